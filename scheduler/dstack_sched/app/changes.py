"""What lies between the plan in force and a new one, and the least disruptive way to each change.

- message: batch size, SLO, weight, what happens to late requests. The arbiter tells the instance, in force at
  the next grant; the config file follows without a load.
- level: GPU% of an instance that can change its share from batch to batch. The same.
- instance_group: how many instances, on which GPUs. Triton makes and ends some, the others serve on.
- reload: GPU% of a process that has one share for life; anything, where no arbiter answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dstack_sched.domain.plan import ModelPlan, Plan


class Way(str, Enum):
    """How a change comes into force, the least disruptive first."""

    MESSAGE = "message"
    LEVEL = "level"
    INSTANCE_GROUP = "instance_group"
    RELOAD = "reload"

    def __str__(self) -> str:
        return self.value

    @property
    def loads(self) -> bool:
        """Whether Triton is asked to load the model."""
        return self in (Way.INSTANCE_GROUP, Way.RELOAD)


@dataclass(frozen=True, slots=True)
class Reach:
    """What can be told to running instances. arbiter: whether one answers; levels: the models whose instances
    take any share from batch to batch."""

    arbiter: bool
    levels: Collection[str] = ()

    @classmethod
    def to(cls, instances: Collection[Mapping[str, Any]]) -> Reach:
        """Through an arbiter with these instances (its status' "backends"). What they joined with counts, not
        their configs: a model that cannot be captured, a CPU or an old driver has no levels, asked or not."""
        fixed = {each["model"] for each in instances if not each["levels"]}
        return cls(True, {each["model"] for each in instances} - fixed)


@dataclass(frozen=True, slots=True)
class Change:
    """One difference of one model. what: for people, as in "batch 4 -> 8"."""

    model: str
    way: Way
    what: str

    def __str__(self) -> str:
        return f"{self.model}: {self.what} ({self.way})"


def changes(stated: Plan, wanted: Plan, reach: Reach) -> tuple[Change, ...]:
    """Every difference, the least disruptive ways first. Models that `wanted` does not name stay as they are.

    stated: what the configs state now; a model that is missing there has never been planned.
    """
    found = [
        change
        for model, row in wanted.models.items()
        for change in _of_model(model, stated.models.get(model), row, reach)
    ]
    order = list(Way)
    return tuple(sorted(found, key=lambda change: order.index(change.way)))


def _of_model(model: str, before: ModelPlan | None, row: ModelPlan, reach: Reach) -> list[Change]:
    if before is None:
        return [Change(model, Way.RELOAD, f"first plan, {row.gpu_percent:g}% x batch {row.batch_size}")]
    told = Way.MESSAGE if reach.arbiter else Way.RELOAD
    found = []
    if row.batch_size != before.batch_size:
        found.append(Change(model, told, f"batch {before.batch_size} -> {row.batch_size}"))
    if row.slo_ms is not None and row.slo_ms != before.slo_ms:
        found.append(Change(model, told, f"SLO {_ms(before.slo_ms)} -> {_ms(row.slo_ms)}"))
    if row.slo_ms is not None and row.on_late != before.on_late:
        found.append(Change(model, told, f"late requests: {before.on_late.value} -> {row.on_late.value}"))
    if row.weight != before.weight and reach.arbiter:
        found.append(Change(model, Way.MESSAGE, f"weight {before.weight:g} -> {row.weight:g}"))
    if row.gpu_percent != before.gpu_percent:
        way = Way.LEVEL if reach.arbiter and model in reach.levels else Way.RELOAD
        found.append(Change(model, way, f"GPU% {before.gpu_percent:g} -> {row.gpu_percent:g}"))
    old, new = _gpus(before), _gpus(row)
    if old != new:
        what = f"GPUs {old} -> {new}" if set(old) != set(new) else f"instances {len(old)} -> {len(new)}"
        found.append(Change(model, Way.INSTANCE_GROUP, what))
    return found


def loaded(found: Collection[Change]) -> tuple[str, ...]:
    """The models that Triton must load for these changes, each once."""
    return tuple(dict.fromkeys(change.model for change in found if change.way.loads))


def counts(found: Collection[Change]) -> Mapping[Way, int]:
    """How many changes go each way."""
    return {way: number for way in Way if (number := sum(change.way is way for change in found))}


def _gpus(row: ModelPlan) -> list[int]:
    return sorted(replica.gpu for replica in row.replicas) or [row.gpu]


def _ms(slo_ms: float | None) -> str:
    return "none" if slo_ms is None else f"{slo_ms:g} ms"
