"""perf-h100-compare as a whole, on CPU instances: every alternative through a real Triton and perf_analyzer.

    .venv/bin/python -m pytest -q -m slow tests/integration/test_compare_dry_run.py       (about 2.5 minutes)

Peaks mean nothing here; that all eight have one, that a second run adds what is missing, and that the report
can be made of them, does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
FILES = {"resnet50": "resnet50_u8", "bert_base": "bert_base_cls"}  # of mix C-2 (perf/compare/cells.py)
WIDTH = 64

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def save_model(path: Path, name: str) -> None:
    """A small dense network; its tensors' names start with the model's, as those of the exports do."""
    rng = np.random.default_rng(1)
    weight = numpy_helper.from_array(rng.normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32), "w")
    x, y = (
        helper.make_tensor_value_info(f"{name}_{part}", TensorProto.FLOAT, ["batch", WIDTH])
        for part in ("image", "output")
    )
    node = helper.make_node("MatMul", [x.name, "w"], [y.name])
    graph = helper.make_graph([node], name, [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def save_profiles(path: Path) -> None:
    """Of a CPU with two cores: a millisecond and a tenth a row."""
    points = [
        {"gpu_percent": p, "batch_size": b, "latency_ms_p50": 1.0 + 0.1 * b * 100.0 / p,
         "latency_ms_p99": 1.2 + 0.1 * b * 100.0 / p, "samples": 100}
        for p in (50.0, 100.0) for b in (1, 8, 32)
    ]  # fmt: skip
    models = {name: {"sha256": "0" * 64, "memory_bytes": 1 << 20, "points": points} for name in FILES}
    gpu = {"name": "CPU", "sms": 2, "memory_bytes": 1 << 34, "driver": "cpu", "runtime": "onnxruntime"}
    path.write_text(json.dumps({"version": 1, "gpu": gpu, "models": models}))


def compare(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, str(ROOT / "perf" / "h100_compare.py"), "--device", "cpu", "--cells", "C-2:100",
        "--models-dir", str(folder), "--profiles", str(folder / "profiles.json"),
        "--out", str(folder / "out"), "--work", str(folder / "work"), "--seconds", "0.5",
        "--warmup-s", "0.3", "--tolerance", "0.5", "--static-search-s", "10", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def test_all_alternatives_run_and_are_reported(tmp_path: Path) -> None:
    for name, file in FILES.items():
        save_model(tmp_path / f"{file}.onnx", name)
    save_profiles(tmp_path / "profiles.json")

    first = compare(tmp_path, "--alternatives", "mps-default,dstack", "--time-budget-s", "200")
    assert first.returncode == 0, first.stdout + first.stderr
    second = compare(tmp_path, "--time-budget-s", "300")
    assert second.returncode == 0, second.stdout + second.stderr
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert sorted(each["letter"] for each in document["cells"]) == list("abcdefgh")
    for each in document["cells"]:
        assert each["peak_per_s"] > 0 and len(each["repeats"]) == 1, each["policy"]
        latencies = each["at_peak"]["figures"]["models"]
        assert all(model["requests"] > 0 and model["attainment"] >= 0.99 for model in latencies.values())
    assert "mps-default" not in second.stdout.split("\n")[0]  # known from the first run
    assert next(iter(document["static_searches"].values()))["tried"]
    learned = document["learned"]["C-2:100:equal:poisson"]
    assert learned["seconds"] > 0 and all(each["scale"] > 0 for each in learned["corrections"].values())
    assert "shares by what was seen" in first.stdout and "shares by what was seen" not in second.stdout
    assert "| C-2:100:equal:poisson |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "timeline_C-2_100_equal_poisson.png").exists()
