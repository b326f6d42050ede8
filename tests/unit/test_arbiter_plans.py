"""What the arbiter is told of a plan: the right GPU index, the right models, tables that decode."""

from __future__ import annotations

from typing import Any

import pytest

from dstack_sched.app.arbiter_plans import ArbiterPlans
from dstack_sched.cli.deployment import demand_of
from dstack_sched.domain.json_form import CPU_INDEX, gpus_from_json
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.domain.profile import Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.workload import OnLate
from fakes.serving import FakeClock


class RecordingArbiter:
    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def request(self, verb: str, **fields: Any) -> dict[str, Any]:
        self.requests.append((verb, fields))
        return {}

    def close(self) -> None:
        pass


def device(driver: str) -> Device:
    return Device("thing", 2, 1 << 30, driver, "onnxruntime")


def profile(name: str) -> ModelProfile:
    points = tuple(
        ProfilePoint(p, b, 2.0 * b * 100 / p, 3.0 * b * 100 / p, 9) for p in (50.0, 100.0) for b in (1, 4)
    )
    return ModelProfile(name, "0" * 64, 1 << 20, points)


def plan(gpu: int, gpus: int = 1, replicas: tuple[Replica, ...] = ()) -> Plan:
    row = ModelPlan(
        gpu, 50.0, 4, 0, 16.0, 250.0, 1.0, 50.0, 0.1, replicas, slo_ms=80.0, rate_per_s=25.0, weight=2.0,
        on_late=OnLate.REJECT,
    )  # fmt: skip
    return Plan(150.0, ("thing",) * gpus, {"a": row}, True, (), 2.0)


@pytest.mark.parametrize("stated_gpu", [CPU_INDEX, 0])
def test_a_cpu_plan_goes_to_the_index_that_cpu_instances_join_as(stated_gpu: int) -> None:
    """Guards against a plan for GPU 0 that no instance of a CPU host ever meets."""
    arbiter, wanted = RecordingArbiter(), plan(stated_gpu)
    profiles = ProfileSet(device("cpu"), {"a": profile("a")})
    ArbiterPlans(arbiter, FakeClock()).tell(wanted, profiles, demand_of(wanted))
    ((verb, fields),) = arbiter.requests
    plans = gpus_from_json(fields["gpus"])
    assert (verb, set(plans)) == ("plan", {CPU_INDEX})
    (model,) = plans[CPU_INDEX].models
    assert plans[CPU_INDEX].capacity_percent == 150.0
    assert (model.name, model.gpu_percent, model.batch_size) == ("a", 50.0, 4)
    assert (model.slo_us, model.weight, model.on_late) == (80_000, 2.0, OnLate.REJECT)
    table = {
        (p, b): model.latency_ms[i][j]
        for i, p in enumerate(model.gpu_percents)
        for j, b in enumerate(model.batch_sizes)
    }
    assert table[50.0, 4] == pytest.approx(16.0, rel=0.05)


def test_replicas_go_to_their_gpus() -> None:
    arbiter = RecordingArbiter()
    wanted = plan(1, 2, (Replica(1, 50.0, 10.0), Replica(0, 40.0, 15.0)))
    profiles = ProfileSet(device("580"), {"a": profile("a")})
    ArbiterPlans(arbiter, FakeClock()).tell(wanted, profiles, demand_of(wanted))
    plans = gpus_from_json(arbiter.requests[0][1]["gpus"])
    assert {gpu: each.models[0].gpu_percent for gpu, each in plans.items()} == {0: 40.0, 1: 50.0}


def test_a_model_without_a_profile_is_sent_without_a_table() -> None:
    arbiter, wanted = RecordingArbiter(), plan(0)
    ArbiterPlans(arbiter, FakeClock()).tell(wanted, ProfileSet(device("580"), {}), demand_of(wanted))
    (model,) = gpus_from_json(arbiter.requests[0][1]["gpus"])[0].models
    assert model.latency_ms == ()
