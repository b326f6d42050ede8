"""Plans in JSON form: what goes out comes back, and nothing but a valid plan comes in."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_backend import wire
from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.json_form import gpu_index, gpus_from_json, gpus_to_json, plan_from_json
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import InputError

PERCENT = st.floats(0.01, 100.0)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(str.isprintable)


@st.composite
def models(draw: st.DrawFn, name: str) -> EngineModel:
    percents = tuple(sorted(draw(st.sets(PERCENT, max_size=5))))
    batches = tuple(sorted(draw(st.sets(st.integers(1, 512), max_size=5))))
    cell = st.integers(1, 10**8).map(lambda tenths_us: round(tenths_us / 10_000, 4))
    line = st.tuples(*[cell] * len(batches))
    table = draw(st.tuples(*[line] * len(percents))) if percents and batches else ()
    return EngineModel(
        name=name,
        gpu_percent=draw(PERCENT),
        batch_size=draw(st.integers(1, 1024)),
        slo_us=draw(st.integers(0, 10_000_000)),
        weight=draw(st.floats(0.01, 100.0)),
        on_late=draw(st.sampled_from(OnLate)),
        knee_percent=draw(PERCENT),
        gpu_percents=percents if table else (),
        batch_sizes=batches if table else (),
        latency_ms=table,
        interference_per_percent=draw(st.floats(0.0, 0.1)),
        interference_exponent=draw(st.floats(0.1, 3.0)),
    )


@st.composite
def plans(draw: st.DrawFn) -> PlanChanged:
    names = draw(st.sets(NAME, max_size=3))
    return PlanChanged(draw(st.floats(1.0, 400.0)), tuple(draw(models(name)) for name in sorted(names)))


GPUS = st.dictionaries(st.integers(-1, 63), plans(), min_size=1, max_size=3)


@given(GPUS)
def test_plans_come_back_equal(gpus: dict[int, PlanChanged]) -> None:
    """Through real JSON, as it crosses the socket and the plan file."""
    assert gpus_from_json(json.loads(json.dumps(gpus_to_json(gpus)))) == gpus


def test_no_field_is_lost_on_the_way() -> None:
    """Guards against a new field of EngineModel that the reader forgets and fills with its default."""
    model = EngineModel(
        "m", 50.0, 8, 50_000, 2.0, OnLate.REJECT, 40.0, (25.0,), (4,), ((2.0,),), 0.001, 1.5
    )  # fmt: skip
    assert all(getattr(model, field.name) != field.default for field in dataclasses.fields(model))
    plan = PlanChanged(150.0, (model,))
    assert plan_from_json(gpus_to_json({0: plan})["0"]) == plan


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_a_plan_or_one_clear_line(raw: Any) -> None:
    try:
        gpus_from_json(raw)
    except InputError as error:
        assert "\n" not in str(error)


@given(plans(), JSON, st.data())
def test_one_value_replaced(plan: PlanChanged, value: Any, data: st.DataObject) -> None:
    """Whatever stands at one place of a good plan, the answer is a plan within bounds or InputError."""
    raw = copy.deepcopy(gpus_to_json({0: plan}))["0"]
    target = raw
    if raw["models"] and data.draw(st.booleans()):
        target = data.draw(st.sampled_from(raw["models"]))
    target[data.draw(st.sampled_from(sorted(target)))] = value
    try:
        found = plan_from_json(raw)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert 0 < found.capacity_percent <= 600
    for model in found.models:
        assert 0 < model.gpu_percent <= 100 and model.batch_size >= 1 and model.slo_us >= 0
        assert len(model.latency_ms) in (0, len(model.gpu_percents))


def small_plan() -> dict[str, Any]:
    model = EngineModel(
        "m", 50.0, 8, 50_000, 1.0, OnLate.SERVE, 40.0, (25.0, 50.0), (1, 8), ((2.0, 9.0), (1.0, 5.0)), 0.001
    )
    return gpus_to_json({0: PlanChanged(200.0, (model,))})["0"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: plan.update(capacity_percent=0), "capacity_percent"),
        (lambda plan: plan.update(capacity_percent=True), "a number is wanted"),
        (lambda plan: plan.update(capacity_percent=10**400), "finite"),
        (lambda plan: plan.update(extra=1), "unknown key 'extra'"),
        (lambda plan: plan.pop("models"), "'models' is missing"),
        (lambda plan: plan["models"].append(plan["models"][0]), "there twice"),
        (lambda plan: plan["models"][0].pop("weight"), "'weight' is missing"),
        (lambda plan: plan["models"][0].update(gpu_percent=101), "not in (0, 100]"),
        (lambda plan: plan["models"][0].update(batch_size=1.5), "whole number"),
        (lambda plan: plan["models"][0].update(on_late="drop"), "none of serve, reject"),
        (lambda plan: plan["models"][0].update(gpu_percents=[50, 25]), "ascend"),
        (lambda plan: plan["models"][0].update(batch_sizes=[1, 1.5]), "whole numbers"),
        (lambda plan: plan["models"][0].update(latency_ms=[[1.0, 2.0]]), "2 rows"),
        (lambda plan: plan["models"][0].update(latency_ms=[[1.0], [2.0, 3.0]]), "of 2"),
        (lambda plan: plan["models"][0].update(latency_ms=[[1.0, 0], [2.0, 3.0]]), "latencies"),
    ],
)
def test_errors_name_the_place(change: Any, says: str) -> None:
    plan = small_plan()
    change(plan)
    with pytest.raises(InputError, match="plan") as caught:
        plan_from_json(plan)
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["", "x", "--1", "-2", "64", "1.0", "²", 3, None, "00000"])
def test_bad_gpu_index(key: object) -> None:
    with pytest.raises(InputError):
        gpu_index(key, "gpus")


def test_64_models_fit_into_one_packet() -> None:
    """Guards the controller's message against the packet limit, with wide tables and long fractions."""
    line = tuple(1.23456789 * i for i in range(1, 11))
    gpus = {
        0: PlanChanged(
            200.0,
            tuple(
                EngineModel(
                    f"model_with_a_long_name_{i}", 33.333333, 16, 50_000, 1.0, OnLate.SERVE, 40.0,
                    tuple(10.0 * p for p in range(1, 11)), tuple(range(1, 11)), (line,) * 10, 0.00123456789,
                )
                for i in range(64)
            ),
        )
    }  # fmt: skip
    assert (
        len(wire.encode(wire.Control({"verb": "plan", "gpus": gpus_to_json(gpus)}))) < wire.MAX_MESSAGE_BYTES
    )
