"""Two GPUs: placement, one engine each, a GPU that goes and comes back, as the whole control loop does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.two_gpus import MODELS, TwoGpus

EVEN = dict.fromkeys(MODELS, 40.0)
HOT = {"a": 700.0, "b": 20.0, "c": 20.0, "d": 20.0}


@pytest.fixture
def site(tmp_path: Path) -> TwoGpus:
    return TwoGpus(tmp_path, EVEN)


def test_every_model_runs_where_its_plan_says_and_nowhere_else(site: TwoGpus) -> None:
    assert site.placed() == site.running()
    assert all(site.placed().values())


def test_a_hot_model_gets_a_replica_on_each_gpu_with_one_share(tmp_path: Path) -> None:
    site = TwoGpus(tmp_path, HOT)
    assert site.running()["a"] == site.placed()["a"] == (0, 1)
    assert "a" in site.arbiter.engine(0) and "a" in site.arbiter.engine(1)
    assert len({each.gpu_percent for each in site.round.plan.models["a"].replicas}) == 1


def test_each_gpu_has_an_engine_that_waits_for_no_other(tmp_path: Path) -> None:
    """Guards against one capacity for all GPUs: GPU 0 is granted full, GPU 1 is granted at once."""
    site = TwoGpus(tmp_path, HOT)
    arbiter = site.arbiter
    on = {gpu: [c for c, (_, where) in arbiter.instances.items() if where == gpu] for gpu in (0, 1)}
    (second,) = [c for c in on[1] if arbiter.instances[c][0] == "a"]
    for _ in range(3):  # more work than GPU 0 can be granted at once
        for connection in on[0]:
            arbiter.work(connection, 4)
    full = arbiter.request("status")["gpus"]["0"]
    assert full["granted_percent"] > 0
    assert arbiter.request("status")["gpus"]["1"]["granted_percent"] == 0
    assert len(arbiter.work(second, 4)) == 1
    assert arbiter.request("status")["gpus"]["0"]["granted_percent"] == full["granted_percent"]


def test_a_gpu_that_goes_is_planned_around_within_two_looks_and_used_again(tmp_path: Path) -> None:
    site = TwoGpus(tmp_path, HOT)
    site.watch(10)
    site.inventory.set(1, lost="NVML: GPU is lost", xids=(79,))
    site.server.loses(1)
    site.watch(2)
    assert set(site.placed().values()) == {(0,)}
    assert site.running() == site.placed()
    assert site.arbiter.engine(1) == [] and site.arbiter.engine(0) == list(MODELS)
    (reason,) = [each for each in site.reasons() if "GPU 1 is out: Xid 79" in each]
    assert "it has fallen off the bus" in reason
    assert any("GPU 1" in each for each in site.reasons("fault"))
    site.inventory.set(1, lost="")
    site.server.dead.clear()
    site.clock.sleep_s(500)
    site.watch(3)
    assert set(site.placed().values()) == {(0,)}, "ten minutes after its last error at the earliest"
    site.clock.sleep_s(100)
    site.watch(3)
    assert any(1 in gpus for gpus in site.placed().values()) and site.running() == site.placed()
    assert any("GPU 1 is back" in each for each in site.reasons())


def test_models_on_the_gpu_that_stays_are_not_loaded_anew(site: TwoGpus) -> None:
    """Guards against a re-plan that shuffles everybody."""
    stays, goes = 0, 1
    if not any(gpus == (goes,) for gpus in site.placed().values()):
        stays, goes = goes, stays
    before = site.placed()
    site.watch(10)
    site.server.loads.clear()
    site.inventory.set(goes, lost="NVML: GPU is lost")
    site.server.loses(goes)
    site.watch(3)
    assert set(site.placed().values()) == {(stays,)}
    moved = {name for name, gpus in before.items() if gpus != (stays,)}
    shares = {name: row.gpu_percent for name, row in site.round.plan.models.items()}
    assert moved <= set(site.server.loads), (before, shares)
    assert len(site.server.loads) == len(set(site.server.loads)), "nobody twice"


def test_what_one_gpu_cannot_carry_moves_all_the_same(tmp_path: Path) -> None:
    """Models must leave a dead GPU even where the rest cannot keep every SLO at every rate."""
    site = TwoGpus(tmp_path, {"a": 1400.0, "b": 300.0, "c": 300.0, "d": 300.0})
    site.watch(5)
    site.inventory.set(0, lost="NVML: GPU is lost")
    site.server.loses(0)
    site.watch(3)
    assert all(gpus == (1,) for gpus in site.running().values() if gpus)
    assert site.arbiter.engine(0) == []


def test_an_operator_drains_a_gpu_and_gives_it_back_without_a_fault(tmp_path: Path) -> None:
    site = TwoGpus(tmp_path, HOT)
    site.watch(5)
    site.excluded.add("1")
    site.watch(2)
    assert set(site.placed().values()) == {(0,)}
    assert site.reasons("fault") == []
    site.excluded.clear()
    site.watch(2)
    assert any(1 in gpus for gpus in site.placed().values())


def test_a_move_that_fails_is_tried_again(tmp_path: Path) -> None:
    site = TwoGpus(tmp_path, HOT)
    site.watch(5)
    why_not, site.server.fails = site.server.fails, lambda model, parameters: "no memory"
    site.inventory.set(1, lost="NVML: GPU is lost")
    site.server.loses(1)
    site.watch(3)
    assert site.placed()["a"] == (0, 1), "all as before"
    site.server.fails = why_not
    for _ in range(8):
        site.clock.sleep_s(10)
        site.watch(2)
    assert site.placed()["a"] == (0,) and site.running()["a"] == (0,)
