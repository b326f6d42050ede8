"""A real deployment under load: what clients sent, what Triton, backend and arbiter count, and what `status`
and the controller show is one and the same story."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_sched.app.metrics_document import backend_metrics
from dstack_sched.app.status_model import ALL_STAGES
from dstack_sched.domain import metrics as table
from fakes.load import Load, wait_until
from fakes.onnx_models import SlowSum
from fakes.scrape import Scrape, scrape
from fakes.site import Site, dstackctl

MODELS = ("alpha", "beta")
ANSWERS = 300
CONTROLLER = (
    "--interval-s", 0.5, "--window-s", 6, "--cooldown-s", 3, "--triton-metrics", "127.0.0.1:1",
    "--time-budget-s", 1, "--target-error", 0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    models = [SlowSum(name, inner=256, depth=8, seed=seed) for seed, name in enumerate(MODELS)]
    site = Site(tmp_path_factory.mktemp("observe"), models)
    try:
        site.start_serve("--arbiter-metrics-port", 0, "--log-format", "json")
        yield site
    finally:
        site.stop()


def triton(site: Site) -> Scrape:
    assert site.serve is not None
    return scrape(f"http://{site.serve.printed['urls']['metrics']}/metrics")


def arbiter(site: Site) -> Scrape:
    assert site.serve is not None
    return scrape(site.serve.printed["urls"]["arbiter_metrics"])


def test_sent_counted_and_shown_are_the_same(site: Site) -> None:
    """A count that is lost or doubled on its way would be found here: requests, rows, grants and batches."""
    with Load(site.url, site.models, clients=2) as load:
        load.wait_for(ANSWERS)
        shown = site.status()
        load.wait_for(load.total() + 50)
    assert not load.failures
    sent = {name: load.sent[name] for name in MODELS}

    def told() -> bool:
        """The backend tells Triton once a second."""
        seen = triton(site)
        return all(seen.total("dstack_latency_samples_total", model=name) == sent[name] for name in MODELS)

    wait_until("Triton's endpoint has all requests", told)
    backend, decided = triton(site), arbiter(site)
    decided.check(table.ARBITER + table.HEALTH)
    published = {name for name in backend.names() if name.startswith("dstack_")}
    assert published == {metric.name for metric in backend_metrics()}
    for name in MODELS:
        assert backend.total("dstack_requests_total", model=name) == sent[name]
        assert backend.total("dstack_rows_total", model=name) == sent[name]
        assert decided.value(table.ROWS, model=name) == sent[name], "one row a request, all by grants"
        batches = backend.total("dstack_batches_total", model=name)
        assert backend.total("dstack_ungated_batches_total", model=name) == 0
        given, unused = (decided.value(each, model=name) for each in (table.GRANTS, table.UNUSED_GRANTS))
        standing = decided.value(table.SESSIONS, state="running") + decided.total(table.GPU_GRANTED)
        assert batches <= given - unused <= batches + (2 if standing else 0), "a grant a batch"
        assert backend.total("dstack_batches_by_size_total", model=name) == batches
        for stage in ALL_STAGES[1:]:
            assert backend.total("dstack_stage_samples_total", model=name, stage=stage) == batches
        row = shown["models"][name]
        assert row["rate_per_s"] > 0 and row["goodput_per_s"] > 0 and row["within_slo"] > 0
        assert 0 < row["latency_p50_ms"] <= row["latency_p99_ms"]
        assert row["stages_us"].keys() >= set(ALL_STAGES[1:])
        assert 0 < row["totals"]["requests"] <= sent[name]
    assert 0 < shown["gpus"]["-1"]["utilization_percent"] <= shown["gpus"]["-1"]["capacity_percent"]


def test_the_controller_tells_what_it_does(site: Site) -> None:
    """Its endpoint, its board, its log and its decisions agree."""
    run = site.start_run(*CONTROLLER, "--metrics-port", 0, "--log-format", "json")
    url = next(line["message"].split()[-1] for line in log_of(site) if "metrics of" in line["message"])
    with Load(site.url, site.models, clients=1, rates=dict.fromkeys(MODELS, 20.0)):

        def measured() -> bool:
            rates = scrape(url).samples(table.ARRIVALS)
            return {each.labels["model"] for each in rates if each.labels["kind"] == "forecast"} == set(
                MODELS
            )

        wait_until("rates of all models", measured, within_s=60.0)
        seen, shown = scrape(url), site.status()
    seen.check(table.CONTROLLER + table.HEALTH + table.GPUS)
    decisions = site.decisions("applied", "kept")
    rounds = [each for each in seen.samples(table.ROUNDS) if each.labels["outcome"] in ("applied", "kept")]
    assert sum(each.value for each in rounds) >= 1
    board = shown["controller"]
    assert board["running"] and board["pid"] == run.process.pid and board["age_s"] < 30
    assert board["plan"]["feasible"] and seen.value(table.FEASIBLE) == 1
    for name in MODELS:
        row = shown["models"][name]
        assert row["predicted_run_ms"] > 0 and row["planned_per_s"] > 0 and row["slo_ms"] == 250.0
        assert row["gpu_percent"] == pytest.approx(
            100 * seen.value(table.PLANNED_SHARE, model=name, gpu=row_gpu(seen, name))
        )
    lines = log_of(site)
    assert {line["part"] for line in lines} == {"controller"}
    applied = next(line for line in lines if line.get("what") in ("applied", "kept"))
    assert applied["reason"] == decisions[0]["reason"] and applied["cause"] == "start"
    assert run.stop() == 0
    assert not site.status()["controller"]["running"]


def row_gpu(seen: Scrape, model: str) -> str:
    return next(
        each.labels["gpu"] for each in seen.samples(table.PLANNED_SHARE) if each.labels["model"] == model
    )


def log_of(site: Site) -> list[dict[str, object]]:
    assert site.run is not None
    return [json.loads(line) for line in site.run.said().splitlines()]


def test_status_watches_without_a_terminal_too(site: Site) -> None:
    """`dstackctl status --watch > file` must not fill it with control characters, and ends on Ctrl-C."""
    places = ("--state", site.state, "--socket", site.socket, "--url", site.url)
    process = subprocess.Popen(dstackctl("status", "--watch", *places), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = []
        while sum("model" in line and "GPU%" in line for line in lines) < 2:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        assert not any("\x1b" in line for line in lines)
    finally:
        process.send_signal(2)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in rest


def test_serve_logs_json_only(site: Site) -> None:
    assert site.serve is not None
    lines = [json.loads(line) for line in site.serve.said().splitlines()]
    assert all({"time_s", "level", "part", "message"} <= line.keys() for line in lines)
    logs = Path(site.state / "logs")
    arbiter_lines = [json.loads(line) for line in (logs / "arbiter.log").read_text().splitlines()]
    assert any(line["message"].startswith("joined: ") for line in arbiter_lines)
