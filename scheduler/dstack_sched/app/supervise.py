"""Keep services up: started in order, a dead one restarted where that is safe, all stopped in reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dstack_sched.errors import DstackError, MachineError
from dstack_sched.ports import Clock

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0


class Service(Protocol):
    """Something that runs beside us. `failure` is None while it runs, else one line that says why not."""

    @property
    def name(self) -> str: ...
    def start(self) -> object: ...
    def failure(self) -> str | None: ...
    def stop(self) -> None: ...


@dataclass
class Watched:
    """One service and what is known of its restarts. Times in seconds, backoff 0 after a healthy minute."""

    service: Service
    restartable: bool
    backoff_s: float = 0.0
    started_at_s: float = 0.0
    retry_at_s: float = 0.0


class Supervisor:
    """`start`, then `check` again and again, then `stop`. `report` is told what happens, one line each."""

    def __init__(
        self,
        services: Sequence[tuple[Service, bool]],
        clock: Clock,
        report: Callable[[str], None],
    ) -> None:
        """services: (service, whether it may be restarted by itself), in the order of starting."""
        self._watched = [Watched(service, restartable) for service, restartable in services]
        self._started: list[Watched] = []
        self._clock = clock
        self._report = report

    def start(self) -> None:
        """Start all, in order; what was started is stopped again when one fails."""
        try:
            for each in self._watched:
                self._started.append(each)
                each.service.start()
                each.started_at_s = self._now_s()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Look after each once. Errors: MachineError when one that cannot be restarted is down."""
        now_s = self._now_s()
        for each in self._started:
            why = each.service.failure()
            if why is None:
                if each.backoff_s and now_s - each.started_at_s > HEALTHY_AFTER_S:
                    each.backoff_s = 0.0
                continue
            if not each.restartable:
                raise MachineError(f"{each.service.name} {why}")
            if now_s >= each.retry_at_s:
                self._restart(each, why, now_s)

    def _restart(self, each: Watched, why: str, now_s: float) -> None:
        each.backoff_s = min(LAST_BACKOFF_S, each.backoff_s * 2 or FIRST_BACKOFF_S)
        each.retry_at_s = now_s + each.backoff_s
        self._report(f"{each.service.name} {why}; starting it again")
        try:
            each.service.start()
            each.started_at_s = self._now_s()
        except DstackError as error:
            self._report(f"{error}; next try in {each.backoff_s:g} s")

    def stop(self) -> None:
        """Stop all that was started, last first; one that fails to stop does not keep the others up."""
        while self._started:
            each = self._started.pop()
            try:
                each.service.stop()
            except DstackError as error:
                self._report(f"{each.service.name} did not stop in order: {error}")

    def _now_s(self) -> float:
        return self._clock.now_us() / 1e6
