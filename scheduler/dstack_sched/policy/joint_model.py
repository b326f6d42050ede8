"""The joint program in full, as a mixed-integer linear program (cvxpy, HiGHS); for one GPU or a few models.

y[m,k,g] = 1: a replica of model m runs as candidate k on GPU g. On each GPU g, with capacity C:

    sum d y <= C                  demand (candidates.py)
    sum memory y <= memory,       sum y <= MPS clients
    a candidate `alone` shares its GPU with nobody

and, for the wait W_m that co-runners cause and for keeping up with the rates, one rule per GPU, z[g,r] = 1:

    side by side:        sum p y <= C        everybody fits at once: nobody waits, W_m = 0
    s slots, round T:    p <= C/s,  sum u y <= s,  sum F y <= T <= s slack_m + F_m
                         so that W_m = sum over co-runners of F_j / s <= slack_m

Why: where no share is above C/s, a replica that waits for its share finds at least s others running. The
engine serves one batch of each model that waits before any model twice (its session rule), so those ahead of
m, at most one batch of each, are run off by s at a time: the wait of list scheduling. And s slots keep up
with replicas that are busy for u of the time each, as long as sum u <= s: the sum of demands d alone does not
say that, because shares above C/2, say, never run two at a time. s = floor(C/p) and T = s slack + F of the
candidates are all that matter: with all of them the program is exact, and with fewer (large programs) a plan
is still valid, if perhaps not the best. decisions/0022-slots.md has what the simulator said.
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
    slots_of,
    solve_program,
    tolerated_ms,
)


class JointModel:
    """One instance; `solve` finds the assignment of least weighted demand."""

    def __init__(
        self,
        tasks: Sequence[JointTask],
        options: Sequence[Sequence[Candidate]],
        limits: Limits,
        max_rounds: int = 1000,
    ) -> None:
        """options: the candidates of each task, in its order, none empty. max_rounds: rounds of each number
        of slots."""
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
        """sum p, sum F and sum u against the rule in force; those it does not set get what it implies."""
        shared = [c for c in self.on_gpu[g] if not self._of(c).alone]
        found = [self._of(c) for c in shared]
        if not found:
            return
        low_p, high_p = min(c.gpu_percent for c in found), max(c.gpu_percent for c in found)
        low_f, high_f = min(c.latency_ms for c in found), max(c.latency_ms for c in found)
        z = [self._z(g, r) for r in range(len(self.rounds))]
        implied: dict[Kind, float] = {"side": high_p / low_f, "slots": high_f / low_p}
        for kind in implied:
            whole = sum(
                max((size(c, kind) for c in items if not c.alone), default=0.0) for items in self.options
            )
            tops = [r.limit if r.kind == kind else min(whole, r.limit * implied[kind]) for r in self.rounds]
            self._below.add([*shared, *z], [*(size(c, kind) for c in found), *(-top for top in tops)], 0.0)
        slots = [float(r.slots) if r.kind == "slots" else float(len(self.tasks)) for r in self.rounds]
        if "capacity" not in self.limits.relaxed:
            self._below.add([*shared, *z], [*(c.utilization for c in found), *(-x for x in slots)], 0.0)

    def _round_members(self, g: int) -> None:
        """A candidate of too large a share, or that tolerates less than T, is not on a GPU whose rule has so
        many slots and a round of T or longer."""
        by_model: dict[int, list[int]] = defaultdict(list)
        for column in self.on_gpu[g]:
            if not self._of(column).alone:
                by_model[self.columns[column][0]].append(column)
        by_slots: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for r, rule in enumerate(self.rounds):
            if rule.kind == "slots":
                by_slots[rule.slots].append((rule.limit, self._z(g, r)))
        capacity, wait = self.limits.capacity_percent, "wait" not in self.limits.relaxed
        for slots, rules in by_slots.items():
            longer = sorted(rules)
            for columns in by_model.values():
                most = {
                    c: (tolerated_ms(self._of(c), slots) if wait else np.inf)
                    if slots_of(self._of(c).gpu_percent, capacity) >= slots
                    else -1.0
                    for c in columns
                }
                out_before = 0
                for i, (limit, _) in enumerate(longer):
                    out = [c for c in columns if most[c] < limit * (1 - 1e-9)]
                    if len(out) > out_before:
                        z = [column for _, column in longer[i:]]
                        self._below.add([*out, *z], [1.0] * (len(out) + len(z)), 1.0)
                    out_before = len(out)
