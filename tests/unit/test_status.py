"""Status: what two readings of Triton, arbiter, controller and GPUs make of rates, shares and lateness, what
is shown when parts are missing, and that it fits the screen."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dstack_sched.adapters.controller_board import SERVE_BOARD, FileStatusBoard, read_board
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.app.gpus import GpuWatch, gpu_rows
from dstack_sched.app.status import StatusReader
from dstack_sched.app.status_reading import Sources
from dstack_sched.cli import app, register
from dstack_sched.cli.status_view import duration, view
from dstack_sched.errors import InputError, MachineError, ServerError
from fakes.gpus import GIB, FakeInventory
from fakes.serving import FakeClock, FakeServer

PLAN = {"gpu_percent": 40.0, "batch_size": 8, "slo_ms": 50.0, "latency_ms": 5.0}


class FakeArbiter:
    """Answers status and telemetry from dictionaries that a test changes; None: nobody answers."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] | None = {
            "policy": "dstack", "pid": 7, "uptime_s": 100.0, "clients": 2,
            "gpus": {
                "0": {
                    "capacity_percent": 200.0, "granted_percent": 50.0, "gpu_percent_ms": 1000.0,
                    "plan": {"detect": PLAN}, "scores": {"detect": 3},
                }
            },
            "models": {"detect": counters(grants=20, granted_rows=160, rows=100, late_rows=10, run_ms=100.0,
                                          gpu_percent_ms=4000.0)},
            "backends": [{"model": "detect", "gpu": 0, "state": "running", "waiting": 3}],
            "backend_states": {"idle": 0, "running": 1},
            "decision_us": {"p50": 8.0, "p99": 20.0},
            "overload_reports": [],
        }  # fmt: skip
        self.pages: list[dict[str, Any]] = []

    def request(self, verb: str, **fields: Any) -> dict[str, Any]:
        if self.answer is None:
            raise MachineError("no arbiter answers")
        if verb == "telemetry":
            if not self.pages:
                raise InputError("unknown verb 'telemetry'")
            return self.pages[fields["since"]]
        return copy.deepcopy(self.answer)

    def close(self) -> None:
        pass


def counters(**known: float) -> dict[str, Any]:
    names = ("grants", "granted_rows", "unused_grants", "rows", "late_rows", "run_ms", "gpu_percent_ms")
    return {name: known.get(name, 0) for name in names} | {"wait_us": {"counts": [], "sum": 0}}


class World:
    """A reader over fakes; `read` moves the time on by a second first."""

    def __init__(self, root: Path) -> None:
        (root / "detect" / "1").mkdir(parents=True)
        (root / "detect" / "config.pbtxt").write_text(
            'backend: "dstack" parameters { key: "gpu_percent" value { string_value: "40" } }'
        )
        (root / "idle" / "1").mkdir(parents=True)
        self.server = FakeServer(DiskRepository(root), "detect")
        self.server.in_force["detect"] |= {"backend": "dstack"}
        self.server.counts["detect"] = {"rows": 1000, "failed": 0}
        self.arbiter, self.clock, self.inventory = FakeArbiter(), FakeClock(), FakeInventory(0)
        self.boards: dict[str, Any] = {}
        self.mps: dict[str, Any] | None = None
        watch = GpuWatch(self.inventory, self.clock)

        def gpus() -> Any:
            watch.look()
            return gpu_rows(watch.states)

        self.reader = StatusReader(
            Sources(
                self.server, self.arbiter, self.clock, boards=lambda: self.boards, gpus=gpus,
                mps=lambda: self.mps,
            )
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        self.clock.now += 1.0
        return self.reader.read()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def shown(document: dict[str, Any], width: int = 110, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(view(document, width=width, **options))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_two_readings_give_rates_and_shares(world: World) -> None:
    first = world.read()["models"]["detect"]
    assert (first["rate_per_s"], first["utilization_percent"], first["goodput_per_s"]) == (None, None, None)
    assert first["within_slo"] == pytest.approx(0.9)
    world.clock.now += 1.0
    world.server.counts["detect"] = {"rows": 1050, "failed": 2}
    answer = world.arbiter.answer
    assert answer is not None
    answer["models"]["detect"] = counters(
        grants=31, granted_rows=248, unused_grants=1, rows=200, late_rows=11, run_ms=160.0,
        gpu_percent_ms=64_000.0,
    )  # fmt: skip
    answer["gpus"]["0"] |= {"gpu_percent_ms": 61_000.0}
    document = world.read()
    row = document["models"]["detect"]
    assert row["rate_per_s"] == pytest.approx(26.0)
    assert row["within_slo"] == pytest.approx(0.99)
    assert row["goodput_per_s"] == pytest.approx(99 / 2)
    assert row["utilization_percent"] == pytest.approx(30.0)
    assert row["batch_rows_mean"] == 10.0, "100 rows in the 10 grants that were used"
    assert row["granted_rows_mean"] == 8.0
    assert row["measured_run_ms"] == 6.0 and row["predicted_run_ms"] == 5.0
    assert row["level_percent"] == 1000.0, "60000 GPU%-ms in 60 ms: the fake's figures, only divided"
    assert document["gpus"]["0"]["utilization_percent"] == pytest.approx(30.0)
    assert (row["gpu_percent"], row["batch_size"], row["slo_ms"], row["waiting"]) == (40.0, 8, 50.0, 3)
    assert document["models"]["idle"]["state"] == "UNAVAILABLE"


def test_resets_of_server_and_arbiter_give_no_negative_figures(world: World) -> None:
    world.read()
    world.server.counts["detect"] = {"rows": 4, "failed": 0}
    assert world.arbiter.answer is not None
    world.arbiter.answer["models"]["detect"] = counters(grants=1, rows=2, gpu_percent_ms=1.0)
    row = world.read()["models"]["detect"]
    assert row["rate_per_s"] == pytest.approx(4.0)
    assert row["within_slo"] == 1.0
    assert row["utilization_percent"] is None and row["goodput_per_s"] is None


def test_nothing_came_lately(world: World) -> None:
    """An idle model shows zero rates and what was true before, not dashes or divisions by zero."""
    world.read()
    row = world.read()["models"]["detect"]
    assert (row["rate_per_s"], row["goodput_per_s"], row["utilization_percent"]) == (0.0, 0.0, 0.0)
    assert row["within_slo"] == pytest.approx(0.9) and row["batch_rows_mean"] == 5.0


def test_stages_are_the_worst_instance_s_and_triton_s_queue(world: World) -> None:
    body = {"model": "detect", "gpu": 0, "totals": {"requests": 5}, "latency_us": {"p50": 900, "p99": 4000}}
    world.arbiter.pages = [
        {"instances": {"detect_0#1": {**body, "stages_us": {"run": {"mean": 800.0, "p99": 1000}}}},
         "next_since": 1, "more": True},
        {"instances": {"detect_1#2": {**body, "stages_us": {"run": {"mean": 900.0, "p99": 950}}}},
         "next_since": 2, "more": False},
    ]  # fmt: skip
    world.server.queue = {"detect": (10, 5_000_000)}
    row = world.read()["models"]["detect"]
    assert row["stages_us"] == {"triton_queue": {"mean": 500.0}, "run": {"mean": 900.0, "p99": 1000}}
    assert row["totals"] == {"requests": 10}
    assert (row["latency_p50_ms"], row["latency_p99_ms"]) == (0.9, 4.0)
    world.server.queue = {"detect": (20, 6_000_000)}
    document = world.read()
    assert document["models"]["detect"]["stages_us"]["triton_queue"]["mean"] == 100.0
    line = next(line for line in shown(document, stages=True).splitlines() if "0.9/1" in line)
    assert line.split()[:2] == ["detect", "0.1"]


def test_without_an_arbiter_the_rest_is_shown(world: World) -> None:
    world.arbiter.answer = None
    document = world.read()
    assert document["arbiter"] is None and document["models"]["detect"]["waiting"] is None
    text = shown(document)
    assert "arbiter: none; models run ungated (no arbiter answers)" in text and "detect" in text


def test_without_triton_what_the_arbiter_knows_is_shown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> Any:
        raise ServerError("Triton at 127.0.0.1:1: no answer")

    monkeypatch.setattr(world.server, "metadata", gone)
    document = world.read()
    assert document["server"] is None and list(document["models"]) == ["detect"]
    assert "Triton at 127.0.0.1:1: no answer" in shown(document)
    world.arbiter.answer = None
    assert world.read()["models"] == {}
    assert "controller: none has run" in shown(world.read())


def test_a_model_of_another_backend_is_not_ours_to_show(world: World) -> None:
    world.server.in_force["detect"] |= {"backend": "onnxruntime"}
    assert "detect" not in world.read()["models"]


def test_the_controller_s_view_is_shown_while_it_runs(world: World) -> None:
    board = {
        "running": True, "pid": 5, "updated_s": world.clock.wall_time_s(), "dry_run": True,
        "plan": {"headroom": 1.8, "feasible": True},
        "last_round": {"what": "advised", "reason": "detect: rate 20 -> 90"},
        "models": {"detect": {"forecast_per_s": 33.0, "planned_per_s": 30.0, "predicted_run_ms": 7.0}},
        "faults": [{"kind": "stub_dead", "subject": "detect", "since_s": world.clock.wall_time_s() - 599,
                    "detail": "its process ended"}],
    }  # fmt: skip
    world.boards = {"controller": board, "serve": {**board, "models": {}}}
    document = world.read()
    row = document["models"]["detect"]
    assert (row["forecast_per_s"], row["planned_per_s"], row["predicted_run_ms"]) == (33.0, 30.0, 7.0)
    assert len(document["faults"]) == 1, "both saw it, it is one fault"
    text = shown(document, width=200)
    assert "controller: pid 5, dry run; headroom 1.8; last: advised (detect: rate 20 -> 90)" in text
    assert "FAULT stub_dead detect: its process ended (for 10 min)" in text
    world.clock.now += 100
    assert "SILENT for 102 s" in shown(world.read())
    world.boards["controller"] = {**board, "running": False}
    world.boards["serve"] = None
    document = world.read()
    assert document["models"]["detect"]["forecast_per_s"] is None, "a forecast of a dead controller is none"
    assert document["faults"] == [] and "not running (last seen" in shown(document)


def test_gpus_with_memory_and_those_that_are_out(world: World) -> None:
    world.inventory.gpus = FakeInventory(2).gpus
    world.inventory.set(0, used_bytes=20 * GIB, utilization_percent=61.0)
    world.inventory.set(1, lost="it has disappeared")
    world.mps = {"owner": "dstackctl, process 9", "clients": {"0": 2, "1": 0}, "client_limit": 48}
    text = " ".join(shown(world.read(), width=300).split())
    assert "GPU 0 (NVIDIA H100 80GB HBM3): granted 50% now, -% on average, of 200%, busy 61%, memory" in text
    assert "20.0/80 GiB" in text and "OUT: it has disappeared" in text
    assert "MPS: dstackctl, process 9, 2 clients of at most 48 a GPU" in text


@pytest.mark.parametrize(
    ("width", "stages"), [(40, False), (80, False), (80, True), (100, True), (132, False), (160, True)]
)
def test_it_fits_the_screen(world: World, width: int, stages: bool) -> None:
    """Figures are never cut, whatever the terminal: the lesser columns and long names give way."""
    world.read()
    document = world.read()
    document["models"]["a_model_with_quite_a_long_name"] = {
        **document["models"]["detect"], "rate_per_s": 12345.6, "goodput_per_s": 12000.1,
        "within_slo": 0.99912, "latency_p50_ms": 12.34, "latency_p99_ms": 123.4, "measured_run_ms": 12.34,
        "predicted_run_ms": 11.11, "batch_rows_mean": 15.5, "forecast_per_s": 13000.0, "waiting": 1234,
        "stages_us": {stage: {"mean": 1234.5, "p99": 12345.6} for stage in ("hand_over", "run", "respond")},
    }  # fmt: skip
    lines = shown(document, width=width, stages=stages).splitlines()
    assert all(len(line) <= width for line in lines)
    rows = [line for line in lines if line.startswith("a_model")]
    assert len(rows) == 1 + stages and all("…" not in row.partition(" ")[2] for row in rows)
    figures = {40: ("12346", "99.9"), 80: ("15.5/8", "12346", "12000", "99.9", "12.3/123", "12.3/11.1")}
    for figure in figures[40] if width < 80 else (*figures[80], *(["13000", "1234"] if width > 80 else [])):
        assert figure in rows[0]
    if stages:
        assert rows[1].count("1.23/12.3" if width > 132 else "1.23") == 3


def test_boards_of_run_and_serve_stand_apart(tmp_path: Path) -> None:
    FileStatusBoard(tmp_path).write({"version": 1, "who": "run"})
    FileStatusBoard(tmp_path, SERVE_BOARD).write({"version": 1, "who": "serve"})
    controller, serve = read_board(tmp_path), read_board(tmp_path, SERVE_BOARD)
    assert controller is not None and serve is not None
    assert (controller["who"], serve["who"]) == ("run", "serve")


def run(*arguments: str) -> Any:
    register(["status"])
    return CliRunner().invoke(app, ["status", *arguments])


def test_why_needs_nothing_that_runs(tmp_path: Path) -> None:
    log = FileDecisionLog(tmp_path)
    for number in range(20):
        log.append({"time_s": 1_800_000_000 + number, "what": "kept", "reason": f"reason {number}"})
    answer = run("--why", "-n", "3", "--state", str(tmp_path))
    assert [line.split("kept: ")[1] for line in answer.stdout.splitlines()] == [
        "reason 17", "reason 18", "reason 19",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "names"), [(("-n", "0"), "-n 0: 1 to"), (("--watch", "--json"), "--watch and --json")]
)
def test_bad_options_are_named(tmp_path: Path, arguments: tuple[str, ...], names: str) -> None:
    answer = run(*arguments, "--state", str(tmp_path))
    assert isinstance(answer.exception, InputError) and names in str(answer.exception)


def test_durations() -> None:
    assert [duration(s) for s in (None, 0.4, 119, 120, 7200, 200_000)] == [
        "-", "0 s", "119 s", "2 min", "2 h", "2 d",
    ]  # fmt: skip


def test_the_document_is_json(world: World) -> None:
    assert json.loads(json.dumps(world.read(), allow_nan=False))["version"] == 1
