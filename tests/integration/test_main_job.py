"""The main job from the command line, on a real Triton: `demo` (what `make run` runs) and `run`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.cli.demo import RESULT_KEYS
from fakes.load import Load
from fakes.onnx_models import WIDTH, SlowSum

MODELS = {name: SlowSum(name, inner=128, depth=8, seed=seed) for seed, name in enumerate(("alpha", "beta"))}
PATIENCE_S = 150
QUICKLY = ("--time-budget-s", 2, "--target-error", 0.3)  # profiles that are good enough here


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for name, model in MODELS.items():
        model.save(root / name / "1" / "model.onnx")
        tensors = (
            f'input [ {{ name: "x_{name}" data_type: TYPE_FP32 dims: [ {WIDTH} ] }} ]\n'
            f'output [ {{ name: "y_{name}" data_type: TYPE_FP32 dims: [ {WIDTH} ] }} ]\n'
        )
        (root / name / "config.pbtxt").write_text(f'backend: "dstack"  # ours\nmax_batch_size: 8\n{tensors}')
    return root


def workload(
    path: Path, slo_ms: float = 500, rate_per_s: float = 20, names: tuple[str, ...] = tuple(MODELS)
) -> Path:
    entries = [f"  - {{name: {name}, slo_ms: {slo_ms}, rate_per_s: {rate_per_s}}}" for name in names]
    path.write_text("\n".join(["models:", *entries]) + "\n")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dstack_sched", *map(str, arguments)]


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, SOCKET_VARIABLE: str(folder / "none.sock")},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_main_job_end_to_end_and_again(repository: Path, tmp_path: Path) -> None:
    """Serve, profile, plan, rewrite, reload, load, report; again: the profiles are reused."""
    before = tree(repository)
    arguments = (
        "demo",
        repository,
        "--workload",
        workload(tmp_path / "w.yaml"),
        "--run-dir",
        "run",
        *QUICKLY,
    )
    status, _, err = finish(start(tmp_path, *arguments, "--seconds", 4))
    assert status == 0, err
    assert tree(repository) == before, "the repository itself is not to be touched"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    check_result(result, err)
    for name, row in result["models"].items():
        config = (tmp_path / "run" / "models" / name / "config.pbtxt").read_text()
        stated = dict(re.findall(r'key: "(\w+)" value { string_value: "([^"]*)" }', config))
        assert float(stated["gpu_percent"]) == row["gpu_percent"]
        assert int(stated["batch_size"]) == row["batch_size"]
        assert config.startswith('backend: "dstack"  # ours\nmax_batch_size: 8\n')
    chart = (tmp_path / "run" / "timeline.html").read_text()
    assert '"alpha"' in chart and '"beta"' in chart, "the arbiter granted nothing"
    measured = points(tmp_path / "run" / "profiles")
    assert {model for model, _ in measured} == set(MODELS)
    status, _, err = finish(start(tmp_path, *arguments, "--seconds", 1))
    assert status == 0, err
    # A noisy machine may leave the error above the target: then points are added, and what is out of order is
    # measured again. No two measurements of a place are equal, so what is equal was kept.
    kept = measured & points(tmp_path / "run" / "profiles")
    assert len(kept) >= len(measured) / 2, "profiles were measured again"


def points(profiles: Path) -> set[tuple[str, str]]:
    """Model and point of every measurement kept."""
    models = [json.loads(path.read_text())["model"] for path in profiles.glob("*/*.json")]
    return {(model["name"], json.dumps(point)) for model in models for point in model["points"]}


def check_result(result: dict[str, Any], said: str) -> None:
    """The contract of issue 2: exactly these keys, with figures that fit together."""
    assert set(result) == {"version", "triton_version", "reloads", "models"}
    assert (result["version"], result["reloads"]) == (1, 2)
    assert re.fullmatch(r"\d+\.\d+\.\d+", result["triton_version"])
    assert set(result["models"]) == set(MODELS)
    for row in result["models"].values():
        assert tuple(row) == RESULT_KEYS
        assert (row["slo_ms"], row["rate_per_s"], row["failed"]) == (500, 20, 0), said
        assert row["requests"] > 0
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p99"]
        assert 0 <= row["slo_attainment"] <= 1
        assert 0 < row["gpu_percent"] <= 100
        assert row["goodput_per_s"] == pytest.approx(row["slo_attainment"] * row["requests"] / 4, rel=0.05)


def bad_inputs(repository: Path, folder: Path) -> Iterator[tuple[list[object], str]]:
    good = workload(folder / "good.yaml")
    (folder / "empty").mkdir()
    yield ["demo", folder / "nowhere", "--workload", good], "does not exist"
    yield ["demo", folder / "empty", "--workload", good], "holds no model"
    yield ["demo", repository, "--workload", folder / "none.yaml"], "no such file"
    ghost = workload(folder / "ghost.yaml", names=("ghost",))
    yield ["demo", repository, "--workload", ghost], "model ghost is not in"
    negative = workload(folder / "negative.yaml", rate_per_s=-1)
    yield ["demo", repository, "--workload", negative], "rate_per_s is -1"
    yield ["run", repository, "--workload", good, "--url", "127.0.0.1:1"], "no Triton answers"
    yield ["demo", repository, "--workload", good, "--tritonserver", folder / "no-triton"], "no-triton"


def test_bad_input_is_one_line_exit_2_and_changes_nothing(repository: Path, tmp_path: Path) -> None:
    before, bad = tree(repository), list(bad_inputs(repository, tmp_path))
    with ThreadPoolExecutor(2) as pool:  # most of each is the start of Python
        ends = pool.map(lambda each: finish(start(tmp_path, *each[0])), bad)
        for (arguments, message), (status, out, err) in zip(bad, ends, strict=True):
            assert (status, out) == (2, ""), (arguments, err)
            assert len(err.splitlines()) == 1, err
            assert message in err
    assert tree(repository) == before


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    until_s = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.1)
    return found


def test_run_plans_then_follows_the_rates(
    repository: Path, tmp_path: Path, triton: Callable[..., Any]
) -> None:
    """Advice first, then the real thing: a plan in force, a shift of the rates, a new plan and why."""
    server = triton(repository, load=list(MODELS))
    state = tmp_path / "state"
    wanted = workload(tmp_path / "w.yaml", rate_per_s=5)
    site = ("--state", state, "--url", server.grpc_url, "--time-budget-s", 2)
    options = (*site, "--workload", wanted, "--interval-s", 0.5, "--window-s", 3, "--cooldown-s", 3)
    before = tree(repository)
    status, out, err = finish(start(tmp_path, "run", repository, *options, "--dry-run", "--once", "--json"))
    assert status == 0, err
    advised = json.loads(out)
    assert advised["report"] is None
    assert tree(repository) == before
    process = start(tmp_path, "run", repository, *options)

    def decisions() -> list[dict[str, Any]]:
        lines = (state / "decisions.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["what"] != "advised"]

    assert wait_for(decisions, process)[0]["what"] == "applied"
    clients = {"clients": 8, "rates": {"alpha": 60.0}, "answer_within_s": PATIENCE_S}
    with Load(server.grpc_url, {"alpha": MODELS["alpha"]}, **clients) as load:
        shifted = wait_for(
            lambda: [d for d in decisions() if d.get("rates", {}).get("alpha", 0) > 30], process
        )
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 0, err
    assert load.failures == []
    assert re.search(r"alpha: [\d.]+/s forecast .* planned for", shifted[0]["reason"])
    with TritonClient(server.grpc_url) as client:
        for name in MODELS:
            in_force = client.config(name)["parameters"]
            text = (repository / name / "config.pbtxt").read_text()
            assert (
                f'"gpu_percent" value {{ string_value: "{in_force["gpu_percent"]["string_value"]}" }}' in text
            )
    status, out, err = finish(start(tmp_path, "status", "--url", server.grpc_url, "--state", state, "--json"))
    assert status == 0, err
    document = json.loads(out)
    assert document["models"]["alpha"]["state"] == "READY"
    assert document["decisions"][-1]["reason"] == decisions()[-1]["reason"]
    before = tree(repository)
    short = workload(tmp_path / "short.yaml", slo_ms=0.0001)
    status, out, err = finish(start(tmp_path, "run", repository, *site, "--workload", short, "--once"))
    assert (status, out) == (2, ""), err
    assert len(err.splitlines()) == 1, err
    assert re.search(r"SLO 0.0001 ms of alpha cannot be met: .* the SLO must be at least [\d.]+ ms", err)
    assert tree(repository) == before
