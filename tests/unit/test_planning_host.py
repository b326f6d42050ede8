"""Plans for the GPUs that are really there: which are used, with how much memory, and who stays where."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_sched.adapters.plan_files import parse_plan, plan_json
from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.app.planning_host import choices, numbers_for, renumbered
from dstack_sched.domain.gpu import HostGpus, PlanGpu
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import InfeasibleError, InputError
from fakes.surfaces import GPU, points, profile_set

GIB = 1 << 30
NAMES = "abcdefgh"


def profiles(memory_gib: float = 1.0) -> ProfileSet:
    """Models of 10 ms at 20%, 4 ms at 100%, whatever the batch size."""
    grid = points(lambda p, b: 2.5 + 150.0 / p, (20, 40, 60, 100), (1, 2, 4))
    return profile_set(dict.fromkeys(NAMES, grid), memory_gib=memory_gib)


def workload(count: int, rate: float = 40.0) -> Workload:
    return Workload(tuple(ModelDemand(name, 60.0, rate) for name in NAMES[:count]))


def host(*gpus: tuple[int, float], names: int = 0, clients: int = 0) -> HostGpus:
    """(index, free GiB) of each usable GPU; names: GPUs of the host in all."""
    usable = tuple(PlanGpu(index, GPU.name, int(gib * GIB), clients) for index, gib in gpus)
    return HostGpus((GPU.name,) * (names or len(gpus)), usable)


def gpus_of(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: tuple(r.gpu for r in row.replicas) for name, row in plan.models.items()}


def test_only_usable_gpus_get_models_and_all_keep_their_names() -> None:
    plan = make_plan(profiles(), workload(3), PlanOptions(host=host((1, 79), (3, 79), names=4)))
    assert plan.feasible and len(plan.gpus) == 4
    assert {gpu for gpus in gpus_of(plan).values() for gpu in gpus} <= {1, 3}
    assert all(row.gpu == row.replicas[0].gpu for row in plan.models.values())


def test_a_model_too_hot_for_one_gpu_is_replicated_with_equal_shares() -> None:
    """One config states one GPU%: decisions/0070."""
    hot = Workload((ModelDemand("a", 60.0, 1500.0), ModelDemand("b", 60.0, 10.0)))
    plan = make_plan(profiles(), hot, PlanOptions(host=host((0, 79), (2, 79), names=3)))
    assert plan.feasible
    assert gpus_of(plan)["a"] == (0, 2)
    assert len({r.gpu_percent for r in plan.models["a"].replicas}) == 1


def test_memory_that_others_hold_is_left_to_them() -> None:
    """30 GiB models: two fit an empty GPU, none one that others have filled to 20 GiB free."""
    big = profiles(memory_gib=30.0)
    assert (
        len(set(gpus_of(make_plan(big, workload(4), PlanOptions(host=host((0, 79), (1, 79))))).values())) == 2
    )
    three = make_plan(big, workload(2), PlanOptions(host=host((0, 20), (1, 70))))
    assert three.feasible
    assert set(gpus_of(three).values()) == {(1,)}, "the full GPU is left out"
    none = make_plan(big, workload(3), PlanOptions(host=host((0, 20), (1, 70))))
    assert not none.feasible and "memory" in none.binding[0]


def test_a_line_about_a_limit_names_the_real_gpu() -> None:
    plan = make_plan(profiles(), workload(2, rate=300), PlanOptions(host=host((5, 79), names=6)))
    assert any("gpu 5" in line for line in plan.binding) and not any("gpu 0" in line for line in plan.binding)


def test_models_stay_where_they_are_when_a_gpu_joins_or_goes() -> None:
    current: dict[str, set[int]] = {"a": {2}, "b": {2}, "c": {0}, "d": {0}}
    plan = make_plan(
        profiles(30.0), workload(4), PlanOptions(host=host((0, 79), (2, 79), names=3), current=current)
    )
    kept = [name for name, gpus in gpus_of(plan).items() if set(gpus) == current[name]]
    flipped = [name for name, gpus in gpus_of(plan).items() if set(gpus) != current[name]]
    assert len(kept) >= len(flipped)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_fewest_replicas_move(data: st.DataObject) -> None:
    """Against every way to number the GPUs."""
    count = data.draw(st.integers(1, 4))
    indices = sorted(data.draw(st.sets(st.integers(0, 7), min_size=count, max_size=count)))
    models = {}
    for name in NAMES[: data.draw(st.integers(1, 6))]:
        on = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count)))
        models[name] = row(tuple(Replica(gpu, 50.0, 1.0) for gpu in on))
    plan = Plan(100.0, ("x",) * count, models, True, (), 1.0)
    current = {name: data.draw(st.sets(st.integers(0, 7), max_size=3)) for name in NAMES}

    def staying(numbers: list[int]) -> int:
        return sum(numbers[r.gpu] in current[name] for name, each in models.items() for r in each.replicas)

    chosen = numbers_for(plan, indices, current)
    assert sorted(chosen) == indices
    assert staying(chosen) == max(staying(list(each)) for each in itertools.permutations(indices))
    if not any(current.values()):
        assert chosen == indices


def row(replicas: tuple[Replica, ...]) -> ModelPlan:
    return ModelPlan(replicas[0].gpu, 50.0, 4, 0, 10.0, 100.0, 1.0, 40.0, 0.5, replicas)


def test_renumbering_keeps_replicas_in_order_and_the_first_one_up_front() -> None:
    plan = Plan(100.0, ("x", "x"), {"a": row((Replica(0, 50.0, 1.0), Replica(1, 50.0, 2.0)))}, True,
                ("a: capacity of gpu 1 (100%)",), 1.0)  # fmt: skip
    found = renumbered(plan, [3, 0], ("x",) * 4)
    assert found.models["a"].gpu == 0
    assert [(r.gpu, r.rate_per_s) for r in found.models["a"].replicas] == [(0, 2.0), (3, 1.0)]
    assert found.binding == ("a: capacity of gpu 0 (100%)",) and found.gpus == ("x",) * 4


def test_every_gpu_first_then_without_the_fullest() -> None:
    gpus = host((0, 10), (1, 79), (2, 79), (3, 40)).usable
    assert [[g.index for g in each] for each in choices(gpus)] == [[0, 1, 2, 3], [1, 2, 3], [1, 2]]
    assert [[g.index for g in each] for each in choices(host((0, 79), (1, 79)).usable)] == [[0, 1]]


def test_other_mps_clients_and_a_reload_take_places() -> None:
    """48 places a GPU with driver 580; 41 others and one for a reload leave 6: eight models need two GPUs."""
    plan = make_plan(profiles(), workload(8, rate=1.0), PlanOptions(host=host((0, 79), (1, 79), clients=41)))
    counts = [list(gpus_of(plan).values()).count((gpu,)) for gpu in (0, 1)]
    assert plan.feasible and max(counts) <= 6
    short = make_plan(profiles(), workload(8, rate=1.0), PlanOptions(host=host((0, 79), clients=41)))
    assert not short.feasible and "MPS clients" in short.binding[0]


def test_hosts_without_such_a_gpu_are_one_clear_line() -> None:
    other = HostGpus(("Tesla T4",), (PlanGpu(0, "Tesla T4", 15 * GIB),))
    with pytest.raises(
        InputError, match=r"profiles are of Test GPU, this host has Tesla T4; profile on this host"
    ):
        make_plan(profiles(), workload(1), PlanOptions(host=other))
    with pytest.raises(InfeasibleError, match="no Test GPU of this host can be used now"):
        make_plan(profiles(), workload(1), PlanOptions(host=HostGpus((GPU.name,), ())))


def test_memory_limits_are_above_what_was_measured_and_only_on_request() -> None:
    plan = make_plan(profiles(8.0), workload(1), PlanOptions(memory_limits=True))
    assert plan.models["a"].memory_limit_mb == 10 * 1024
    assert (
        make_plan(profiles(1.0), workload(1), PlanOptions(memory_limits=True)).models["a"].memory_limit_mb
        == 1536
    )
    assert make_plan(profiles(), workload(1)).models["a"].memory_limit_mb is None


def broken(**changes: Any) -> str:
    plan = make_plan(profiles(), workload(1), PlanOptions(gpus=2))
    document = plan_json(replace(plan, models={"a": plan.models["a"]}))
    document["models"]["a"].update(changes)
    return json.dumps(document)


def test_a_plan_file_keeps_the_limit_and_refuses_replicas_that_no_config_can_state() -> None:
    percent = json.loads(broken())["models"]["a"]["gpu_percent"]
    assert parse_plan(broken(memory_limit_mb=2048), "p").models["a"].memory_limit_mb == 2048
    uneven = [{"gpu": g, "gpu_percent": percent + 5 * g, "rate_per_s": 1.0} for g in (0, 1)]
    with pytest.raises(InputError, match="p: a: replicas with another gpu_percent"):
        parse_plan(broken(replicas=uneven), "p")
    with pytest.raises(InputError, match="p: a: two replicas on one GPU"):
        parse_plan(broken(replicas=[uneven[0], uneven[0]]), "p")
    with pytest.raises(InputError, match="p: a: memory_limit_mb is 0"):
        parse_plan(broken(memory_limit_mb=0), "p")
