"""The joint program as a mixed-integer linear program (cvxpy, HiGHS). Solved by joint_program.py.

y[m,k,g] = 1: a replica of model m runs as candidate k on GPU g. On each GPU g, with capacity C:

    sum d y <= C t                demand (candidates.py); t = 1, or the least t for the largest headroom 1/t
    sum memory y <= memory,       sum y <= MPS clients
    a candidate `alone` shares its GPU with nobody

and, for the wait W_m that co-runners cause, one rule per GPU, z[g,r] = 1:

    side by side:  sum p y <= C                 everybody fits at once: nobody waits, W_m = 0
    work round T:  sum p F y <= T <= L_m        W_m = sum over co-runners p_j F_j / (C - p_m)
    serial round T:  sum F y <= T <= M_m        W_m = sum over co-runners F_j
    with  L_m = slack_m (C - p_m) + p_m F_m,    M_m = slack_m + F_m   (so that W_m <= slack_m)

Why these bound the wait: the engine serves one batch of each model that waits before any model twice (its
session rule). While m waits for its p_m, somebody runs, so it waits no longer than all those batches one
after the other (serial); and less than p_m is free, so the others' share-time sum p_j F_j runs off at C - p_m
or faster (work). The rounds T are values of L and M of the candidates: with all of them the program is exact,
and with fewer (large programs) a plan is still valid, if perhaps not the best.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from dstack_sched.policy.candidates import Candidate, JointTask, spread
from dstack_sched.policy.monotone import Array

Goal = Literal["demand", "headroom"]
Status = Literal["optimal", "limit", "infeasible", "failed"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one GPU, all GPUs alike. relaxed: names of limits left out to find which one binds
    ("memory", "clients", "wait")."""

    gpus: int
    capacity_percent: float
    memory_bytes: int
    max_clients: int
    relaxed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """chosen: (model index, candidate index, gpu) of every replica. value: the goal's; bound: a proven bound
    on it (equal up to the gap when optimal). Empty when the status is infeasible or failed."""

    status: Status
    chosen: tuple[tuple[int, int, int], ...] = ()
    value: float = float("nan")
    bound: float = float("nan")


@dataclass(frozen=True, slots=True)
class Round:
    """A rule for waiting on one GPU; limit T in percent x ms ("work") or ms ("serial"), C for "side"."""

    kind: Literal["side", "work", "serial"]
    limit: float


def work(c: Candidate) -> float:
    """The share-time of one batch, p F, in percent x ms."""
    return c.gpu_percent * c.latency_ms


def work_tolerated(c: Candidate, capacity_percent: float) -> float:
    """L: the largest sum of p F on its GPU at which the candidate keeps its SLO."""
    if math.isinf(c.slack_ms):
        return math.inf
    return c.slack_ms * max(0.0, capacity_percent - c.gpu_percent) + work(c)


def serial_tolerated(c: Candidate) -> float:
    """M: the largest sum of F on its GPU at which the candidate keeps its SLO."""
    return c.slack_ms + c.latency_ms


class _Rows:
    """Constraint rows  sum coefficient * column <= right, collected as triplets."""

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


class JointModel:
    """One instance, built once; `solve` may be called for each goal."""

    def __init__(
        self,
        tasks: Sequence[JointTask],
        options: Sequence[Sequence[Candidate]],
        limits: Limits,
        max_rounds: int = 1000,
    ) -> None:
        """options: the candidates of each task, in its order, none empty. max_rounds: of each kind."""
        self.tasks, self.options, self.limits = tasks, options, limits
        # Large first: this order breaks the symmetry between equal GPUs where it bites most.
        self.order = sorted(range(len(tasks)), key=lambda m: -min(c.demand_percent for c in options[m]))
        self.columns: list[tuple[int, int, int]] = []
        self._place_columns()
        self.on_gpu: list[list[int]] = [[] for _ in range(limits.gpus)]
        for column, (_, _, g) in enumerate(self.columns):
            self.on_gpu[g].append(column)
        self.rounds = self._choose_rounds(max_rounds)
        self.width = len(self.columns)
        self.t = self.width + limits.gpus * len(self.rounds)
        self.pick: dict[tuple[int, int], int] = {}  # x[m, k]: a model with replicas takes candidate k
        for m, items in enumerate(options):
            if any(c.replicas > 1 for c in items):
                for key in dict.fromkeys(_key(c) for c in items):
                    self.pick[(m, _index(items, key))] = self.t + 1 + len(self.pick)
        self.replicated = {m for m, _ in self.pick}
        self.total = self.t + 1 + len(self.pick)
        self._rows = self._inequalities()
        self._equal = self._equalities()

    def _z(self, g: int, r: int) -> int:
        return self.width + g * len(self.rounds) + r

    def _place_columns(self) -> None:
        used = 0
        for m in self.order:
            used += max(c.replicas for c in self.options[m])
            # Equal GPUs are numbered in the order in which models first use them.
            for g in range(min(used, self.limits.gpus)):
                self.columns.extend((m, k, g) for k in range(len(self.options[m])))

    def _of(self, column: int) -> Candidate:
        m, k, _ = self.columns[column]
        return self.options[m][k]

    def _choose_rounds(self, most: int) -> list[Round]:
        shared = [c for items in self.options for c in items if not c.alone]
        capacity = self.limits.capacity_percent
        if "wait" in self.limits.relaxed:
            return [Round("work", 2 * sum(max(work(c) for c in items) for items in self.options))]
        works = {work_tolerated(c, capacity) for c in shared} - {math.inf}
        serials = {serial_tolerated(c) for c in shared} - {math.inf}
        rounds = [Round("side", capacity)]
        rounds += [Round("work", x) for x in spread(sorted(works), most)]
        rounds += [Round("serial", x) for x in spread(sorted(serials), most)]
        if not works and shared:
            rounds.append(Round("work", 2 * sum(max(work(c) for c in items) for items in self.options)))
        return rounds

    def _equalities(self) -> _Rows:
        rows = _Rows()
        by_model: dict[int, list[int]] = defaultdict(list)
        for column, (m, _, _) in enumerate(self.columns):
            by_model[m].append(column)
        for m, columns in by_model.items():
            picks = {k: x for (model, k), x in self.pick.items() if model == m}
            if not picks:
                rows.add(columns, [1.0] * len(columns), 1.0)
                continue
            rows.add(list(picks.values()), [1.0] * len(picks), 1.0)
            for k, x in picks.items():
                same = [c for c in columns if _key(self._of(c)) == _key(self.options[m][k])]
                rows.add([*same, x], [1.0] * len(same) + [-float(self.options[m][k].replicas)], 0.0)
        for g in range(self.limits.gpus):
            z = [self._z(g, r) for r in range(len(self.rounds))]
            rows.add(z, [1.0] * len(z), 1.0)
        return rows

    def _inequalities(self) -> _Rows:
        rows, limits = _Rows(), self.limits
        for g in range(limits.gpus):
            columns = self.on_gpu[g]
            found = [self._of(c) for c in columns]
            rows.add([*columns, self.t], [*(c.demand_percent for c in found), -limits.capacity_percent], 0.0)
            if "memory" not in limits.relaxed:
                sizes = [self.tasks[self.columns[c][0]].memory_bytes / limits.memory_bytes for c in columns]
                rows.add(columns, sizes, 1.0)
            clients = limits.max_clients if "clients" not in limits.relaxed else len(self.tasks) + 1
            rows.add(columns, [float(clients) if c.alone else 1.0 for c in found], float(clients))
            self._round_limits(rows, g)
            self._round_members(rows, g)
        self._utilizations(rows)
        return rows

    def _utilizations(self, rows: _Rows) -> None:
        """u <= t for each replica; one replica of a model at most on a GPU."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for column, (m, _, g) in enumerate(self.columns):
            groups[(m, g if m in self.replicated else -1)].append(column)
        for (_, g), columns in groups.items():
            rows.add([*columns, self.t], [*(self._of(c).utilization for c in columns), -1.0], 0.0)
            if g >= 0:
                rows.add(columns, [1.0] * len(columns), 1.0)

    def _round_limits(self, rows: _Rows, g: int) -> None:
        """sum p, sum p F and sum F against the round in force; the other two get what that round implies."""
        shared = [c for c in self.on_gpu[g] if not self._of(c).alone]
        found = [self._of(c) for c in shared]
        if not found:
            return
        low_p, low_f = min(c.gpu_percent for c in found), min(c.latency_ms for c in found)
        high_p, high_f = max(c.gpu_percent for c in found), max(c.latency_ms for c in found)
        for kind, value, implied in (
            ("side", lambda c: c.gpu_percent, {"work": 1 / low_f, "serial": high_p / low_f}),
            ("work", work, {"side": high_f, "serial": high_p}),
            ("serial", lambda c: c.latency_ms, {"side": high_f / low_p, "work": 1 / low_p}),
        ):
            sizes = [value(c) for c in found]
            whole = sum(max((value(c) for c in items if not c.alone), default=0.0) for items in self.options)
            tops = [min(whole, r.limit * (1.0 if r.kind == kind else implied[r.kind])) for r in self.rounds]
            z = [self._z(g, r) for r in range(len(self.rounds))]
            rows.add([*shared, *z], [*sizes, *(-top for top in tops)], 0.0)

    def _round_members(self, rows: _Rows, g: int) -> None:
        """A candidate that tolerates less than T is not on a GPU whose round is T or longer."""
        by_model: dict[int, list[int]] = defaultdict(list)
        for column in self.on_gpu[g]:
            if not self._of(column).alone:
                by_model[self.columns[column][0]].append(column)
        capacity = self.limits.capacity_percent
        for kind in ("work", "serial"):
            longer = sorted((x.limit, self._z(g, r)) for r, x in enumerate(self.rounds) if x.kind == kind)
            for columns in by_model.values():
                tolerated = {
                    c: work_tolerated(self._of(c), capacity)
                    if kind == "work"
                    else serial_tolerated(self._of(c))
                    for c in columns
                }
                out_before = 0
                for i, (limit, _) in enumerate(longer):
                    out = [c for c in columns if tolerated[c] < limit * (1 - 1e-9)]
                    if len(out) > out_before:
                        z = [column for _, column in longer[i:]]
                        rows.add([*out, *z], [1.0] * (len(out) + len(z)), 1.0)
                    out_before = len(out)

    def solve(self, goal: Goal, *, gap: float, time_limit_s: float) -> Answer:
        """demand: least weighted demand with every rate served (t = 1). headroom: least t."""
        integers = [*range(self.t), *self.pick.values()]
        v = cp.Variable(self.total, boolean=(np.asarray(integers),), bounds=[0, None])
        cost = np.zeros(self.total)
        for column, (m, _, _) in enumerate(self.columns):
            c = self._of(column)
            # The weight of a best-effort model has no demand to act on: it takes the least share-time.
            per_percent = self.tasks[m].weight / self.limits.capacity_percent
            best_effort = (
                1e-6 * c.gpu_percent * c.latency_ms / c.batch_size if not np.isfinite(c.slack_ms) else 0.0
            )
            cost[column] = per_percent * (c.demand_percent + best_effort)
        constraints: list[Any] = [
            self._rows.matrix(self.total) @ v <= np.asarray(self._rows.right),
            self._equal.matrix(self.total) @ v == np.asarray(self._equal.right),
        ]
        if goal == "demand":
            constraints.append(v[self.t] == 1.0)
        else:
            cost = 1e-6 * cost / max(1e-9, float(cost.sum()))
            cost[self.t] = 1.0
        problem = cp.Problem(cp.Minimize(cost @ v), constraints)
        return self._read(problem, v, cost, gap, time_limit_s)

    def _read(
        self, problem: cp.Problem, v: cp.Variable, cost: Array, gap: float, time_limit_s: float
    ) -> Answer:
        options = {"mip_rel_gap": gap, "time_limit": time_limit_s, "threads": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cvxpy warns of a time limit; the status says it too
            try:
                problem.solve(solver=cp.HIGHS, highs_options=options)
            except cp.SolverError:
                return Answer("failed")
        if problem.status in ("infeasible", "infeasible_or_unbounded"):
            return Answer("infeasible")
        if problem.status not in (cp.OPTIMAL, cp.USER_LIMIT) or v.value is None:
            return Answer("failed")
        values: NDArray[np.float64] = np.asarray(v.value)
        if not self._holds(values):
            return Answer("failed")
        chosen = tuple(self.columns[i] for i in np.nonzero(values[: self.width] > 0.5)[0])
        info = problem.solver_stats.extra_stats
        bound = float(getattr(info, "mip_dual_bound", np.nan))
        return Answer(
            "optimal" if problem.status == cp.OPTIMAL else "limit", chosen, float(cost @ values), bound
        )

    def _holds(self, values: Array) -> bool:
        """A run cut short by its time limit may carry no solution: check the rows before it is believed."""
        left = self._rows.matrix(self.total) @ values
        even = self._equal.matrix(self.total) @ values
        return bool(
            (left <= np.asarray(self._rows.right) + 1e-5 * (1 + np.abs(self._rows.right))).all()
            and np.allclose(even, self._equal.right, atol=1e-4)
            and (np.abs(values[: self.width] - np.round(values[: self.width])) < 1e-4).all()
        )


def _key(c: Candidate) -> tuple[float, int, int]:
    return (c.gpu_percent, c.batch_size, c.replicas)


def _index(items: Sequence[Candidate], key: tuple[float, int, int]) -> int:
    return next(k for k, c in enumerate(items) if _key(c) == key)
