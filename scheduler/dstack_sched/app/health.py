"""Staying up: what is wrong is found, mended where that is possible, logged with its reason, and counted.

Each guard looks for one kind of fault and knows how to mend it. `Health` decides when: a fault must last a
moment before it is believed, tries to mend it back off, and a guard that does not get anywhere gives up with
one clear line, while everything else goes on. `dstackctl serve` and `dstackctl run` both use it: they may
look after the same Triton, and `alone` keeps them from mending the same thing at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from dstack_sched.app.backoff import Backoff, BackoffSettings
from dstack_sched.app.telemetry import HealthTelemetry
from dstack_sched.domain.fault import Fault, FaultKind
from dstack_sched.errors import DstackError
from dstack_sched.ports import Clock, DecisionLog

SIX_TRIES = BackoffSettings(first_s=1.0, last_s=60.0, tries=6)


class Guard(Protocol):
    """Looks for one kind of fault."""

    kind: FaultKind

    def look(self, now_us: int) -> Iterable[Fault]:
        """All that is wrong now. Errors: DstackError where that cannot be told just now."""
        ...

    def mend(self, fault: Fault) -> str | None:
        """Mend it; says what was done in one line. None: nobody here can, it is only reported.

        Returning is no proof: the next look is. Errors: DstackError with why it did not work.
        """
        ...


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """confirm_s: a fault is believed once it was seen for so long. backoff: between tries to mend it."""

    confirm_s: float = 0.5
    backoff: BackoffSettings = SIX_TRIES


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a try to mend: what was done, or why it did not work; neither where nobody here can."""

    done: str | None = None
    error: str | None = None


@dataclass(slots=True)
class Case:
    """The history of one fault. well_since_us: None while it is there."""

    fault: Fault
    tries: Backoff
    believed: bool = False
    mendable: bool = True
    given_up: bool = False
    well_since_us: int | None = None

    @property
    def there(self) -> bool:
        return self.believed and self.well_since_us is None


class Health:
    """`check` again and again, from one thread. Never raises a DstackError.

    alone: entered around all mending of a check; MachineError where somebody else is at it, then nothing is
    mended this time. each: how the mends of one check are run, `map` or a pool's.
    """

    def __init__(
        self,
        guards: Iterable[Guard],
        clock: Clock,
        log: DecisionLog,
        telemetry: HealthTelemetry,
        *,
        settings: HealthSettings | None = None,
        alone: Callable[[], AbstractContextManager[object]] = nullcontext,
        each: Callable[[Callable[[Case], Outcome], Iterable[Case]], Iterable[Outcome]] = map,
    ) -> None:
        self._guards = tuple(guards)
        self._clock = clock
        self._log = log
        self._telemetry = telemetry
        self._settings = settings or HealthSettings()
        self._alone = alone
        self._each = each
        self._cases: dict[tuple[FaultKind, str], Case] = {}

    def check(self) -> tuple[Fault, ...]:
        """One look at everything, mends included; the faults that are there after it."""
        for guard in self._guards:
            self._look(guard)
        due = [case for case in self._cases.values() if self._due(case)]
        if due:
            self._mend(due)
        present = tuple(case.fault for case in self._cases.values() if case.there)
        self._telemetry.note(present)
        return present

    def _look(self, guard: Guard) -> None:
        now_us = self._clock.now_us()
        try:
            found = {fault.subject: fault for fault in guard.look(now_us)}
        except DstackError:
            return  # a server that does not answer has a guard of its own; the rest is as it was
        for fault in found.values():
            self._seen(fault, now_us)
        for (kind, subject), case in list(self._cases.items()):
            if kind == guard.kind and subject not in found:
                self._not_seen(case, now_us)

    def _seen(self, fault: Fault, now_us: int) -> None:
        key = (fault.kind, fault.subject)
        case = self._cases.get(key)
        if case is None:
            case = self._cases[key] = Case(fault, Backoff(self._settings.backoff))
        elif case.well_since_us is not None:  # it is back
            case.fault, case.believed, case.well_since_us = fault, False, None
        if not case.believed and now_us - case.fault.since_us >= self._settings.confirm_s * 1e6:
            case.believed = True
            self._decide("fault", case, fault.detail)
        if case.there and case.tries.spent and case.tries.retry_at_us <= now_us and not case.given_up:
            case.given_up = True
            self._decide("given up", case, f"{fault.detail}; {case.tries.tries} tries did not mend it")

    def _not_seen(self, case: Case, now_us: int) -> None:
        if case.there:
            self._decide("healed", case, f"well again after {(now_us - case.fault.since_us) / 1e6:.1f} s")
        if case.well_since_us is None:
            case.well_since_us, case.given_up = now_us, False
        case.tries.well_since(case.well_since_us, now_us)
        if case.tries.tries == 0:
            del self._cases[(case.fault.kind, case.fault.subject)]

    def _due(self, case: Case) -> bool:
        return case.there and case.mendable and case.tries.due(self._clock.now_us())

    def _mend(self, due: list[Case]) -> None:
        """All that is due, unless somebody else is at it: then the next check comes back to it."""
        guards = {guard.kind: guard for guard in self._guards}
        try:
            with self._alone():
                for kind in {case.fault.kind for case in due}:
                    self._look(guards[kind])  # it may have been mended while we waited for our turn
                due = [case for case in due if self._due(case)]
                outcomes = self._each(lambda case: try_to(guards[case.fault.kind], case.fault), due)
                for case, outcome in zip(due, outcomes, strict=True):
                    self._tried(case, outcome)
        except DstackError:
            return

    def _tried(self, case: Case, outcome: Outcome) -> None:
        if outcome.done is None and outcome.error is None:
            case.mendable = False
            return
        case.tries.tried(self._clock.now_us())
        if outcome.done is not None:
            self._decide("mended", case, outcome.done)
        elif not case.tries.spent:
            self._decide("not mended", case, f"{outcome.error}; next try in {case.tries.wait_s:g} s")
        else:
            case.given_up = True
            self._decide("given up", case, f"{outcome.error}; {case.tries.tries} tries did not mend it")

    def _decide(self, what: str, case: Case, reason: str) -> None:
        fault = case.fault
        self._log.append(
            {
                "time_s": round(self._clock.wall_time_s(), 3),
                "what": what,
                "reason": f"{fault.subject}: {reason}",
                "kind": str(fault.kind),
                "subject": fault.subject,
                "tries": case.tries.tries,
            }
        )


def try_to(guard: Guard, fault: Fault) -> Outcome:
    try:
        return Outcome(guard.mend(fault))
    except DstackError as error:
        return Outcome(error=str(error))
