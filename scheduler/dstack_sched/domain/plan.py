"""What the controller decided: for each model a GPU, a GPU% and a batch size."""

from __future__ import annotations

from dataclasses import dataclass, field

from dstack_sched.domain.workload import OnLate


@dataclass(frozen=True, slots=True)
class Replica:
    """One instance of a model: on which GPU, with how much of it, taking which share of the rate.

    All replicas of a model have the same GPU%: a config states one (decisions/0070)."""

    gpu: int
    gpu_percent: float
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model's row of plan.json. `replicas` has one entry a GPU; `gpu`, `gpu_percent` repeat the first.

    latency_ms: predicted f(p, b) with co-runners; throughput_per_s: of all replicas running back to back;
    efficacy: b / (p f^2) in 1/(percent ms^2); utilization: rate / throughput.
    slo_ms, rate_per_s, weight and on_late repeat the demand planned for, so that a plan can be applied by
    itself; slo_ms None: best effort. memory_limit_mb: bound of one instance's GPU memory (MPS), None: none.
    """

    gpu: int
    gpu_percent: float
    batch_size: int
    max_queue_delay_us: int
    latency_ms: float
    throughput_per_s: float
    efficacy: float
    knee_percent: float
    utilization: float
    replicas: tuple[Replica, ...] = field(default=())
    slo_ms: float | None = None
    rate_per_s: float = 0.0
    weight: float = 1.0
    on_late: OnLate = OnLate.SERVE
    memory_limit_mb: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The content of a plan.json. `headroom`: largest factor on all rates that still fits.

    Not feasible: binding[0] says which model, which limit and the largest scale of the rates that fits;
    `models` then holds the plan for the rates at that scale (empty when none fits). gap: proven
    relative distance from the best plan over the candidates, 0 when solved to optimality. notes: what
    the reader should know, one line each.
    """

    capacity_percent: float
    gpus: tuple[str, ...]
    models: dict[str, ModelPlan]
    feasible: bool
    binding: tuple[str, ...]
    headroom: float
    gap: float = 0.0
    notes: tuple[str, ...] = ()
