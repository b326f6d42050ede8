"""What is simulated: instances, demands, delays, faults. A scenario and a seed make a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dstack_sched.domain.event import PlanChanged
from dstack_sched.domain.workload import ModelDemand
from dstack_sched.sim.arrivals import Arrivals
from dstack_sched.sim.gpu import SpeedModel

FaultKind = Literal["hang", "crash", "slow", "arbiter"]


@dataclass(frozen=True, slots=True)
class SimInstance:
    """One backend instance as it would join. levels: shares from batch to batch; empty: gpu_percent.
    sm_groups: into how many its device is split; which of them a batch runs on makes no difference here."""

    name: str
    demand: ModelDemand
    gpu_percent: float
    levels: tuple[float, ...]
    max_batch_size: int
    batch_size: int
    sm_groups: int = 0

    @property
    def slo_us(self) -> int:
        return round(self.demand.slo_ms * 1000) if self.demand.slo_ms else 0


@dataclass(frozen=True, slots=True)
class Delays:
    """Of the control plane, in us, one way each: message to the engine (and its decision), grant to the
    backend. A grant round trip over the arbiter's socket is their sum, about 100 us."""

    to_engine_us: int = 50
    to_backend_us: int = 50


BUSY_HOST = Delays(250, 250)  # of a host of sixteen virtual cores that also serves and is loaded


@dataclass(frozen=True, slots=True)
class Serving:
    """What serving a request costs beside its run, in us. outside_us: from the client into the instance's
    queue and from the end of the run back to the client; latency only. prepare_us: from the decision to run
    until the device starts (gather, copy in, hand over); it keeps the instance busy, not the GPU, and
    overlaps the batch before where one runs. answer_us: of each row; the rows of a batch are answered one
    after the other, beside what runs next."""

    outside_us: int = 0
    prepare_us: int = 0
    answer_us: int = 0


NO_SERVING = Serving()
# Of 1.0 to 1.7 ms measured for a lone request (perf/reports/h100/dataplane.md); its parts: decisions/0126.
TRITON_H100 = Serving(outside_us=400, prepare_us=500, answer_us=350)
TAIL_US = 1000  # what Triton, Python and client add in one of a hundred requests beyond the usual (0126)


@dataclass(frozen=True, slots=True)
class Fault:
    """At at_us something breaks. hang: the instance's next batch never ends until duration_us later, when the
    process is killed and joins again. crash: the process dies and joins again after duration_us. slow: its
    batches take `factor` times as long for duration_us. arbiter: the engine is gone for duration_us; backends
    run ungated meanwhile, and a fresh engine takes over."""

    kind: FaultKind
    at_us: int
    duration_us: int
    instance: str = ""
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One GPU, one policy's deployment of models on it, and what happens to it."""

    speeds: SpeedModel
    instances: tuple[SimInstance, ...]
    plan: PlanChanged
    duration_us: int
    arrivals: Arrivals = field(default_factory=Arrivals)
    delays: Delays = field(default_factory=Delays)
    faults: tuple[Fault, ...] = ()
    serving: Serving = field(default_factory=Serving)
