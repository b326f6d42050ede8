"""`dstackctl profile` from the command line: a real model, measured for real on this CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dstack_sched.adapters.profile_files import read_profiles
from fakes.onnx_models import SlowSum, add_model


def dstackctl(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dstack_sched", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two models, profiled once: repository, state and profiles.json beside each other."""
    root = tmp_path_factory.mktemp("profiled")
    for name in ("first", "second"):
        add_model(
            root / "repository", SlowSum(name, inner=256, depth=6), gpu_percent=50, slo_ms=50, batch_size=4
        )
    out = dstackctl(
        "profile",
        root / "repository",
        "--state",
        root / "state",
        "--out",
        root / "p.json",
        "--corun",
        "--json",
        "--time-budget-s",
        2,
    )
    (root / "out.json").write_text(out.stdout)
    return root


def test_a_repository_is_profiled_into_the_contract(measured: Path) -> None:
    profiles = read_profiles(measured / "p.json")
    printed = json.loads((measured / "out.json").read_text())
    assert set(profiles.models) == set(printed["models"]) == {"first", "second"}
    assert printed["profiling"]["first"]["measured"] >= 3
    for model in profiles.models.values():
        assert len(model.sha256) == 64
        assert model.fit is not None and model.knee is not None
        assert max(point.batch_size for point in model.points) == 4, "max_batch_size of its config"
        assert model.memory_bytes > 10 << 20
    assert profiles.corun, "models side by side"
    assert {member.model for point in profiles.corun for member in point.members} == {"first", "second"}


def test_what_is_known_is_not_measured_again(measured: Path) -> None:
    files = {path: path.read_bytes() for path in (measured / "state" / "profiles").glob("*/*.json")}
    again = dstackctl("profile", measured / "repository", "--state", measured / "state", "--json")
    made = json.loads(again.stdout)["profiling"]
    complete = [name for name, row in made.items() if row["measured"] == 0]
    # A noisy machine may leave the error above the target; then the grid is completed, and only that.
    assert all(row["reused"] >= 3 for row in made.values())
    if len(complete) == 2:
        assert {path: path.read_bytes() for path in files} == files


def test_show_prints_plots_and_draws(measured: Path) -> None:
    shown = dstackctl("profile", "--show", "first", "--state", measured / "state", "--png", measured / "png")
    assert "first on" in shown.stdout and "knee at GPU%" in shown.stdout
    assert "second on" not in shown.stdout
    assert "(GPU%)" in shown.stdout, "the plot in the terminal"
    assert "\x1b[" not in shown.stdout, "no colours into a pipe"
    png = (measured / "png" / "first.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    from_file = dstackctl(
        "profile", "--show", "--profiles", measured / "p.json", "--json", "--state", measured / "state"
    )
    assert set(json.loads(from_file.stdout)["models"]) == {"first", "second"}


def test_show_without_that_model_says_so(measured: Path) -> None:
    done = dstackctl("profile", "--show", "third", "--state", measured / "state", status=2)
    assert done.stderr.strip().endswith("no profile of 'third'; make one with dstackctl profile")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"latency_ms_p50": float("nan")}, "latency_ms_p50 is nan"),
        ({"latency_ms_p50": -1.0}, "latency_ms_p50 is -1"),
        ({"latency_ms_p50": 1e6, "latency_ms_p99": 1e6, "gpu_percent": 100, "batch_size": 1}, "not monotone"),
    ],
)
def test_a_bad_profile_is_one_line_and_status_2(
    measured: Path, tmp_path: Path, change: dict, wanted: str
) -> None:
    document = json.loads((measured / "p.json").read_text())
    # Points of our own: which ones a noisy machine leaves to a real profile is not certain.
    document["models"]["first"]["points"] = points = [
        {"gpu_percent": p, "batch_size": b, "latency_ms_p50": ms, "latency_ms_p99": ms, "samples": 9}
        for p, b, ms in ((50, 1, 2.0), (50, 4, 6.0), (100, 4, 4.0), (100, 1, 1.5))
    ]
    points[-1].update(change)
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(document))
    done = dstackctl("profile", "--show", "--profiles", bad, "--state", tmp_path, status=2)
    assert wanted in done.stderr and "bad.json: first" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_import_adds_points_to_a_file(measured: Path, tmp_path: Path) -> None:
    csv = tmp_path / "metrics-model-inference.csv"
    csv.write_text("Model,Batch,Concurrency,p99 Latency (ms)\nbert,1,1,4.0\nbert,8,1,9.0\nbert,8,4,40.0\n")
    out = tmp_path / "all.json"
    missing = dstackctl(
        "profile", "import", csv, "--model", "bert", "--out", out, "--state", tmp_path, status=2
    )
    assert "--gpu FILE" in missing.stderr
    dstackctl(
        "profile",
        "import",
        csv,
        "--model",
        "bert",
        "--out",
        out,
        "--gpu",
        measured / "p.json",
        "--state",
        tmp_path,
    )
    half = ("--gpu-percent", 50, "--name", "bert")
    csv.write_text(csv.read_text().replace("4.0", "6.0").replace("9.0", "15.0"))
    dstackctl("profile", "import", csv, "--model", "bert", "--out", out, *half, "--state", tmp_path)
    model = read_profiles(out).models["bert"]
    assert {(p.gpu_percent, p.batch_size): p.latency_ms_p50 for p in model.points} == {
        (100, 1): 4.0,
        (100, 8): 9.0,
        (50, 1): 6.0,
        (50, 8): 15.0,
    }
    assert model.fit is not None


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "name an ONNX file, a model or a repository"),
        (["none"], "none: no such file or directory"),
        (["REPOSITORY", "--models", "third"], "no model named 'third' there; the models are first, second"),
        (["REPOSITORY", "--batch-sizes", "1,x"], "--batch-sizes '1,x': numbers by comma are wanted"),
        (["REPOSITORY", "--gpu-percents", "50,200"], "a GPU% is at most 100"),
        (["REPOSITORY", "--shape", "x"], "NAME:D1,D2,... is wanted"),
        (["REPOSITORY", "--provider", "tpu"], "one of auto, cpu, cuda is wanted"),
    ],
)
def test_bad_usage_is_one_line(measured: Path, tmp_path: Path, arguments: list[str], wanted: str) -> None:
    given = [str(measured / "repository") if part == "REPOSITORY" else part for part in arguments]
    done = dstackctl("profile", *given, "--state", tmp_path, status=2)
    assert wanted in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_has_examples() -> None:
    assert "Example: dstackctl profile model_repository" in dstackctl("profile", "--help").stdout
    assert "Example: dstackctl profile import" in dstackctl("profile", "import", "--help").stdout
