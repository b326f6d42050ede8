"""The number of MPS clients a plan needs, against what the driver takes."""

from __future__ import annotations

import pytest

from dstack_sched.app.mps_clients import check_clients, count_clients
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.errors import InputError


def plan(*models: tuple[int, ...]) -> Plan:
    """One model for each tuple of GPUs; an empty one has no replicas listed and is on GPU 0."""
    rows = {}
    for number, gpus in enumerate(models):
        replicas = tuple(Replica(gpu, 10.0, 1.0) for gpu in gpus)
        rows[f"m{number}"] = ModelPlan(gpus[0] if gpus else 0, 10.0, 1, 0, 1.0, 1.0, 1.0, 1.0, 0.1, replicas)
    return Plan(100.0, ("x", "x"), rows, True, (), 1.0)


def test_every_replica_is_a_client_and_a_reload_one_more() -> None:
    zero, one = count_clients(plan((0,), (0, 1), ()), {1: 7}, 48)
    assert (zero.gpu, zero.planned, zero.others, zero.peak) == (0, 3, 0, 4)
    assert (one.gpu, one.planned, one.others, one.peak) == (1, 1, 7, 9)


def test_what_fits_is_reported_and_what_does_not_is_refused() -> None:
    full = plan(*[(0,)] * 40)
    assert check_clients(full, {0: 7}, 48) == ("GPU 0: 40 MPS clients planned, 7 of others, 48 at most",)
    with pytest.raises(
        InputError, match=r"GPU 0: the plan needs 40 MPS clients and one more .* others hold 8"
    ):
        check_clients(full, {0: 8}, 48)
    assert check_clients(full, {0: 8}, 60)


def test_the_cpu_has_no_clients() -> None:
    assert check_clients(plan((-1,)), {}, 48) == ()
