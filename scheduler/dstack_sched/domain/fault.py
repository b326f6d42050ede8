"""What can go wrong in a deployment, as records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# What Triton says of a CUDA context of its own that is lost; memory that is short may be there again later.
NO_STREAM = r"unable to create stream: (?!out of memory)"


class FaultKind(str, Enum):
    """The faults that are looked for; values are labels of metrics and words of the decision log."""

    STUB_DEAD = "stub_dead"
    MODEL_NOT_LOADED = "model_not_loaded"
    SERVER_AWAY = "server_away"
    ARBITER_AWAY = "arbiter_away"
    ARBITER_WITHOUT_PLAN = "arbiter_without_plan"
    PLAN_REFUSED = "plan_refused"
    MPS_DEAD = "mps_dead"
    SERVER_WITHOUT_GPU = "server_without_gpu"
    GPU_LOST = "gpu_lost"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Fault:
    """Something is wrong with `subject` (a model, a GPU, a service) since `since_us` (monotonic).

    detail: one line for people that does not repeat kind and subject.
    """

    kind: FaultKind
    subject: str
    since_us: int
    detail: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.detail}"
