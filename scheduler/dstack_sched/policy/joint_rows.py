"""What the forms of the joint program share: waiting rules, constraint rows, and the call of the solver."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import cvxpy as cp
import highspy
import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog

from dstack_sched.policy.candidates import Candidate, JointTask, spread
from dstack_sched.policy.monotone import Array

Kind = Literal["side", "slots", "alone"]
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
    """A rule for waiting on one GPU (joint_model.py). limit: C in percent ("side"), or the round T in ms, the
    largest sum of run times ("slots", with the number of slots). "alone": a GPU with one replica. widest:
    shares up to C/widest belong (0: C/slots), for bounds over numbers of slots that are not tried."""

    kind: Kind
    limit: float
    slots: int = 1
    widest: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """chosen: (model index, candidate index, gpu) of every replica. value: weighted demand in percent of one
    GPU; bound: a proven lower bound on it. Empty when the status is infeasible or failed."""

    status: Status
    chosen: tuple[tuple[int, int, int], ...] = ()
    value: float = math.nan
    bound: float = -math.inf


def size(c: Candidate, kind: Kind) -> float:
    """What the candidate takes of a rule's limit: its run in ms, or its GPU%."""
    return c.latency_ms if kind == "slots" else c.gpu_percent


def tolerated_ms(c: Candidate, slots: int) -> float:
    """The longest round at which the candidate keeps its SLO with so many slots."""
    return slots * c.slack_ms + c.latency_ms


def choose_rounds(
    options: Sequence[Sequence[Candidate]], limits: Limits, most: int, most_slots: int = 1000
) -> list[Round]:
    """Side by side, and out of all slots and rounds that could matter at most `most_slots` numbers of slots
    with at most `most` rounds each: rounds that some candidate just tolerates. On one GPU all models share
    them, which narrows them down (then with all numbers of slots)."""
    capacity = limits.capacity_percent
    shared = [[c for c in items if not c.alone] for items in options]
    rounds = [Round("side", capacity)]
    counts = sorted({slots_of(c.gpu_percent, capacity) for items in shared for c in items} - {0})
    for fewer, slots in pairwise([0, *(int(x) for x in spread(counts, most_slots))]):
        allowed = [[c for c in items if slots_of(c.gpu_percent, capacity) > fewer] for items in shared]
        everything = sum(max((c.latency_ms for c in items), default=0.0) for items in shared)
        if "wait" in limits.relaxed:
            rounds.append(Round("slots", everything, slots))
            continue
        values = {min(tolerated_ms(c, slots), everything) for items in allowed for c in items}
        if limits.gpus == 1:
            low = sum(min((c.latency_ms for c in items), default=math.inf) for items in allowed)
            high = min(max((tolerated_ms(c, slots) for c in items), default=0.0) for items in allowed)
            values = {x for x in values if low * (1 - 1e-9) <= x <= high * (1 + 1e-9)}
        rounds += [Round("slots", x, slots) for x in spread(sorted(values - {0.0}), most)]
    return rounds


def slots_of(gpu_percent: float, capacity_percent: float) -> int:
    """How many replicas of this size the capacity holds at once."""
    return math.floor(capacity_percent / gpu_percent + 1e-9)


def slots_in_force(members: Sequence[Candidate], capacity_percent: float) -> int | None:
    """How many of these replicas run at a time at least, while one waits; None where all fit side by side."""
    if sum(c.gpu_percent for c in members) <= capacity_percent * (1 + 1e-9):
        return None
    return slots_of(max(c.gpu_percent for c in members), capacity_percent)


def fits_round(c: Candidate, r: Round, limits: Limits) -> bool:
    """May the candidate be on a GPU under this rule?"""
    if (r.kind == "alone") != c.alone:
        return False
    if r.kind != "slots":
        return True
    if slots_of(c.gpu_percent, limits.capacity_percent) < (r.widest or r.slots):
        return False
    return "wait" in limits.relaxed or tolerated_ms(c, r.slots) >= r.limit * (1 - 1e-9)


def cost_of(task: JointTask, c: Candidate) -> float:
    """Weighted demand in percent; a best-effort model, which claims none, takes the least share-time."""
    if math.isinf(c.slack_ms):
        return 1e-6 * c.gpu_percent * c.latency_ms / c.batch_size
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
    """min cost v over below, equal, 0 <= v <= upper, v integer where said. cvxpy with HiGHS; a program
    without integers, a bound of which many are asked for, goes to HiGHS by itself, which is much shorter."""
    width = cost.size
    left, even = below.matrix(width), equal.matrix(width)
    right, exact = np.asarray(below.right), np.asarray(equal.right)
    if not integers:
        return _solve_real(cost, (left, right), (even, exact), upper, time_limit_s)
    _let_highs_greet()
    v = cp.Variable(width, integer=(np.asarray(integers, np.int64),), bounds=[np.zeros(width), upper])
    problem = cp.Problem(cp.Minimize(cost @ v), [left @ v <= right, even @ v == exact])
    options = {"mip_rel_gap": gap, "time_limit": time_limit_s, "threads": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cvxpy warns of a time limit; the status says it too
        try:
            problem.solve(solver=cp.HIGHS, highs_options=options)
        except cp.SolverError:
            return Solved("failed", None, -math.inf)
    info = problem.solver_stats.extra_stats if problem.solver_stats is not None else None
    bound = float(getattr(info, "mip_dual_bound", -math.inf))
    if problem.status in ("infeasible", "infeasible_or_unbounded"):
        return Solved("infeasible", None, math.inf)
    if problem.status not in (cp.OPTIMAL, cp.USER_LIMIT) or v.value is None:
        return Solved("failed", None, bound)
    values = np.asarray(v.value, np.float64)
    # A run cut short by its time limit may carry no solution: check it before it is believed.
    whole = values[list(integers)]
    holds = (
        (left @ values <= right + 1e-5 * (1 + np.abs(right))).all()
        and np.allclose(even @ values, exact, atol=1e-4)
        and (np.abs(whole - np.round(whole)) < 1e-4).all()
    )
    if not holds:
        return Solved("failed", None, bound)
    return Solved("optimal" if problem.status == cp.OPTIMAL else "limit", values, bound)


@functools.cache
def _let_highs_greet() -> None:
    """HiGHS 1.16 writes its name to the process's standard output when the first solver is made, before any
    option can be set; there it would precede what `--json` prints."""
    try:
        kept = os.dup(1)
    except OSError:  # closed
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


def _solve_real(
    cost: Array,
    below: tuple[sp.csr_array, Array],
    equal: tuple[sp.csr_array, Array],
    upper: Array,
    time_limit_s: float,
) -> Solved:
    if (np.diff(equal[0].indptr) == 0).any():  # a model without any column
        return Solved("infeasible", None, math.inf)
    found = linprog(
        cost,
        A_ub=below[0],
        b_ub=below[1],
        A_eq=equal[0],
        b_eq=equal[1],
        bounds=np.stack([np.zeros_like(upper), upper], axis=1),
        method="highs",
        options={"time_limit": time_limit_s},
    )
    if found.status == 2:
        return Solved("infeasible", None, math.inf)
    if found.status != 0:
        return Solved("failed", None, -math.inf)
    return Solved("optimal", np.asarray(found.x, np.float64), float(found.fun))


def replica_key(c: Candidate) -> tuple[float, int, int]:
    """What all replicas of a model have in common: (GPU%, batch size, replicas)."""
    return (c.gpu_percent, c.batch_size, c.replicas)
