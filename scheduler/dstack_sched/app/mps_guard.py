"""MPS as seen from the processes that depend on it: a dead daemon, a dead server, a server in FAULT.

A CUDA context does not outlive its MPS server. A backend whose context broke notices at its next run or look
at the device, fails what it has with an error and ends. This guard is for those that cannot notice because
they hang in the driver: once their server is gone, they get GRACE_S to end themselves and are then ended. A
server in FAULT takes no new client before the last of its old ones has ended, so there too. Loading
the models again is the stub guard's work; starting our own daemon again is the supervisor's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dstack_sched.domain.fault import Fault, FaultKind
from dstack_sched.domain.mps import FAULT, MpsServer
from dstack_sched.ports import StubProcesses

GRACE_S = 2.0
FAULT_GRACE_S = 5.0  # clients that are not stopped by the fault may finish what they run
ASK_EVERY_S = 2.0  # asking starts NVIDIA's control program, three times
DAEMON = "MPS daemon"
CLIENTS = "MPS clients"


@dataclass(slots=True)
class Seen:
    """One MPS server as it was seen last. gone_since_us, fault_since_us: 0 while it is not so."""

    clients: frozenset[int]
    gone_since_us: int = 0
    fault_since_us: int = 0


@dataclass(slots=True)
class MpsGuard:
    """health.Guard over the daemon in use. Says nothing before a daemon has answered once.

    servers: those of the daemon, None when it does not answer.
    """

    servers: Callable[[], tuple[MpsServer, ...] | None]
    stubs: StubProcesses
    kind: FaultKind = FaultKind.MPS_DEAD
    ask_every_s: float = ASK_EVERY_S
    _servers: dict[int, Seen] = field(default_factory=dict)
    _answered: bool = False
    _away_since_us: int = 0
    _asked_us: int | None = None
    _hung: frozenset[int] = frozenset()

    def look(self, now_us: int) -> list[Fault]:
        if self._asked_us is None or now_us - self._asked_us >= self.ask_every_s * 1e6:
            self._asked_us = now_us
            self._ask(now_us)
        faults = []
        if self._away_since_us:
            faults.append(
                Fault(
                    self.kind,
                    DAEMON,
                    self._away_since_us,
                    "does not answer; new processes run without shares",
                )
            )
        hung = self._outliving(now_us)
        self._hung = frozenset(hung)
        if hung:
            why = f"{len(hung)} backends hang without their MPS server"
            faults.append(Fault(self.kind, CLIENTS, min(hung.values()), why))
        return faults

    def mend(self, fault: Fault) -> str | None:
        """End the backends that hang. The daemon itself is not ours to start here."""
        if fault.subject != CLIENTS:
            return None
        self.stubs.kill(self._hung)
        return f"ended {len(self._hung)} backends that hung without their MPS server"

    def _ask(self, now_us: int) -> None:
        servers = self.servers()
        if servers is None:
            if self._answered and not self._away_since_us:
                self._away_since_us = now_us
        else:
            self._answered, self._away_since_us = True, 0
        present = {server.pid: server for server in servers or ()}
        for pid, seen in self._servers.items():
            if pid not in present and not seen.gone_since_us and not self.stubs.alive(frozenset({pid})):
                seen.gone_since_us = now_us
        for pid, server in present.items():
            seen = self._servers.setdefault(pid, Seen(frozenset()))
            clients = frozenset(client.pid for client in server.clients)
            # In FAULT the list shrinks before the processes have ended.
            seen.clients = seen.clients | clients if server.status == FAULT else clients
            seen.fault_since_us = (seen.fault_since_us or now_us) if server.status == FAULT else 0
        ours = self.stubs.all_pids()
        self._servers = {
            pid: seen for pid, seen in self._servers.items() if not seen.gone_since_us or seen.clients & ours
        }

    def _outliving(self, now_us: int) -> dict[int, int]:
        """Our processes that are there although their server is not, beyond the grace -> since when."""
        found: dict[int, int] = {}
        for seen in self._servers.values():
            for since_us, grace_s in ((seen.gone_since_us, GRACE_S), (seen.fault_since_us, FAULT_GRACE_S)):
                if since_us and now_us - since_us >= grace_s * 1e6:
                    found |= dict.fromkeys(seen.clients, since_us)
        ours = self.stubs.all_pids() if found else frozenset()
        return {pid: since_us for pid, since_us in found.items() if pid in ours}
