"""The arbiter as our child: one a host, another's is used and left alone, a dead one is seen and replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dstack_sched.adapters.arbiter_process import ArbiterProcess
from dstack_sched.adapters.logs import LogOptions
from dstack_sched.errors import MachineError


def test_own_another_s_and_a_dead_one(tmp_path: Path) -> None:
    socket = tmp_path / "arbiter.sock"
    first = ArbiterProcess(socket, tmp_path / "first.log")
    second = ArbiterProcess(socket, tmp_path / "second.log")
    try:
        assert not first.answers()
        first.start()
        assert first.answers() and first.pid is not None and first.failure() is None

        second.start()
        assert second.pid is None and second.failure() is None, "it uses the first one's"
        second.stop()
        assert first.answers(), "and leaves it alone"

        os.kill(first.pid, signal.SIGKILL)
        assert first._process is not None
        first._process.wait(10)
        assert first.failure() == "ended with status 137"
        assert second.failure() == "answers no more"
        second.start()
        assert second.pid is not None and second.answers()
    finally:
        first.stop()
        second.stop()
    assert not second.answers() and not socket.exists()


@pytest.mark.parametrize("log", [None, LogOptions("json")])
def test_one_that_does_not_start_says_why(tmp_path: Path, log: LogOptions | None) -> None:
    process = ArbiterProcess(tmp_path / "a.sock", tmp_path / "log", policy="no-such-policy", log=log)
    with pytest.raises(MachineError, match=r"^the arbiter did not start: [^{]*no-such-policy"):
        process.start()
    assert process.pid is None
