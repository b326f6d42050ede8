"""What a simulation says, as `dstackctl simulate --json` prints it (DESIGN section 5, issue 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstack_sched.sim.backend import Backend
from dstack_sched.sim.world import World

VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One model. offered, served, rejected, late: requests; late ones were served past their deadline or are
    still waiting past it. latency of served requests only."""

    offered: int
    served: int
    rejected: int
    late: int
    goodput_per_s: float
    slo_attainment: float
    latency_ms_p50: float
    latency_ms_p99: float
    mean_batch_size: float
    gpu_share_ms: float


@dataclass(frozen=True, slots=True)
class SimResult:
    """One policy in one scenario. gpu_utilization: mean of min(promised GPU%, 100) / 100. jain_fairness: of
    GPU%-time over weight, among models that were not served in full, or among all when all were."""

    policy: str
    seed: int
    duration_s: float
    models: dict[str, ModelResult]
    total_goodput_per_s: float
    gpu_utilization: float
    jain_fairness: float
    max_granted_percent: float
    overload_reports: int

    @property
    def worst_attainment(self) -> float:
        return min((m.slo_attainment for m in self.models.values() if m.offered), default=1.0)


def summarize(world: World, policy: str, seed: int) -> SimResult:
    """Count what happened to every request that arrived within the duration."""
    duration_s = world.scenario.duration_us / 1e6
    by_model: dict[str, list[Backend]] = {}
    for backend in world.backends:
        by_model.setdefault(backend.spec.demand.name, []).append(backend)
    answer_us = world.scenario.serving.answer_us
    models = {name: _model(backends, duration_s, answer_us) for name, backends in by_model.items()}
    weights = {b.spec.demand.name: b.spec.demand.weight for b in world.backends}
    short = [n for n, m in models.items() if m.slo_attainment < 0.99]
    service = [models[n].gpu_share_ms / weights[n] for n in (short if len(short) > 1 else models)]
    return SimResult(
        policy=policy,
        seed=seed,
        duration_s=duration_s,
        models=models,
        total_goodput_per_s=sum(m.goodput_per_s for m in models.values()),
        gpu_utilization=world.gpu.busy_percent_us / 100.0 / world.scenario.duration_us,
        jain_fairness=jain(service),
        max_granted_percent=world.gpu.max_promised,
        overload_reports=len(world.overloads),
    )


def jain(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has it all."""
    x = np.asarray(values, np.float64)
    square = float((x * x).sum()) * x.size
    return float(x.sum()) ** 2 / square if square > 0 else 1.0


def _model(backends: Sequence[Backend], duration_s: float, answer_us: int) -> ModelResult:
    offered = rejected = late = 0
    latencies: list[NDArray[np.int64]] = []
    sizes: list[int] = []
    share_percent_us = 0.0
    for backend in backends:
        arrivals = np.asarray(backend.arrivals, np.int64)
        done = np.array([b for b in backend.batches if b[2]], np.int64).reshape(-1, 3)
        rows = done[:, 1]
        before = np.repeat(np.cumsum(rows) - rows, rows)  # rows of earlier batches
        place = np.arange(before.size) - before  # of a row in its batch
        first = np.repeat(done[:, 0], rows)
        waited = np.repeat(done[:, 2], rows) + answer_us * (1 + place) - arrivals[first + place]
        offered += arrivals.size
        rejected += backend.rejected + backend.failed
        slo_us = backend.spec.slo_us or (1 << 60)
        unanswered = arrivals.size - first.size - backend.rejected - backend.failed
        late += int((waited > slo_us).sum()) + (unanswered if backend.spec.slo_us else 0)
        latencies.append(waited)
        sizes.extend(rows.tolist())
        share_percent_us += backend.share_percent_us
    took = np.concatenate(latencies) / 1000.0
    in_time = offered - rejected - late if backends[0].spec.slo_us else took.size
    return ModelResult(
        offered=offered,
        served=took.size,
        rejected=rejected,
        late=late,
        goodput_per_s=in_time / duration_s,
        slo_attainment=in_time / offered if offered else 1.0,
        latency_ms_p50=float(np.percentile(took, 50)) if took.size else 0.0,
        latency_ms_p99=float(np.percentile(took, 99)) if took.size else 0.0,
        mean_batch_size=float(np.mean(sizes)) if sizes else 0.0,
        gpu_share_ms=share_percent_us / 100.0 / 1000.0,
    )


def document(result: SimResult, ideal_corun_per_s: float, ideal_isolated_per_s: float) -> dict[str, Any]:
    """The JSON of one result beside its bounds."""
    return {
        "version": VERSION,
        "policy": result.policy,
        "seed": result.seed,
        "duration_s": result.duration_s,
        "models": {name: _rounded(m) for name, m in result.models.items()},
        "total_goodput_per_s": round(result.total_goodput_per_s, 3),
        "gpu_utilization": round(result.gpu_utilization, 5),
        "ideal_corun_goodput_per_s": round(ideal_corun_per_s, 3),
        "ideal_isolated_goodput_per_s": round(ideal_isolated_per_s, 3),
        "fraction_of_ideal": round(result.total_goodput_per_s / max(ideal_corun_per_s, 1e-9), 5),
        "jain_fairness": round(result.jain_fairness, 5),
        "max_granted_percent": round(result.max_granted_percent, 3),
    }


def _rounded(model: ModelResult) -> dict[str, Any]:
    return {
        name: round(value, 5) if isinstance(value := getattr(model, name), float) else value
        for name in ModelResult.__slots__
    }
