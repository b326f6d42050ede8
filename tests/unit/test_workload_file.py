"""workload.yaml: what is taken, and the one line for everything that is not."""

from __future__ import annotations

import pytest

from dstack_sched.config import parse_workload, read_workload
from dstack_sched.domain.workload import ModelDemand, OnLate
from dstack_sched.errors import InputError

GOOD = """
attainment: 0.95
models:
  - {name: resnet50, slo_ms: 25, rate_per_s: 400}
  - name: bert
    slo_ms: null
    rate_per_s: 0
    weight: 2
    on_late: reject
"""


def test_reads_every_key():
    workload = parse_workload(GOOD, "w.yaml")
    assert workload.attainment == 0.95
    assert workload.models == (
        ModelDemand("resnet50", 25.0, 400.0),
        ModelDemand("bert", None, 0.0, 2.0, OnLate.REJECT),
    )
    assert parse_workload("models: [{name: a, slo_ms: 1, rate_per_s: 1}]", "w").attainment == 0.99


def _model(**changes) -> str:
    entry = {"name": "a", "slo_ms": 10, "rate_per_s": 5} | changes
    body = ", ".join(f"{k}: {v}" for k, v in entry.items() if v != "-")
    return f"models: [{{{body}}}]"


@pytest.mark.parametrize(
    "text,words",
    [
        ("", "w.yaml: models: .* is wanted, this is empty"),
        ("[1, 2]", "w.yaml: .* is wanted, this is a list"),
        ("models: []", "at least one model"),
        ("models: [3]", r"model 1: \{name, slo_ms, rate_per_s\} is wanted, this is a int"),
        ("models: [{name: a, slo_ms: 1, rate_per_s: 1}]\nversion: 1", "unknown key 'version'"),
        (_model(speed=3), r"model 1 \(a\): unknown key 'speed'; known keys are name, slo_ms"),
        (_model(slo_ms="-"), r"slo_ms is missing; null for best effort"),
        (_model(rate_per_s="-"), "rate_per_s is missing"),
        (_model(name="7"), "name is 7"),
        (_model(slo_ms="0"), "slo_ms is 0; a time above 0 ms"),
        (_model(slo_ms=".nan"), "slo_ms is nan; a finite number"),
        (_model(slo_ms="fast"), "slo_ms is 'fast'; a finite number"),
        (_model(slo_ms="true"), "slo_ms is True; a finite number"),
        (_model(rate_per_s="-1"), "rate_per_s is -1; 0 or more"),
        (_model(rate_per_s=".inf"), "rate_per_s is inf; a finite number"),
        (_model(weight="0"), "weight is 0; a number above 0"),
        (_model(on_late="drop"), "on_late is 'drop'; serve or reject"),
        (_model() + "\nattainment: 2", "attainment is 2; a share above 0, at most 1"),
        (
            "models: [{name: a, slo_ms: 1, rate_per_s: 1}, {name: a, slo_ms: 1, rate_per_s: 1}]",
            "a is listed twice",
        ),
        ("models: [{name: a, name: b, slo_ms: 1, rate_per_s: 1}]", "key 'name' is given twice"),
        ("models: [{name: a", "not YAML"),
        ("models: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_refuses_in_one_line_that_names_the_place(text, words):
    with pytest.raises(InputError, match=words) as error:
        parse_workload(text, "w.yaml")
    assert "\n" not in str(error.value) and str(error.value).startswith("w.yaml")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_workload(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot be read"):
        read_workload(tmp_path / "bytes.yaml")
