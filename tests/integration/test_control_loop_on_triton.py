"""The control loop on a real Triton under load: rates shift, the plan follows, nothing is lost."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.load import Load, wait_until
from fakes.onnx_models import SlowSum
from fakes.site import Site

SLO_MS = 400.0
WISH = "the workload file has changed"
GROWS_EVERY_S = 15.0
OPTIONS = ("--interval-s", 0.5, "--window-s", 10, "--cooldown-s", 2, "--horizon-s", 600)
MODELS = (SlowSum("hot", inner=512, depth=24, detours=420), SlowSum("cool", inner=128, depth=8, seed=1))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """One row a batch, so that more requests are more work."""
    site = Site(tmp_path, MODELS, slo_ms=SLO_MS, rates={"hot": 2.0, "cool": 5.0})
    for name in site.models:
        config = site.repository / name / "config.pbtxt"
        config.write_text(
            config.read_text().replace("max_batch_size: 8", "max_batch_size: 1").replace('"8"', '"1"')
        )
    yield site
    site.stop()


def latency_ms(site: Site, name: str) -> float:
    """What the profile says of one row on one core."""
    for path in (site.state / "profiles").glob("*/*.json"):
        model = json.loads(path.read_text()).get("model", {})
        if model.get("name") == name:
            return min(p["latency_ms_p50"] for p in model["points"] if p["gpu_percent"] < 100)
    raise AssertionError(f"no profile of {name}")


def applied(site: Site, text: str) -> list[dict[str, Any]]:
    return [entry for entry in site.decisions("applied") if text in entry["reason"]]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a second core is what the second instance runs on")
def test_a_model_that_outgrows_its_share_gets_more_and_no_request_is_lost(site: Site) -> None:
    """Quiet at first; then more work for one model than a core does: the loop gives it another instance (or
    more threads) under load, every answer comes and is right, and the log says why. Then a wish of the
    operator: told, not loaded."""
    served = site.start_serve()
    run = site.start_run(*OPTIONS)
    rate = min(1150.0 / latency_ms(site, "hot"), 120.0)
    rates = {"hot": 2.0, "cool": 5.0}
    # A busy machine answers late: that is no lost request.
    with Load(served.url, site.models, clients=24, rates=rates, answer_within_s=30.0) as load:
        wait_until("a look at the load", lambda: load.answered["cool"] > 10, within_s=60)
        load.rates["hot"] = rate
        until_loaded(site, load, "hot")
        count = load.answered["hot"]
        wait_until("more answers", lambda: load.answered["hot"] > count + 50, within_s=60)
        load.rates["hot"] = 2.0
        site.write_workload(0.8 * SLO_MS, {"hot": 2.0, "cool": 5.0})
        wait_until("the wish", lambda: applied(site, WISH), within_s=60)
    grown, wish = loads_of(site, "hot")[0], applied(site, WISH)[0]
    assert load.failures == []
    # The new rate may have been taken in before, by a message: then that decision explains it.
    explained = [each for each in site.decisions() if re.search(r"hot: \S+/s forecast", each["reason"])]
    assert explained and explained[0]["time_s"] <= grown["time_s"]
    assert grown["rates"]["hot"] > 2 * 2.0, "planned for what was forecast"
    assert "hot: " in grown["reason"] and "would miss without it" in grown["reason"]
    assert wish["loads"] == 0
    assert "SLO 400 ms -> 320 ms (message)" in wish["reason"]
    assert site.stated()["hot"]["slo_ms"] == "320"
    assert run.process.poll() is None, run.said()
    told = {entry["reason"] for entry in site.status()["decisions"]}
    assert wish["reason"] in told


def until_loaded(site: Site, load: Load, model: str) -> None:
    """Wait for a load of the model, at a growing rate: where the machine was busy while it was profiled, the
    model is faster than its profile says."""
    grows_s = time.monotonic() + GROWS_EVERY_S

    def loaded() -> bool:
        nonlocal grows_s
        if time.monotonic() > grows_s:
            grows_s += GROWS_EVERY_S
            load.rates[model] *= 1.4
        return bool(loads_of(site, model))

    wait_until(f"more of the machine for {model}", loaded, within_s=90)


def loads_of(site: Site, model: str) -> list[dict[str, Any]]:
    """Rounds after the first that loaded this model."""
    return [
        entry
        for entry in site.decisions("applied")[1:]
        if entry["loads"]
        and any(change.startswith(f"{model}: ") and "message" not in change for change in entry["changes"])
    ]
