"""Staying up, with a Triton in memory and a clock that the test advances: what is mended, and when."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.app.arbiter_plans import ArbiterPlans
from dstack_sched.app.guards import (
    ArbiterGuard,
    ArbiterPlanGuard,
    LoadedGuard,
    ServerGuard,
    StubGuard,
    instances,
)
from dstack_sched.app.health import SIX_TRIES, Guard, Health
from dstack_sched.app.refusals import WAITS, Refusals
from dstack_sched.app.revive import Reviver
from dstack_sched.app.telemetry import HealthTelemetry, NoMetrics
from dstack_sched.domain.plan import ModelPlan, Plan
from dstack_sched.domain.profile import Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import MachineError, PlanRefusedError
from fakes.serving import FakeClock, FakeServer

MODELS = ("alpha", "beta", "gamma")


class Log:
    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)

    def last(self, count: int) -> list[dict[str, Any]]:
        return self.entries[-count:]

    def story(self, subject: str) -> list[str]:
        return [entry["what"] for entry in self.entries if entry["subject"] == subject]


class Site:
    """A repository of three models on a Triton in memory, and its health."""

    def __init__(self, root: Path) -> None:
        for name in MODELS:
            (root / name / "1").mkdir(parents=True)
            (root / name / "1" / "model.onnx").write_bytes(b"onnx")
            (root / name / "config.pbtxt").write_text('backend: "dstack"\n')
        self.repository = DiskRepository(root)
        self.server = FakeServer(self.repository, *MODELS)
        self.clock, self.log = FakeClock(), Log()
        self.telemetry = HealthTelemetry(NoMetrics(), self.clock)
        reviver = Reviver(self.repository, self.server, self.clock)
        self.guards: list[Guard] = [
            ServerGuard(self.server, "triton"),
            StubGuard(self.server, self.server, reviver),
            LoadedGuard(self.server, reviver),
        ]
        self.health = self.new_health()

    def new_health(self, alone: Callable[[], AbstractContextManager[object]] = nullcontext) -> Health:
        return Health(self.guards, self.clock, self.log, self.telemetry, alone=alone)

    def look(self, seconds: float, every_s: float = 0.5) -> None:
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.health.check()
            self.clock.sleep_s(every_s)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "models")
    site.look(2)
    assert site.log.entries == [] and site.server.loads == []
    return site


def test_a_dead_stub_is_seen_and_its_model_alone_loaded_again(site: Site) -> None:
    site.server.kill_stub("beta")
    assert site.health.check() == (), "one look is no proof: a reload may be under way"
    site.clock.sleep_s(0.5)
    (fault,) = site.health.check()
    assert (fault.kind, fault.subject) == ("stub_dead", "beta")
    assert "1 of 1 stub processes are dead" in fault.detail
    assert site.server.loads == ["beta"]
    site.clock.sleep_s(0.5)
    assert site.health.check() == ()
    assert site.log.story("beta") == ["fault", "mended", "healed"]
    assert all(entry["reason"] for entry in site.log.entries)


def test_a_plain_load_would_not_help_so_the_version_is_made_newer(site: Site) -> None:
    """Guards against a load that Triton answers with "successfully loaded" and no new stub."""
    version = site.repository.model_dir("beta") / "1"
    before = version.stat().st_mtime_ns
    site.server.kill_stub("beta")
    site.look(1.5)
    assert version.stat().st_mtime_ns > max(before, (version / "model.onnx").stat().st_mtime_ns)
    assert site.server.pids("beta")


def test_one_of_several_instances_missing_is_a_fault_too() -> None:
    def group(kind: str, count: int, *gpus: int) -> dict[str, Any]:
        return {"kind": kind, "count": count, "gpus": list(gpus)}

    assert instances({"instance_group": [group("KIND_CPU", 2)]}) == 2
    assert instances({"instance_group": [group("KIND_GPU", 1, 0, 1), group("KIND_CPU", 1)]}) == 3
    assert instances({"instance_group": []}) == instances({}) == 1


class BlindStubs:
    """As of a Triton on another host."""

    def pids(self, model: str) -> None:
        return None

    def alive(self, pids: frozenset[int]) -> frozenset[int]:
        return frozenset()

    def blind_reason(self) -> str:
        return "Triton is on another host"


def test_on_another_host_a_model_that_answers_only_errors_is_loaded_again(site: Site) -> None:
    reviver = Reviver(site.repository, site.server, site.clock)
    site.guards = [StubGuard(site.server, BlindStubs(), reviver)]
    site.health = site.new_health()
    counts = site.server.counts
    for model in MODELS:
        counts[model] = {"rows": 5, "failed": 0}
    for _ in range(60):  # alpha is dead, beta answers some, gamma is asked nothing
        counts["alpha"]["failed"] += 1
        counts["beta"] = {"rows": counts["beta"]["rows"] + 1, "failed": counts["beta"]["failed"] + 5}
        site.look(0.5)
        if site.server.loads:
            break
    assert site.server.loads == ["alpha"]
    assert "10 s; its processes are probably dead" in site.log.entries[0]["reason"]
    counts["alpha"] = {"rows": 1, "failed": 0}  # a full load sets them to 0
    site.look(20)
    assert site.log.story("alpha") == ["fault", "mended", "healed"]
    assert site.server.loads == ["alpha"]


def test_a_model_of_another_backend_is_left_alone(site: Site) -> None:
    site.server.in_force["gamma"] = {**site.server.in_force["gamma"], "backend": "onnxruntime"}
    site.server.kill_stub("gamma")
    site.look(5)
    assert site.server.loads == [] and site.log.entries == []


def test_a_model_that_keeps_dying_is_given_up_with_one_line_and_the_others_are_looked_after(
    site: Site,
) -> None:
    """Guards against reloads without end, and one bad model keeping the others from being mended."""
    site.server.fails = lambda model, parameters: "no memory" if model == "beta" else ""
    site.server.kill_stub("beta")
    site.look(5)
    site.server.kill_stub("gamma")
    site.look(3600, every_s=1.0)
    assert site.server.loads.count("beta") == SIX_TRIES.tries
    assert site.log.story("beta") == ["fault", *["not mended"] * 5, "given up"]
    assert "no memory; 6 tries did not mend it" in site.log.entries[-1]["reason"]
    assert site.log.story("gamma") == ["fault", "mended", "healed"]
    assert [fault.subject for fault in site.health.check()] == ["beta"], "it stays visible"

    site.server.fails = lambda model, parameters: ""
    site.repository.make_newer("beta")
    site.server.load("beta")  # by hand
    site.look(SIX_TRIES.healthy_after_s + 2, every_s=1.0)
    assert site.log.story("beta")[-1] == "healed"
    site.server.kill_stub("beta")
    site.look(2)
    assert site.log.story("beta")[-3:] == ["fault", "mended", "healed"], "the slate is clean again"


def test_tries_back_off(site: Site) -> None:
    tries: list[float] = []
    site.server.fails = lambda model, parameters: tries.append(site.clock.now) or "no"
    site.server.kill_stub("alpha")
    site.look(200, every_s=0.1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert gaps == pytest.approx([1, 2, 4, 8, 16], abs=0.11)


def test_loads_that_succeed_and_do_not_last_are_given_up_too(site: Site) -> None:
    """Guards against a crash loop that every load seems to mend."""
    for _ in range(400):
        if site.server.pids("alpha"):
            site.server.kill_stub("alpha")
        site.look(0.5)
    assert site.server.loads.count("alpha") == SIX_TRIES.tries
    assert site.log.story("alpha").count("given up") == 1


def test_a_triton_that_comes_back_without_its_models_gets_them_again(site: Site) -> None:
    site.server.away = True
    site.look(30)
    assert [fault.subject for fault in site.health.check()] == ["triton"]
    assert site.log.story("triton") == ["fault"] and site.server.loads == []
    site.server.restart()
    site.look(3)
    assert sorted(site.server.loads) == list(MODELS)
    assert site.log.story("triton") == ["fault", "healed"]
    assert [site.log.story(model) for model in MODELS] == [["fault", "mended", "healed"]] * 3


def test_a_model_that_somebody_unloaded_stays_unloaded(site: Site) -> None:
    site.server.unload("beta")
    site.look(10)
    assert site.server.loads == [] and site.log.entries == []
    site.server.restart()
    site.look(10)
    assert sorted(site.server.loads) == ["alpha", "gamma"]


def test_while_another_rewrites_the_repository_nothing_is_mended(site: Site) -> None:
    busy = True

    @contextmanager
    def alone() -> Iterator[None]:
        if busy:
            raise MachineError("dstackctl (pid 7) is rewriting it")
        yield

    site.health = site.new_health(alone)
    site.server.kill_stub("beta")
    site.look(20)
    assert site.server.loads == [] and site.log.story("beta") == ["fault"]
    busy = False
    site.look(1)
    assert site.server.loads == ["beta"], "waiting for one's turn is no failed try"


def test_what_another_mended_meanwhile_is_not_mended_again(site: Site) -> None:
    """Guards against `serve` and `run` reloading the same model one after the other."""

    @contextmanager
    def alone() -> Iterator[None]:
        if not site.server.pids("beta"):
            site.repository.make_newer("beta")
            site.server.load("beta")  # what the other one did while we waited
        yield

    site.health = site.new_health(alone)
    site.server.kill_stub("beta")
    site.look(5)
    assert site.server.loads == ["beta"]
    assert site.log.story("beta") == ["fault", "healed"]


def test_in_a_read_only_repository_the_model_is_unloaded_first(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.utime", refuse)
    site.server.kill_stub("beta")
    site.look(2)
    assert site.log.story("beta") == ["fault", "mended", "healed"]
    assert "Read-only file system" in site.log.entries[1]["reason"]

    site.server.fails = lambda model, parameters: "no memory" if model == "beta" else ""
    site.server.kill_stub("beta")
    site.look(8)
    assert "beta" in site.server.by_hand, "it is unloaded, by us"
    site.server.fails = lambda model, parameters: ""
    site.look(60)
    assert site.server.pids("beta"), "and we do not take our own unloading for somebody's wish"


def test_wall_clock_jumps_change_nothing(site: Site) -> None:
    """Guards against waits and back-offs that hang on the wall clock: only the monotonic one decides."""
    jumps = itertools.cycle((0.0, 1e9, -1e9, 3600.0))
    site.clock.wall_time_s = lambda: 1_800_000_000 + next(jumps)  # type: ignore[method-assign]
    site.server.kill_stub("beta")
    site.look(2)
    assert site.log.story("beta") == ["fault", "mended", "healed"]


# -- the arbiter ------------------------------------------------------------------------------------------


class Arbiter:
    """Answers ping and plan; `age_s` grows with the clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.started, self.up = clock, clock.now, True
        self.plans: list[Any] = []

    def request(self, verb: str, **fields: Any) -> dict[str, Any]:
        if not self.up:
            raise MachineError("no arbiter answers at /run/x")
        if verb == "plan":
            self.plans.append(fields["gpus"])
        return {"pid": 7, "uptime_s": self.clock.now - self.started}

    def restart(self) -> None:
        self.up, self.started = True, self.clock.now

    def close(self) -> None: ...


def planned() -> tuple[Plan, ProfileSet, Workload]:
    row = ModelPlan(0, 50.0, 4, 0, 10.0, 100.0, 1.0, 50.0, 0.1, slo_ms=50.0, rate_per_s=5.0)
    points = tuple(ProfilePoint(p, b, 2.0 * b, 3.0 * b, 9) for p in (50.0, 100.0) for b in (1, 4))
    profiles = ProfileSet(Device("x", 2, 1 << 30, "cpu", "r"), {"a": ModelProfile("a", "0" * 64, 1, points)})
    return Plan(100.0, ("x",), {"a": row}, True, (), 2.0), profiles, Workload((ModelDemand("a", 50.0, 5.0),))


def test_a_new_arbiter_is_told_the_plan_in_force() -> None:
    clock, log = FakeClock(), Log()
    arbiter = Arbiter(clock)
    plans = ArbiterPlans(arbiter, clock)
    guards = [ArbiterGuard(arbiter), ArbiterPlanGuard(plans)]
    health = Health(guards, clock, log, HealthTelemetry(NoMetrics(), clock))

    def look(seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            clock.sleep_s(0.5)
            health.check()

    look(10)
    assert arbiter.plans == [] and log.entries == [], "no plan yet, nothing to tell"
    plans.tell(*planned())
    look(10)
    assert len(arbiter.plans) == 1
    arbiter.up = False
    look(10)
    assert [fault.kind for fault in health.check()] == ["arbiter_away"]
    arbiter.restart()
    look(3)
    assert len(arbiter.plans) == 2 and arbiter.plans[0] == arbiter.plans[1]
    assert health.check() == ()
    clock.sleep_s(0.3)
    arbiter.restart()  # so fast that nobody saw it away
    look(3)
    assert len(arbiter.plans) == 3
    look(600)
    assert len(arbiter.plans) == 3

    arbiter.up = False
    with pytest.raises(MachineError):
        plans.tell(*planned())
    arbiter.up = True  # the same one: it only did not answer
    look(3)
    assert len(arbiter.plans) == 4


# -- plans that were refused ------------------------------------------------------------------------------


def test_a_refused_plan_is_held_back_ever_longer_and_others_are_not() -> None:
    clock, refusals = FakeClock(), Refusals()
    plan, *_ = planned()
    now = Plan(100.0, ("x",), {}, True, (), 2.0)
    tries = []
    for _ in range(40_000):
        if refusals.holds_back(plan, now, clock.now_us()) is None:
            tries.append(clock.now)
            refusals.refused(PlanRefusedError("a", "a: out of memory"), clock.now_us())
        clock.sleep_s(1.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert gaps[:7] == pytest.approx([30, 60, 120, 240, 480, 960, 1920], abs=1.1)
    assert max(gaps) <= WAITS.last_s + 1
    why = refusals.holds_back(plan, now, clock.now_us())
    assert why is not None and "a: out of memory" in why
    assert refusals.holds_back(plan, plan, clock.now_us()) is None, "it leaves the model as it is"
    refusals.applied(plan)
    assert refusals.holds_back(plan, now, clock.now_us()) is None and refusals.present() == {}
