"""When to plan again, and when a new plan is worth its reloads: functions of values, no clock, no server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dstack_sched.domain.plan import Plan
from dstack_sched.domain.workload import Workload


@dataclass(frozen=True, slots=True)
class ReplanSettings:
    """Hysteresis: a rate must leave [fall, rise] x planned, clearly (beyond `sigmas` of Poisson noise), for
    `hold_s`, and `cooldown_s` must have passed since the last plan.

    margin: plans are made for rates this much above what is measured. floor: share of a model's stated rate
    that is planned for even when nobody calls it. min_step_percent: a smaller change of GPU% is no reload's
    worth.
    """

    window_s: float = 10.0
    rise: float = 1.3
    fall: float = 0.5
    sigmas: float = 3.0
    hold_s: float = 5.0
    cooldown_s: float = 30.0
    margin: float = 1.15
    floor: float = 0.1
    min_step_percent: float = 5.0


@dataclass(frozen=True, slots=True)
class Watch:
    """What the watcher remembers from one look to the next. Times in microseconds."""

    planned_at_us: int
    outside_since_us: Mapping[str, int] = field(default_factory=dict)


def outside(planned_per_s: float, measured_per_s: float, settings: ReplanSettings) -> bool:
    """Whether a measured rate left the planned band by more than chance explains."""
    noise = settings.sigmas * math.sqrt(max(measured_per_s, planned_per_s) / settings.window_s)
    return (
        measured_per_s > planned_per_s * settings.rise + noise
        or measured_per_s < planned_per_s * settings.fall - noise
    )


def look(
    watch: Watch,
    planned: Mapping[str, float],
    measured: Mapping[str, float],
    now_us: int,
    settings: ReplanSettings,
) -> tuple[Watch, str | None]:
    """One look at the rates (per second). Returns what to remember, and the reason to plan again, if any."""
    since = {
        model: watch.outside_since_us.get(model, now_us)
        for model, rate in measured.items()
        if model in planned and outside(planned[model], rate, settings)
    }
    watch = replace(watch, outside_since_us=since)
    if now_us - watch.planned_at_us < settings.cooldown_s * 1e6:
        return watch, None
    for model, since_us in since.items():
        if now_us - since_us >= settings.hold_s * 1e6:
            reason = f"{model}: {measured[model]:.3g}/s measured, {planned[model]:.3g}/s planned for"
            return watch, reason
    return watch, None


def demand_now(stated: Workload, measured: Mapping[str, float], settings: ReplanSettings) -> Workload:
    """The stated workload at the measured rates, with margin; what is not measured yet keeps its rate."""
    models = []
    for model in stated.models:
        rate = measured.get(model.name)
        if rate is not None:
            model = replace(model, rate_per_s=max(rate * settings.margin, model.rate_per_s * settings.floor))
        models.append(model)
    return replace(stated, models=tuple(models))


def worth_applying(current: Plan, new: Plan, settings: ReplanSettings) -> str | None:
    """Why a new plan should be put in force; None where what it would gain is less than its reloads cost."""
    for model, row in new.models.items():
        before = current.models.get(model)
        if before is None:
            return f"{model}: no plan yet"
        if row.batch_size != before.batch_size:
            return f"{model}: batch {before.batch_size} -> {row.batch_size}"
        if abs(row.gpu_percent - before.gpu_percent) >= settings.min_step_percent:
            return f"{model}: GPU% {before.gpu_percent:g} -> {row.gpu_percent:g}"
        if row.slo_ms != before.slo_ms:
            return f"{model}: SLO {before.slo_ms} -> {row.slo_ms} ms"
    return None
