"""A Triton whose own CUDA context is lost: it answers, and from some load on it can load nothing more.

Triton has a context of its own, in which it makes a stream for each GPU instance. It dies with the MPS
server as those of the backends do, but nobody notices for a while: the driver has some streams in reserve.
Seen on an H100: seven loads after a killed MPS daemon went well, then none did. Only a new process helps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from dstack_sched.domain.fault import NO_STREAM, Fault, FaultKind

# Triton's own words, before it asks a backend for anything.
LOST = re.compile(
    r"^E\d{4} [\d:.]+ (?P<pid>\d+) \S+\] .*Failed to create instance: " + NO_STREAM + r"(?P<why>[^\"\n]+)",
    re.MULTILINE,
)
SERVER = "triton"


class ServerGpuGuard:
    """health.Guard of a Triton of ours. log: what Triton has logged since the last call. pid: its process.
    end: tell it to end, in order; whoever looks after it starts it again, and the loaded guard its models.
    """

    kind = FaultKind.SERVER_WITHOUT_GPU

    def __init__(self, log: Callable[[], str], pid: Callable[[], int], end: Callable[[], None]) -> None:
        self._log, self._pid, self._end = log, pid, end
        self._lost: tuple[int, str, int] | None = None  # process, why, since when

    def look(self, now_us: int) -> Iterator[Fault]:
        for found in LOST.finditer(self._log()):
            if self._lost is None or self._lost[0] != int(found["pid"]):
                self._lost = int(found["pid"]), found["why"], now_us
        if self._lost is not None and self._lost[0] == self._pid():
            _, why, since_us = self._lost
            yield Fault(self.kind, SERVER, since_us, f"its CUDA context is lost ({why}): it can load nothing")

    def mend(self, fault: Fault) -> str:
        self._end()
        return "told to end; it is started again, with all that it served"
