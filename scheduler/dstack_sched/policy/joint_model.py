"""The joint program in full, as a mixed-integer linear program (cvxpy, HiGHS); for one GPU or a few models.

y[m,k,g] = 1: a replica of model m runs as candidate k on GPU g. On each GPU g, with capacity C:

    sum d y <= C                  demand (candidates.py)
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

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dstack_sched.policy.candidates import Candidate, JointTask
from dstack_sched.policy.joint_rows import (
    Answer,
    Kind,
    Limits,
    Rows,
    choose_rounds,
    cost_of,
    replica_key,
    size,
    solve_program,
    tolerated,
)

_KINDS: tuple[Kind, ...] = ("side", "work", "serial")


class JointModel:
    """One instance; `solve` finds the assignment of least weighted demand."""

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
        self.rounds = choose_rounds(options, limits, max_rounds)
        self.width = len(self.columns)
        self.total = self.width + limits.gpus * len(self.rounds)
        self.pick: dict[int, dict[tuple[float, int, int], int]] = {}  # model -> what its replicas run as -> x
        for m, items in enumerate(options):
            if any(c.replicas > 1 for c in items):
                keys = dict.fromkeys(replica_key(c) for c in items)
                self.pick[m] = {key: self.total + i for i, key in enumerate(keys)}
                self.total += len(keys)
        self._below, self._equal = Rows(), Rows()
        self._each_model_once()
        for g in range(limits.gpus):
            self._gpu_limits(g)
            self._round_limits(g)
            if "wait" not in limits.relaxed:
                self._round_members(g)

    def solve(self, *, gap: float, time_limit_s: float) -> Answer:
        """The plan of least weighted demand."""
        cost = np.zeros(self.total)
        for column, (m, _, _) in enumerate(self.columns):
            cost[column] = cost_of(self.tasks[m], self._of(column))
        solved = solve_program(
            cost,
            self._below,
            self._equal,
            range(self.total),
            np.ones(self.total),
            gap=gap,
            time_limit_s=time_limit_s,
        )
        if solved.values is None:
            return Answer(solved.status, bound=solved.bound)
        chosen = tuple(self.columns[i] for i in np.nonzero(solved.values[: self.width] > 0.5)[0])
        return Answer(solved.status, chosen, float(cost @ solved.values), solved.bound)

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

    def _z(self, g: int, r: int) -> int:
        return self.width + g * len(self.rounds) + r

    def _each_model_once(self) -> None:
        by_model: dict[int, list[int]] = defaultdict(list)
        for column, (m, _, _) in enumerate(self.columns):
            by_model[m].append(column)
        for m, columns in by_model.items():
            if m not in self.pick:
                self._equal.add(columns, [1.0] * len(columns), 1.0)
                continue
            picks = self.pick[m]
            self._equal.add(list(picks.values()), [1.0] * len(picks), 1.0)
            for key, x in picks.items():
                same = [c for c in columns if replica_key(self._of(c)) == key]
                self._equal.add([*same, x], [1.0] * len(same) + [-float(key[2])], 0.0)
            for g in range(self.limits.gpus):
                here = [c for c in columns if self.columns[c][2] == g]
                self._below.add(here, [1.0] * len(here), 1.0)
        for g in range(self.limits.gpus):
            z = [self._z(g, r) for r in range(len(self.rounds))]
            self._equal.add(z, [1.0] * len(z), 1.0)

    def _gpu_limits(self, g: int) -> None:
        limits, columns = self.limits, self.on_gpu[g]
        found = [self._of(c) for c in columns]
        if "capacity" not in limits.relaxed:
            self._below.add(columns, [c.demand_percent for c in found], limits.capacity_percent)
        if "memory" not in limits.relaxed:
            sizes = [self.tasks[self.columns[c][0]].memory_bytes / limits.memory_bytes for c in columns]
            self._below.add(columns, sizes, 1.0)
        clients = float(limits.max_clients if "clients" not in limits.relaxed else len(self.columns))
        self._below.add(columns, [clients if c.alone else 1.0 for c in found], clients)

    def _round_limits(self, g: int) -> None:
        """sum p, sum p F and sum F against the round in force; the other two get what that round implies."""
        shared = [c for c in self.on_gpu[g] if not self._of(c).alone]
        found = [self._of(c) for c in shared]
        if not found:
            return
        low_p, low_f = min(c.gpu_percent for c in found), min(c.latency_ms for c in found)
        high_p, high_f = max(c.gpu_percent for c in found), max(c.latency_ms for c in found)
        implied: dict[Kind, dict[Kind, float]] = {
            "side": {"side": 1.0, "work": 1 / low_f, "serial": high_p / low_f},
            "work": {"side": high_f, "work": 1.0, "serial": high_p},
            "serial": {"side": high_f / low_p, "work": 1 / low_p, "serial": 1.0},
        }
        for kind in _KINDS:
            whole = sum(
                max((size(c, kind) for c in items if not c.alone), default=0.0)
                * max(c.replicas for c in items)
                for items in self.options
            )
            tops = [min(whole, r.limit * implied[kind][r.kind]) for r in self.rounds]
            tops = [r.limit if r.kind == kind else top for r, top in zip(self.rounds, tops, strict=True)]
            z = [self._z(g, r) for r in range(len(self.rounds))]
            self._below.add([*shared, *z], [*(size(c, kind) for c in found), *(-top for top in tops)], 0.0)

    def _round_members(self, g: int) -> None:
        """A candidate that tolerates less than T is not on a GPU whose round is T or longer."""
        by_model: dict[int, list[int]] = defaultdict(list)
        for column in self.on_gpu[g]:
            if not self._of(column).alone:
                by_model[self.columns[column][0]].append(column)
        for kind in ("work", "serial"):
            longer = sorted((x.limit, self._z(g, r)) for r, x in enumerate(self.rounds) if x.kind == kind)
            for columns in by_model.values():
                most = {c: tolerated(self._of(c), kind, self.limits.capacity_percent) for c in columns}
                out_before = 0
                for i, (limit, _) in enumerate(longer):
                    out = [c for c in columns if most[c] < limit * (1 - 1e-9)]
                    if len(out) > out_before:
                        z = [column for _, column in longer[i:]]
                        self._below.add([*out, *z], [1.0] * (len(out) + len(z)), 1.0)
                    out_before = len(out)
