"""STATE/corrections.json, and the workload file that may change."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dstack_sched.adapters.correction_store import FileCorrectionStore
from dstack_sched.cli.live_steps import WorkloadFile
from dstack_sched.domain.profile import Correction, ProfilePoint
from dstack_sched.errors import InputError
from fakes.controller import CPU

KEPT = Correction("abc", 1.7, (ProfilePoint(50.0, 4, 12.5, 13.5, 64),), 0.25)


def test_corrections_come_back_by_device_and_model(tmp_path: Path) -> None:
    FileCorrectionStore(tmp_path).write(CPU, {"1" * 64: KEPT})
    FileCorrectionStore(tmp_path).write(CPU, {"2" * 64: Correction("d")})
    assert FileCorrectionStore(tmp_path).read(CPU) == {"1" * 64: KEPT, "2" * 64: Correction("d")}
    assert FileCorrectionStore(tmp_path).read(replace(CPU, runtime="another")) == {}


ONE = '{"version": 1, "models": {"cpu 2 cpu onnxruntime x": %s}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 9, "models": {}}',
        ONE % '{"scale": 1}',
        ONE % '{"base": "a", "scale": -1, "points": []}',
        ONE % '{"base": "a", "scale": 1, "points": [], "slowdown": -1}',
        ONE % '{"base": "a", "scale": 1, "points": [], "slowdown": "fast"}',
        ONE % '["a"]',
        ONE % '{"base": "a", "scale": 1, "points": [{"gpu_percent": 50}]}',
    ],
)
def test_a_broken_file_is_forgotten_not_fatal(tmp_path: Path, text: str) -> None:
    store = FileCorrectionStore(tmp_path)
    store.path.write_text(text)
    assert store.read(CPU) == {}
    store.write(CPU, {"1" * 64: KEPT})
    assert store.read(CPU)["1" * 64] == KEPT


def test_a_state_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = FileCorrectionStore(tmp_path / "file")
    store.write(CPU, {"1" * 64: KEPT})
    store.write(CPU, {"1" * 64: KEPT})
    assert len([r for r in caplog.records if "drift will have to be found again" in r.message]) == 1


def wish(path: Path, rate: float, stamp: int) -> None:
    path.write_text(f"models:\n  - {{name: a, slo_ms: 50, rate_per_s: {rate}}}\n")
    os.utime(path, ns=(stamp, stamp))


def test_a_changed_workload_is_read_again_and_a_bad_one_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.yaml"
    wish(path, 5, 1)
    file = WorkloadFile(path, lambda read, where: None)
    assert file.read().models[0].rate_per_s == 5
    wish(path, 7, 2)
    assert file.read().models[0].rate_per_s == 7
    path.write_text("models: [")
    assert file.read().models[0].rate_per_s == 7
    assert file.read().models[0].rate_per_s == 7
    assert "the workload read before stays" in capsys.readouterr().err
    path.unlink()
    assert file.read().models[0].rate_per_s == 7
    wish(path, 9, 3)
    assert file.read().models[0].rate_per_s == 9


def test_a_bad_workload_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        WorkloadFile(tmp_path / "none.yaml", lambda read, where: None)
