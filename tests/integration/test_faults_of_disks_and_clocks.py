"""Real Triton, serve and run: full and read-only disks, models that do not load, clocks that jump; a
Triton and an arbiter of others that go and come back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.triton_client import TritonClient
from fakes.arbiter_bench import ArbiterProcess
from fakes.load import Load, all_grow, wait_until
from fakes.onnx_models import SlowSum, add_model
from fakes.site import Site

pytestmark = pytest.mark.slow

MODELS = ("alpha", "beta")
RATES = dict.fromkeys(MODELS, 20.0)
CONTROLLER = ("--interval-s", 0.5, "--window-s", 6, "--cooldown-s", 3)
WITHIN_S = 90.0
Loaded = Callable[..., tuple[Site, Load]]
# For our own code alone: gRPC sets deadlines by this clock in Python and watches them by the real one in C.
JUMPING_CLOCK = """
import sys, time
_time, _time_ns, _monotonic = time.time, time.time_ns, time.monotonic
def _ahead_s():  # a day ahead, a day behind, and right, for two seconds each
    asking = sys._getframe(2).f_globals.get("__name__", "")
    return (86400, -86400, 0)[int(_monotonic() / 2) % 3] if asking.startswith("dstack") else 0
time.time = lambda: _time() + _ahead_s()
time.time_ns = lambda: _time_ns() + _ahead_s() * 10**9
"""


@pytest.fixture
def new_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """`new_site(env)`: two models, nothing started yet; what is started is stopped after the test."""
    sites: list[Site] = []

    def make(env: dict[str, str] | None = None) -> Site:
        models = [SlowSum(name, inner=256, depth=16, seed=seed) for seed, name in enumerate(MODELS)]
        sites.append(Site(tmp_path / "site", models, rates=RATES, env=env))
        return sites[-1]

    yield make
    for site in sites:
        site.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk(name)` mounts a file system of 8 MiB below the site's folder."""
    mounted: list[Path] = []

    def mount(name: str) -> Path:
        path = tmp_path / "site" / name
        path.mkdir(parents=True)
        options = ["-t", "tmpfs", "-o", "size=8m", "dstack-test"]
        done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            return path


def wish(site: Site, slo_ms: float) -> None:
    """The operator wants another objective."""
    site.write_workload(slo_ms, RATES)


def fulfilled(site: Site, slo_ms: float) -> bool:
    return {float(found.get("slo_ms", 0)) for found in site.stated().values()} == {slo_ms}


def new_stub(site: Site, model: str, not_pid: int) -> bool:
    stub = site.serve.stub(model) if site.serve else None
    return stub is not None and stub.pid != not_pid


def kill_stub(site: Site, model: str, load: Load) -> float:
    """Kill it and wait until the model answers again; seconds."""
    assert site.serve is not None
    stub, began_s = site.serve.stub(model), time.monotonic()
    assert stub is not None
    stub.kill()
    wait_until(f"a new stub of {model}", lambda: new_stub(site, model, stub.pid), WITHIN_S)
    wait_until(f"{model} answers", all_grow(load.counts, names=[model]), WITHIN_S)
    return time.monotonic() - began_s


@pytest.fixture
def loaded(new_site: Callable[..., Site]) -> Iterator[Loaded]:
    """`loaded(env)`: a site with serve and run, and clients at it. What failed is looked at by the test."""
    loads: list[Load] = []

    def make(env: dict[str, str] | None = None) -> tuple[Site, Load]:
        site = new_site(env)
        site.start_serve()
        site.start_run(*CONTROLLER)
        loads.append(Load(site.url, site.models, clients=2, rates=RATES))
        wait_until("all models run by grants", all_grow(site.granted_rows), WITHIN_S)
        return site, loads[-1]

    yield make
    for load in loads:
        load.stop()


def test_a_full_repository_disk(disk: Callable[[str], Path], loaded: Loaded) -> None:
    repository = disk("models")
    site, load = loaded()
    assert site.run is not None
    filler, tree = fill(repository), site.tree()
    wish(site, 300.0)
    wait_until("it is said", lambda: "No space left on device); free some space" in site.run.said(), WITHIN_S)
    assert site.tree() == tree, "all or nothing"
    kill_stub(site, "alpha", load)
    filler.unlink()
    wait_until("the wish is fulfilled", lambda: fulfilled(site, 300.0), WITHIN_S)
    load.stop()
    assert load.failed("beta") == []
    assert not list(repository.glob(".dstack-*"))


def test_a_full_state_disk(disk: Callable[[str], Path], loaded: Loaded) -> None:
    """Nor log, nor journal, nor board can be written: nothing is changed without a journal, nobody dies."""
    state = disk("state")
    site, load = loaded()
    assert site.run is not None and site.serve is not None
    filler, tree = fill(state), site.tree()
    wish(site, 300.0)
    wait_until("it is said", lambda: "No space left" in site.run.said(), WITHIN_S)
    assert site.tree() == tree
    kill_stub(site, "alpha", load)
    filler.unlink()
    wait_until("the wish is fulfilled", lambda: fulfilled(site, 300.0), WITHIN_S)
    load.stop()
    assert load.failed("beta") == []
    assert site.run.process.poll() is None and site.serve.process.poll() is None
    assert site.decisions()[-1]["what"] in ("applied", "kept", "healed"), "the log goes on, line by line"


def test_a_read_only_repository(disk: Callable[[str], Path], loaded: Loaded) -> None:
    repository = disk("models")
    site, load = loaded()
    assert site.run is not None
    tree = site.tree()
    subprocess.run(["mount", "-o", "remount,ro", str(repository)], check=True)
    kill_stub(site, "alpha", load)
    wish(site, 300.0)
    wait_until("it is said", lambda: "is not writable" in site.run.said(), WITHIN_S)
    assert site.tree() == tree
    subprocess.run(["mount", "-o", "remount,rw", str(repository)], check=True)
    wait_until("the wish is fulfilled", lambda: fulfilled(site, 300.0), WITHIN_S)
    load.stop()
    assert load.failed("beta") == []


def test_a_new_model_that_does_not_load_is_held_back_until_it_is_mended(
    new_site: Callable[..., Site],
) -> None:
    site = new_site()
    add_model(site.repository, SlowSum("gamma", inner=64, depth=2), gpu_percent=50, slo_ms=250.0)
    config = site.repository / "gamma" / "config.pbtxt"
    good = config.read_text()
    config.write_text(good + 'parameters { key: "execution_provider" value { string_value: "cuda" } }\n')
    served = site.start_serve()
    assert served.printed["models"] == {"alpha": True, "beta": True, "gamma": False}
    site.start_run(*CONTROLLER)
    with Load(site.url, site.models, clients=2, rates=RATES) as load:
        wait_until("all models run by grants", all_grow(site.granted_rows), WITHIN_S)
        known = len(site.decisions())
        site.workload.write_text(
            site.workload.read_text() + "  - {name: gamma, slo_ms: 250, rate_per_s: 1}\n"
        )

        def refused() -> list[str]:
            reasons = [each["reason"] for each in site.decisions()[known:]]
            return [reason for reason in reasons if "could not be put in force" in reason]

        wait_until("it is refused", refused, WITHIN_S)
        assert "gamma: the plan could not be put in force, all is as before" in refused()[0]
        time.sleep(15)
        loads = served.process and (site.state / "logs" / "triton.log").read_text().count(
            '"loading: gamma:1"'
        )
        assert loads <= 3, "the start of serve, the plan, its way back: not every round"
        config.write_text(good)
        with TritonClient(site.url) as client:
            wait_until("it is loaded", lambda: client.is_model_ready("gamma"), WITHIN_S)
        load.stop()
        assert load.failed() == []


def test_clocks_that_jump(tmp_path: Path, loaded: Loaded) -> None:
    """The wall clock of serve, run, arbiter and stubs jumps by days every two seconds: nobody notices."""
    jumping = tmp_path / "jumping"
    jumping.mkdir()
    (jumping / "sitecustomize.py").write_text(JUMPING_CLOCK)
    path = os.pathsep.join([str(jumping), *filter(None, [os.environ.get("PYTHONPATH")])])
    site, load = loaded({"PYTHONPATH": path})
    times = [entry["time_s"] for entry in site.decisions()]
    assert times
    for _ in range(2):  # the second one must be newer than a time stamp of tomorrow
        assert kill_stub(site, "alpha", load) < WITHIN_S
    assert site.serve is not None
    arbiter = site.serve.arbiter()
    assert arbiter is not None
    arbiter.kill()
    wait_until("all models run by grants again", all_grow(site.granted_rows), WITHIN_S)
    wish(site, 300.0)
    wait_until("the wish is fulfilled", lambda: fulfilled(site, 300.0), WITHIN_S)
    spread_s = max(entry["time_s"] for entry in site.decisions()) - min(times)
    load.stop()
    assert load.failed("beta") == []
    assert abs(spread_s) > 3600 or len({int(t / 3600) for t in times}) > 1, "the clock did not jump"


def test_a_triton_and_an_arbiter_of_others_go_and_come_back(
    new_site: Callable[..., Site], triton: Callable[..., object]
) -> None:
    """Attached by URL: the controller waits, loads the models again, and tells a new arbiter the plan."""
    site = new_site()
    arbiter = ArbiterProcess(site.socket, site.folder / "arbiter.log")
    server = triton(site.repository, load=MODELS, env={SOCKET_VARIABLE: str(site.socket)})
    try:
        run = site.start_run(*CONTROLLER, url=server.grpc_url)
        before = site.stated()
        server.stop()
        arbiter.end(signal.SIGKILL)
        for kept in site.folder.glob("*arbiter*plan*"):
            kept.unlink()
        time.sleep(12)
        assert run.process.poll() is None, run.said()
        seen = {(fault["kind"], fault["subject"]) for fault in site.status(server.grpc_url)["faults"]}
        assert {("server_away", "triton"), ("arbiter_away", "arbiter")} <= seen
        arbiter = ArbiterProcess(site.socket, site.folder / "arbiter.log")
        server.start()
        with TritonClient(server.grpc_url) as client, Load(server.grpc_url, site.models, rates=RATES) as load:
            for model in MODELS:
                wait_until(f"{model} is loaded again", lambda m=model: client.is_model_ready(m), WITHIN_S)
            back_s = time.monotonic()
            wait_until("all models run by grants", all_grow(site.granted_rows), WITHIN_S)
            planned = lambda: site.arbiter_status()["gpus"].get("-1", {}).get("planned_models")  # noqa: E731
            wait_until("the arbiter knows the plan", lambda: planned() == list(MODELS), WITHIN_S)
            load.stop()
            assert load.failed(sent_after_s=back_s) == []
        assert {m: p["gpu_percent"] for m, p in site.stated().items()} == {
            m: p["gpu_percent"] for m, p in before.items()
        }
        told = [each["what"] for each in site.decisions() if each.get("kind") == "server_away"]
        assert told == ["fault", "healed"]
    finally:
        if site.run is not None:
            site.run.stop()
        arbiter.end(signal.SIGTERM)
