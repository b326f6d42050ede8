"""Keep services up: started in order, a dead one restarted where that is safe, all stopped in reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dstack_sched.app.backoff import Backoff, BackoffSettings
from dstack_sched.errors import DstackError, MachineError
from dstack_sched.ports import Clock

ALWAYS = BackoffSettings()
A_FEW_TIMES = BackoffSettings(first_s=1.0, tries=5)
NEVER = BackoffSettings(tries=0)


class Service(Protocol):
    """Something that runs beside us. `failure` is None while it runs, else one line that says why not."""

    @property
    def name(self) -> str: ...
    def start(self) -> object: ...
    def failure(self) -> str | None: ...
    def stop(self) -> None: ...


@dataclass
class Watched:
    """One service and what is known of its restarts."""

    service: Service
    restarts: Backoff
    started_at_us: int = 0


class Supervisor:
    """`start`, then `check` again and again, then `stop`. `report` is told what happens, one line each."""

    def __init__(
        self,
        services: Sequence[tuple[Service, BackoffSettings]],
        clock: Clock,
        report: Callable[[str], None],
        restarted: Callable[[str], None] = lambda name: None,
    ) -> None:
        """services: (service, how it may be restarted by itself), in the order of starting. restarted is told
        the name of each that was started again."""
        self._watched = [Watched(service, Backoff(settings)) for service, settings in services]
        self._started: list[Watched] = []
        self._clock = clock
        self._report = report
        self._restarted = restarted

    def start(self) -> None:
        """Start all, in order; what was started is stopped again when one fails."""
        try:
            for each in self._watched:
                self._started.append(each)
                each.service.start()
                each.started_at_us = self._clock.now_us()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Look after each once. Errors: MachineError when one is down that may not be restarted any more."""
        for each in self._started:
            why = each.service.failure()
            now_us = self._clock.now_us()
            if why is None:
                each.restarts.well_since(each.started_at_us, now_us)
            elif each.restarts.spent:
                tried = f"; {each.restarts.tries} restarts did not help" if each.restarts.tries else ""
                raise MachineError(f"{each.service.name} {why}{tried}")
            elif each.restarts.due(now_us):
                self._restart(each, why, now_us)

    def _restart(self, each: Watched, why: str, now_us: int) -> None:
        each.restarts.tried(now_us)
        self._report(f"{each.service.name} {why}; starting it again")
        try:
            each.service.start()
            each.started_at_us = self._clock.now_us()
            self._restarted(each.service.name)
        except DstackError as error:
            self._report(f"{error}; next try in {each.restarts.wait_s:g} s")

    def stop(self) -> None:
        """Stop all that was started, last first; one that fails to stop does not keep the others up."""
        while self._started:
            each = self._started.pop()
            try:
                each.service.stop()
            except DstackError as error:
                self._report(f"{each.service.name} did not stop in order: {error}")
