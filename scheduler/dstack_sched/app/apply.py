"""Put a plan in force: the config edits that state it, checked before any of them is made (app/edits.py).

What running instances take by message (app/changes.py) is stated by the file alone: no load, nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dstack_backend import settings
from dstack_sched.app.changes import Reach
from dstack_sched.app.edits import ConfigEdits, Done, Step
from dstack_sched.domain.change import Action, ApplyReport, ConfigEdit, ModelOutcome
from dstack_sched.domain.model_config import BACKEND, ConfigChange, InstanceGroup, ModelConfig
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import InputError
from dstack_sched.ports import ModelRepository, ModelServer

TOLD = frozenset({"batch_size", "slo_ms", "on_late"})  # parameters that the arbiter tells running instances
NOBODY = Reach(arbiter=False)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One model's part of a plan, checked: the edit of its config and the parameters that Triton must have in
    force after it (those that instances are told may lag behind there)."""

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
    if plan.memory_limit_mb is not None:
        wanted["process_memory_limit_mb"] = str(plan.memory_limit_mb)
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
        instance_groups=_instance_groups(plan, config, gpus),
    )


def _preferred(batch_size: int, config: ModelConfig) -> tuple[int, ...] | None:
    """A preferred size of 1 would make Triton send single requests down; none lets it send all that waits."""
    if batch_size > 1:
        return (batch_size,)
    return () if config.preferred_batch_sizes else None


def _instance_groups(plan: ModelPlan, config: ModelConfig, gpus: int) -> tuple[InstanceGroup, ...] | None:
    """One instance on each GPU of the plan. Without `gpus` Triton makes one on every GPU there is, so only
    on a host with one GPU it need not be told, unless the config names others."""
    on = tuple(sorted(replica.gpu for replica in plan.replicas)) or (plan.gpu,)
    if on[0] < 0:
        return _cpu_instances(len(on), config)
    named = {gpu for group in config.instance_groups for gpu in group.gpus}
    if gpus <= 1 and not named - set(on):
        return None
    return (InstanceGroup("KIND_GPU", 1, on),)


def _cpu_instances(count: int, config: ModelConfig) -> tuple[InstanceGroup, ...] | None:
    """So many instances on the CPU; a config that leaves it to Triton gets one, and need not say so."""
    stated = sum(group.count for group in config.instance_groups) or 1
    return None if stated == count else (InstanceGroup("KIND_CPU", count),)


def _number(value: float) -> str:
    return f"{value:.10g}"


def _same(stated: str | None, wanted: str) -> bool:
    try:
        return stated is not None and float(stated) == float(wanted)
    except ValueError:
        return stated == wanted


def stated_share(config: ModelConfig) -> float:
    """GPU% that a config states; 0 where it states none."""
    try:
        return float(config.parameters.get("gpu_percent", 0))
    except ValueError:
        return 0.0


def stated_instances(config: ModelConfig) -> tuple[float, int]:
    """(GPU%, instances) that a config states; 0 and 1 where it does not."""
    count = sum(group.count * max(1, len(group.gpus)) for group in config.instance_groups)
    return stated_share(config), max(1, count)


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
                on_late=OnLate(config.parameters.get("on_late", OnLate.SERVE.value)),
                **_placement(row, config),
            )
        except (KeyError, ValueError):
            continue
    return replace(plan, models=rows)


def _placement(row: ModelPlan, config: ModelConfig) -> dict[str, Any]:
    """Where the config places the model's instances; nothing where it leaves that to Triton."""
    if row.gpu < 0:
        count = sum(group.count for group in config.instance_groups) or 1
        each = Replica(row.gpu, float(config.parameters["gpu_percent"]), row.rate_per_s / count)
        return {"replicas": (each,) * count}
    gpus = sorted({gpu for group in config.instance_groups for gpu in group.gpus})
    if not gpus:
        return {}
    percent, rate = float(config.parameters["gpu_percent"]), row.rate_per_s / len(gpus)
    return {"gpu": gpus[0], "replicas": tuple(Replica(gpu, percent, rate) for gpu in gpus)}


def has_levels(config: ModelConfig) -> bool:
    """Whether the model's instances take any share from batch to batch (backend parameter `levels`; where it
    is not stated, the backend's default, which is for GPUs)."""
    stated = config.parameters.get("levels")
    if stated is None:
        on_cpu = {group.kind for group in config.instance_groups} == {"KIND_CPU"}
        return settings.LEVELS_DEFAULT != "off" and not on_cpu
    return stated != "off"


class Applier:
    """Applies plans to one repository and its server. Not for several threads."""

    def __init__(self, repository: ModelRepository, server: ModelServer, edits: ConfigEdits) -> None:
        self._repository = repository
        self._server = server
        self._edits = edits

    def check(self, plan: Plan, reach: Reach = NOBODY) -> tuple[Rewrite, ...]:
        """Every rewrite the plan asks for, each checked; nothing is touched. Raises InputError."""
        present = self._repository.models()
        missing = [model for model in plan.models if model not in present]
        if missing:
            raise InputError(
                f"the plan names {', '.join(missing)}, not in {self._repository.name}; "
                f"it has {', '.join(present)}: plan again for this repository"
            )
        states = self._server.models()
        rewrites = [self._rewrite(model, plan, states.get(model) == "READY", reach) for model in plan.models]
        return tuple(sorted(rewrites, key=lambda rewrite: rewrite.growth_percent))

    def apply(self, plan: Plan, reach: Reach = NOBODY) -> ApplyReport:
        """Put the plan in force: files that need no load first, then loads, shrinking models first.

        reach: what running instances have been told of this plan. Raises InputError with all as before.
        """
        rewrites = self.check(plan, reach)
        todo = [rewrite for rewrite in rewrites if not self._in_force(rewrite)]
        todo.sort(key=lambda rewrite: rewrite.edit.load)
        steps = [Step(each.edit, _saying(each.plan), stating(each.parameters)) for each in todo]
        done = {each.model: each for each in self._edits.put_in_force(steps, "the plan")}
        outcomes = [
            _outcome(each, done.get(each.model)) for each in sorted(rewrites, key=lambda each: each in todo)
        ]
        blind = any(done[each.model].old_stubs_gone is None for each in todo if each.edit.load)
        return ApplyReport(tuple(outcomes), (self._edits.blind_reason(),) if blind else ())

    def _rewrite(self, model: str, plan: Plan, ready: bool, reach: Reach) -> Rewrite:
        row = plan.models[model]
        config = self._repository.config(model)
        where = self._repository.config_path(model)
        text = self._repository.read_config(model)
        backend = config.backend or config.platform
        if text is not None and backend != BACKEND:
            raise InputError(
                f'{where}: belongs to backend "{backend or "unnamed"}", not to "{BACKEND}"; '
                f"`dstackctl adopt REPO --model {model}`, where its repository is, turns it into one"
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
        parameters = {key: value for key, value in change.parameters.items() if value is not None}
        if reach.arbiter:
            told = TOLD | {"gpu_percent"} if model in reach.levels and has_levels(config) else TOLD
            parameters = {key: value for key, value in parameters.items() if key not in told}
        load = not (ready and self._loaded(model, config, change, parameters))
        edit = ConfigEdit(
            model, text, self._repository.edited(model, change), ready, "load" if load else "nothing"
        )
        return Rewrite(model, row, edit, parameters, row.gpu_percent - stated_share(config))

    def _loaded(
        self, model: str, config: ModelConfig, change: ConfigChange, parameters: Mapping[str, str]
    ) -> bool:
        """Whether file and server have all of the change but what instances are told."""
        return (
            config.backend == change.backend
            and all(_same(config.parameters.get(key), value) for key, value in parameters.items())
            and change.max_queue_delay_us in (None, config.max_queue_delay_us)
            and change.instance_groups in (None, config.instance_groups)
            and states(self._server.config(model), parameters)
        )

    def _in_force(self, rewrite: Rewrite) -> bool:
        """Whether disk and server both state it, so that nothing needs to be done."""
        return rewrite.edit.old_text == rewrite.edit.new_text and not rewrite.edit.load


def _outcome(rewrite: Rewrite, done: Done | None) -> ModelOutcome:
    plan = rewrite.plan
    if done is None:
        return ModelOutcome(rewrite.model, "unchanged", plan.gpu_percent, plan.batch_size)
    loaded: Action = "reloaded" if rewrite.edit.was_ready else "loaded"
    return ModelOutcome(
        rewrite.model,
        loaded if rewrite.edit.load else "told",
        plan.gpu_percent,
        plan.batch_size,
        done.load_s,
        done.old_stubs_gone,
    )


def _saying(plan: ModelPlan) -> str:
    return f"{plan.gpu_percent:g}% x batch {plan.batch_size}"


def stating(parameters: Mapping[str, str]) -> Callable[[Mapping[str, Any]], bool]:
    """states() for these parameters."""
    return lambda in_force: states(in_force, parameters)


def states(in_force: Mapping[str, Any], parameters: Mapping[str, str]) -> bool:
    """Whether a config as Triton reports it has these parameters."""
    found = in_force.get("parameters", {})
    return all(_same(found.get(key, {}).get("string_value"), value) for key, value in parameters.items())
