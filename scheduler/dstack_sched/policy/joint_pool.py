"""The joint program on many equal GPUs: pool the GPUs that wait by the same rule, then pack.

Pooled: y[m,k,r] is how much of model m runs as candidate k on GPUs under waiting rule r, n[r] how many GPUs
follow that rule, whole numbers with sum n = G. The limits of one GPU (joint_model.py) hold for the n[r] GPUs
of a rule together, so equal GPUs need no names. It is a relaxation: models are small against a GPU, so little
is lost, and no symmetry is left to search through.

Packed (joint_pack.py): the rules are given to single GPUs as the pooled answer counted them, and a second
program places every model on one of them; candidates are chosen afresh.

The bound is pooled too, with every rule widened to reach the next longer one and n[r] real, so that it holds
for all rounds and not only for those tried; gap = (value - bound) / value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dstack_sched.policy.candidates import Candidate, JointTask
from dstack_sched.policy.joint_pack import members, pack, widened
from dstack_sched.policy.joint_rows import (
    Answer,
    Limits,
    Round,
    Rows,
    Solved,
    choose_rounds,
    cost_of,
    replica_key,
    size,
    solve_program,
)
from dstack_sched.policy.monotone import Array

# Room left in the pool, so that whole models can be packed; tried in turn.
_ROOM = (0.97, 0.9, 0.8)
_SUPPORT = 1e-6
_POOL_SLOTS = 6  # numbers of slots to try


def solve_pooled(
    tasks: Sequence[JointTask],
    options: Sequence[Sequence[Candidate]],
    limits: Limits,
    *,
    rounds: int,
    gap: float,
    time_limit_s: float,
    prove: bool = True,
) -> Answer:
    """The plan of least weighted demand, as far as pooling and packing find it. Its bound is proven, where
    `prove` asks for one."""
    rules = [*choose_rounds(options, limits, rounds, _POOL_SLOTS), Round("alone", 1.0)]
    lowest = -np.inf
    if prove:
        bound = _bound(tasks, options, limits, rules, time_limit_s)
        if bound.status == "infeasible":
            return Answer("infeasible", bound=np.inf)
        lowest = bound.bound
    for room in _ROOM:
        pool = Pool(tasks, options, limits, [(r, r) for r in rules], room=room)
        pooled = pool.solve(gap=gap, time_limit_s=time_limit_s)
        if pooled.values is None:
            break
        packed = _pack(pool, pooled.values, gap, time_limit_s)
        if packed.chosen:
            done = packed.value - lowest <= gap * abs(packed.value)
            return Answer("optimal" if done else "limit", packed.chosen, packed.value, lowest)
    return Answer("failed", bound=lowest)


def _bound(
    tasks: Sequence[JointTask],
    options: Sequence[Sequence[Candidate]],
    limits: Limits,
    rules: Sequence[Round],
    time_limit_s: float,
) -> Solved:
    """The least demand of the pooled program with widened rules, all variables real."""
    pool = Pool(tasks, options, limits, widened(rules), room=1.0)
    return pool.solve(gap=1e-3, time_limit_s=time_limit_s, real=True)


class Pool:
    """rules: (for members, for limits): candidates fit the one, and together keep within the other."""

    def __init__(
        self,
        tasks: Sequence[JointTask],
        options: Sequence[Sequence[Candidate]],
        limits: Limits,
        rules: Sequence[tuple[Round, Round]],
        *,
        room: float,
    ) -> None:
        self.tasks, self.options, self.limits, self.rules = tasks, options, limits, rules
        self.columns: list[tuple[int, int, int]] = []  # (model, candidate, rule)
        for r, (rule, _) in enumerate(rules):
            for m, items in enumerate(options):
                self.columns.extend((m, k, r) for k in members(items, rule, limits))
        self.n0 = len(self.columns)
        self.total = self.n0 + len(rules)
        self.pick: dict[tuple[int, tuple[float, int, int]], int] = {}
        for m, items in enumerate(options):
            if any(c.replicas > 1 for c in items):
                for key in dict.fromkeys(replica_key(c) for c in items):
                    self.pick[(m, key)] = self.total
                    self.total += 1
        self.below, self.equal = Rows(), Rows()
        self._models()
        for r in range(len(rules)):
            self._rule_limits(r, room)
        self.equal.add([self.n0 + r for r in range(len(rules))], [1.0] * len(rules), float(limits.gpus))

    def _of(self, column: int) -> Candidate:
        m, k, _ = self.columns[column]
        return self.options[m][k]

    def _models(self) -> None:
        by_model: dict[int, list[int]] = defaultdict(list)
        for column, (m, _, _) in enumerate(self.columns):
            by_model[m].append(column)
        for m in range(len(self.tasks)):
            columns = by_model[m]
            picks = {key: x for (model, key), x in self.pick.items() if model == m}
            if not picks:
                self.equal.add(columns, [1.0] * len(columns), 1.0)
                continue
            self.equal.add(list(picks.values()), [1.0] * len(picks), 1.0)
            for key, x in picks.items():
                same = [c for c in columns if replica_key(self._of(c)) == key]
                self.equal.add([*same, x], [1.0] * len(same) + [-float(key[2])], 0.0)
            for r in range(len(self.rules)):
                here = [c for c in columns if self.columns[c][2] == r]
                self.below.add([*here, self.n0 + r], [1.0] * len(here) + [-1.0], 0.0)

    def _rule_limits(self, r: int, room: float) -> None:
        rule, limit = self.rules[r]
        n, limits = self.n0 + r, self.limits
        columns = [c for c, (_, _, rule_of) in enumerate(self.columns) if rule_of == r]
        found = [self._of(c) for c in columns]
        if "capacity" not in limits.relaxed:
            demand = [c.demand_percent for c in found]
            self.below.add([*columns, n], [*demand, -room * limits.capacity_percent], 0.0)
        if "memory" not in limits.relaxed:
            sizes = [self.tasks[self.columns[c][0]].memory_bytes / limits.memory_bytes for c in columns]
            self.below.add([*columns, n], [*sizes, -1.0], 0.0)
        if rule.kind == "alone":
            self.below.add([*columns, n], [1.0] * len(columns) + [-1.0], 0.0)
            return
        if "clients" not in limits.relaxed:
            self.below.add([*columns, n], [1.0] * len(columns) + [-float(limits.max_clients)], 0.0)
        self.below.add([*columns, n], [*(size(c, rule.kind) for c in found), -room * limit.limit], 0.0)
        if rule.kind == "slots" and "capacity" not in limits.relaxed:
            self.below.add([*columns, n], [*(c.utilization for c in found), -room * limit.slots], 0.0)

    def solve(self, *, gap: float, time_limit_s: float, real: bool = False) -> Solved:
        """Models may be split between rules (they are packed later); GPUs are whole unless `real`."""
        cost = np.zeros(self.total)
        for column, (m, _, _) in enumerate(self.columns):
            cost[column] = cost_of(self.tasks[m], self._of(column))
        integers = [] if real else range(self.n0, self.n0 + len(self.rules))
        return solve_program(
            cost,
            self.below,
            self.equal,
            integers,
            np.full(self.total, float(self.limits.gpus)),
            gap=gap,
            time_limit_s=time_limit_s,
        )


def _pack(pool: Pool, values: Array, gap: float, time_limit_s: float) -> Answer:
    """Every model to single GPUs whose rules are those that the pool counted."""
    limits, options = pool.limits, pool.options
    counts = np.round(values[pool.n0 : pool.n0 + len(pool.rules)]).astype(int)
    rule_of = [r for r, count in enumerate(counts) for _ in range(count)]
    used: dict[int, set[int]] = defaultdict(set)
    for column in np.nonzero(values[: pool.n0] > _SUPPORT)[0]:
        m, _, r = pool.columns[column]
        used[m].add(r)
    for narrow in (True, False):
        columns = [
            (m, k, g)
            for g, r in enumerate(rule_of)
            for m, items in enumerate(options)
            if not narrow or r in used[m]
            for k in members(items, pool.rules[r][0], limits)
        ]
        rules = [pool.rules[r] for r in rule_of]
        answer = pack(pool.tasks, options, limits, columns, rules, gap=gap, time_limit_s=time_limit_s)
        if answer.chosen:
            return answer
    return Answer("failed")
