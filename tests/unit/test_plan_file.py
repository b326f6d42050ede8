"""plan.json: the contract's keys, a round trip, and the one line for a file that is not one."""

from __future__ import annotations

import json
import math

import pytest

from dstack_sched.adapters.plan_files import parse_plan, plan_json, read_plan, write_plan
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import InputError

ROW = ModelPlan(
    gpu=1,
    gpu_percent=35.0,
    batch_size=8,
    max_queue_delay_us=4200,
    latency_ms=6.5,
    throughput_per_s=2400.0,
    efficacy=0.005,
    knee_percent=60.0,
    utilization=0.4,
    replicas=(Replica(1, 35.0, 600.0), Replica(0, 35.0, 600.0)),
    slo_ms=25.0,
    rate_per_s=1200.0,
    weight=2.0,
    on_late=OnLate.REJECT,
)
PLAN = Plan(200.0, ("H100", "H100"), {"resnet50": ROW}, True, ("capacity",), 1.7, 0.01, ("a note",))


def test_holds_the_keys_of_the_contract():
    """DESIGN section 5: other programs read these."""
    content = plan_json(PLAN)
    assert {"version", "capacity_percent", "gpus", "models", "feasible", "binding", "headroom"} <= set(
        content
    )
    assert content["version"] == 1
    assert set(content["models"]["resnet50"]) >= {
        "gpu", "gpu_percent", "batch_size", "max_queue_delay_us", "latency_ms", "throughput_per_s",
        "efficacy", "knee_percent", "utilization",
    }  # fmt: skip


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "deep" / "plan.json"
    write_plan(path, PLAN)
    assert read_plan(path) == PLAN
    assert [each.name for each in path.parent.iterdir()] == ["plan.json"]  # no temporary file is left


def test_a_headroom_without_limit_is_null():
    free = Plan(100.0, (), {}, True, (), math.inf)
    text = json.dumps(plan_json(free), allow_nan=False)
    assert parse_plan(text, "p").headroom == math.inf


def test_only_the_contract_is_needed_to_read_a_plan():
    content = plan_json(PLAN)
    for key in ("gap", "notes"):
        del content[key]
    for key in ("replicas", "slo_ms", "rate_per_s", "weight", "on_late"):
        del content["models"]["resnet50"][key]
    found = parse_plan(json.dumps(content), "p")
    assert found.models["resnet50"].replicas == () and found.models["resnet50"].slo_ms is None


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda c: c.update(version=2), "version is 2, this dstackctl reads version 1"),
        (lambda c: c.update(feasible="yes"), "feasible is 'yes'"),
        (lambda c: c.update(gpus="H100"), "gpus: a list of texts"),
        (lambda c: c.update(models=[]), "models: an object is wanted"),
        (lambda c: c["models"]["resnet50"].update(gpu=2), "resnet50: gpu is 2, but the plan lists 2"),
        (lambda c: c["models"]["resnet50"].update(gpu_percent=0), "gpu_percent is 0; above 0"),
        (lambda c: c["models"]["resnet50"].update(gpu_percent=101), "gpu_percent is 101; at most 100"),
        (
            lambda c: c["models"]["resnet50"].update(batch_size=0),
            "batch_size is 0; a whole number of at least 1",
        ),
        (lambda c: c["models"]["resnet50"].update(batch_size=2.5), "batch_size is 2.5"),
        (lambda c: c["models"]["resnet50"].update(latency_ms="x"), "latency_ms is 'x'; a finite number"),
        (lambda c: c["models"]["resnet50"].update(on_late="drop"), "on_late is 'drop'"),
        (lambda c: c["models"]["resnet50"]["replicas"].append(3), "replica 3: an object is wanted"),
        (lambda c: c["models"]["resnet50"].pop("utilization"), "utilization is None"),
    ],
)
def test_refuses_in_one_line_that_names_model_and_key(change, words):
    content = plan_json(PLAN)
    change(content)
    with pytest.raises(InputError, match=words) as error:
        parse_plan(json.dumps(content), "plan.json")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"version": 1,')
    with pytest.raises(InputError, match="not JSON"):
        read_plan(tmp_path / "half.json")
