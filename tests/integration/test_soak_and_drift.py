"""Over a while on real Triton: a short soak as `make perf-soak` runs it, and a model that becomes slower."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dstack_sched.adapters.triton_client import TritonClient
from fakes.load import Load, all_grow, wait_until
from fakes.onnx_models import SlowSum
from fakes.site import Site

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 90.0


def test_a_short_soak(tmp_path: Path) -> None:
    """A minute and a half, four faults. What grows is not judged: the processes are too young."""
    out = tmp_path / "soak.json"
    options = ("--minutes", "1.5", "--fault-every-s", "18", "--warm-up-s", "10", "--out", str(out))
    done = subprocess.run(
        [sys.executable, str(ROOT / "perf" / "soak.py"), *options],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert out.exists(), done.stderr
    report = json.loads(out.read_text())
    verdict = {what: holds for what, holds in report["verdict"].items() if what != "nothing grows"}
    assert len(verdict) == 6 and all(verdict.values()), (verdict, done.stdout)
    assert len(report["faults"]) >= 3
    assert report["requests"]["sent"] > 1000
    assert {"triton", "serve", "arbiter", "controller", "stub of alpha"} <= report["growth"].keys()


def test_the_plan_follows_a_model_that_becomes_slower(tmp_path: Path) -> None:
    """An update of a model that answers the same in three times the time: telemetry tells, the profile is
    corrected, and the plan is made anew, without a restart or a measurement of anybody's."""
    models = [SlowSum(name, seed=seed) for seed, name in enumerate(("alpha", "beta"))]
    rates = {"alpha": 30.0, "beta": 10.0}
    site = Site(tmp_path / "site", models, rates=rates)
    try:
        site.start_serve()
        site.start_run("--interval-s", 0.5, "--window-s", 10, "--cooldown-s", 3)
        with Load(site.url, site.models, clients=4, rates=rates) as load:
            wait_until("all models run by grants", all_grow(site.granted_rows, by=200), WITHIN_S)
            known = len(site.decisions())
            slower = SlowSum("alpha", seed=0, detours=24)
            slower.save(site.repository / "alpha" / "1" / "model.onnx")
            with TritonClient(site.url) as client:
                client.load("alpha")

            def factor() -> float:
                found = [
                    float(match[1])
                    for entry in site.decisions()[known:]
                    if entry.get("cause") == "drift"
                    for match in re.finditer(r"alpha: runs take ([\d.]+) of the predicted", entry["reason"])
                ]
                return max(found, default=0.0)

            wait_until("it is seen to be slower", lambda: factor() > 1.4, WITHIN_S)
            load.stop()
            assert load.failed() == []
    finally:
        site.stop()
