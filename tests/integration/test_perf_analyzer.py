"""perf_analyzer and `dstackctl bench` against the sample models on one real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters import perf_analyzer
from dstack_sched.adapters.perf_analyzer import LoadOptions, PerfAnalyzerLoad, find_perf_analyzer
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from dstack_sched.errors import InputError
from fakes.feature_models import lookup, save

SAMPLES = Path(__file__).parents[2] / "model_repository"
MODELS = sorted(each.parent.name for each in SAMPLES.glob("*/config.pbtxt"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """All sample models, and one that fails for some requests, ungated."""
    missing = [model for model in MODELS if not (SAMPLES / model / "1" / "model.onnx").exists()]
    assert not missing, f"no weights of {', '.join(missing)}: run make models"
    directory = tmp_path_factory.mktemp("samples")
    for model in MODELS:
        (directory / "models" / model).parent.mkdir(exist_ok=True)
        (directory / "models" / model).symlink_to(SAMPLES / model)
    save(lookup(), directory / "models" / "lookup" / "1" / "model.onnx")
    (directory / "models" / "lookup" / "config.pbtxt").write_text('backend: "dstack"\n')
    env = {SOCKET_VARIABLE: str(directory / "no-arbiter.sock")}
    repository = directory / "models"
    with TritonProcess(find_server(), repository, log_path=directory / "triton.log", env=env) as running:
        with TritonClient(running.grpc_url) as client:
            for model in (*MODELS, "lookup"):
                client.load(model)
        yield running


@pytest.mark.parametrize("memory", ["none", "system"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("model", MODELS)
def test_stock_command_line(server: TritonProcess, model: str, protocol: str, memory: str) -> None:
    """As anybody would call it: the model's name, and nothing about its tensors."""
    url = server.grpc_url if protocol == "grpc" else server.http_url
    run = subprocess.run(
        [
            str(find_perf_analyzer()), "-m", model, "-i", protocol, "-u", url, "--shared-memory", memory,
            "--request-count", "10",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "Request count: 10" in run.stdout and "Failed" not in run.stdout, run.stdout


def bench(server: TritonProcess, workload: Path, *options: str) -> tuple[int, dict, str]:
    arguments = ["bench", "--workload", str(workload), "--url", server.grpc_url, "--json", *options]
    run = subprocess.run(
        [sys.executable, "-m", "dstack_sched", *arguments], capture_output=True, text=True, timeout=120
    )
    return run.returncode, json.loads(run.stdout or "{}"), run.stderr


def write_workload(path: Path, slo_ms: float, *names: str) -> Path:
    models = [{"name": model, "slo_ms": slo_ms, "rate_per_s": 8} for model in names]
    path.write_text(json.dumps({"models": models, "attainment": 0.9}))  # JSON is YAML
    return path


def test_bench_reports_every_model_over_grpc_and_http(server: TritonProcess, tmp_path: Path) -> None:
    workload = write_workload(tmp_path / "workload.yaml", 5000, "magika", "ocr_orient")
    for options in ([], ["--http-url", server.http_url]):
        status, result, errors = bench(server, workload, "--seconds", "2", "--warmup", "1", *options)
        assert status == 0, errors
        assert result["met"] is True and sorted(result["models"]) == ["magika", "ocr_orient"]
        for model in result["models"].values():
            assert model["failed"] == model["unmeasured"] == 0
            assert 4 <= model["requests"] <= 50, "about 8 a second for 2 s"
            assert 0 < model["latency_ms_p50"] <= model["latency_ms_p95"] <= model["latency_ms_p99"] < 5000
            assert model["slo_attainment"] == 1.0
            assert model["goodput_per_s"] == pytest.approx(model["requests"] / 2)


def test_bench_says_when_an_slo_is_missed(server: TritonProcess, tmp_path: Path) -> None:
    workload = write_workload(tmp_path / "workload.yaml", 0.01, "magika", "ocr_orient")
    status, result, errors = bench(server, workload, "--seconds", "2", "--warmup", "0")
    assert status == 1
    assert result["met"] is False and result["models"]["magika"]["slo_attainment"] == 0
    assert "magika: SLO missed: 0.0% within 0.01 ms, wanted 90.0%" in errors


def test_bench_starts_a_generator_anew_that_sends_nothing(
    server: TritonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As perf_analyzer does now and then on a busy machine (app/bench.py, again_if_silent)."""
    program = tmp_path / "perf_analyzer"
    program.write_text(
        f'#!/bin/sh\n[ "$1" != --version ] && mkdir {tmp_path}/hung 2>/dev/null && exec sleep 600\n'
        f'exec {find_perf_analyzer()} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PERF_ANALYZER", str(program))
    workload = write_workload(tmp_path / "workload.yaml", 5000, "magika")
    status, result, errors = bench(server, workload, "--seconds", "2", "--warmup", "0")
    assert status == 0, errors
    assert (tmp_path / "hung").is_dir() and result["models"]["magika"]["slo_attainment"] == 1.0
    assert "magika: no request was answered within 15 s of the first" in errors


def test_bench_counts_failures_and_goes_on(server: TritonProcess, tmp_path: Path) -> None:
    """An index beyond the table: every request fails while it runs, and the bench must say so."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"data": [{"index": [99]}]}))
    workload = write_workload(tmp_path / "workload.yaml", 5000, "lookup", "ocr_orient")
    options = ["--seconds", "3", "--warmup", "0", "--input-data", f"lookup={data}"]
    status, result, errors = bench(server, workload, *options)
    assert status == 1, errors
    bad, good = result["models"]["lookup"], result["models"]["ocr_orient"]
    assert bad["failed"] >= 1 and bad["slo_attainment"] == 0
    assert any("out of data bounds" in error for error in bad["errors"])
    assert all(f"lookup: the load was interrupted: {error}\n" in errors for error in bad["errors"])
    assert (good["slo_attainment"], good["errors"]) == (1.0, [])


def test_data_that_perf_analyzer_refuses_is_no_failure_of_the_server(
    server: TritonProcess, tmp_path: Path
) -> None:
    """Guards against reports of failed requests, or of objectives met, where nothing was ever sent."""
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"data": [{"bytes": {"content": [1] * 7, "shape": [7]}}]}))
    workload = write_workload(tmp_path / "workload.yaml", 5000, "magika")
    options = ["--seconds", "1", "--warmup", "0", "--input-data", f"magika={wrong}"]
    status, result, errors = bench(server, workload, *options)
    assert (status, result) == (2, {})
    assert len(errors.splitlines()) == 1
    assert "dstackctl: magika: the load could not be driven: perf_analyzer ended with status" in errors
    assert "shape of [7]" in errors


def test_bad_input_is_one_line_and_exit_2(server: TritonProcess, tmp_path: Path) -> None:
    workload = tmp_path / "workload.yaml"
    workload.write_text("models: [{name: nobody, slo_ms: 10, rate_per_s: 1}]")
    status, result, errors = bench(server, workload)
    assert (status, result) == (2, {})
    assert errors == (
        "dstackctl: workload: model 'nobody' is not served; ready are: "
        + ", ".join(sorted([*MODELS, "lookup"]))
        + "\n"
    )


def test_doctor_finds_all_that_is_needed_here() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dstack_sched", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    report = json.loads(run.stdout)
    assert run.returncode == 0 and report["ok"] is True, report
    found = {check["name"]: check for check in report["checks"]}
    needed = {"python", "tritonserver", "python stub", "libpython", "stub starts", "backend dstack"}
    assert needed | {"onnxruntime", "perf_analyzer", "arbiter socket", "GPU", "MPS"} <= found.keys()
    assert all(check["ok"] or not check["needed"] for check in found.values())


def test_doctor_names_the_mend_of_what_is_missing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dstack_sched", "doctor", "--json", "--tritonserver", str(tmp_path)],
        capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin", "PERF_ANALYZER": "/none"},
    )  # fmt: skip
    assert run.returncode == 1
    missing = {check["name"]: check for check in json.loads(run.stdout)["checks"] if not check["ok"]}
    assert missing["tritonserver"]["mend"] == "give its directory or its binary"
    assert missing["tritonserver"]["needed"] is True


def test_a_load_whose_inputs_do_not_fit_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there, so what is started ends; shared memory is not kept."""
    declared = {"name": "x", "data_type": "TYPE_UINT8", "dims": [3, 224, 224]}
    configs = {"m": {"name": "m", "max_batch_size": 8, "input": [declared]}}
    program = find_perf_analyzer()
    with PerfAnalyzerLoad(program, LoadOptions("127.0.0.1:1"), configs) as load:
        monkeypatch.setattr(perf_analyzer, "available_bytes", lambda: 2_000_000_000)
        assert load.start("m", np.full(10, 1000)).ends_within(30.0)
        with pytest.raises(InputError, match=r"^m: perf_analyzer keeps .* for 10000 .*--shared-memory"):
            load.start("m", np.full(10_000, 1000))
    with PerfAnalyzerLoad(program, LoadOptions("127.0.0.1:1", shared_memory="system"), configs) as load:
        assert load.start("m", np.full(10_000, 1000)).ends_within(30.0)
