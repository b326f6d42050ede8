"""What was measured about a model on one kind of device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Device:
    """The device a profile holds for. On a CPU host `sms` is the number of cores."""

    name: str
    sms: int
    memory_bytes: int
    driver: str
    runtime: str


@dataclass(frozen=True, slots=True)
class ProfilePoint:
    """Latency of one batch, model alone on the device. gpu_percent in (0, 100], batch_size >= 1."""

    gpu_percent: float
    batch_size: int
    latency_ms_p50: float
    latency_ms_p99: float
    samples: int


@dataclass(frozen=True, slots=True)
class LatencyFit:
    """f(p, b) = a0 + a1 b + (a2 + a3 b) / p, in ms, p in percent (DESIGN section 3)."""

    a0: float
    a1: float
    a2: float
    a3: float
    max_relative_error: float


@dataclass(frozen=True, slots=True)
class Knee:
    """GPU% beyond which 10 more points cut latency by less than the stated fraction, at a batch size."""

    gpu_percent: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """All that is known of one model's speed. `levels`: GPU percentages that need no reload, if any."""

    name: str
    sha256: str
    memory_bytes: int
    points: tuple[ProfilePoint, ...]
    fit: LatencyFit | None = None
    knee: Knee | None = None
    levels: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Correction:
    """What service has shown a profile to be by now (app/drift.py). base: the profile it was made from.

    points: measured in service, at most one a (GPU%, batch size); scale: of all other latencies. slowdown: by
    co-runners of 100%, None: as the co-runs say.
    """

    base: str
    scale: float = 1.0
    points: tuple[ProfilePoint, ...] = ()
    slowdown: float | None = None


@dataclass(frozen=True, slots=True)
class CorunMember:
    """One model of a co-run measurement, closed loop."""

    model: str
    gpu_percent: float
    batch_size: int
    latency_ms_p50: float
    throughput_per_s: float


@dataclass(frozen=True, slots=True)
class CorunPoint:
    """Models measured side by side under MPS; gpu_percent 100 means no limit."""

    members: tuple[CorunMember, ...]


@dataclass(frozen=True, slots=True)
class ProfileSet:
    """The content of a profiles.json; slowdown: of models for which service has shown what co-runners of 100%
    do to them, in place of what the co-runs say."""

    device: Device
    models: dict[str, ModelProfile]
    corun: tuple[CorunPoint, ...] = field(default=())
    slowdown: Mapping[str, float] = field(default_factory=dict)
