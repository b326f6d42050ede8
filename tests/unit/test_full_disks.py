"""What is kept on disk when there is no room, who may write at a time, and time stamps that always grow."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from dstack_sched.adapters import decision_log, repository_lock
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.edit_journal import FileEditJournal
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.repository_lock import RepositoryLock
from dstack_sched.errors import InputError, MachineError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    (root / "detect" / "1").mkdir(parents=True)
    (root / "detect" / "1" / "model.onnx").write_bytes(b"onnx")
    return root


# -- the decision log -------------------------------------------------------------------------------------


def test_a_decision_that_cannot_be_written_is_lost_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = FileDecisionLog(tmp_path)
    log.append({"what": "applied", "n": 1})

    def full(*args: object) -> int:
        raise FULL

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(decision_log.os, "write", full)
        for _ in range(5):
            log.append({"what": "kept"})
    assert log.lost == 5
    assert sum("decisions are not kept: No space left" in record.message for record in caplog.records) == 1
    log.append({"what": "applied", "n": 2})
    assert [entry["n"] for entry in log.last(9)] == [1, 2]


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a disk that takes a part of a write: the rest of the log must stay readable."""
    log, write = FileDecisionLog(tmp_path), os.write
    log.append({"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(decision_log.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
        log.append({"n": 2})
    log.append({"n": 3})
    assert [entry["n"] for entry in log.last(9)] == [1, 3]
    assert log.path.read_text() == '{"n":1}\n{"n":3}\n'


# -- the journal ------------------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_written_or_ended_is_one_clear_line(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileEditJournal(tmp_path / "state", root) as journal:

        def full(*args: object, **options: object) -> None:
            raise FULL

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(InputError, match=r"cannot be written \(No space left.*nothing was changed"):
                journal.begin(())
        assert journal.pending() == ()
        journal.begin(())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", full)
            with pytest.raises(InputError, match="the journal cannot be removed"):
                journal.end()
        journal.end()


# -- one at a time ----------------------------------------------------------------------------------------


def test_two_with_other_state_directories_exclude_each_other(tmp_path: Path, root: Path) -> None:
    with (
        FileEditJournal(tmp_path / "one", root),
        pytest.raises(MachineError, match=rf"dstackctl \(pid {os.getpid()}\) is rewriting it; wait"),
        FileEditJournal(tmp_path / "two", root),
    ):
        pass
    with FileEditJournal(tmp_path / "two", root):
        pass


def test_a_lock_is_waited_for(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = RepositoryLock(root, beside=tmp_path / "lock")
    first.__enter__()
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            first.__exit__()

    monkeypatch.setattr(repository_lock.time, "sleep", sleep)
    with RepositoryLock(root, beside=tmp_path / "lock", wait_s=60.0):
        assert len(waits) == 3


def test_where_a_directory_cannot_be_locked_a_file_in_the_state_directory_is(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, which locks only what is open for writing."""
    flock = repository_lock.fcntl.flock

    def as_nfs(descriptor: int, how: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, how)

    monkeypatch.setattr(repository_lock.fcntl, "flock", as_nfs)
    with (
        FileEditJournal(tmp_path / "state", root),
        pytest.raises(MachineError, match="is rewriting it"),
        FileEditJournal(tmp_path / "state", root),
    ):
        pass


def test_a_repository_that_is_gone_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="gone: No such file"),
        RepositoryLock(tmp_path / "gone", beside=tmp_path / "lock"),
    ):
        pass


# -- time stamps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead_s", [0, 86_400])
def test_versions_are_made_newer_whatever_the_clock_says(root: Path, ahead_s: int) -> None:
    """Guards against a load that Triton ignores: files may carry stamps of tomorrow after a clock jump."""
    model, version = root / "detect" / "1" / "model.onnx", root / "detect" / "1"
    stamp_ns = model.stat().st_mtime_ns + ahead_s * 10**9
    os.utime(model, ns=(stamp_ns, stamp_ns))
    for _ in range(3):
        before_ns = max(stamp_ns, version.stat().st_mtime_ns)
        DiskRepository(root).make_newer("detect")
        assert version.stat().st_mtime_ns > before_ns
    assert model.stat().st_mtime_ns == stamp_ns and model.read_bytes() == b"onnx"


def test_a_version_that_is_another_users_gets_the_time_now(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (root / "detect" / "1", root / "detect" / "1" / "model.onnx"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    utime, asked = os.utime, []

    def not_the_owner(path: Path, ns: tuple[int, int] | None = None) -> None:
        asked.append(ns)
        if ns is not None:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        utime(path)

    monkeypatch.setattr("os.utime", not_the_owner)
    before_ns = (root / "detect" / "1").stat().st_mtime_ns
    DiskRepository(root).make_newer("detect")
    assert asked[1] is None and (root / "detect" / "1").stat().st_mtime_ns > before_ns


def test_a_model_without_versions_cannot_be_made_newer(root: Path) -> None:
    (root / "bare").mkdir()
    with pytest.raises(InputError, match="has no version directory"):
        DiskRepository(root).make_newer("bare")
