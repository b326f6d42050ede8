"""What must hold of the engine whatever happens: random plans, arrivals and faults drive it in the simulator.

A failing example prints its seed and scenario; `derandomize` makes the run in CI repeatable.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from dstack_sched.domain.decision import Decision, Grant, Shed
from dstack_sched.domain.event import BackendLeft, BatchFinished, Event, PlanChanged
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.registry import POLICIES, make_engine
from dstack_sched.policy.interference import Interference
from dstack_sched.sim.arrivals import Arrivals
from dstack_sched.sim.result import jain, summarize
from dstack_sched.sim.scenario import Fault, Scenario
from dstack_sched.sim.world import World
from fakes.worlds import HEAVY, LIGHT, demand, scenario

SETTINGS = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
HOUR_US = 3_600_000_000
SHAPES = st.sampled_from([LIGHT, HEAVY, (0.2, 0.1, 5.0, 1.0), (2.0, 0.0, 100.0, 50.0)])
ARRIVALS = st.sampled_from(
    [Arrivals(), Arrivals("gamma", cv=3.0), Arrivals("periodic"), Arrivals("onoff", on_s=0.05, off_s=0.1)]
)


@st.composite
def scenarios(draw: st.DrawFn, *, faulty: bool = True) -> Scenario:
    """Up to five models, best-effort ones among them, from idle to far too much load, with faults."""
    models = []
    for i in range(draw(st.integers(1, 5))):
        wanted = demand(
            f"m{i}",
            rate_per_s=draw(st.sampled_from([0.0, 20.0, 200.0, 1500.0])),
            slo_ms=draw(st.sampled_from([None, 4.0, 20.0, 100.0])),
            weight=draw(st.sampled_from([0.5, 1.0, 3.0])),
            on_late=draw(st.sampled_from(list(OnLate))),
        )
        models.append((wanted, float(draw(st.sampled_from([10, 30, 50, 100]))), draw(SHAPES)))
    faults = []
    if faulty:
        for _ in range(draw(st.integers(0, 2))):
            kind = draw(st.sampled_from(["hang", "crash", "slow", "arbiter"]))
            victim = draw(st.sampled_from([d.name for d, _, _ in models]))
            at_us, lasts_us = draw(st.integers(0, 300_000)), draw(st.integers(1_000, 200_000))
            faults.append(Fault(kind, at_us, lasts_us, victim, 3.0))
    return scenario(
        models,
        capacity_percent=draw(st.sampled_from([100.0, 150.0, 280.0])),
        duration_s=0.4,
        arrivals=draw(ARRIVALS),
        levels=draw(st.sampled_from([(), (10.0, 25.0, 50.0, 100.0)])),
        interference=Interference({}, draw(st.sampled_from([0.0, 0.6])), 1.3),
        faults=faults,
        profiled=draw(st.booleans()),
        batch_size=draw(st.sampled_from([1, 4, 16])),
    )


def run(case: Scenario, seed: int, policy: str = "dstack", drain_us: int = HOUR_US) -> World:
    note(f"seed {seed}, policy {policy}")
    return World(case, lambda: make_engine(policy), seed, checked=True, record=True, drain_us=drain_us).run()


@SETTINGS
@given(scenarios(), st.integers(0, 2**32 - 1))
def test_every_accepted_request_is_answered_or_rejected(case: Scenario, seed: int) -> None:
    """Also after crashes, hangs and a restart of the arbiter: nothing is forgotten in a queue.

    `checked` asserts the engine's invariants, among them granted <= capacity, after each event.
    """
    world = run(case, seed)
    for backend in world.backends:
        answered = sum(rows for _, rows, end in backend.batches if end)
        assert answered + backend.rejected + backend.failed == len(backend.arrivals)
        if backend.spec.demand.on_late is OnLate.SERVE:
            assert backend.rejected == 0, "a model that serves late requests had some rejected"


@SETTINGS
@given(scenarios(), st.integers(0, 2**32 - 1), st.sampled_from(sorted(POLICIES)))
def test_grants_never_exceed_capacity(case: Scenario, seed: int, policy: str) -> None:
    """Counted from the decisions alone, not from the engine's own books. Capacity may shrink under running
    grants, and a batch may run ungated while the arbiter is away; no grant may be added beyond capacity."""
    world = run(case, seed, policy, drain_us=50_000)
    unlimited = policy in ("mps-default", "mps-static", "fixed-batch")
    capacity = case.plan.capacity_percent
    if unlimited:
        capacity = 100.0 * len(case.instances)
    held: dict[str, list[tuple[int, float, int]]] = defaultdict(
        list
    )  # instance -> grants: id, percent, lease
    assert world.trace is not None
    for now, event, decisions in world.trace:
        _give_back(held, event, now)
        for decision in decisions:
            if isinstance(decision, Grant):
                assert len(held[decision.instance]) < 2, "more than one grant chained behind a running one"
                held[decision.instance].append(
                    (decision.grant_id, decision.gpu_percent, decision.lease_until_us)
                )
                total = sum(max(p for _, p, _ in grants) for grants in held.values() if grants)
                assert total <= capacity + 1e-6, f"{total}% granted of {capacity}% at {now} us"


@SETTINGS
@given(scenarios(), st.integers(0, 2**32 - 1), st.sampled_from(sorted(POLICIES)))
def test_sm_groups_are_disjoint_while_there_are_enough(case: Scenario, seed: int, policy: str) -> None:
    """Counted from the decisions: as many groups as the share says, no other's where that can be."""
    world = run(case, seed, policy, drain_us=50_000)
    assert world.trace is not None
    held: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
    masks: dict[int, int] = {}
    crashed = any(fault.kind != "slow" for fault in case.faults)  # an ungated batch is on groups unknown
    for now, event, decisions in world.trace:
        _give_back(held, event, now)
        for decision in decisions:
            if not isinstance(decision, Grant):
                continue
            count = max(1, int(decision.gpu_percent * 16 / 100 + 0.5))
            assert decision.sm_groups.bit_count() == min(count, 16)
            others = 0
            for name, grants in held.items():
                for grant_id, _, _ in grants if name != decision.instance else ():
                    others |= masks[grant_id]
            if others.bit_count() + count <= 16 and not crashed:
                assert not decision.sm_groups & others, f"{decision} beside {others:016b}"
            masks[decision.grant_id] = decision.sm_groups
            held[decision.instance].append((decision.grant_id, 0.0, decision.lease_until_us))


def _give_back(held: dict[str, list[tuple[int, float, int]]], event: Event, now: int) -> None:
    if isinstance(event, PlanChanged):  # also the first event of an engine that starts anew
        held.clear()
    if isinstance(event, BackendLeft):
        held.pop(event.instance, None)
    if isinstance(event, BatchFinished):
        ids = [grant_id for grant_id, _, _ in held[event.instance]]
        if event.grant_id in ids:
            del held[event.instance][: ids.index(event.grant_id) + 1]
    for grants in held.values():
        if grants and grants[0][2] <= now:
            del grants[0]


@SETTINGS
@given(scenarios(), st.integers(0, 2**32 - 1))
def test_waiting_longer_than_a_session_is_reported(case: Scenario, seed: int) -> None:
    """No model with work waits longer than a session (the longest objective) without an overload report.

    A session counts from when the engine learns of the work, or from the model's last grant; the report may
    come one control-plane delay later.
    """
    world = run(case, seed, drain_us=50_000)
    objectives = [i.slo_us for i in case.instances if i.slo_us]
    session_us = max(objectives, default=100_000)
    since: dict[str, int] = {}
    assert world.trace is not None
    for now, event, decisions in world.trace:
        if isinstance(event, PlanChanged):
            since.clear()
        for name, began in since.items():
            late = now - began - session_us
            reported = any(d.model == name and began <= at for at, d in world.overloads)
            assert late <= 2_000 or reported, f"{name} waited {now - began} us at {now} us, unreported"
        _note_waiting(since, now, event, decisions)


def _note_waiting(since: dict[str, int], now: int, event: Event, decisions: tuple[Decision, ...]) -> None:
    """Keep for each instance when it was last seen idle or was granted, while it has work."""
    name = getattr(event, "instance", None)
    waiting = getattr(event, "waiting", None)
    if isinstance(event, BackendLeft):
        since.pop(event.instance, None)
    elif name is not None and waiting is not None:
        if waiting == 0:
            since.pop(name, None)
        else:
            since.setdefault(name, now)
    for decision in decisions:
        if isinstance(decision, (Grant, Shed)):
            since.pop(decision.instance, None)


@SETTINGS
@given(scenarios(), st.integers(0, 2**32 - 1), st.sampled_from(sorted(POLICIES)))
def test_the_same_seed_gives_the_same_trace(case: Scenario, seed: int, policy: str) -> None:
    """Decisions hang on events alone: no clock, no global randomness, no order of a set."""
    first, second = (run(case, seed, policy, drain_us=20_000) for _ in range(2))
    assert first.trace == second.trace


@SETTINGS
@given(scenarios(), st.integers(0, 2**32 - 1))
def test_a_recorded_event_stream_replays_to_the_same_decisions(case: Scenario, seed: int) -> None:
    """The engine behind the simulator is the engine anywhere: fed with the recorded events, it decides the
    same (the arbiter's own replay test does this over its service)."""
    world = run(case, seed, drain_us=20_000)
    assert world.trace is not None
    engine = None
    for now, event, decisions in world.trace:
        if isinstance(event, PlanChanged):
            engine = make_engine("dstack")
        assert engine is not None
        assert tuple(engine.handle(event, now)) == decisions


@pytest.mark.parametrize("levels", [(), (25.0, 50.0, 100.0)])
@pytest.mark.parametrize("slo_ms", [None, 15.0])
def test_equal_weights_share_equally_when_saturated(levels: tuple[float, ...], slo_ms: float | None) -> None:
    """Different run times, shares and rates, all with more work than they can get: GPU%-time is equal."""
    shapes = [LIGHT, HEAVY, (0.2, 0.1, 5.0, 1.0), (2.0, 0.0, 100.0, 50.0)]
    models = [(demand(f"m{i}", 3000.0 * (i + 1), slo_ms), 50.0, shape) for i, shape in enumerate(shapes)]
    world = World(
        scenario(models, capacity_percent=100.0, duration_s=3.0, levels=levels),
        lambda: make_engine("dstack"), seed=1, checked=True,
    ).run()  # fmt: skip
    result = summarize(world, "dstack", 1)
    assert jain([m.gpu_share_ms for m in result.models.values()]) >= 0.97, result
    if slo_ms:
        assert {o.model for _, o in world.overloads} == set(result.models), "an overload went unreported"


def test_weights_divide_the_gpu_when_saturated() -> None:
    """Weight 3 gets three times the GPU%-time of weight 1: who misses under overload is defined."""
    models = [
        (demand("small", 9000.0, weight=1.0), 60.0, LIGHT),
        (demand("large", 9000.0, weight=3.0), 60.0, LIGHT),
    ]
    world = World(scenario(models, duration_s=3.0), lambda: make_engine("dstack"), seed=2, checked=True).run()
    share = {name: m.gpu_share_ms for name, m in summarize(world, "dstack", 2).models.items()}
    assert share["large"] / share["small"] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("kind", ["hang", "crash"])
def test_a_dead_backend_gives_its_share_back(kind: str) -> None:
    """Two models that cannot run side by side: when one dies within a batch, the other goes on. For a hang
    only the lease ends the grant."""
    models = [(demand("dies", 300.0, 50.0), 60.0, LIGHT), (demand("lives", 300.0, 50.0), 60.0, LIGHT)]
    fault = Fault(kind, 200_000, 1_500_000, "dies")  # type: ignore[arg-type]
    world = World(
        scenario(models, duration_s=1.5, faults=[fault]), lambda: make_engine("dstack"), 3, checked=True
    ).run()
    ends = [end for _, _, end in world.by_name["lives"].batches if end > 600_000]
    assert len(ends) > 100, "the share of the dead backend never came back"
    if kind == "hang":
        assert any("lease" in overload.reason for _, overload in world.overloads)
