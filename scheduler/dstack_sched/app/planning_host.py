"""Plan for the GPUs that a host really has: some out, some partly taken by others, models on them already.

The joint program takes GPUs that are all alike. So every GPU counts with the memory of the one that others
have filled most; where the workload does not fit so, that one is left out, and so on. The program's GPU
numbers mean nothing; they are given to real GPUs such that as many models as possible stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy.optimize import linear_sum_assignment

from dstack_sched.domain.gpu import HostGpus, PlanGpu
from dstack_sched.domain.plan import Plan
from dstack_sched.errors import InfeasibleError, InputError

Placement = Mapping[str, Collection[int]]  # model -> the GPUs that it runs on
# (number of GPUs, memory of each in bytes, most MPS clients of others on one) -> a plan on GPUs 0, 1, ...
Planner = Callable[[int, int, int], Plan]


def plan_on_host(plan_alike: Planner, host: HostGpus, device_name: str, current: Placement) -> Plan:
    """The first plan that fits, with the most GPUs first; else the one with the largest scale of the rates.

    Errors: InputError where no GPU of the profiled kind is there, InfeasibleError where none is usable now.
    """
    kind = [gpu for gpu in host.usable if gpu.name == device_name]
    if not kind:
        if device_name in host.names:
            raise InfeasibleError(f"no {device_name} of this host can be used now; see dstackctl doctor")
        there = ", ".join(sorted(set(host.names))) or "no GPU"
        raise InputError(
            f"the profiles are of {device_name}, this host has {there}; profile on this host, or name the "
            "number of GPUs with --gpus"
        )
    best: Plan | None = None
    for gpus in choices(kind):
        found = plan_alike(len(gpus), min(gpu.memory_bytes for gpu in gpus), max(gpu.clients for gpu in gpus))
        if best is None or found.feasible or found.headroom > best.headroom:
            best = renumbered(found, numbers_for(found, [gpu.index for gpu in gpus], current), host.names)
        if found.feasible:
            break
    assert best is not None
    return best


def choices(gpus: Sequence[PlanGpu]) -> list[tuple[PlanGpu, ...]]:
    """All of them, then without those with the least memory, and so on; each by index."""
    ranked = sorted(gpus, key=lambda gpu: (-gpu.memory_bytes, gpu.index))
    cuts = [i for i, (one, other) in enumerate(pairwise(ranked), 1) if other.memory_bytes < one.memory_bytes]
    return [
        tuple(sorted(ranked[:count], key=lambda gpu: gpu.index)) for count in (len(ranked), *reversed(cuts))
    ]


def numbers_for(plan: Plan, indices: Sequence[int], current: Placement) -> list[int]:
    """The real index of each GPU of the plan, such that the fewest replicas move. indices: ascending."""
    stays = np.zeros((len(indices), len(indices)))
    for model, row in plan.models.items():
        for replica in row.replicas:
            for place, index in enumerate(indices):
                stays[replica.gpu, place] += index in current.get(model, ())
    # Among equals the order is kept: a bonus for it, too small to move a model.
    stays += np.eye(len(indices)) / (2 * len(indices))
    _, chosen = linear_sum_assignment(stays, maximize=True)
    return [indices[place] for place in chosen]


def renumbered(plan: Plan, numbers: Sequence[int], names: Sequence[str]) -> Plan:
    """The plan with GPU i called numbers[i], for a host whose GPUs have these names."""
    models = {}
    for model, row in plan.models.items():
        replicas = sorted((replace(r, gpu=numbers[r.gpu]) for r in row.replicas), key=lambda r: r.gpu)
        models[model] = replace(row, gpu=replicas[0].gpu, replicas=tuple(replicas))

    def in_words(line: str) -> str:
        return re.sub(r"\bgpu (\d+)", lambda found: f"gpu {numbers[int(found[1])]}", line)

    return replace(plan, gpus=tuple(names), models=models, binding=tuple(map(in_words, plan.binding)))
