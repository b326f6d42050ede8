"""`make perf-h100-profiles` on the CPU: what it writes, and that a second command goes on where one ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "ocr_orient", "magika"


@pytest.fixture
def study(tmp_path: Path) -> Any:
    """Runs the study on some of two sample models; what it said, and what profiles.json holds then."""
    models = tmp_path / "models"
    models.mkdir()
    for name in (FIRST, SECOND):
        (models / f"{name}.onnx").symlink_to(ROOT / "model_repository" / name / "1" / "model.onnx")

    def run(*names: str) -> tuple[str, dict[str, Any]]:
        command = [
            sys.executable, ROOT / "perf" / "h100_profiles.py", "--device", "cpu", "--time-budget-s", "150",
            "--models", ",".join(names), "--exhaustive", FIRST, "--batch-sizes", "1,2",
            "--models-dir", models, "--out", tmp_path / "out", "--state", tmp_path / "state",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((tmp_path / "out" / "profiles.json").read_text())

    return run


def places(model: dict[str, Any]) -> set[tuple[float, int]]:
    return {(point["gpu_percent"], point["batch_size"]) for point in model["points"]}


def test_a_second_command_goes_on_where_one_ended(study: Any) -> None:
    said, alone = study(FIRST)
    assert "going on" not in said
    assert set(alone["figures"]["against_exhaustive_grid"]) == {FIRST}
    said, both = study(FIRST, SECOND)
    assert f"going on from an earlier run: {FIRST}" in said
    assert set(both["models"]) == {FIRST, SECOND}
    assert places(alone["models"][FIRST]) <= places(both["models"][FIRST]), "nothing is lost"
    assert "PHASE exhaustive_s" not in said, "nor its grid"
    assert both["figures"]["against_exhaustive_grid"] == alone["figures"]["against_exhaustive_grid"]
    timing, before = both["figures"]["timing"], alone["figures"]["timing"]
    assert timing["exhaustive_s"] == before["exhaustive_s"]
    assert timing["models_s"][SECOND] > 0 and timing["models_s"][FIRST] >= before["models_s"][FIRST]
