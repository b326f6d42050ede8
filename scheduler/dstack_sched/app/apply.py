"""Put a plan in force: rewrite configs, reload one model at a time, all or nothing.

All edits go to the journal first. Then, for each model whose config does not state the plan yet: replace
config.pbtxt, load over gRPC (Triton makes the new version before it breaks the old), check that what is in
force is what was written, and wait until the old stub processes are gone (until then memory and GPU% count
twice). If a model fails, every config of this plan goes back byte for byte and the old versions serve on. A
controller that dies in between leaves its journal, and the next one finishes or undoes the plan as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dstack_sched.domain.change import ApplyReport, ConfigEdit, ModelOutcome
from dstack_sched.domain.model_config import BACKEND, ConfigChange, InstanceGroup, ModelConfig
from dstack_sched.domain.plan import ModelPlan, Plan
from dstack_sched.errors import DstackError, InputError, ServerError
from dstack_sched.ports import Clock, EditJournal, ModelRepository, ModelServer, StubProcesses

READY_TIMEOUT_S = 120.0
STUBS_GONE_TIMEOUT_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One model's part of a plan, checked: the edit of its config and the parameters in force after it."""

    model: str
    plan: ModelPlan
    edit: ConfigEdit
    parameters: Mapping[str, str]
    growth_percent: float


def plan_change(plan: ModelPlan, config: ModelConfig, gpus: int) -> ConfigChange:
    """The config fields that state a model's plan.

    max_batch_size is the clients' and stays as found: the planned batch is our `batch_size` parameter and
    Triton's preferred size. Without a max_batch_size in the file (it is completed from the graph, after
    Triton has checked the file) a preferred size would be refused, so batching is left to be completed too.
    Values that are there already, however spelled, are left alone.
    """
    wanted = {"gpu_percent": _number(plan.gpu_percent), "batch_size": str(plan.batch_size)}
    if plan.slo_ms is not None:
        wanted |= {"slo_ms": _number(plan.slo_ms), "on_late": plan.on_late.value}
    stated = config.parameters
    parameters = {
        key: stated[key] if _same(stated.get(key), value) else value for key, value in wanted.items()
    }
    batches = bool(config.max_batch_size)
    return ConfigChange(
        backend=BACKEND,
        parameters=parameters,
        preferred_batch_sizes=_preferred(plan.batch_size, config) if batches else None,
        max_queue_delay_us=0 if batches else None,  # waiting is the backend's: decisions/0040
        instance_groups=_instance_groups(plan) if gpus > 1 else None,
    )


def _preferred(batch_size: int, config: ModelConfig) -> tuple[int, ...] | None:
    """A preferred size of 1 would make Triton send single requests down; none lets it send all that waits."""
    if batch_size > 1:
        return (batch_size,)
    return () if config.preferred_batch_sizes else None


def _instance_groups(plan: ModelPlan) -> tuple[InstanceGroup, ...]:
    gpus = tuple(sorted(replica.gpu for replica in plan.replicas)) or (plan.gpu,)
    return (InstanceGroup("KIND_GPU", 1, gpus),)


def _number(value: float) -> str:
    return f"{value:.10g}"


def _same(stated: str | None, wanted: str) -> bool:
    try:
        return stated is not None and float(stated) == float(wanted)
    except ValueError:
        return stated == wanted


def _share(config: ModelConfig) -> float:
    try:
        return float(config.parameters.get("gpu_percent", 0))
    except ValueError:
        return 0.0


def stated_plan(repository: ModelRepository, plan: Plan) -> Plan:
    """The plan with what the configs state in place of its own; models whose configs do not are left out."""
    rows = {}
    for model, row in plan.models.items():
        config = repository.config(model) if model in repository.models() else ModelConfig()
        try:
            rows[model] = replace(
                row,
                gpu_percent=float(config.parameters["gpu_percent"]),
                batch_size=int(config.parameters["batch_size"]),
                slo_ms=float(config.parameters["slo_ms"]) if "slo_ms" in config.parameters else None,
            )
        except (KeyError, ValueError):
            continue
    return replace(plan, models=rows)


class Applier:
    """Applies plans to one repository and its server. Not for several threads; hold the journal's lock."""

    def __init__(
        self,
        repository: ModelRepository,
        server: ModelServer,
        journal: EditJournal,
        stubs: StubProcesses,
        clock: Clock,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._repository = repository
        self._server = server
        self._journal = journal
        self._stubs = stubs
        self._clock = clock
        self._say = say

    # -- the plan ---------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> tuple[Rewrite, ...]:
        """Every rewrite the plan asks for, each checked; nothing is touched. Raises InputError."""
        present = self._repository.models()
        missing = [model for model in plan.models if model not in present]
        if missing:
            raise InputError(
                f"the plan names {', '.join(missing)}, not in {self._repository.root}; "
                f"it has {', '.join(present)}: plan again for this repository"
            )
        states = self._server.models()
        rewrites = [self._rewrite(model, plan, states.get(model) == "READY") for model in plan.models]
        return tuple(sorted(rewrites, key=lambda rewrite: rewrite.growth_percent))

    def apply(self, plan: Plan) -> ApplyReport:
        """Put the plan in force, shrinking models first. Raises InputError with all as it was before."""
        rewrites = self.check(plan)
        for rewrite in rewrites:
            if rewrite.edit.old_text != rewrite.edit.new_text:
                self._repository.check_writable(rewrite.model)
        todo = [rewrite for rewrite in rewrites if not self._in_force(rewrite)]
        if todo:
            self._journal.begin(rewrite.edit for rewrite in todo)
        changed = self._put_all_in_force(todo)
        unchanged = [
            ModelOutcome(each.model, "unchanged", each.plan.gpu_percent, each.plan.batch_size)
            for each in rewrites
            if each not in todo
        ]
        blind = any(outcome.old_stubs_gone is None for outcome in changed)
        return ApplyReport((*unchanged, *changed), (self._stubs.blind_reason(),) if blind else ())

    def _put_all_in_force(self, rewrites: Sequence[Rewrite]) -> list[ModelOutcome]:
        outcomes = []
        for number, rewrite in enumerate(rewrites):
            try:
                outcomes.append(self._put_in_force(rewrite))
            except DstackError as error:
                for tried in reversed(rewrites[: number + 1]):
                    self._put_back(tried.edit, load=self._serves_new(tried))
                self._journal.end()
                raise InputError(
                    f"{rewrite.model}: the plan could not be put in force, all is as before: {error}"
                ) from error
        self._journal.end()
        return outcomes

    def _rewrite(self, model: str, plan: Plan, ready: bool) -> Rewrite:
        row = plan.models[model]
        config = self._repository.config(model)
        where = self._repository.config_path(model)
        text = self._repository.read_config(model)
        backend = config.backend or config.platform
        if text is not None and backend != BACKEND:
            raise InputError(
                f'{where}: belongs to backend "{backend or "unnamed"}", not to "{BACKEND}"; '
                f"`dstackctl adopt {self._repository.root} --model {model}` turns it into one"
            )
        if config.scheduler:
            raise InputError(f"{where}: uses {config.scheduler}, which cannot be planned; leave {model} out")
        cap = config.max_batch_size
        if cap is None and ready:
            cap = int(self._server.config(model).get("max_batch_size", 0))
        if cap is not None and row.batch_size > max(1, cap):
            raise InputError(
                f"{where}: max_batch_size is {cap}, the plan wants batches of {row.batch_size}; "
                "raise it, or profile and plan again"
            )
        change = plan_change(row, config, len(plan.gpus))
        edit = ConfigEdit(model, text, self._repository.edited(model, change), ready)
        parameters = {key: value for key, value in change.parameters.items() if value is not None}
        return Rewrite(model, row, edit, parameters, row.gpu_percent - _share(config))

    def _in_force(self, rewrite: Rewrite) -> bool:
        """Whether disk and server both state it, so that nothing needs to be done."""
        edit = rewrite.edit
        return (
            edit.old_text == edit.new_text
            and edit.was_ready
            and states(self._server.config(edit.model), rewrite.parameters)
        )

    def _put_in_force(self, rewrite: Rewrite) -> ModelOutcome:
        edit, plan = rewrite.edit, rewrite.plan
        self._say(f"{edit.model}: {plan.gpu_percent:g}% x batch {plan.batch_size}, loading")
        began_us = self._clock.now_us()
        if edit.old_text != edit.new_text or edit.was_ready:  # an equal text, but newer, makes Triton load it
            self._repository.write_config(edit.model, edit.new_text)
        old_stubs = self._load(edit.model)
        if not states(self._server.config(edit.model), rewrite.parameters):
            raise ServerError("Triton serves another config than the one on disk")
        gone = self._wait_gone(old_stubs)
        return ModelOutcome(
            edit.model,
            "reloaded" if edit.was_ready else "loaded",
            plan.gpu_percent,
            plan.batch_size,
            (self._clock.now_us() - began_us) / 1e6,
            gone,
        )

    def _load(self, model: str) -> frozenset[int] | None:
        """Load and wait until ready. The old version's stubs, None where they cannot be seen."""
        old_stubs = self._stubs.pids(model)
        self._server.load(model)
        until_us = self._clock.now_us() + int(READY_TIMEOUT_S * 1e6)
        while not self._server.is_model_ready(model):
            if self._clock.now_us() > until_us:
                raise ServerError(f"not ready within {READY_TIMEOUT_S:g} s of its load")
            self._clock.sleep_s(POLL_S)
        return old_stubs

    def _wait_gone(self, pids: frozenset[int] | None) -> bool | None:
        if pids is None:
            return None
        until_us = self._clock.now_us() + int(STUBS_GONE_TIMEOUT_S * 1e6)
        while alive := self._stubs.alive(pids):
            if self._clock.now_us() > until_us:
                self._say(
                    f"old stub processes {sorted(alive)} are still there after {STUBS_GONE_TIMEOUT_S:g} s"
                )
                return False
            self._clock.sleep_s(POLL_S)
        return True

    # -- the way back -----------------------------------------------------------------------------------

    def _serves_new(self, rewrite: Rewrite) -> bool:
        """Whether the old config needs a load to be in force again: the new one is, or none."""
        if rewrite.edit.old_text == rewrite.edit.new_text:
            return False
        try:
            return not self._server.is_model_ready(rewrite.model) or states(
                self._server.config(rewrite.model), rewrite.parameters
            )
        except DstackError:
            return True

    def _put_back(self, edit: ConfigEdit, *, load: bool) -> None:
        """The old text back on disk; with `load`, in force too (or unloaded, as it was before)."""
        if self._repository.read_config(edit.model) != edit.old_text:
            self._repository.write_config(edit.model, edit.old_text)
        if not load:
            return
        try:
            if edit.was_ready:
                self._wait_gone(self._load(edit.model))
            else:
                self._server.unload(edit.model)
        except DstackError as error:
            self._say(f"{edit.model}: its old config is back on disk but could not be loaded: {error}")

    def recover(self) -> tuple[str, ...]:
        """Finish the plan that a controller left half applied; undo all of it where that fails.

        Returns lines for people, none when there was nothing to do. A config that someone has changed since
        is theirs and stays.
        """
        pending = self._journal.pending()
        edits = [edit for edit in pending if self._is_as_left(edit)]
        lines = [
            f"{edit.model}: an apply was interrupted here; its config has changed since and is left alone"
            for edit in pending
            if edit not in edits
        ]
        done: list[ConfigEdit] = []
        try:
            for edit in edits:
                done.append(edit)
                self._finish(edit)
            lines += [f"{edit.model}: an interrupted apply was finished" for edit in edits]
        except DstackError as error:
            for edit in reversed(done):
                self._put_back(edit, load=True)
            lines += [f"{edit.model}: an interrupted apply was undone ({error})" for edit in edits]
        if pending:
            self._journal.end()
        return tuple(lines)

    def _is_as_left(self, edit: ConfigEdit) -> bool:
        return edit.model in self._repository.models() and self._repository.read_config(edit.model) in (
            edit.old_text,
            edit.new_text,
        )

    def _finish(self, edit: ConfigEdit) -> None:
        self._say(f"{edit.model}: finishing an interrupted apply")
        if self._repository.read_config(edit.model) != edit.new_text:
            self._repository.write_config(edit.model, edit.new_text)
        self._wait_gone(self._load(edit.model))


def states(in_force: Mapping[str, Any], parameters: Mapping[str, str]) -> bool:
    """Whether a config as Triton reports it has these parameters."""
    found = in_force.get("parameters", {})
    return all(_same(found.get(key, {}).get("string_value"), value) for key, value in parameters.items())
