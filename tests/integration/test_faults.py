"""Real Triton with `serve` and `run` under load: each fault mends by itself, and costs what it must, no more.

Lost requests: none but those of a killed process, and those that reach Triton while a model has none. Times
to recover are recorded (`make test-faults` writes them to run/faults.json), and only bounded generously.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.load import Load, all_grow, wait_until
from fakes.onnx_models import SlowSum
from fakes.site import Site

MODELS = ("alpha", "beta")
RATES = dict.fromkeys(MODELS, 20.0)
SLO_MS = 250.0
RECOVERED_WITHIN_S = 60.0
CONTROLLER = (
    "--interval-s", 0.5, "--window-s", 6, "--cooldown-s", 3, "--triton-metrics", "127.0.0.1:1",
    "--time-budget-s", 1, "--target-error", 0.5,
)  # fmt: skip
Record = Callable[..., None]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two models served and planned for; every test leaves them so."""
    models = [SlowSum(name, inner=256, depth=16, seed=seed) for seed, name in enumerate(MODELS)]
    site = Site(tmp_path_factory.mktemp("faults"), models, slo_ms=SLO_MS, rates=RATES)
    try:
        site.start_serve()
        site.start_run(*CONTROLLER)
        yield site
    finally:
        site.stop()


@pytest.fixture
def load(site: Site) -> Iterator[Load]:
    """Clients at the planned rates; the test begins when all models run by grants."""
    with Load(site.url, site.models, clients=2, rates=RATES) as load:
        wait_until("all models run by grants", all_grow(site.granted_rows), within_s=RECOVERED_WITHIN_S)
        yield load


@pytest.fixture
def record(request: pytest.FixtureRequest, load: Load) -> Iterator[Record]:
    """`record(recovered_s=..., lost=...)`: figures of this fault, for the report."""
    figures: dict[str, Any] = {}
    yield figures.update
    report = os.environ.get("DSTACK_FAULTS_REPORT")
    if report:
        path = Path(report)
        known = json.loads(path.read_text()) if path.exists() else {}
        counted = {"requests": load.sent.total(), "failed": len(load.failures)}
        path.write_text(json.dumps({**known, request.node.name: counted | figures}, indent=2) + "\n")


LOST_GPU = (
    'E1123 03:09:47.837621 {pid} backend_model.cc:692] "ERROR: Failed to create instance: unable to create '
    'stream: the remote procedural call between the MPS server and the MPS client failed"\n'
)


def new_stub(site: Site, model: str, not_pid: int) -> bool:
    assert site.serve is not None
    stub = site.serve.stub(model)
    return stub is not None and stub.pid != not_pid


def healed(site: Site, kind: str, subject: str, since: int) -> bool:
    """Whether the log tells, from entry `since` on, that this fault came and went."""
    told = [
        e["what"] for e in site.decisions()[since:] if (e.get("kind"), e.get("subject")) == (kind, subject)
    ]
    return "fault" in told and told[-1] == "healed"


def no_faults(site: Site) -> bool:
    return site.status()["faults"] == []


def consistent(site: Site, before: dict[str, str]) -> bool:
    """The same files as before, only configs differ, what they state of shares is in force; no leftovers."""
    now = site.tree()
    changed = {Path(name).name for name in now if now[name] != before.get(name)}
    shares = [
        {model: float(parameters["gpu_percent"]) for model, parameters in found.items()}
        for found in (site.stated(), site.in_force())
    ]
    journals = list(site.state.glob("edits/*/edits.json"))
    return (
        now.keys() == before.keys()
        and changed <= {"config.pbtxt"}
        and shares[0] == shares[1]
        and not journals
    )


def test_a_killed_stub_costs_its_own_model_a_moment(site: Site, load: Load, record: Record) -> None:
    assert site.serve is not None
    tree, known = site.tree(), len(site.decisions())
    stub = site.serve.stub("alpha")
    assert stub is not None
    killed_s = time.monotonic()
    stub.kill()
    wait_until("alpha has a new stub", lambda: new_stub(site, "alpha", stub.pid), RECOVERED_WITHIN_S)
    wait_until("alpha answers", all_grow(load.counts, names=["alpha"]), RECOVERED_WITHIN_S)
    recovered_s = time.monotonic() - killed_s
    wait_until("alpha runs by grants", all_grow(site.granted_rows, names=["alpha"]), RECOVERED_WITHIN_S)
    wait_until("it is told", lambda: healed(site, "stub_dead", "alpha", known))
    load.stop()
    assert load.failed("beta") == []
    assert load.failed("alpha", sent_after_s=killed_s + recovered_s) == []
    inside = sum(each.sent_s < killed_s for each in load.failures)
    assert inside <= 2, "more than the clients had inside"
    record(recovered_s=recovered_s, inside_the_stub=inside, refused_meanwhile=len(load.failures) - inside)
    assert consistent(site, tree)
    assert [e["what"] for e in site.decisions()[known:] if e.get("kind") == "stub_dead"].count("mended") == 1


def test_a_killed_arbiter_costs_nothing_and_the_new_one_knows_the_plan(
    site: Site, load: Load, record: Record
) -> None:
    assert site.serve is not None
    arbiter = site.serve.arbiter()
    assert arbiter is not None
    for kept in site.folder.glob("*arbiter*plan*"):
        kept.unlink()  # so that only the controller can know
    killed_s = time.monotonic()
    arbiter.kill()
    wait_until("all answer without it", all_grow(load.counts), RECOVERED_WITHIN_S)
    wait_until("a new one is there", lambda: site.arbiter_status().get("pid") not in (None, arbiter.pid))
    wait_until(
        "it knows the plan",
        lambda: site.arbiter_status()["gpus"].get("-1", {}).get("planned_models") == list(MODELS),
        RECOVERED_WITHIN_S,
    )
    wait_until("all models run by its grants", all_grow(site.granted_rows), RECOVERED_WITHIN_S)
    record(recovered_s=time.monotonic() - killed_s)
    load.stop()
    assert load.failed() == []
    assert len(site.arbiter_status()["backends"]) == len(MODELS), "every instance is joined once"


def test_a_killed_triton_comes_back_with_the_plan_in_force(site: Site, load: Load, record: Record) -> None:
    assert site.serve is not None and site.run is not None
    tree, url, known = site.tree(), site.url, len(site.decisions())
    triton = site.serve.triton()
    assert triton is not None
    killed_s = time.monotonic()
    triton.kill()
    wait_until("another one runs", lambda: (now := site.serve.triton()) and now.pid != triton.pid, 60)
    wait_until("all models answer", all_grow(load.counts), RECOVERED_WITHIN_S)
    recovered_s = time.monotonic() - killed_s
    wait_until("all models run by grants", all_grow(site.granted_rows), RECOVERED_WITHIN_S)
    for model in MODELS:
        wait_until(
            "it is told", lambda m=model: healed(site, "model_not_loaded", m, known), RECOVERED_WITHIN_S
        )
    load.stop()
    assert load.failed(sent_after_s=killed_s + recovered_s) == []
    assert site.url == url and consistent(site, tree)
    assert site.run.process.poll() is None, site.run.said()
    assert len(site.arbiter_status()["backends"]) == len(MODELS), "every instance is joined once"
    record(recovered_s=recovered_s)


def test_a_triton_that_lost_its_gpu_is_started_again(site: Site, load: Load, record: Record) -> None:
    """Without a GPU it cannot come to that: the line that Triton wrote on an H100 is put into its log."""
    assert site.serve is not None
    known, triton = len(site.decisions()), site.serve.triton()
    assert triton is not None
    lost_s = time.monotonic()
    with (site.state / "logs" / "triton.log").open("a") as log:
        log.write(LOST_GPU.format(pid=triton.pid))
    wait_until("another one runs", lambda: (now := site.serve.triton()) and now.pid != triton.pid, 60)
    wait_until("all models answer", all_grow(load.counts), RECOVERED_WITHIN_S)
    recovered_s = time.monotonic() - lost_s
    wait_until("it is told", lambda: healed(site, "server_without_gpu", "triton", known), RECOVERED_WITHIN_S)
    load.stop()
    assert load.failed(sent_after_s=lost_s + recovered_s) == []
    record(recovered_s=recovered_s)


def test_a_killed_controller_is_followed_by_the_next(site: Site, load: Load, record: Record) -> None:
    assert site.run is not None
    tree = site.tree()
    killed_s = time.monotonic()
    site.run.stop(signal.SIGKILL)
    wait_until("all models run by grants without it", all_grow(site.granted_rows, by=20))
    site.start_run(*CONTROLLER)
    record(recovered_s=time.monotonic() - killed_s)
    load.stop()
    assert load.failed() == []
    assert consistent(site, tree)
    wait_until("nothing is wrong", lambda: no_faults(site), RECOVERED_WITHIN_S)
