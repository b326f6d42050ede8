"""Does a plan fit the number of clients that MPS takes on each GPU? Counted before anything is touched.

Every instance is a process of its own and so a client; while a model reloads, its old and its new instance
are both there, one model at a time. What others run under the same daemon counts too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dstack_sched.domain.plan import Plan
from dstack_sched.errors import InputError


@dataclass(frozen=True, slots=True)
class ClientCount:
    """MPS clients of one GPU: of the plan, of others, and how many there may be."""

    gpu: int
    planned: int
    others: int
    limit: int

    @property
    def peak(self) -> int:
        """While one model reloads."""
        return self.planned + self.others + (1 if self.planned else 0)


def count_clients(plan: Plan, others: Mapping[int, int], limit: int) -> tuple[ClientCount, ...]:
    """One row a GPU that the plan uses. others: clients that are not of the plan's models, by GPU index."""
    planned: Counter[int] = Counter()
    for row in plan.models.values():
        planned.update({replica.gpu for replica in row.replicas} or {row.gpu})
    return tuple(
        ClientCount(gpu, count, others.get(gpu, 0), limit)
        for gpu, count in sorted(planned.items())
        if gpu >= 0
    )


def check_clients(plan: Plan, others: Mapping[int, int], limit: int) -> tuple[str, ...]:
    """One line a GPU for the report. Errors: InputError where a GPU would have more clients than it takes."""
    counts = count_clients(plan, others, limit)
    for each in counts:
        if each.peak > each.limit:
            raise InputError(
                f"GPU {each.gpu}: the plan needs {each.planned} MPS clients and one more while a model "
                f"reloads, others hold {each.others}, and MPS takes {each.limit} a GPU; nothing was changed: "
                "plan with more GPUs or fewer models"
            )
    return tuple(
        f"GPU {each.gpu}: {each.planned} MPS clients planned, {each.others} of others, {each.limit} at most"
        for each in counts
    )
