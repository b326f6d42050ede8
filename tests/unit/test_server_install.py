"""Finding a Triton, a stub that fits, a libpython: on directory trees made for the test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dstack_sched.adapters import server_install
from dstack_sched.adapters.server_install import (
    RUNNING,
    STUB,
    build_backend_dir,
    find_binary,
    find_libpython,
    find_server,
    find_stub,
    install_backend,
    server_environment,
)
from dstack_sched.errors import InputError, MachineError

SONAME = f"libpython{RUNNING}.so.1.0"


def make_install(root: Path, soname: str = SONAME) -> Path:
    """A Triton as in NVIDIA's containers: bin, backends, lib."""
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tritonserver").touch(mode=0o755)
    python = root / "backends" / "python"
    python.mkdir(parents=True)
    (python / "libtriton_python.so").touch()
    (python / "triton_python_backend_utils.py").touch()
    (python / STUB).write_bytes(b"\x7fELF...\0" + soname.encode() + b"\0...")
    (root / "backends" / "onnxruntime").mkdir()
    (root / "lib").mkdir()
    (root / "lib" / soname).touch()
    return root


def test_a_directory_or_its_binary_will_do(tmp_path: Path) -> None:
    root = make_install(tmp_path / "triton")
    for given in (root, root / "bin", root / "bin" / "tritonserver"):
        assert find_binary(given) == root / "bin" / "tritonserver"
    install = find_server(root)
    assert install.backends == root / "backends"
    assert install.libpython == root / "lib" / SONAME
    assert install.library_dirs == (root / "lib",)


def test_nothing_there_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"--tritonserver /\S+: no Triton there; give"):
        find_server(tmp_path)


def test_no_server_at_all_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_install, "SYSTEM_INSTALL", tmp_path / "none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MachineError, match=r"no Triton server.*--tritonserver PATH.*nvidia-pytriton==0\.7\.0"
    ):
        find_server()


def test_the_system_install_comes_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_install(tmp_path / "opt")
    monkeypatch.setattr(server_install, "SYSTEM_INSTALL", root)
    assert find_server().binary == root / "bin" / "tritonserver"


def test_a_stub_of_another_python_is_refused(tmp_path: Path) -> None:
    root = make_install(tmp_path / "triton", "libpython3.7.so.1.0")
    with pytest.raises(
        MachineError, match=rf"built for Python 3\.7, this is Python {RUNNING}; run dstackctl with"
    ):
        find_server(root)


def test_versioned_stubs_name_those_there_are(tmp_path: Path) -> None:
    for version in ("3.9", "3.10", "3.8"):
        (tmp_path / "python_backend_stubs" / f"{version}").mkdir(parents=True)
    (tmp_path / "python_backend_stubs" / RUNNING).rmdir() if RUNNING == "3.10" else None
    with pytest.raises(
        MachineError, match=rf"no Python backend stub for Python {RUNNING}, only for 3\.8, 3\.9"
    ):
        find_stub(tmp_path)


def test_a_missing_libpython_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / STUB
    stub.write_bytes(b"libpython3.99.so.1.0")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    with pytest.raises(
        MachineError, match=r"libpython3\.99\.so\.1\.0 is missing.*apt-get install libpython3\.99"
    ):
        find_libpython(stub)
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    with pytest.raises(MachineError, match="--enable-shared"):
        find_libpython(stub)


def test_a_file_that_is_no_stub_is_refused(tmp_path: Path) -> None:
    stub = tmp_path / STUB
    stub.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(MachineError, match="not a Python backend stub"):
        find_libpython(stub)


def test_the_wheel_s_own_libpython_counts(tmp_path: Path) -> None:
    """The wheel's stub for 3.13 names a copy with a hash in its name."""
    stub = tmp_path / STUB
    stub.write_bytes(b"..libpython3.13.so.1.0\0..libpython3-419a3a08.13.so.1.0\0..")
    (tmp_path / "libpython3-419a3a08.13.so.1.0").touch()
    assert find_libpython(stub, (tmp_path,)).name == "libpython3-419a3a08.13.so.1.0"


def test_private_backend_directory_has_all_backends_and_ours(tmp_path: Path) -> None:
    install = find_server(make_install(tmp_path / "triton"))
    directory = build_backend_dir(install, tmp_path / "private" / "backends")
    assert (directory / "onnxruntime").resolve() == install.backends / "onnxruntime"
    assert (directory / "python" / STUB).resolve() == install.stub
    assert (directory / "python" / "libtriton_python.so").exists()
    assert (directory / "dstack" / "model.py").is_file()
    assert (directory / "dstack" / "dstack_backend" / "wire.py").is_file()


def test_install_copies_replaces_ours_and_refuses_others(tmp_path: Path) -> None:
    target = install_backend(tmp_path)
    assert (target / "model.py").is_file() and not (target / "model.py").is_symlink()
    assert not list(target.rglob("__pycache__"))
    (target / "stale.txt").touch()
    assert install_backend(tmp_path, link=True) == target
    assert (target / "model.py").is_symlink() and not (target / "stale.txt").exists()

    other = tmp_path / "other"
    (other / "dstack").mkdir(parents=True)
    with pytest.raises(InputError, match="is there and is not this backend; move it away first"):
        install_backend(other)
    with pytest.raises(InputError, match="is not a directory"):
        install_backend(tmp_path / "none")


def test_environment_puts_our_python_and_libraries_first(tmp_path: Path) -> None:
    install = find_server(make_install(tmp_path / "triton"))
    env = server_environment(install, {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/mine", "KEEP": "1"})
    assert env["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin"]
    assert env["LD_LIBRARY_PATH"].split(":")[0] == str(tmp_path / "triton" / "lib")
    assert env["LD_LIBRARY_PATH"].split(":")[-1] == "/mine"
    assert env["KEEP"] == "1"
