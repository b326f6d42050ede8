"""Two GPUs of one host: placement, replicas, a GPU taken out of service and given back, under load.

Needs two GPUs; figures go to $OUT/two_gpus.json where $OUT is set. About three minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_sched.adapters.nvml import NvmlInventory
from dstack_sched.adapters.profile_files import read_profiles, write_profiles
from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import MachineError
from fakes.gpu_site import GpuSite, note, private_runtime
from fakes.load import Load, wait_until
from fakes.site import dstackctl

SLO_MS = 100.0
MODELS = ("hot", "cold")


def gpus() -> int:
    """How many there are; 0 where NVML fails."""
    inventory = NvmlInventory()
    try:
        return len(inventory.read())
    except MachineError:
        return 0
    finally:
        inventory.close()


pytestmark = [
    pytest.mark.skipif(gpus() < 2, reason="needs two GPUs of one kind"),
    pytest.mark.timeout(400),
]


def call(site: GpuSite, *words: object) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        dstackctl(*words), capture_output=True, text=True, timeout=200, env={**os.environ, **site.env}
    )
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models measured on GPU 0, once: state/ and profiles.json in this folder."""
    folder = tmp_path_factory.mktemp("profiles")
    with private_runtime() as private:
        site = GpuSite(folder, MODELS, private, slo_ms=SLO_MS)
        call(site, "profile", "measure", site.repository, "--time-budget-s", 15, "--batch-sizes", "1,4,8",
             "--provider", "cuda", "--state", folder / "state",
             "--out", folder / "profiles.json")  # fmt: skip
    return folder


@pytest.fixture
def profiles(measured: Path) -> ProfileSet:
    return read_profiles(measured / "profiles.json")


@pytest.fixture
def site(tmp_path: Path, measured: Path) -> Iterator[GpuSite]:
    """A site whose controller knows the profiles already."""
    with private_runtime() as private:
        site = GpuSite(tmp_path, MODELS, private, slo_ms=SLO_MS)
        shutil.copytree(measured / "state" / "profiles", site.state / "profiles")
        try:
            yield site
        finally:
            site.stop()


def rate_for_both(profiles: ProfileSet) -> float:
    """A rate of "hot" that one GPU cannot carry and two can."""

    def plan(rate: float, count: int) -> Plan:
        wanted = Workload((ModelDemand("hot", SLO_MS, rate), ModelDemand("cold", SLO_MS, 5.0)))
        return make_plan(profiles, wanted, PlanOptions(gpus=count))

    most = 100.0 * plan(100.0, 1).headroom
    for factor in (1.3, 1.2, 1.4, 1.5, 1.1, 1.6, 1.7, 1.8):
        one, two = plan(factor * most, 1), plan(factor * most, 2)
        if not one.feasible and two.feasible and len(two.models["hot"].replicas) == 2:
            return factor * most
    raise AssertionError(f"no rate beyond {most:g}/s needs two GPUs")


def place(site: GpuSite, profiles: ProfileSet, rate: float, *options: object) -> dict[str, tuple[int, ...]]:
    """Plan with the GPUs of this host and apply; model -> the GPUs that the plan names."""
    site.write_workload(SLO_MS, {"hot": rate, "cold": 5.0})
    measured, plan = site.folder / "profiles.json", site.folder / "plan.json"
    write_profiles(measured, profiles)
    call(site, "plan", "--profiles", measured, "--workload", site.workload, "--state", site.state,
         "--out", plan, *options)  # fmt: skip
    call(site, "apply", "--plan", plan, "--repo", site.repository, "--state", site.state, "--url", site.url,
         "--socket", site.socket, "--profiles", measured)  # fmt: skip
    rows = json.loads(plan.read_text())["models"]
    return {name: tuple(each["gpu"] for each in row["replicas"]) for name, row in rows.items()}


def test_replicas_run_where_the_plan_says_and_move_off_a_gpu_that_is_left_out(
    site: GpuSite, profiles: ProfileSet
) -> None:
    rate = rate_for_both(profiles)
    site.start_serve()
    with Load(site.url, site.models) as load:
        load.wait_for(50)
        placed = place(site, profiles, rate)
        assert placed["hot"] == (0, 1)
        assert {name: site.gpus_of(name) for name in MODELS} == placed
        engines = site.arbiter_status()["gpus"]
        assert {"0", "1"} <= set(engines)
        for gpu in ("0", "1"):
            assert "hot" in engines[gpu]["planned_models"]
        load.wait_for(load.total() + 500)
        granted = {gpu: found["gpu_percent_ms"] for gpu, found in site.arbiter_status()["gpus"].items()}
        assert granted["0"] > 0 and granted["1"] > 0, "both replicas were granted work"
        began = time.monotonic()
        moved = place(site, profiles, rate / 4, "--exclude-gpu", "1")
        took_s = time.monotonic() - began
        assert set(moved.values()) == {(0,)}
        assert {name: site.gpus_of(name) for name in MODELS} == moved
        load.wait_for(load.total() + 200)
        back = place(site, profiles, rate)
        assert back["hot"] == (0, 1) == site.gpus_of("hot")
        load.wait_for(load.total() + 200)
    failed = load.failed()
    note("two_gpus", rate_per_s=rate, placed=placed, moved=moved, moved_s=took_s, granted=granted,
         answered=load.total(), failed=len(failed), reasons=sorted(set(failed))[:10])  # fmt: skip
    assert not failed, failed[:5]


def test_a_running_controller_drains_a_gpu_and_uses_it_again(site: GpuSite, profiles: ProfileSet) -> None:
    """`dstackctl gpus --exclude 1` beside `dstackctl run`: no request is lost, GPU 1 is empty in seconds."""
    rate = rate_for_both(profiles)
    site.write_workload(SLO_MS, {"hot": rate, "cold": 5.0})
    site.start_serve()
    with Load(site.url, site.models, clients=6) as load:
        load.wait_for(50)
        site.start_run("--provider", "cuda", "--time-budget-s", 15)
        assert 1 in {gpu for name in MODELS for gpu in site.gpus_of(name)}
        began = time.monotonic()
        call(site, "gpus", "--exclude", "1", "--state", site.state)
        wait_until("GPU 1 is empty", lambda: all(site.gpus_of(name) == (0,) for name in MODELS), 90.0)
        drained_s = time.monotonic() - began
        engine = site.arbiter_status()["gpus"]["1"]
        assert engine["planned_models"] == []
        load.wait_for(load.total() + 200)
        began = time.monotonic()
        call(site, "gpus", "--include", "1", "--state", site.state)
        reason = "GPU 1 is back"
        wait_until(
            reason, lambda: any(reason in each["reason"] for each in site.decisions("applied", "kept")), 60.0
        )
        back_s = time.monotonic() - began
        load.wait_for(load.total() + 200)
    failed = load.failed()
    note("two_gpus", drained_s=drained_s, decided_back_s=back_s, run_failed=len(failed),
         decisions=[each["reason"] for each in site.decisions()])  # fmt: skip
    assert not failed, failed[:5]


def test_each_gpu_s_reading_is_its_own(site: GpuSite, profiles: ProfileSet) -> None:
    """NVML's order is CUDA's: a model that was placed on GPU 1 shows on GPU 1."""
    site.start_serve()
    place(site, profiles, 10.0, "--exclude-gpu", "0")
    assert {name: site.gpus_of(name) for name in MODELS} == {"hot": (1,), "cold": (1,)}
