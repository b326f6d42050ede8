"""Counters of an instance: plain numbers, written by the executor and gate, read by metrics.py.

Each is written by code that holds the executor's or the gate's lock, or by one thread only; a reader may
see a value a moment old, never a torn one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

STAGES = ("accept", "wait", "grant", "gather", "run", "respond")


@dataclass(slots=True)
class Stats:
    """Totals since the instance started. `sizes`: batches by rows, rounded up to a power of two.

    `stage_ns`, summed nanoseconds: accept (reading the requests of a hand-over), wait (the mean wait of a
    batch's requests, that for its grant included), grant (work waited, nothing ran and no grant had come: the
    part of wait that is the scheduler's), gather, run, respond.
    """

    requests: int = 0
    rows: int = 0
    batches: int = 0
    failed: int = 0
    rejected: int = 0
    cancelled: int = 0
    late: int = 0
    grants: int = 0
    ungated_batches: int = 0
    unused_grants: int = 0
    arbiter_connects: int = 0
    arbiter_disconnects: int = 0
    waiting_rows: int = 0
    gated: int = 0
    stage_ns: Counter[str] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
