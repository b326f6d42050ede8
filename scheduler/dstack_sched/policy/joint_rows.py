"""What the forms of the joint program share: waiting rules, constraint rows, and the call of the solver."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cvxpy as cp
import numpy as np
import scipy.sparse as sp

from dstack_sched.policy.candidates import Candidate, JointTask, spread
from dstack_sched.policy.monotone import Array

Kind = Literal["side", "work", "serial", "alone"]
Status = Literal["optimal", "limit", "infeasible", "failed"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one GPU, all GPUs alike. relaxed: limits left out to find which one binds ("memory", "clients",
    "wait", "capacity")."""

    gpus: int
    capacity_percent: float
    memory_bytes: int
    max_clients: int
    relaxed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Round:
    """A rule for waiting on one GPU: limit T in percent x ms ("work") or ms ("serial"), C for "side"; "alone"
    is a GPU with one replica."""

    kind: Kind
    limit: float


@dataclass(frozen=True, slots=True)
class Answer:
    """chosen: (model index, candidate index, gpu) of every replica. value: weighted demand in percent of one
    GPU; bound: a proven lower bound on it. Empty when the status is infeasible or failed."""

    status: Status
    chosen: tuple[tuple[int, int, int], ...] = ()
    value: float = math.nan
    bound: float = -math.inf


def work(c: Candidate) -> float:
    """The share-time of one batch, p F, in percent x ms."""
    return c.gpu_percent * c.latency_ms


def size(c: Candidate, kind: Kind) -> float:
    """What the candidate takes of a round's limit."""
    if kind == "work":
        return work(c)
    return c.latency_ms if kind == "serial" else c.gpu_percent


def tolerated(c: Candidate, kind: Kind, capacity_percent: float) -> float:
    """The longest round at which the candidate keeps its SLO: L (work), M (serial), no limit otherwise."""
    if kind == "work" and math.isfinite(c.slack_ms):
        return c.slack_ms * max(0.0, capacity_percent - c.gpu_percent) + work(c)
    return c.slack_ms + c.latency_ms if kind == "serial" else math.inf


def choose_rounds(options: Sequence[Sequence[Candidate]], limits: Limits, most: int) -> list[Round]:
    """Side by side, and at most `most` rounds of each other kind, out of all that could matter: those that
    some candidate just tolerates. On one GPU all models share the round, which narrows them down."""
    capacity = limits.capacity_percent
    shared = [[c for c in items if not c.alone] for items in options]
    rounds = [Round("side", capacity)]
    kinds: tuple[Kind, ...] = ("work", "serial")
    for kind in kinds:
        everything = sum(max((size(c, kind) for c in items), default=0.0) for items in shared)
        if "wait" in limits.relaxed:
            rounds.append(Round(kind, everything))
            continue
        values = {min(tolerated(c, kind, capacity), everything) for items in shared for c in items}
        if limits.gpus == 1:
            low = sum(min((size(c, kind) for c in items), default=math.inf) for items in shared)
            high = min(max((tolerated(c, kind, capacity) for c in items), default=0.0) for items in shared)
            values = {x for x in values if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)}
        rounds += [Round(kind, x) for x in spread(sorted(values - {0.0}), most)]
    return rounds


def fits_round(c: Candidate, r: Round, limits: Limits) -> bool:
    """May the candidate be on a GPU under this rule?"""
    if (r.kind == "alone") != c.alone:
        return False
    if "wait" in limits.relaxed:
        return True
    return tolerated(c, r.kind, limits.capacity_percent) >= r.limit * (1 - 1e-9)


def cost_of(task: JointTask, c: Candidate) -> float:
    """Weighted demand in percent; a best-effort model, which claims none, takes the least share-time."""
    if math.isinf(c.slack_ms):
        return 1e-6 * work(c) / c.batch_size
    return task.weight * c.demand_percent


class Rows:
    """Constraint rows  sum coefficient x column <= (or ==) right, collected as triplets."""

    def __init__(self) -> None:
        self.row: list[int] = []
        self.column: list[int] = []
        self.value: list[float] = []
        self.right: list[float] = []

    def add(self, columns: Sequence[int], values: Sequence[float], right: float) -> None:
        self.row.extend([len(self.right)] * len(columns))
        self.column.extend(columns)
        self.value.extend(values)
        self.right.append(right)

    def matrix(self, width: int) -> sp.csr_array:
        return sp.csr_array((self.value, (self.row, self.column)), shape=(len(self.right), width))


@dataclass(frozen=True, slots=True)
class Solved:
    """values: shape (columns,), None without a solution."""

    status: Status
    values: Array | None
    bound: float


def solve_program(
    cost: Array,
    below: Rows,
    equal: Rows,
    integers: Sequence[int],
    upper: Array,
    *,
    gap: float,
    time_limit_s: float,
) -> Solved:
    """min cost v over below, equal, 0 <= v <= upper, v integer where said. cvxpy with HiGHS."""
    width = cost.size
    integer: bool | tuple[Array, ...] = (np.asarray(integers, np.int64),) if integers else False
    v = cp.Variable(width, integer=integer, bounds=[np.zeros(width), upper])
    left, even = below.matrix(width), equal.matrix(width)
    right, exact = np.asarray(below.right), np.asarray(equal.right)
    problem = cp.Problem(cp.Minimize(cost @ v), [left @ v <= right, even @ v == exact])
    options = {"mip_rel_gap": gap, "time_limit": time_limit_s, "threads": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy warns of a time limit; the status says it too
        try:
            problem.solve(solver=cp.HIGHS, highs_options=options)
        except cp.SolverError:
            return Solved("failed", None, -math.inf)
    info = problem.solver_stats.extra_stats if problem.solver_stats is not None else None
    bound = float(getattr(info, "mip_dual_bound", -math.inf)) if integers else -math.inf
    if problem.status in ("infeasible", "infeasible_or_unbounded"):
        return Solved("infeasible", None, math.inf)
    if problem.status not in (cp.OPTIMAL, cp.USER_LIMIT) or v.value is None:
        return Solved("failed", None, bound)
    values = np.asarray(v.value, np.float64)
    # A run cut short by its time limit may carry no solution: check it before it is believed.
    whole = values[list(integers)] if integers else np.zeros(0)
    holds = (
        (left @ values <= right + 1e-5 * (1 + np.abs(right))).all()
        and np.allclose(even @ values, exact, atol=1e-4)
        and (np.abs(whole - np.round(whole)) < 1e-4).all()
    )
    if not holds:
        return Solved("failed", None, bound)
    value = float(cost @ values)
    done = problem.status == cp.OPTIMAL
    return Solved("optimal" if done else "limit", values, bound if integers else value)


def replica_key(c: Candidate) -> tuple[float, int, int]:
    """What all replicas of a model have in common: (GPU%, batch size, replicas)."""
    return (c.gpu_percent, c.batch_size, c.replicas)
