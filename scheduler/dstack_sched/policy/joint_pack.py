"""Models to single GPUs whose waiting rules are given; and the joint program on one GPU, rule by rule."""

from __future__ import annotations

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
    rounds: int,
    gap: float,
    time_limit_s: float,
    prove: bool = True,
) -> Answer:
    """On one GPU all models share a rule, so each rule is a program of its own, and an easy one (a knapsack
    with a choice for each model). Rules are tried in the order of their bounds, until the bounds of the rest
    show that none is better; without `prove` the first that fits is enough."""
    found = []
    for lower, rule in widened(choose_rounds(options, limits, rounds)):
        columns = [(m, k, 0) for m, items in enumerate(options) for k in members(items, lower, limits)]
        relaxed = pack(
            tasks,
            options,
            limits,
            columns,
            [(lower, rule)],
            gap=0.0,
            time_limit_s=time_limit_s,
            real=True,
        )
        if relaxed.status != "infeasible":
            found.append((relaxed.bound, rule))
    found.sort(key=lambda x: x[0])
    best = Answer("infeasible", bound=np.inf)
    certain = True
    for bound, rule in found:
        if best.chosen and (not prove or bound >= best.value * (1 - gap)):
            break
        columns = [(m, k, 0) for m, items in enumerate(options) for k in members(items, rule, limits)]
        answer = pack(tasks, options, limits, columns, [(rule, rule)], gap=gap, time_limit_s=time_limit_s)
        certain &= answer.status in ("optimal", "infeasible")
        if answer.chosen and not answer.value >= best.value:
            best = answer
    lowest = found[0][0] if found else np.inf
    if not best.chosen:
        return Answer("infeasible" if certain else "failed", bound=lowest)
    done = certain and best.value - lowest <= gap * abs(best.value)
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
