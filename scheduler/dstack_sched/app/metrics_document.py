"""docs/METRICS.md, made from the tables of metrics; a test holds the file to what this prints.

python -m dstack_sched.app.metrics_document > docs/METRICS.md
"""

from __future__ import annotations

from collections.abc import Iterable

from dstack_backend import metrics as backend
from dstack_sched.domain import metrics as table
from dstack_sched.domain.metrics import Kind, Metric

HEAD = """# Metrics

Made by `python -m dstack_sched.app.metrics_document` from the tables in the code; a test holds it to them.

Names follow Prometheus: seconds, bytes, ratios where 1 is the whole (a share of 0.4 is 40 GPU%), `_total` for
counters. Share-seconds are shares of a GPU times the time they were held: their rate over the capacity is the
utilization. Rows are batch items: a request of batch 4 is 4 rows. A model's histograms add up over GPUs.

| where | how to turn it on |
| --- | --- |
| controller | `dstackctl run ... --metrics-port 8004` |
| arbiter | `dstackctl serve ... --arbiter-metrics-port 8003`, or `dstackctl arbiter --metrics-port 8003` |
| backend | Triton's own `/metrics` (port 8002), nothing to do |

Endpoints listen on loopback unless told otherwise (`--metrics-address`, `serve --address`); port 0 means any
free one. Beside this file: `prometheus.yml` (what to scrape), `prometheus-rules.yml` (recording rules and
alerts) and `grafana-dashboard.json`. The arbiter only counts, in plain numbers; its endpoint is a process of
its own that asks for one status a scrape, so that no scrape takes the interpreter from a decision.
"""


def document() -> str:
    """The text of docs/METRICS.md."""
    parts = [
        HEAD,
        _section("Controller", table.CONTROLLER),
        _section("Faults: controller and `serve`", table.HEALTH),
        _section("GPUs, in the controller's endpoint", table.GPUS),
        _section("Arbiter", table.ARBITER),
        _section("Backend, in Triton's endpoint", backend_metrics(), BACKEND_NOTE),
    ]
    return "\n".join(parts)


BACKEND_NOTE = """Every series also has the labels `model`, `version`, `instance` and `pid`: the process id
keeps the old and the new instance of a reload apart. Brought up to date once a second. Triton's own compute
and queue times do not hold for this backend: it answers from its own threads.
"""


def backend_metrics() -> tuple[Metric, ...]:
    """The backend's own tables as ours; it stands alone and cannot use our types."""
    rows = [(backend.counter_name(name), "counter", "", text) for name, text in backend.COUNTERS.items()]
    rows += [(f"dstack_{name}", "gauge", "", text) for name, text in backend.GAUGES.items()]
    rows += backend.LABELLED
    return tuple(
        Metric(name, Kind(kind), text, (label,) if label else (), unit_of(name))
        for name, kind, label, text in rows
    )


def unit_of(name: str) -> str:
    """The unit that a name ends with."""
    last = name.removesuffix("_total").rpartition("_")[2]
    return last if last in ("seconds", "bytes", "ratio", "rows") else ""


def _section(title: str, metrics: Iterable[Metric], note: str = "") -> str:
    lines = [f"## {title}", ""]
    if note:
        lines += [note]
    lines += ["| name | kind | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind.value} | {metric.unit} | {labels} | {metric.help} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(document(), end="")  # noqa: T201
