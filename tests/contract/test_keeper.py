"""The keeper against real processes: whatever ends first, nothing of the program stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import psutil
import pytest

from dstack_sched.adapters.kept_process import KeptProcess
from dstack_sched.errors import MachineError

# A program with a child in a session of its own, which no signal to a process group would reach.
WITH_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
open("/dev/shm/" + sys.argv[2] + "region", "w").write("x")
time.sleep(600)
"""


def wait_for(condition: object, what: str, timeout_s: float = 15.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, f"timed out: {what}"
        time.sleep(0.02)


def pids_in(path: Path) -> list[int]:
    wait_for(lambda: path.exists() and len(path.read_text().split()) == 2, f"{path.name} is written")
    return [int(each) for each in path.read_text().split()]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def prefix() -> str:
    return f"dstack_test_{uuid.uuid4().hex[:8]}_"


def start_with_child(tmp_path: Path, prefix: str) -> tuple[KeptProcess, list[int]]:
    private = tmp_path / "private"
    private.mkdir()
    process = KeptProcess(
        [sys.executable, "-c", WITH_CHILD, str(tmp_path / "pids"), prefix],
        log_path=tmp_path / "log",
        grace_s=5.0,
        shm_prefix=prefix,
        remove=[private],
    )
    return process, pids_in(tmp_path / "pids")


def assert_nothing_left(tmp_path: Path, prefix: str, pids: list[int]) -> None:
    for pid in pids:
        wait_for(lambda pid=pid: gone(pid), f"process {pid} is gone")  # type: ignore[misc]
    wait_for(lambda: not list(Path("/dev/shm").glob(f"{prefix}*")), "shared memory is gone")
    wait_for(lambda: not (tmp_path / "private").exists(), "the private directory is gone")


def test_stop_ends_the_program_and_what_it_started(tmp_path: Path, prefix: str) -> None:
    process, pids = start_with_child(tmp_path, prefix)
    assert process.pid == pids[0]
    process.stop()
    assert_nothing_left(tmp_path, prefix, pids)
    process.stop()  # again: harmless


# It goes on after SIGTERM: its child ends a moment later, it itself not for long.
LINGERS = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def asked(*_):
    time.sleep(0.3)
    if sys.argv[2] == "childless":
        child.kill()
signal.signal(signal.SIGTERM, asked)
open(sys.argv[1], "w").write(f"{child.pid} ready")
until = time.monotonic() + 60
while time.monotonic() < until:
    time.sleep(1)
"""


@pytest.mark.parametrize(("way", "grace_s"), [("childless", 60.0), ("with its child", 1.0)])
def test_a_program_that_lingers_without_children_is_ended(tmp_path: Path, way: str, grace_s: float) -> None:
    """Guards Ctrl-C of serve against the ten seconds that Triton waits for models without processes, and
    those that still answer against an early end."""
    process = KeptProcess(
        [sys.executable, "-c", LINGERS, str(tmp_path / "pids"), way],
        log_path=tmp_path / "log",
        grace_s=grace_s,
        childless_s=0.1,
    )
    wait_for(lambda: (tmp_path / "pids").exists() and "ready" in (tmp_path / "pids").read_text(), "it is up")
    began = time.monotonic()
    assert process.stop() == 128 + signal.SIGKILL
    if way == "with its child":
        assert time.monotonic() - began >= grace_s, "it was not given its time"


def test_kill_9_of_the_parent_takes_the_program_along(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "private").mkdir()
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from dstack_sched.adapters.kept_process import KeptProcess
        KeptProcess([sys.executable, "-c", {WITH_CHILD!r}, {str(tmp_path / "pids")!r}, {prefix!r}],
                    log_path=Path({str(tmp_path / "log")!r}), grace_s=5.0, shm_prefix={prefix!r},
                    remove=[Path({str(tmp_path / "private")!r})])
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script])
    pids = pids_in(tmp_path / "pids")
    parent.kill()
    parent.wait()
    assert_nothing_left(tmp_path, prefix, pids)


def test_kill_9_of_the_keeper_ends_the_program(tmp_path: Path, prefix: str) -> None:
    process, pids = start_with_child(tmp_path, prefix)
    os.kill(process.keeper_pid, signal.SIGKILL)
    try:
        wait_for(lambda: gone(pids[0]), "the program is gone")
    finally:
        os.kill(pids[1], signal.SIGKILL)
        process.stop()
        for region in Path("/dev/shm").glob(f"{prefix}*"):
            region.unlink()


def test_the_program_s_own_end_shows_with_its_status_and_its_log_stays(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    log = private / "log"
    process = KeptProcess(
        [sys.executable, "-c", "import sys; print('last words'); sys.exit(7)"], log_path=log, remove=[private]
    )
    assert process.wait(10) == 7
    assert "last words" in log.read_text()
    process.stop()
    assert not private.exists()


def test_a_program_that_ignores_the_request_is_made_to_end(tmp_path: Path) -> None:
    ignores = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    stubborn = f"{ignores}; print('up', flush=True); time.sleep(600)"
    process = KeptProcess([sys.executable, "-c", stubborn], log_path=tmp_path / "log", grace_s=0.3)
    wait_for(lambda: "up" in (tmp_path / "log").read_text(), "it is up")
    assert process.stop() == 128 + signal.SIGKILL
    assert gone(process.pid)


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="did not start"):
        KeptProcess([str(tmp_path / "nothing")], log_path=tmp_path / "log")
