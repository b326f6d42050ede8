"""The ways to share a GPU that are compared, and how each is deployed through Triton.

All use the same backend with CUDA graphs and the pipeline, so that only the way of sharing differs:

    (a) time-sliced    no MPS: the driver takes turns between the processes
    (b) temporal       one model at a time, by the arbiter
    (c) mps-default    MPS, no limits, every backend runs when it likes
    (d) mps-static     MPS, fixed knee shares of the plan (GSLICE-like), every backend runs when it likes
    (e) best-static    as (d), with the best shares and batch sizes that a search by trial finds
    (f) rate-limiter   as (d), Triton's own rate limiter with the shares as resources
    (g) one-process    all models in one stub process, a thread and a stream each
    (h) dstack         D-STACK with the settings that users get
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from compare.cells import file_of

MAX_BATCH_SIZE = 32
ONE_PROCESS = "one_process"
RESOURCE = "GPU_PCT"


@dataclass(frozen=True, slots=True)
class Alternative:
    """letter: as in the issue and the tables. mps: with the MPS daemon. shares: each process gets the plan's
    GPU% or the whole GPU. policy: the arbiter's; None: no arbiter, backends run when they like."""

    letter: str
    name: str
    summary: str
    mps: bool = True
    shares: Literal["whole", "planned", "searched"] = "whole"
    policy: str | None = None
    levels: bool = False
    rate_limiter: bool = False
    one_process: bool = False

    @property
    def server(self) -> tuple[object, ...]:
        """Alternatives with equal values can take turns on one running server."""
        return (self.mps, self.shares, self.rate_limiter, self.one_process)


ALTERNATIVES = {
    each.name: each
    for each in (
        Alternative("h", "dstack", "D-STACK", policy="dstack", levels=True),
        Alternative("b", "temporal", "one model at a time", policy="temporal"),
        Alternative("c", "mps-default", "MPS, no limits"),
        Alternative("d", "mps-static", "MPS, fixed knee shares", shares="planned"),
        Alternative("f", "rate-limiter", "Triton's rate limiter", shares="planned", rate_limiter=True),
        Alternative("e", "best-static", "best fixed shares by search", shares="searched"),
        Alternative("g", "one-process", "one process, many streams", mps=False, one_process=True),
        Alternative("a", "time-sliced", "no MPS, time slices", mps=False),
    )
}


@dataclass(frozen=True, slots=True)
class Served:
    """How one model is deployed. gpu_percent and batch_size as in config.pbtxt."""

    gpu_percent: float = 100.0
    batch_size: int = MAX_BATCH_SIZE
    slo_ms: float = 0.0
    on_late: str = "serve"
    extra: Mapping[str, str] = field(default_factory=dict)


def write_repository(
    root: Path, models_dir: Path, served: Mapping[str, Served], alternative: Alternative, kind: str
) -> dict[str, str]:
    """Write a model repository; model -> the name to ask Triton for. kind: KIND_GPU or KIND_CPU."""
    if alternative.one_process:
        from compare.one_process.repository import write_one_process

        return write_one_process(root, models_dir, served, kind)
    names = {}
    for model, how in served.items():
        name = model.replace("#", "_")
        link(models_dir / f"{file_of(model)}.onnx", root / name / "1" / "model.onnx")
        (root / name / "config.pbtxt").write_text(config_text(how, alternative, kind))
        names[model] = name
    return names


def config_text(how: Served, alternative: Alternative, kind: str) -> str:
    """config.pbtxt of one model."""
    parameters = {
        "gpu_percent": f"{how.gpu_percent:g}", "batch_size": str(how.batch_size), **how.extra,
    }  # fmt: skip
    if how.slo_ms:
        parameters |= {"slo_ms": f"{how.slo_ms:g}", "on_late": how.on_late}
    limiter = ""
    if alternative.rate_limiter:
        resource = f'{{ name: "{RESOURCE}" global: true count: {max(1, round(how.gpu_percent))} }}'
        limiter = f" rate_limiter {{ resources [ {resource} ] }}"
        parameters["prefetch"] = "0"  # execute() ends with the batch: the limiter counts what really runs
    lines = [
        'backend: "dstack"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        f"instance_group [ {{ kind: {kind} count: 1{limiter} }} ]",
        "dynamic_batching { }",
        *(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, without a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve())
