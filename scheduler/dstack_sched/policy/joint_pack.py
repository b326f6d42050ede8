"""Models to single GPUs whose waiting rules are given; and the joint program on one GPU, rule by rule."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dstack_sched.policy.candidates import Candidate, JointTask
from dstack_sched.policy.joint_rows import (
    Answer,
    Kind,
    Limits,
    Round,
    Rows,
    choose_rounds,
    cost_of,
    fits_round,
    replica_key,
    size,
    solve_program,
)

Column = tuple[int, int, int]  # model, candidate, GPU


def solve_one_gpu(
    tasks: Sequence[JointTask],
    options: Sequence[Sequence[Candidate]],
    limits: Limits,
    *,
    gap: float,
    time_limit_s: float,
    prove: bool = True,
    most_programs: int = 80,
) -> Answer:
    """On one GPU all models share a rule, so each rule is a program of its own, and an easy one (a knapsack
    with a choice for each model). Ranges of rounds are bounded by a linear program, the most promising range
    is halved until it is one rule, and that is solved; until no range left can be better, or `most_programs`
    were solved, or, without `prove`, a plan is found."""

    def solve(members_of: Round, rule: Round, real: bool) -> Answer:
        columns = [(m, k, 0) for m, items in enumerate(options) for k in members(items, members_of, limits)]
        return pack(
            tasks,
            options,
            limits,
            columns,
            [(members_of, rule)],
            gap=gap,
            time_limit_s=time_limit_s,
            real=real,
        )

    ranges: list[tuple[float, int, tuple[Round, ...]]] = []  # bound, order, rules from short to long
    solved = 0

    def bound(rules: tuple[Round, ...]) -> None:
        nonlocal solved
        solved += 1
        relaxed = solve(rules[0], rules[-1], real=True)
        if relaxed.status != "infeasible":
            heapq.heappush(ranges, (relaxed.bound, solved, rules))

    rounds = choose_rounds(options, limits, 1000)
    for key in dict.fromkeys((r.kind, r.slots) for r in rounds):
        bound(tuple(r for r in rounds if (r.kind, r.slots) == key))
    best, certain = Answer("infeasible", bound=np.inf), True
    while ranges and solved < most_programs and not (best.chosen and not prove):
        if best.chosen and ranges[0][0] >= best.value * (1 - gap):
            break
        _, _, rules = heapq.heappop(ranges)
        if len(rules) > 1:
            bound(rules[: len(rules) // 2])
            bound(rules[len(rules) // 2 :])
            continue
        solved += 1
        answer = solve(rules[0], rules[0], real=False)
        certain &= answer.status in ("optimal", "infeasible")
        if answer.chosen and not answer.value >= best.value:
            best = answer
    lowest = min(ranges[0][0] if ranges else np.inf, best.bound if best.chosen else np.inf)
    if not best.chosen:
        return Answer("infeasible" if certain and not ranges else "failed", bound=lowest)
    done = certain and best.value - lowest <= 2 * gap * abs(best.value)
    return Answer("optimal" if done else "limit", best.chosen, best.value, lowest)


def widened(rules: Sequence[Round]) -> list[tuple[Round, Round]]:
    """(members, rule): whatever the round is, it lies between the two of some pair, and its plans are plans
    of that pair: models that tolerate the shorter, within the limit of the longer."""
    pairs = [(r, r) for r in rules if r.kind != "slots"]
    counts = sorted({r.slots for r in rules if r.kind == "slots"})
    for fewer, slots in pairwise([0, *counts]):
        same = [r for r in rules if r.kind == "slots" and r.slots == slots]
        # Numbers of slots that were left out lie between two: their members need fit no more than the fewer,
        # their limits are within those of the more.
        wide = [Round("slots", x, slots, fewer + 1) for x in (0.0, *(r.limit for r in same[:-1]))]
        pairs += zip(wide, same, strict=True)
    return pairs


def members(items: Sequence[Candidate], rule: Round, limits: Limits) -> list[int]:
    """The candidates that may be on a GPU under the rule, without those that are no use there."""
    return undominated(items, [k for k, c in enumerate(items) if fits_round(c, rule, limits)], rule.kind)


def undominated(items: Sequence[Candidate], fitting: Sequence[int], kind: Kind) -> list[int]:
    """Under one rule only demand and the part of its limit count: those that no other beats in both."""
    kept: list[int] = []
    found: dict[tuple[int, bool], float] = {}
    for k in sorted(fitting, key=lambda k: (items[k].demand_percent, size(items[k], kind))):
        group = (items[k].replicas, items[k].alone)
        taken = 0.0 if kind == "alone" else size(items[k], kind)
        # Replicas must all run as one (p, b), under other rules too: none of theirs is left out.
        if items[k].replicas > 1 or group not in found or taken < found[group] * (1 - 1e-9):
            found[group] = min(taken, found.get(group, np.inf))
            kept.append(k)
    return kept


def pack(
    tasks: Sequence[JointTask],
    options: Sequence[Sequence[Candidate]],
    limits: Limits,
    columns: Sequence[Column],
    rules: Sequence[tuple[Round, Round]],
    *,
    gap: float,
    time_limit_s: float,
    real: bool = False,
) -> Answer:
    """Least weighted demand over the given columns; rules: of each GPU the rule for its members and
    that for its limits. real: models may
    be split (a bound, no plan)."""
    below, equal = Rows(), Rows()
    found = [options[m][k] for m, k, _ in columns]
    total = _each_model_once(options, columns, found, below, equal)
    by_gpu: dict[int, list[int]] = defaultdict(list)
    for i, (_, _, g) in enumerate(columns):
        by_gpu[g].append(i)
    for g, here in by_gpu.items():
        rule, limit = rules[g]
        if "capacity" not in limits.relaxed:
            below.add(here, [found[i].demand_percent for i in here], limits.capacity_percent)
        if "memory" not in limits.relaxed:
            memory = [tasks[columns[i][0]].memory_bytes / limits.memory_bytes for i in here]
            below.add(here, memory, 1.0)
        most = 1.0 if rule.kind == "alone" else float(limits.max_clients)
        if "clients" not in limits.relaxed or rule.kind == "alone":
            below.add(here, [1.0] * len(here), most)
        if rule.kind != "alone":
            below.add(here, [size(found[i], rule.kind) for i in here], limit.limit)
        if rule.kind == "slots" and "capacity" not in limits.relaxed:
            below.add(here, [found[i].utilization for i in here], float(limit.slots))
    cost = np.zeros(total)
    cost[: len(columns)] = [cost_of(tasks[m], c) for (m, _, _), c in zip(columns, found, strict=True)]
    integers = [] if real else range(total)
    solved = solve_program(cost, below, equal, integers, np.ones(total), gap=gap, time_limit_s=time_limit_s)
    if solved.values is None or real:
        return Answer(solved.status, bound=solved.bound)
    chosen = tuple(columns[int(i)] for i in np.nonzero(solved.values[: len(columns)] > 0.5)[0])
    return Answer(solved.status, chosen, float(cost @ solved.values), solved.bound)


def _each_model_once(
    options: Sequence[Sequence[Candidate]],
    columns: Sequence[Column],
    found: Sequence[Candidate],
    below: Rows,
    equal: Rows,
) -> int:
    """Rows for each model; a model with replicas has them all run as one (p, b), on different GPUs. Returns
    the number of columns, with those that choose the (p, b)."""
    total = len(columns)
    by_model: dict[int, list[int]] = defaultdict(list)
    for i, (m, _, _) in enumerate(columns):
        by_model[m].append(i)
    for m, items in enumerate(options):
        mine = by_model[m]
        if all(c.replicas == 1 for c in items):
            equal.add(mine, [1.0] * len(mine), 1.0)
            continue
        keys = dict.fromkeys(replica_key(found[i]) for i in mine)
        equal.add(range(total, total + len(keys)), [1.0] * len(keys), 1.0)
        for j, key in enumerate(keys):
            same = [i for i in mine if replica_key(found[i]) == key]
            equal.add([*same, total + j], [1.0] * len(same) + [-float(key[2])], 0.0)
        total += len(keys)
        for g in {columns[i][2] for i in mine}:
            here = [i for i in mine if columns[i][2] == g]
            below.add(here, [1.0] * len(here), 1.0)
    return total
