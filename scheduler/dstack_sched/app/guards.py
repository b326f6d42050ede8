"""The guards: each looks for one kind of fault of a deployment, and knows how to mend it (health.Guard)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dstack_sched.app.arbiter_plans import ArbiterPlans
from dstack_sched.app.instances import instances
from dstack_sched.app.revive import Reviver
from dstack_sched.domain.fault import Fault, FaultKind
from dstack_sched.domain.model_config import BACKEND
from dstack_sched.domain.served_model import READY, UNLOADED_BY_HAND, ServedModel
from dstack_sched.errors import DstackError
from dstack_sched.ports import ArbiterClient, ModelServer, StubProcesses

FOREIGN_FOR_US = 10_000_000
SILENT_ERRORS, SILENT_FOR_US = 10, 10_000_000
Names: TypeAlias = Callable[[], Collection[str]]


class StubGuard:
    """Models that Triton calls READY though a stub process of theirs is gone.

    Triton 2.51 does not show it, nor start another one. Only models of our backend; `models` None: all of
    them. Of a Triton whose processes we do not see (on another host) a model counts as dead once it has
    answered nothing but errors, SILENT_ERRORS at least, for SILENT_FOR_US.
    """

    kind = FaultKind.STUB_DEAD

    def __init__(
        self,
        server: ModelServer,
        stubs: StubProcesses,
        reviver: Reviver,
        models: Names | None = None,
    ) -> None:
        self._server = server
        self._stubs = stubs
        self._reviver = reviver
        self._models = models
        self._whole: dict[str, frozenset[int]] = {}  # the stubs of models that had all of theirs
        self._foreign_until_us: dict[str, int] = {}
        self._last_answer: dict[str, Answers] = {}

    def look(self, now_us: int) -> Iterator[Fault]:
        ours = None if self._models is None else self._models()
        for model, served in self._server.index().items():
            if ours is not None and model not in ours:
                continue
            missing = self._missing(model, served, now_us)
            if missing:
                yield Fault(self.kind, model, now_us, missing)

    def mend(self, fault: Fault) -> str:
        return self._reviver.restart(fault.subject)

    def _missing(self, model: str, served: ServedModel, now_us: int) -> str:
        """What is gone, "" where nothing is. As long as those seen last live, nobody else is asked."""
        if served.state != READY or now_us < self._foreign_until_us.get(model, 0):
            self._whole.pop(model, None)
            return ""
        whole = self._whole.get(model)
        if whole and self._stubs.alive(whole) == whole:
            return ""
        config = self._server.config(model)
        if config.get("backend") != BACKEND:
            self._foreign_until_us[model] = now_us + FOREIGN_FOR_US
            return ""
        pids = self._stubs.pids(model)
        wanted = instances(config) * served.ready_versions
        if pids is None:
            return self._silent(model, now_us)
        if len(pids) >= wanted:
            self._whole[model] = pids
            return ""
        return f"{wanted - len(pids)} of {wanted} stub processes are dead; Triton does not start them again"

    def _silent(self, model: str, now_us: int) -> str:
        now = Answers.read(self._server.statistics(model), model, now_us)
        last = self._last_answer.get(model)
        if last is None or now.right != last.right or now.errors < last.errors:  # it answers, or began anew
            self._last_answer[model] = now
            return ""
        errors, silent_us = now.errors - last.errors, now_us - last.at_us
        if errors < SILENT_ERRORS or silent_us < SILENT_FOR_US:
            return ""
        return f"{errors} errors and no answer in {silent_us / 1e6:.0f} s; its processes are probably dead"


@dataclass(frozen=True, slots=True)
class Answers:
    """A model's counters of requests since it was loaded, over its versions, and when they were read."""

    right: int
    errors: int
    at_us: int

    @classmethod
    def read(cls, statistics: Mapping[str, Any], model: str, at_us: int) -> Answers:
        found = [each for each in statistics.get("model_stats", ()) if each.get("name") == model]
        counts = [
            sum(int(each.get("inference_stats", {}).get(what, {}).get("count", 0)) for each in found)
            for what in ("success", "fail")
        ]
        return cls(counts[0], counts[1], at_us)


class LoadedGuard:
    """Models that were served and are not loaded now: Triton came back without them.

    One that somebody unloaded on purpose is left alone. `models` None: all that were seen READY; else those
    of them that it names, and those that it names at first count as seen.
    """

    kind = FaultKind.MODEL_NOT_LOADED

    def __init__(self, server: ModelServer, reviver: Reviver, models: Names | None = None) -> None:
        self._server = server
        self._reviver = reviver
        self._models = models
        self._served: set[str] = set(models()) if models else set()

    def look(self, now_us: int) -> Iterator[Fault]:
        index = self._server.index()
        ours = index.keys() if self._models is None else self._models()
        for model, now in index.items():
            if now.state == READY and model in ours:
                self._served.add(model)
            elif now.reason == UNLOADED_BY_HAND and model not in self._reviver.half_done:
                self._served.discard(model)
        self._served &= index.keys()
        for model in sorted(self._served & set(ours)):
            if index[model].state == "UNAVAILABLE":
                why = f" ({index[model].reason})" if index[model].reason else ""
                yield Fault(self.kind, model, now_us, f"was served and is not loaded any more{why}")

    def mend(self, fault: Fault) -> str:
        self._reviver.load(fault.subject)
        return "loaded as it is on disk"


class ServerGuard:
    """A Triton that does not answer. Whoever started it starts it again; we go on when it is back."""

    kind = FaultKind.SERVER_AWAY

    def __init__(self, server: ModelServer, name: str) -> None:
        self._server = server
        self._name = name

    def look(self, now_us: int) -> Iterator[Fault]:
        try:
            self._server.metadata()  # not its readiness: a single model that does not load may deny that
        except DstackError:
            yield Fault(self.kind, self._name, now_us, "does not answer; waiting for it to come back")

    def mend(self, fault: Fault) -> None:
        return None


class ArbiterGuard:
    """An arbiter that does not answer. Models run ungated at their GPU% until it is back."""

    kind = FaultKind.ARBITER_AWAY

    def __init__(self, arbiter: ArbiterClient) -> None:
        self._arbiter = arbiter

    def look(self, now_us: int) -> Iterator[Fault]:
        try:
            self._arbiter.request("ping")
        except DstackError as error:
            yield Fault(self.kind, "arbiter", now_us, f"{error}; models run ungated at their GPU% until then")

    def mend(self, fault: Fault) -> None:
        return None


class ArbiterPlanGuard:
    """An arbiter that was not told the plan in force: a new one, or one that missed the telling."""

    kind = FaultKind.ARBITER_WITHOUT_PLAN

    def __init__(self, plans: ArbiterPlans) -> None:
        self._plans = plans

    def look(self, now_us: int) -> Iterator[Fault]:
        missing = self._plans.missing()
        if missing:
            yield Fault(self.kind, "arbiter", now_us, missing)

    def mend(self, fault: Fault) -> str:
        self._plans.send()
        return "told the plan in force"
