"""Where Triton is on this machine, and whether its Python backend fits the running Python."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import dstack_backend
from dstack_sched.errors import InputError, MachineError

SYSTEM_INSTALL = Path("/opt/tritonserver")
STUB = "triton_python_backend_stub"
LIBPYTHON = re.compile(rb"libpython3(?:-[0-9a-f]+)?\.(\d+)\.so[.\d]*")
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class ServerInstall:
    """One Triton: its binary, its backends, the stub for the running Python, where its libraries lie.

    `library_dirs` go onto LD_LIBRARY_PATH, the directory of the stub's libpython among them.
    """

    binary: Path
    backends: Path
    stub: Path
    libpython: Path
    library_dirs: tuple[Path, ...]


def find_server(path: Path | None = None) -> ServerInstall:
    """The Triton at `path` (a directory or its binary), else in /opt/tritonserver, else of the wheel.

    Errors: MachineError when there is none, or its Python backend cannot run this Python.
    """
    binary = find_binary(path)
    root = binary.parent.parent
    backends = root / "backends"
    if not (backends / "python" / "libtriton_python.so").exists():
        raise MachineError(
            f"{root}: this Triton has no Python backend ({backends}/python); install one that has"
        )
    wheel_libraries = root.parent.parent / "nvidia_pytriton.libs"
    own = tuple(each for each in (root / "lib", wheel_libraries) if each.is_dir())
    stub = find_stub(root)
    libpython = find_libpython(stub, own)
    library_dirs = list(own)
    if libpython.parent not in own and not is_system_library_dir(libpython.parent):
        library_dirs.append(libpython.parent)
    return ServerInstall(binary, backends, stub, libpython, tuple(library_dirs))


def find_binary(path: Path | None) -> Path:
    """The tritonserver binary. Errors: MachineError."""
    if path is not None:
        for candidate in (path, path / "bin" / "tritonserver", path / "tritonserver"):
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate.resolve()
        raise MachineError(f"--tritonserver {path}: no Triton there; give its directory or its binary")
    found = SYSTEM_INSTALL / "bin" / "tritonserver"
    if found.is_file():
        return found
    spec = importlib.util.find_spec("pytriton")  # found, never imported: it pulls in gevent and more
    if spec is not None and spec.origin is not None:
        found = Path(spec.origin).parent / "tritonserver" / "bin" / "tritonserver"
        if found.is_file():
            return found
    raise MachineError(
        f"no Triton server: none in {SYSTEM_INSTALL} and no nvidia-pytriton wheel; give --tritonserver PATH"
        f" or run: {sys.executable} -m pip install --no-deps nvidia-pytriton==0.7.0"
    )


def find_stub(root: Path) -> Path:
    """The Python backend's stub for the running Python below one Triton. Errors: MachineError."""
    versioned = root / "python_backend_stubs"
    if versioned.is_dir():
        stub = versioned / RUNNING / STUB
        if not stub.is_file():
            have = sorted((each.name for each in versioned.iterdir()), key=lambda v: int(v.partition(".")[2]))
            raise MachineError(
                f"{root}: no Python backend stub for Python {RUNNING}, only for {', '.join(have)};"
                " make the environment with one of those"
            )
        return stub
    stub = root / "backends" / "python" / STUB
    if not stub.is_file():
        raise MachineError(f"{stub.parent}: the Python backend's stub is missing; reinstall Triton")
    version = stub_python(stub)[1]
    if version != RUNNING:
        raise MachineError(
            f"{stub}: built for Python {version}, this is Python {RUNNING};"
            f" run dstackctl with Python {version} (make PYTHON=python{version} setup)"
        )
    return stub


def stub_python(stub: Path) -> tuple[str, str]:
    """File name and version of the libpython that a stub loads, as its dynamic section names it.

    A wheel's stub may hold two names: where it brings a copy, with a hash in its name, it loads that one.
    """
    matches = sorted(LIBPYTHON.finditer(stub.read_bytes()), key=lambda match: b"-" not in match.group(0))
    if not matches:
        raise MachineError(f"{stub}: not a Python backend stub (names no libpython); reinstall Triton")
    return matches[0].group(0).decode(), f"3.{matches[0].group(1).decode()}"


def find_libpython(stub: Path, own_dirs: tuple[Path, ...] = ()) -> Path:
    """The libpython that a stub will load. Errors: MachineError with the package to install."""
    name, version = stub_python(stub)
    for directory in (*own_dirs, *library_search_dirs()):
        if (directory / name).exists():
            return directory / name
    if sys.base_prefix == "/usr":
        mend = f"run apt-get install libpython{version}"
    else:
        mend = f"use a Python {version} built with --enable-shared ({sys.base_prefix} has only the program)"
    raise MachineError(f"{name} is missing, Triton's Python backend needs it; {mend}")


def library_search_dirs() -> list[Path]:
    """Directories that may hold the running Python's shared library, most likely first."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    named = [
        sysconfig.get_config_var("LIBDIR"),
        f"{sys.base_prefix}/lib",
        f"/usr/lib/{multiarch}",
        f"/lib/{multiarch}",
        "/usr/local/lib",
        "/usr/lib64",
        "/usr/lib",
        *os.environ.get("LD_LIBRARY_PATH", "").split(":"),
    ]
    return list(dict.fromkeys(Path(each) for each in named if each))


def is_system_library_dir(directory: Path) -> bool:
    """Whether the loader looks there anyway; named again, it would come before a program's own libraries."""
    return directory.parts[:2] in (("/", "lib"), ("/", "lib64")) or directory.parts[:3] in (
        ("/", "usr", "lib"),
        ("/", "usr", "lib64"),
    )


def backend_parts() -> dict[str, Path]:
    """What makes up the backend `dstack`, by name inside its directory. Errors: MachineError."""
    package = Path(dstack_backend.__file__).parent
    for model in (package.parent / "model.py", Path(sys.prefix) / "share" / "dstack" / "model.py"):
        if model.is_file():
            return {"model.py": model, package.name: package}
    raise MachineError(
        f"{package.parent}/model.py is missing: install dstack-triton again from a complete checkout"
    )


def install_backend(backends: Path, *, link: bool = False) -> Path:
    """Put the backend `dstack` into Triton's backend directory; returns <backends>/dstack.

    A dstack backend that is there is replaced; anything else of that name is an InputError.
    """
    target = backends / "dstack"
    if not backends.is_dir():
        raise InputError(
            f"{backends} is not a directory; give Triton's backend directory (--backend-directory)"
        )
    if target.is_symlink() or target.exists():
        if not (target / "dstack_backend").exists():
            raise InputError(f"{target} is there and is not this backend; move it away first")
        remove(target)
    try:
        target.mkdir()
        for name, source in backend_parts().items():
            place(source, target / name, link=link)
    except OSError as error:
        raise InputError(
            f"{error.filename or target}: {error.strerror}; choose a writable directory"
        ) from error
    return target


def remove(path: Path) -> None:
    """A link, or a directory with all in it."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def place(source: Path, target: Path, *, link: bool) -> None:
    if link:
        target.symlink_to(source.resolve())
    elif source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy2(source, target)


def build_backend_dir(install: ServerInstall, directory: Path) -> Path:
    """A private backend directory: every backend of the install, our stub, and `dstack`, all as links.

    But for libraries of the Python backend: Triton refuses one whose real path is elsewhere.
    """
    directory.mkdir(parents=True)
    for backend in install.backends.iterdir():
        if backend.is_dir() and backend.name not in ("python", "dstack"):
            (directory / backend.name).symlink_to(backend.resolve())
    python = directory / "python"
    python.mkdir()
    for part in (install.backends / "python").iterdir():
        if part.suffix == ".so":
            shutil.copy2(part, python / part.name)
        elif part.name not in (STUB, "__pycache__"):
            (python / part.name).symlink_to(part.resolve())
    (python / STUB).symlink_to(install.stub.resolve())
    install_backend(directory, link=True)
    return directory


def server_environment(install: ServerInstall, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment in which Triton finds its libraries and its stub finds our Python packages.

    The stub takes its site-packages from the first `python3` on PATH, so that is ours.
    """
    bin_dir = Path(sys.executable).parent
    if not (bin_dir / "python3").exists():
        raise MachineError(f"{bin_dir} has no python3, Triton's stub looks for it there; use a venv")
    site = Path(sysconfig.get_paths()["purelib"])
    libraries = [*install.library_dirs, *sorted(site.glob("nvidia/*/lib"))]
    env = dict(environ)
    before = [each for each in env.get("LD_LIBRARY_PATH", "").split(":") if each]
    env["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys([*map(str, libraries), *before]))
    env["PATH"] = f"{bin_dir}:{env.get('PATH', os.defpath)}"
    return env
