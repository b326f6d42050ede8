"""docs/: the table is the code's, and what the rules and the dashboard ask for exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dstack_sched.app.metrics_document import backend_metrics, document
from dstack_sched.domain import metrics as table
from dstack_sched.domain.metrics import Kind

DOCS = Path(__file__).parents[2] / "docs"
RULES = yaml.safe_load((DOCS / "prometheus-rules.yml").read_text())
DASHBOARD = json.loads((DOCS / "grafana-dashboard.json").read_text())
RULE_LIST = [rule for group in RULES["groups"] for rule in group["rules"]]
EXPRESSIONS = [rule["expr"] for rule in RULE_LIST] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]


def series() -> dict[str, set[str]]:
    """Series name -> its labels, recorded ones included."""
    known: dict[str, set[str]] = {}
    for metric in (*table.ALL, *backend_metrics()):
        labels = set(metric.labels)
        if metric in backend_metrics():
            labels |= {"model", "version", "instance", "pid"}
        known[metric.name] = labels
        if metric.kind is Kind.HISTOGRAM:
            known |= {f"{metric.name}_{part}": labels | {"le"} for part in ("bucket", "sum", "count")}
    for rule in RULE_LIST:
        if "record" in rule:
            known[rule["record"]] = {"model", "stage", "gpu"}
    return known


def test_the_table_is_the_code_s() -> None:
    assert (DOCS / "METRICS.md").read_text() == document(), (
        "python -m dstack_sched.app.metrics_document > docs/METRICS.md"
    )


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_is_asked_for_exists(expression: str) -> None:
    """A renamed metric would leave a dashboard empty and an alert silent."""
    known = series()
    names = re.findall(r"(?:[a-z]+:)?dstack_[a-z0-9_]+(?::[a-z0-9_]+)?", expression)
    assert names
    for name in names:
        assert name in known, name
    asked = {
        label
        for group in re.findall(r"by \(([^)]*)\)", expression)
        for label in group.replace(" ", "").split(",")
    } | set(re.findall(r"[{,]\s*([a-z_]+)\s*=~?", expression))
    assert asked <= set().union(*(known[name] for name in names))
    assert expression.count("(") == expression.count(")")
    assert not [
        n for n in re.findall(r"rate\((dstack_[a-z_]+)", expression) if not n.endswith(("total", "bucket"))
    ]


def test_names_are_unique_over_all_three() -> None:
    names = [metric.name for metric in (*table.ALL, *backend_metrics())]
    assert len(names) == len(set(names))


def test_the_scrape_config_names_the_three_endpoints() -> None:
    config: dict[str, Any] = yaml.safe_load((DOCS / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert jobs == {
        "triton": ["localhost:8002"], "dstack-arbiter": ["localhost:8003"],
        "dstack-controller": ["localhost:8004"],
    }  # fmt: skip
    assert [(DOCS / name).exists() for name in config["rule_files"]] == [True]


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
