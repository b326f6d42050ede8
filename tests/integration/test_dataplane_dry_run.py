"""perf/h100_dataplane.py on the CPU provider: the study runs from end to end where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fakes.onnx_models import SlowSum

STUDY = Path(__file__).parents[2] / "perf" / "h100_dataplane.py"
LIMIT_S = 150


def run_study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    places = ["--models-dir", str(folder), "--out", str(folder / "out"), "--state", str(folder / "state")]
    return subprocess.run(
        [sys.executable, str(STUDY), *places, *arguments], capture_output=True, text=True, timeout=LIMIT_S
    )


def test_parts_that_need_no_gpu_run_and_are_flagged_as_a_dry_run(tmp_path: Path) -> None:
    SlowSum("one", inner=64, depth=2).save(tmp_path / "one.onnx")
    options = ["--provider", "cpu", "--models", "one,absent", "--raw-seconds", "0.1"]
    done = run_study(tmp_path, *options, "--parts", "raw,overhead,mps")
    assert done.returncode == 1, "a model that is not there is a problem, and so is the exit status"
    report = json.loads((tmp_path / "out" / "dataplane.json").read_text())
    assert report["provider"] == "cpu" and "dry run" in (tmp_path / "out" / "dataplane.md").read_text()
    assert [problem.split(":")[0] for problem in report["problems"]] == ["absent"], report["problems"]
    assert set(report["overhead_ms_p50"]) == {"one"}
    row = report["parts"]["overhead"]["models"]["one"]
    assert row["latency_ms_p50"] > 0 and row["floor"]["latency_ms_p50"] > 0, row
    assert row["stages_us"]["run"] > 0, row
    killed = report["parts"]["mps"]["scenarios"]["stubs"]
    assert killed["recovered"] and killed["recovery_s"] > 0 and killed["failed"] > 0, killed
    assert killed["wrong_answers"] == 0 and killed["answered"] > 0, killed
    assert report["served_over_raw"] is None and report["mps_recovery_s"] is None, "not run, so not claimed"


def test_a_dry_run_is_kept_out_of_the_reports(tmp_path: Path) -> None:
    reports = STUDY.parent / "reports" / "h100"
    refused = run_study(tmp_path, "--provider", "cpu", "--out", str(reports))
    assert refused.returncode == 2
    assert "does not write below perf/reports" in refused.stderr
    unknown = run_study(tmp_path, "--parts", "raw,nothing")
    assert unknown.returncode == 2 and "no part 'nothing'" in unknown.stderr
