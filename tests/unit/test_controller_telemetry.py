"""What the controller tells of itself: every metric with its labels, faults that come and go, the board."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstack_sched.adapters.controller_board import FileStatusBoard, read_board
from dstack_sched.adapters.prometheus import PrometheusMetrics
from dstack_sched.app.gpus import GpuWatch
from dstack_sched.app.telemetry import (
    ControllerTelemetry,
    HealthBoard,
    HealthTelemetry,
    ModelLook,
    NoMetrics,
    gpu_samples,
)
from dstack_sched.domain import metrics as table
from dstack_sched.domain.change import ApplyReport, ModelOutcome
from dstack_sched.domain.fault import Fault, FaultKind
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from fakes.gpus import GIB, FakeInventory
from fakes.serving import FakeClock


def trouble(kind: FaultKind, subject: str, detail: str = "") -> Fault:
    return Fault(kind, subject, 0, detail)


PLAN = Plan(
    200.0, ("H100",),
    {
        "m": ModelPlan(
            0, 40.0, 8, 1000, 12.0, 600.0, 1.0, 40.0, 0.5, slo_ms=50.0, rate_per_s=300.0,
            replicas=(Replica(0, 40.0, 150.0), Replica(1, 30.0, 150.0)),
        )
    },
    True, (), 1.8,
)  # fmt: skip


@pytest.fixture
def telling(tmp_path: Path) -> tuple[ControllerTelemetry, PrometheusMetrics, FakeClock]:
    metrics, clock = PrometheusMetrics(table.CONTROLLER + table.HEALTH), FakeClock()
    board = FileStatusBoard(tmp_path)
    return ControllerTelemetry(metrics, board, clock, {"url": "127.0.0.1:8001"}), metrics, clock


def value(metrics: PrometheusMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_plan_and_a_look_become_metrics(telling) -> None:
    told, metrics, _ = telling
    told.planned(PLAN, 0.2)
    told.in_force(PLAN)
    told.decided("applied", "rate", "m: rate 300 -> 500")
    told.applied(
        ApplyReport((ModelOutcome("m", "reloaded", 40.0, 8), ModelOutcome("n", "unchanged", 1.0, 1))), 3
    )
    told.changed("message", 2)
    told.load_failed("n", rolled_back=True)
    told.looked({"m": ModelLook(310.0, 330.0, 300.0, 0.995, 1.1, 12.0, 13.2), "n": ModelLook()})
    assert value(metrics, "dstack_controller_plan_headroom_ratio") == 1.8
    assert value(metrics, "dstack_controller_planned_gpu_share_ratio", model="m", gpu="1") == 0.3
    assert value(metrics, "dstack_controller_rounds_total", outcome="applied", reason="rate") == 1
    assert value(metrics, "dstack_controller_reloads_total", model="m") == 1
    assert value(metrics, "dstack_controller_reloads_total", model="n") is None
    assert value(metrics, "dstack_controller_changes_total", kind="message") == 2
    assert value(metrics, "dstack_controller_failed_loads_total", model="n") == 1
    assert value(metrics, "dstack_controller_rollbacks_total") == 1
    assert value(metrics, "dstack_controller_part_up", part="server") == 1
    assert value(metrics, "dstack_controller_slo_seconds", model="m") == 0.05
    rates = {
        kind: value(metrics, "dstack_controller_arrivals_rows_per_second", model="m", kind=kind)
        for kind in ("measured", "forecast", "planned")
    }
    assert rates == {"measured": 310.0, "forecast": 330.0, "planned": 300.0}
    assert value(metrics, "dstack_controller_measured_run_seconds", model="m") == pytest.approx(0.0132)
    assert value(metrics, "dstack_controller_slo_attainment_ratio", model="n") is None


def test_series_of_what_is_gone_go(telling) -> None:
    """A model that left must not keep its last rate on a dashboard for months."""
    told, metrics, _ = telling
    told.looked({"m": ModelLook(1.0), "n": ModelLook(2.0)})
    told.looked({"n": ModelLook(3.0)})
    name = "dstack_controller_arrivals_rows_per_second"
    assert value(metrics, name, model="m", kind="measured") is None
    assert value(metrics, name, model="n", kind="measured") == 3.0


def test_faults_are_counted_once_and_their_end_is_timed(telling, tmp_path: Path) -> None:
    told, metrics, clock = telling
    for _ in range(3):
        told.health.note([trouble(FaultKind.STUB_DEAD, "m", "stub 12 died")])
        clock.now += 2.0
    labels = {"kind": "stub_dead", "subject": "m"}
    assert value(metrics, "dstack_faults_total", **labels) == 1
    assert value(metrics, "dstack_faults_present", **labels) == 1
    told.publish()
    (fault,) = json.loads((tmp_path / "controller.json").read_text())["faults"]
    assert (fault["detail"], fault["since_s"]) == ("stub 12 died", 1_800_000_000)
    told.health.note([])
    assert value(metrics, "dstack_faults_present", **labels) is None
    assert value(metrics, "dstack_recovery_duration_seconds_sum", kind="stub_dead") == 6.0
    told.health.note([trouble(FaultKind.STUB_DEAD, "m")])
    assert value(metrics, "dstack_faults_total", **labels) == 2


def test_the_board_tells_a_live_controller_from_a_dead_one(telling, tmp_path: Path) -> None:
    told, _, _ = telling
    told.in_force(PLAN)
    told.planned(replace(PLAN, headroom=1.2), 0.1)  # for rates that rose, and not put in force
    told.looked({"m": ModelLook(310.0)})
    board = read_board(tmp_path)
    assert board is not None and board["running"]
    assert board["plan"]["models"]["m"]["batch_size"] == 8 and board["plan"]["headroom"] == 1.2
    assert board["models"]["m"]["measured_per_s"] == 310.0
    assert board["url"] == "127.0.0.1:8001"
    path = tmp_path / "controller.json"
    path.write_text(json.dumps(board | {"start_ticks": board["start_ticks"] - 5}))
    again = read_board(tmp_path)
    assert again is not None and not again["running"], "the pid belongs to another process by now"
    path.write_text("{")
    assert read_board(tmp_path) is None


def test_a_board_that_cannot_be_written_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk must not stop the controller, nor fill what is left with complaints."""
    (tmp_path / "file").touch()
    board = FileStatusBoard(tmp_path / "file")
    for _ in range(3):
        board.write({"version": 1})
    assert len(caplog.records) == 1


def test_serve_s_board_is_written_when_faults_change_and_seldom_else() -> None:
    """Twice a second for months would wear a disk out."""
    written: list[dict[str, Any]] = []

    class Board:
        def write(self, document: Mapping[str, Any]) -> None:
            written.append(dict(document))

    clock = FakeClock()
    health = HealthTelemetry(NoMetrics(), clock)
    board = HealthBoard(health, Board(), clock, {"url": "u"})
    for at_s in range(25):
        clock.now = float(at_s)
        health.note([trouble(FaultKind.STUB_DEAD, "m")] if 3 <= at_s < 5 else [])
        board.publish()
    assert [len(each["faults"]) for each in written] == [0, 1, 0, 0]
    assert written[0]["url"] == "u" and written[-1]["updated_s"] == 1_800_000_015


def test_gpus_as_they_were_read_last() -> None:
    inventory = FakeInventory(2)
    inventory.set(0, used_bytes=3 * GIB, utilization_percent=61.0)
    inventory.set(1, lost="it has disappeared", memory_bytes=0)
    watch = GpuWatch(inventory, FakeClock())
    watch.look()
    seen = {(sample.metric.name, sample.labels[0]): sample.value for sample in gpu_samples(watch.states)}
    assert seen == {
        ("dstack_gpu_usable", "0"): 1.0, ("dstack_gpu_busy_ratio", "0"): 0.61,
        ("dstack_gpu_memory_used_bytes", "0"): 3.0 * GIB, ("dstack_gpu_memory_total_bytes", "0"): 80.0 * GIB,
        ("dstack_gpu_usable", "1"): 0.0,
    }  # fmt: skip


def test_parts_are_up_unless_a_fault_says_they_are_away(telling) -> None:
    told, metrics, _ = telling
    told.health.note([trouble(FaultKind.ARBITER_AWAY, "arbiter", "no answer")])
    told.looked({})
    assert value(metrics, "dstack_controller_part_up", part="server") == 1
    assert value(metrics, "dstack_controller_part_up", part="arbiter") == 0
    told.health.note([])
    told.looked({})
    assert value(metrics, "dstack_controller_part_up", part="arbiter") == 1
