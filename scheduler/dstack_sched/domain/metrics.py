"""Every metric of the controller and the arbiter: name, kind, unit, labels, help. One table, `ALL`.

Names follow Prometheus: base units (seconds, bytes; ratios where 1 is the whole), `_total` for counters. A
share of a GPU is a ratio: 0.4 is 40 GPU%. Share-seconds are shares times the time they were held: their rate
over the capacity is the utilization. Rows are batch items: a request of batch 4 is 4 rows. The backend's own
metrics stand in dstack_backend.metrics; docs/METRICS.md lists both and is held to them by a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """The kinds of Prometheus that are used here."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. unit: seconds, bytes, ratio, rows, rows per second, share-seconds, or "" for plain counts.

    bounds: upper bounds of a histogram's buckets, ascending, in the metric's unit; +Inf is added.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram's value: counts by bucket (one more than bounds, not cumulative) and the sum of values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one metric. labels: values in the order of metric.labels."""

    metric: Metric
    labels: tuple[str, ...]
    value: float | Buckets


def _counter(name: str, help_text: str, *labels: str, unit: str = "") -> Metric:
    return Metric(name, Kind.COUNTER, help_text, labels, unit)


def _gauge(name: str, help_text: str, *labels: str, unit: str = "") -> Metric:
    return Metric(name, Kind.GAUGE, help_text, labels, unit)


def _histogram(name: str, help_text: str, *labels: str, bounds: tuple[float, ...]) -> Metric:
    return Metric(name, Kind.HISTOGRAM, help_text, labels, "seconds", bounds)


PLAN_BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
RECOVERY_BOUNDS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
WAIT_BOUNDS_S = (
    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0,
)  # fmt: skip
DECISION_BOUNDS_S = (
    5e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 4e-5, 5e-5, 7.5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3,
)  # fmt: skip

# -- faults, told by whoever watches: `dstackctl run` and `dstackctl serve` ---------------------------------

FAULTS = _counter("dstack_faults_total", "Faults seen, by kind and by what they befell", "kind", "subject")
FAULTS_PRESENT = _gauge(
    "dstack_faults_present", "1 for each fault that is there now and not healed yet", "kind", "subject"
)
RECOVERIES = _histogram(
    "dstack_recovery_duration_seconds",
    "From a fault's first sight to its end",
    "kind",
    bounds=RECOVERY_BOUNDS_S,
)
SERVICE_RESTARTS = _counter(
    "dstack_service_restarts_total", "Services that were started again, by name", "service"
)
HEALTH = (FAULTS, FAULTS_PRESENT, RECOVERIES, SERVICE_RESTARTS)

# -- the controller (`dstackctl run --metrics-port`) --------------------------------------------------------

CONTROLLER_STARTED = _gauge(
    "dstack_controller_start_time_seconds", "When the controller started, Unix time", unit="seconds"
)
CONTROLLER_UP = _gauge(
    "dstack_controller_part_up", "1 while this part answers the controller: server, arbiter", "part"
)
ROUNDS = _counter(
    "dstack_controller_rounds_total",
    "Planning rounds by what came of them (applied, kept, advised, failed) and what called for them",
    "outcome", "reason",
)  # fmt: skip
CHANGES = _counter(
    "dstack_controller_changes_total",
    "Changes put in force by kind: message, level, instance_group, reload",
    "kind",
)
RELOADS = _counter("dstack_controller_reloads_total", "Model loads asked of Triton and done", "model")
FAILED_LOADS = _counter("dstack_controller_failed_loads_total", "Model loads that Triton failed", "model")
ROLLBACKS = _counter("dstack_controller_rollbacks_total", "Plans undone because a model did not load")
PLAN_TIME = _histogram("dstack_controller_plan_duration_seconds", "Time to make a plan", bounds=PLAN_BOUNDS_S)
APPLY_TIME = _histogram(
    "dstack_controller_apply_duration_seconds", "Time to put a plan in force", bounds=RECOVERY_BOUNDS_S
)
ARRIVALS = _gauge(
    "dstack_controller_arrivals_rows_per_second",
    "Arrival rate of a model by kind: measured, forecast, planned (for which the plan in force was made)",
    "model", "kind", unit="rows per second",
)  # fmt: skip
PLANNED_SHARE = _gauge(
    "dstack_controller_planned_gpu_share_ratio", "Share of the GPU planned", "model", "gpu", unit="ratio"
)
PLANNED_BATCH = _gauge("dstack_controller_planned_batch_rows", "Batch size planned", "model", unit="rows")
PREDICTED_LATENCY = _gauge(
    "dstack_controller_predicted_run_seconds",
    "Latency of a planned batch on the device as predicted, co-runners included",
    "model", unit="seconds",
)  # fmt: skip
MEASURED_LATENCY = _gauge(
    "dstack_controller_measured_run_seconds",
    "Latency of a batch on the device as measured over the last window",
    "model", unit="seconds",
)  # fmt: skip
DRIFT = _gauge(
    "dstack_controller_latency_drift_ratio",
    "Measured latency over what the profile says for the same batches; 1: as predicted",
    "model", unit="ratio",
)  # fmt: skip
SLO = _gauge("dstack_controller_slo_seconds", "Latency objective in force", "model", unit="seconds")
ATTAINMENT = _gauge(
    "dstack_controller_slo_attainment_ratio",
    "Rows answered within their objective, over the last window",
    "model", unit="ratio",
)  # fmt: skip
HEADROOM = _gauge(
    "dstack_controller_plan_headroom_ratio", "Largest factor on all rates that still fits", unit="ratio"
)
FEASIBLE = _gauge("dstack_controller_plan_feasible", "1 while the wanted SLOs can be met at these rates")
CONTROLLER = (
    CONTROLLER_STARTED, CONTROLLER_UP, ROUNDS, CHANGES, RELOADS, FAILED_LOADS, ROLLBACKS, PLAN_TIME,
    APPLY_TIME, ARRIVALS, PLANNED_SHARE, PLANNED_BATCH,
    PREDICTED_LATENCY, MEASURED_LATENCY, DRIFT, SLO, ATTAINMENT, HEADROOM, FEASIBLE,
)  # fmt: skip

# -- the GPUs, as the controller plans with them ------------------------------------------------------------

GPU_USABLE = _gauge("dstack_gpu_usable", "1 while the GPU is planned with, 0 while it is out", "gpu", "uuid")
GPU_BUSY = _gauge("dstack_gpu_busy_ratio", "Time in which a kernel ran, by NVML", "gpu", "uuid", unit="ratio")
GPU_MEMORY_USED = _gauge(
    "dstack_gpu_memory_used_bytes", "Memory in use, by everyone", "gpu", "uuid", unit="bytes"
)
GPU_MEMORY_TOTAL = _gauge("dstack_gpu_memory_total_bytes", "Memory of the GPU", "gpu", "uuid", unit="bytes")
GPUS = (GPU_USABLE, GPU_BUSY, GPU_MEMORY_USED, GPU_MEMORY_TOTAL)

# -- the arbiter (`dstackctl arbiter --metrics-port`, `dstackctl serve --arbiter-metrics-port`) -------------

ARBITER_UP = _gauge("dstack_arbiter_up", "1 while the arbiter answers; its other metrics are missing else")
ARBITER_UPTIME = _gauge("dstack_arbiter_uptime_seconds", "Since the arbiter started", unit="seconds")
ARBITER_POLICY = _gauge("dstack_arbiter_policy_info", "1 for the scheduling policy in force", "policy")
SESSIONS = _gauge(
    "dstack_arbiter_sessions", "Joined instances by state: idle, waiting, running, hung", "state"
)
CLIENTS = _gauge("dstack_arbiter_clients", "Open connections, controllers included")
DROPPED = _counter("dstack_arbiter_dropped_clients_total", "Connections that ended, by reason", "reason")
GRANTS = _counter("dstack_arbiter_grants_total", "Grants given", "model")
UNUSED_GRANTS = _counter("dstack_arbiter_unused_grants_total", "Grants that ran no row", "model")
ENDED_LEASES = _counter(
    "dstack_arbiter_ended_leases_total", "Grants whose batch did not end before its lease", "model"
)
GRANTED_ROWS = _counter(
    "dstack_arbiter_granted_rows_total",
    "Rows that the grants allowed for; over the grants: the mean batch size granted",
    "model",
    unit="rows",
)
ROWS = _counter("dstack_arbiter_rows_total", "Rows run under grants", "model", unit="rows")
LATE_ROWS = _counter(
    "dstack_arbiter_late_rows_total", "Those that ended past their deadline", "model", unit="rows"
)
SHEDS = _counter("dstack_arbiter_shed_orders_total", "Orders to reject late work", "model")
OVERLOADS = _counter(
    "dstack_arbiter_overloads_total", "Times a session went by without a run for waiting work", "model"
)
RUN_TIME = _counter(
    "dstack_arbiter_run_seconds_total", "Time of batches on the device", "model", unit="seconds"
)
SHARE_TIME = _counter(
    "dstack_arbiter_gpu_share_seconds_total",
    "Share of the GPU times the time it was held",
    "model", unit="share-seconds",
)  # fmt: skip
GRANT_WAIT = _histogram(
    "dstack_arbiter_grant_wait_seconds", "Wait of work for its grant", "model", bounds=WAIT_BOUNDS_S
)
DECISION_TIME = _histogram(
    "dstack_arbiter_decision_seconds", "Time of one engine step", bounds=DECISION_BOUNDS_S
)
WAITING_ROWS = _gauge(
    "dstack_arbiter_waiting_rows", "Rows that wait in the backends now", "model", unit="rows"
)
PLAN_SHARE = _gauge(
    "dstack_arbiter_plan_gpu_share_ratio", "Share of the plan in force", "gpu", "model", unit="ratio"
)
PLAN_BATCH = _gauge(
    "dstack_arbiter_plan_batch_rows", "Batch size of the plan in force", "gpu", "model", unit="rows"
)
PLAN_RUN = _gauge(
    "dstack_arbiter_plan_run_seconds",
    "Latency of a planned batch alone on the device, as profiled",
    "gpu",
    "model",
    unit="seconds",
)
PLAN_SLO = _gauge(
    "dstack_arbiter_plan_slo_seconds",
    "Latency objective of the plan in force",
    "gpu",
    "model",
    unit="seconds",
)
SCORE = _gauge(
    "dstack_arbiter_scoreboard_share_seconds",
    "Share-seconds served over the fairness weight, as the policy counts them; the least is served first",
    "gpu", "model", unit="share-seconds",
)  # fmt: skip
GPU_CAPACITY = _gauge(
    "dstack_arbiter_capacity_ratio", "What all grants of a GPU may sum to; 2: 200 GPU%", "gpu", unit="ratio"
)
GPU_GRANTED = _gauge("dstack_arbiter_granted_ratio", "Sum of the grants that run now", "gpu", unit="ratio")
GPU_STANDING = _gauge(
    "dstack_arbiter_standing_ratio",
    "Sum of the shares that idle instances hold ahead of their next request",
    "gpu",
    unit="ratio",
)
GPU_SHARE_TIME = _counter(
    "dstack_arbiter_granted_share_seconds_total",
    "Sum of the shares granted times the time they were held",
    "gpu", unit="share-seconds",
)  # fmt: skip

ARBITER = (
    ARBITER_UP, ARBITER_UPTIME, ARBITER_POLICY, SESSIONS, CLIENTS, DROPPED, GRANTS, UNUSED_GRANTS,
    GRANTED_ROWS, ENDED_LEASES, ROWS, LATE_ROWS, SHEDS, OVERLOADS, RUN_TIME, SHARE_TIME, GRANT_WAIT,
    DECISION_TIME, WAITING_ROWS, PLAN_SHARE, PLAN_BATCH, PLAN_RUN, PLAN_SLO, SCORE, GPU_CAPACITY, GPU_GRANTED,
    GPU_STANDING, GPU_SHARE_TIME,
)  # fmt: skip

ALL = CONTROLLER + HEALTH + GPUS + ARBITER
