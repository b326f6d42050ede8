"""Status: what two readings of server and arbiter make of rates, shares and lateness."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.app.status import StatusReader
from dstack_sched.cli.status import view
from dstack_sched.errors import MachineError
from fakes.serving import FakeClock, FakeServer


class FakeArbiter:
    """Answers status from a dictionary that a test changes; None: nobody answers."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] | None = {
            "policy": "dstack",
            "gpus": {"-1": {"capacity_percent": 100.0, "granted_percent": 50.0, "gpu_percent_ms": 1000.0}},
            "models": {"detect": {"rows": 100, "late_rows": 10, "gpu_percent_ms": 800.0}},
            "backends": [{"model": "detect", "state": "running", "waiting": 3}],
        }

    def request(self, verb: str, **fields: Any) -> dict[str, Any]:
        if self.answer is None:
            raise MachineError("no arbiter answers")
        return copy.deepcopy(self.answer)

    def close(self) -> None:
        pass


@pytest.fixture
def world(tmp_path: Path) -> tuple[StatusReader, FakeServer, FakeArbiter, FakeClock]:
    (tmp_path / "detect" / "1").mkdir(parents=True)
    (tmp_path / "detect" / "config.pbtxt").write_text(
        'backend: "dstack" parameters { key: "gpu_percent" value { string_value: "40" } }'
    )
    (tmp_path / "idle" / "1").mkdir(parents=True)
    server = FakeServer(DiskRepository(tmp_path), "detect")
    server.in_force["detect"] |= {"backend": "dstack"}
    arbiter, clock = FakeArbiter(), FakeClock()
    return StatusReader(server, arbiter, clock), server, arbiter, clock


def test_two_readings_give_rates_and_shares(world) -> None:
    reader, server, arbiter, clock = world
    server.counts["detect"] = {"rows": 1000, "failed": 0}
    first = reader.read()["models"]["detect"]
    assert (first["rate_per_s"], first["utilization_percent"]) == (None, None)
    assert first["within_slo"] == pytest.approx(0.9)
    clock.now += 2.0
    server.counts["detect"] = {"rows": 1050, "failed": 2}
    arbiter.answer["models"]["detect"] = {"rows": 200, "late_rows": 11, "gpu_percent_ms": 60_800.0}
    arbiter.answer["gpus"]["-1"] = arbiter.answer["gpus"]["-1"] | {"gpu_percent_ms": 61_000.0}
    document = reader.read()
    row = document["models"]["detect"]
    assert row["rate_per_s"] == pytest.approx(26.0)
    assert row["within_slo"] == pytest.approx(0.99)
    assert row["utilization_percent"] == pytest.approx(30.0)
    assert document["gpus"]["-1"]["utilization_percent"] == pytest.approx(30.0)
    assert (row["gpu_percent"], row["batch_size"], row["waiting"]) == (40.0, None, 3)
    assert document["models"]["idle"]["state"] == "UNAVAILABLE"


def test_resets_of_server_and_arbiter_give_no_negative_figures(world) -> None:
    reader, server, arbiter, clock = world
    server.counts["detect"] = {"rows": 1000, "failed": 0}
    reader.read()
    clock.now += 1.0
    server.counts["detect"] = {"rows": 4, "failed": 0}
    arbiter.answer["models"]["detect"] = {"rows": 2, "late_rows": 0, "gpu_percent_ms": 1.0}
    row = reader.read()["models"]["detect"]
    assert row["rate_per_s"] == pytest.approx(4.0)
    assert row["within_slo"] == 1.0
    assert row["utilization_percent"] is None


def test_without_an_arbiter_the_rest_is_shown(world) -> None:
    reader, _, arbiter, _ = world
    arbiter.answer = None
    document = reader.read()
    assert document["arbiter"] is None
    assert document["models"]["detect"]["waiting"] is None
    text = "".join(str(part) for part in view(document).renderables[1:])
    assert "none answers" in text


def test_a_model_of_another_backend_is_not_ours_to_show(world) -> None:
    reader, server, _, _ = world
    server.in_force["detect"] |= {"backend": "onnxruntime"}
    assert "detect" not in reader.read()["models"]
