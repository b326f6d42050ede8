"""The repository on disk: atomic writes, time stamps that grow, one clear line for what cannot be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dstack_sched.adapters import repository as module
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.errors import InputError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    (root / "detect" / "1").mkdir(parents=True)
    (root / "detect" / "config.pbtxt").write_text('backend: "dstack"\n')
    (root / "minimal" / "1").mkdir(parents=True)
    (root / "notes").mkdir()
    (root / "README.md").write_text("not a model")
    return root


def test_models_are_directories_with_a_config_or_a_version(root: Path) -> None:
    repository = DiskRepository(root)
    assert repository.models() == ("detect", "minimal")
    assert repository.read_config("minimal") is None
    assert repository.config("minimal").backend == ""


def test_a_missing_empty_or_wrong_repository_is_one_clear_line(tmp_path: Path, root: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        DiskRepository(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a directory"):
        DiskRepository(root / "README.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no model"):
        DiskRepository(tmp_path / "empty").models()
    for name in ("ghost", "../models/detect", ""):
        with pytest.raises(InputError, match="it has detect, minimal"):
            DiskRepository(root).read_config(name)


def test_a_write_is_newer_whatever_the_clock_says(root: Path) -> None:
    """Guards against a reload that Triton ignores because the time stamp did not grow."""
    repository, path = DiskRepository(root), root / "detect" / "config.pbtxt"
    future_ns = path.stat().st_mtime_ns + 3600 * 10**9
    os.utime(path, ns=(future_ns, future_ns))
    repository.write_config("detect", "# a\n")
    assert path.stat().st_mtime_ns > future_ns
    stamp_ns = path.stat().st_mtime_ns
    repository.write_config("detect", "# b\n")
    assert path.stat().st_mtime_ns > stamp_ns


def test_mode_and_bytes_are_kept(root: Path) -> None:
    repository, path = DiskRepository(root), root / "detect" / "config.pbtxt"
    path.write_bytes(b'# caf\xe9\r\nbackend: "dstack"\r\n')
    path.chmod(0o640)
    text = repository.read_config("detect")
    repository.write_config("detect", "# other\n")
    repository.write_config("detect", text)
    assert path.read_bytes() == b'# caf\xe9\r\nbackend: "dstack"\r\n'
    assert path.stat().st_mode & 0o777 == 0o640


def test_writing_none_removes_the_file(root: Path) -> None:
    repository = DiskRepository(root)
    repository.write_config("minimal", "# a\n")
    repository.write_config("minimal", None)
    assert not (root / "minimal" / "config.pbtxt").exists()


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "mount it read-write"), (errno.EIO, "")],
)
def test_a_write_that_fails_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, mend: str
) -> None:
    repository, before = DiskRepository(root), sorted(root.rglob("*"))

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(InputError) as caught:
        repository.write_config("detect", "# new\n")
    assert "cannot be written, the file is as it was" in str(caught.value)
    assert str(caught.value).endswith(mend)
    assert "\n" not in str(caught.value)
    assert (root / "detect" / "config.pbtxt").read_text() == 'backend: "dstack"\n'
    assert sorted(root.rglob("*")) == before, "no temporary file may stay"


def test_the_temporary_file_is_never_inside_the_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    replace = Path.replace

    def watch(self: Path, target: Path) -> Path:
        seen.append(self)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    DiskRepository(root).write_config("detect", "# new\n")
    assert [path.parent for path in seen] == [root]


def test_a_linked_config_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "shared.pbtxt").write_text("")
    (root / "minimal" / "config.pbtxt").symlink_to(tmp_path / "shared.pbtxt")
    with pytest.raises(InputError, match="is a link to"):
        DiskRepository(root).write_config("minimal", "# a\n")


def test_not_writable_is_said_before_anything_is_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "access", lambda path, mode: Path(path) != root)
    with pytest.raises(InputError, match="is not writable; nothing was changed"):
        DiskRepository(root).check_writable("detect")


def test_sweep_removes_what_a_killed_controller_left(root: Path) -> None:
    (root / ".dstack-detect-123.tmp").write_text("half")
    DiskRepository(root).sweep()
    assert not (root / ".dstack-detect-123.tmp").exists()
    assert (root / "README.md").exists()


def test_a_huge_file_is_no_config(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONFIG_BYTES", 10)
    with pytest.raises(InputError, match="larger than 10 bytes"):
        DiskRepository(root).read_config("detect")
