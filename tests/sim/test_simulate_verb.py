"""`dstackctl simulate` from files to the printed result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dstack_sched.cli import app, register
from dstack_sched.errors import InputError
from fakes.worlds import HEAVY, LIGHT, surface


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    models = {}
    for name, a in (("light", LIGHT), ("heavy", HEAVY)):
        shape = surface(name, a)
        points = [
            {
                "gpu_percent": p, "batch_size": b, "latency_ms_p50": float(shape.latency_ms(p, b)),
                "latency_ms_p99": float(shape.p99_ms(p, b)), "samples": 40,
            }
            for p in (10, 40, 100) for b in (1, 4, 16)
        ]  # fmt: skip
        models[name] = {"sha256": "0" * 64, "memory_bytes": 1 << 30, "points": points}
    gpu = {"name": "made up", "sms": 100, "memory_bytes": 1 << 36, "driver": "1", "runtime": "1"}
    profiles, workload = tmp_path / "profiles.json", tmp_path / "workload.yaml"
    profiles.write_text(json.dumps({"version": 1, "gpu": gpu, "models": models}))
    workload.write_text(
        "models:\n- {name: light, slo_ms: 20, rate_per_s: 200}\n"
        "- {name: heavy, slo_ms: 40, rate_per_s: 100}\n"
    )
    register(["simulate"])
    return ["simulate", "--profiles", str(profiles), "--workload", str(workload), "--duration-s", "1"]


def test_json_and_timeline(files: list[str], tmp_path: Path) -> None:
    page = tmp_path / "gpu.html"
    done = CliRunner().invoke(app, [*files, "--json", "--timeline", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert answer["policy"] == "dstack" and set(answer["models"]) == {"light", "heavy"}
    assert answer["models"]["light"]["slo_attainment"] >= 0.99
    assert "<canvas" in page.read_text() and "heavy" in page.read_text()


def test_all_policies_see_the_same_arrivals(files: list[str]) -> None:
    done = CliRunner().invoke(app, [*files, "--json", "--all"], catch_exceptions=False)
    policies = json.loads(done.stdout)["policies"]
    assert len(policies) == 11
    assert len({(p["models"]["light"]["offered"], p["models"]["heavy"]["offered"]) for p in policies}) == 1


@pytest.mark.parametrize(
    "extra", [["--policy", "best"], ["--duration-s", "0"], ["--levels", "50,x"], ["--arrivals", "trace:/no"]]
)
def test_bad_options_are_one_line_each(files: list[str], extra: list[str]) -> None:
    with pytest.raises(InputError) as error:
        CliRunner().invoke(app, [*files, *extra], catch_exceptions=False)
    assert "\n" not in str(error.value)
