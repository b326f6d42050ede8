"""The policies by name, and how the processes of each are set up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dstack_sched.engine.dstack import DStackEngine
from dstack_sched.engine.interface import Engine
from dstack_sched.engine.rivals_spatial import (
    FixedBatchEngine,
    MaxMinEngine,
    MaxThroughputEngine,
    MpsDefaultEngine,
    MpsStaticEngine,
    RateLimiterEngine,
    TimeSlicedEngine,
)
from dstack_sched.engine.rivals_temporal import ClipperEngine, NexusEngine, TemporalEngine
from dstack_sched.errors import InputError

Shares = Literal["planned", "whole"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy. shares: whether its processes get the plan's GPU% or the whole GPU each (no MPS limit).
    gated: it asks the arbiter before each batch; the others' backends need no grant and pay no round trip.
    levels: it can choose the share of each batch, where the backends have levels. mps: models can run side by
    side; without it the driver takes turns between them."""

    make: Callable[[], Engine]
    shares: Shares
    gated: bool
    summary: str
    levels: bool = False
    mps: bool = True


POLICIES: dict[str, Policy] = {
    "dstack": Policy(DStackEngine, "planned", True, "deadlines, reservations, shares, shedding", True),
    "time-sliced": Policy(TimeSlicedEngine, "whole", False, "no MPS: the driver takes turns", mps=False),
    "temporal": Policy(TemporalEngine, "whole", False, "one model at a time, round robin"),
    "mps-default": Policy(MpsDefaultEngine, "whole", False, "all at once, no limits"),
    "mps-static": Policy(MpsStaticEngine, "planned", False, "all at once, fixed shares (GSLICE-like)"),
    "fixed-batch": Policy(FixedBatchEngine, "planned", False, "fixed shares, full batches only"),
    "max-throughput": Policy(MaxThroughputEngine, "planned", False, "cheapest requests first"),
    "max-min": Policy(MaxMinEngine, "planned", False, "least served first"),
    "triton-rate-limiter": Policy(RateLimiterEngine, "planned", False, "resource counts, fewest runs first"),
    "nexus": Policy(NexusEngine, "whole", False, "duty cycles, early drop, one at a time"),
    "clipper": Policy(ClipperEngine, "whole", False, "AIMD batches, one at a time"),
}


def policy(name: str) -> Policy:
    """The named policy. Raises InputError, listing the names, for one unknown."""
    found = POLICIES.get(name)
    if found is None:
        raise InputError(f"policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    return found


def make_engine(policy_name: str) -> Engine:
    """A fresh engine of the named policy. Raises InputError, listing the names, for one unknown."""
    return policy(policy_name).make()
