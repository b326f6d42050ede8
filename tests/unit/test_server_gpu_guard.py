"""A Triton that lost its own CUDA context, by what it logged on an H100."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstack_sched.adapters.logs import NewText, bound
from dstack_sched.app.server_gpu_guard import ServerGpuGuard

MPS = "the remote procedural call between the MPS server and the MPS client failed"


def failed(why: str, pid: int = 7, words: str = "unable to create stream: ") -> str:
    prefix = f"E1123 03:09:47.837621 {pid} backend_model.cc:692]"
    return f'{prefix} "ERROR: Failed to create instance: {words}{why}"\n'


class Triton:
    """Its log, its process, and how often it was told to end."""

    def __init__(self, path: Path) -> None:
        self.path, self.pid, self.ended = path, 7, 0
        path.write_text(failed(MPS))  # of an earlier run: not looked at
        self.guard = ServerGpuGuard(NewText(path), lambda: self.pid, self.end)

    def end(self) -> None:
        self.ended += 1

    def logs(self, text: str) -> None:
        with self.path.open("a") as log:
            log.write(text)

    def faults(self, now_us: int = 1) -> list[str]:
        return [fault.detail for fault in self.guard.look(now_us)]


@pytest.fixture
def triton(tmp_path: Path) -> Triton:
    return Triton(tmp_path / "triton.log")


def test_it_is_told_to_end_and_the_next_one_is_well(triton: Triton) -> None:
    assert triton.faults() == []
    triton.logs("I1123 something else\n" + failed(MPS))
    (fault,) = triton.guard.look(5)
    assert MPS in fault.detail and fault.since_us == 5
    assert "started again" in triton.guard.mend(fault) and triton.ended == 1
    triton.logs(failed(MPS))
    assert len(triton.faults()) == 1, "still the same process"
    triton.pid = 8
    triton.logs(failed(MPS, pid=7))
    assert triton.faults() == [], "the last words of the old one"
    triton.logs(failed(MPS, pid=8))
    assert len(triton.faults()) == 1


@pytest.mark.parametrize(
    "line",
    [
        failed("out of memory"),
        failed(MPS, words="TritonModelException: unable to create stream: "),  # a backend's words
        failed(MPS).rstrip("\n"),  # not a whole line yet
    ],
)
def test_what_is_no_lost_context(triton: Triton, line: str) -> None:
    triton.logs(line)
    assert triton.faults() == []


def test_a_line_in_two_pieces_and_a_log_that_was_shortened(triton: Triton) -> None:
    line = failed(MPS)
    triton.logs(line[:40])
    assert triton.faults() == []
    triton.logs(line[40:])
    assert len(triton.faults()) == 1
    triton.pid = 9
    bound([triton.path], limit_bytes=10)
    triton.logs(failed(MPS, pid=9))
    assert len(triton.faults()) == 1
    triton.path.unlink()
    assert len(triton.faults()) == 1, "as before: nothing new is known"
