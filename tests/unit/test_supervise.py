"""The supervisor with services that fail on command and a clock that the test advances."""

from __future__ import annotations

import itertools

import pytest

from dstack_sched.app.supervise import A_FEW_TIMES, ALWAYS, NEVER, Supervisor
from dstack_sched.errors import MachineError
from fakes.serving import FakeClock


class Service:
    def __init__(self, name: str, story: list[str]) -> None:
        self.name = name
        self.story = story
        self.why: str | None = None
        self.refuses = False

    def start(self) -> None:
        if self.refuses:
            raise MachineError(f"{self.name} did not start")
        self.story.append(f"start {self.name}")
        self.why = None

    def failure(self) -> str | None:
        return self.why

    def stop(self) -> None:
        self.story.append(f"stop {self.name}")


def make() -> tuple[Supervisor, Service, Service, FakeClock, list[str]]:
    story: list[str] = []
    arbiter, triton, clock = Service("arbiter", story), Service("triton", story), FakeClock()
    return (
        Supervisor([(arbiter, ALWAYS), (triton, NEVER)], clock, story.append),
        arbiter,
        triton,
        clock,
        story,
    )


def test_started_in_order_stopped_in_reverse() -> None:
    supervisor, *_, story = make()
    supervisor.start()
    supervisor.stop()
    supervisor.stop()
    assert story == ["start arbiter", "start triton", "stop triton", "stop arbiter"]


def test_a_failed_start_stops_what_was_started() -> None:
    supervisor, _, triton, _, story = make()
    triton.refuses = True
    with pytest.raises(MachineError, match="triton did not start"):
        supervisor.start()
    assert story == ["start arbiter", "stop triton", "stop arbiter"]


def test_a_dead_service_is_started_again() -> None:
    supervisor, arbiter, _, _, story = make()
    supervisor.start()
    arbiter.why = "ended with status 137"
    supervisor.check()
    assert story[-2:] == ["arbiter ended with status 137; starting it again", "start arbiter"]
    supervisor.check()
    assert len(story) == 4, "a healthy one is left alone"


def test_one_that_cannot_be_restarted_ends_it_all() -> None:
    supervisor, _, triton, _, _ = make()
    supervisor.start()
    triton.why = "ended with status 1: out of memory"
    with pytest.raises(MachineError, match="triton ended with status 1: out of memory"):
        supervisor.check()


def test_restarts_back_off_and_calm_down_again() -> None:
    """Guards against a restart loop that burns a core, and against a backoff that never comes down."""
    supervisor, arbiter, _, clock, story = make()
    supervisor.start()
    arbiter.refuses, arbiter.why = True, "ended"
    tries = []
    for _ in range(2000):
        before = len(story)
        supervisor.check()
        if len(story) > before:
            tries.append(clock.now)
        clock.sleep_s(0.1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert gaps[0] == pytest.approx(0.5, abs=0.11)
    assert max(gaps) == pytest.approx(ALWAYS.last_s, abs=0.11)
    assert sorted(gaps) == pytest.approx(gaps, abs=0.2)

    arbiter.refuses = False
    clock.sleep_s(ALWAYS.last_s)
    supervisor.check()
    assert arbiter.why is None
    clock.sleep_s(ALWAYS.healthy_after_s + 1)
    supervisor.check()
    for _ in range(2):  # at once, and half a second later
        arbiter.why = "ended"
        clock.sleep_s(0.6)
        supervisor.check()
        assert arbiter.why is None


def test_one_that_keeps_dying_is_given_up() -> None:
    """Guards against a crash loop that goes on for ever unseen; a death a minute apart is none."""
    story: list[str] = []
    triton, clock = Service("triton", story), FakeClock()
    supervisor = Supervisor([(triton, A_FEW_TIMES)], clock, story.append)
    supervisor.start()
    for _ in range(20):
        triton.why = "ended with status 139"
        supervisor.check()
        assert triton.why is None
        clock.sleep_s(A_FEW_TIMES.healthy_after_s + 1)
        supervisor.check()
    with pytest.raises(MachineError, match="triton ended with status 139; 5 restarts did not help"):
        for _ in range(1000):
            triton.why = "ended with status 139"
            supervisor.check()
            clock.sleep_s(0.5)
