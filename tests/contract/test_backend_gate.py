"""The gate's half of the conversation, over a real socket, against an arbiter that the test plays by hand."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_backend import wire
from dstack_backend.gate import SHORT_RUN_US, ArbiterGate, Timing
from dstack_backend.interfaces import Permit

PATIENCE_S = 10.0
QUICK = Timing(
    tick_us=5_000, ping_after_us=20_000, idle_ping_after_us=100_000, pong_within_us=150_000,
    welcome_us=150_000, starved_after_us=400_000, first_pause_us=10_000, longest_pause_us=50_000,
)  # fmt: skip
JOIN = wire.Join("m", "m_0.v1.1", 1, -1, 40.0, 8, 4, 50_000, False)
LONG = 1 << 60


class Queue:
    """A listener whose queue the test sets; collects permits."""

    def __init__(self) -> None:
        self.waiting: tuple[int, int] = (0, 0)
        self.permits: list[Permit] = []
        self.shed: list[int] = []
        self.plans: list[tuple[int, int, bool]] = []

    def state(self) -> tuple[int, int]:
        return self.waiting

    def on_grant(self, permit: Permit) -> None:
        self.permits.append(permit)

    def on_shed(self, deadline_before_us: int) -> None:
        self.shed.append(deadline_before_us)

    def on_plan(self, batch_size: int, slo_us: int, reject_late: bool) -> None:
        self.plans.append((batch_size, slo_us, reject_late))


class Arbiter:
    """The other end: accepts, expects, says."""

    def __init__(self, path: Path):
        self.path = path
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(str(path))
        self.listening.listen(8)
        self.listening.settimeout(PATIENCE_S)
        self.connection: socket.socket | None = None

    def accept(self) -> None:
        self.connection, _ = self.listening.accept()
        self.connection.settimeout(PATIENCE_S)

    def say(self, message: wire.Message) -> None:
        self.connection.send(wire.encode(message))

    def hear(self, wanted: type, *, answer_pings: bool = True) -> wire.Message:
        """The next message of a kind; pings on the way are answered."""
        while True:
            packet = self.connection.recv(wire.MAX_MESSAGE_BYTES)
            assert packet, f"closed while {wanted.__name__} was awaited"
            message = wire.decode(packet)
            if isinstance(message, wanted):
                return message
            if isinstance(message, wire.Ping) and answer_pings:
                self.say(wire.Pong(message.nonce))

    def welcome(self) -> wire.Join:
        self.accept()
        self.say(wire.Pong(self.hear(wire.Ping).nonce))
        join = self.hear(wire.Join)
        self.say(wire.Welcome(1, 100.0))
        return join

    def hang_up(self) -> None:
        if self.connection:
            self.connection.close()

    def close(self) -> None:
        self.hang_up()
        self.listening.close()


class Rig:
    def __init__(self, path: Path):
        self.path = path
        self.queue = Queue()
        self.gate = ArbiterGate(path, JOIN, timing=QUICK, telemetry=lambda: {"answer": 42})
        self.arbiters: list[Arbiter] = []

    def arbiter(self) -> Arbiter:
        self.path.unlink(missing_ok=True)
        self.arbiters.append(Arbiter(self.path))
        return self.arbiters[-1]

    def join(self) -> Arbiter:
        arbiter = self.arbiter()
        self.gate.start(self.queue)
        assert arbiter.welcome() == JOIN
        until(lambda: self.gate.stats.gated)
        return arbiter

    def want(self, waiting: int, deadline_us: int = 1_000_000) -> None:
        self.queue.waiting = (waiting, deadline_us if waiting else 0)
        self.gate.work()

    def permit(self, count: int = 1) -> Permit:
        until(lambda: len(self.queue.permits) >= count)
        return self.queue.permits[count - 1]


def until(holds: Callable[[], object]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up, "it did not come true"
        time.sleep(0.002)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "a.sock")
    yield rig
    rig.gate.close()
    for arbiter in rig.arbiters:
        arbiter.close()


def test_work_grant_done(rig: Rig) -> None:
    arbiter = rig.join()
    rig.want(3)
    assert arbiter.hear(wire.Work) == wire.Work(3, 1_000_000)
    assert rig.queue.permits == []
    arbiter.say(wire.Grant(77, 2, 40.0, LONG))
    permit = rig.permit()
    assert (permit.batch_size, permit.gpu_percent) == (2, 40.0)
    assert rig.gate.begin(permit, 1, 1000)
    rig.queue.waiting = (1, 2_000_000)
    rig.gate.done(permit, 2, 1, 1234)
    assert arbiter.hear(wire.Done) == wire.Done(77, 2, 1, 1234, 1, 2_000_000)


def test_work_that_says_nothing_new_is_not_sent(rig: Rig) -> None:
    """Beyond two batches the arbiter cannot grant more; a more urgent row is news."""
    arbiter = rig.join()
    rig.want(8)
    rig.want(8)
    rig.want(9)
    rig.want(10, deadline_us=900)
    assert arbiter.hear(wire.Work) == wire.Work(8, 1_000_000)
    assert arbiter.hear(wire.Work) == wire.Work(10, 900)


def test_a_standing_grant_waits_for_work_and_says_when_it_starts(rig: Rig) -> None:
    arbiter = rig.join()
    arbiter.say(wire.Grant(77, 2, 40.0, LONG, 0b11, True))
    until(lambda: rig.gate.stats.standing_grants)
    assert rig.queue.permits == []
    rig.want(3)
    permit = rig.permit()
    assert permit.sm_groups == 0b11
    rig.queue.waiting = (1, 2_000_000)
    assert rig.gate.begin(permit, 2, 1000)
    assert arbiter.hear(wire.Start) == wire.Start(77, 2, 1, 2_000_000)
    rig.gate.done(permit, 2, 0, 10)
    assert arbiter.hear(wire.Done).grant_id == 77


def test_a_short_run_under_a_standing_grant_is_told_by_its_end(rig: Rig) -> None:
    """Two messages would cost more than they tell."""
    arbiter = rig.join()
    arbiter.say(wire.Grant(77, 2, 40.0, LONG, 0, True))
    until(lambda: rig.gate.stats.standing_grants)
    permit = rig.gate.take()
    assert permit is not None and rig.gate.begin(permit, 2, SHORT_RUN_US)
    rig.gate.done(permit, 2, 0, 10)
    seen = []
    while not seen or not isinstance(seen[-1], wire.Done):
        seen.append(wire.decode(arbiter.connection.recv(wire.MAX_MESSAGE_BYTES)))
    assert not any(isinstance(message, wire.Start) for message in seen)


def test_a_standing_grant_can_be_taken_without_a_queue(rig: Rig) -> None:
    """What a request that comes alone runs under."""
    arbiter = rig.join()
    assert rig.gate.take() is None
    arbiter.say(wire.Grant(77, 2, 40.0, LONG, 0, True))
    until(lambda: rig.gate.stats.standing_grants)
    permit = rig.gate.take()
    assert permit is not None and rig.gate.take() is None
    assert rig.gate.begin(permit, 1, 1000)
    assert arbiter.hear(wire.Start) == wire.Start(77, 1, 0, 0)


def test_a_standing_grant_is_given_back_when_it_is_revoked_and_not_in_use(rig: Rig) -> None:
    arbiter = rig.join()
    arbiter.say(wire.Grant(77, 2, 40.0, LONG, 0, True))
    arbiter.say(wire.Revoke(77))
    assert arbiter.hear(wire.Done) == wire.Done(77, 0, 0, 0, 0, 0)
    assert rig.gate.take() is None
    arbiter.say(wire.Grant(78, 2, 40.0, LONG, 0, True))
    until(lambda: rig.gate.stats.standing_grants == 2)
    permit = rig.gate.take()
    arbiter.say(wire.Revoke(78))
    arbiter.say(wire.Shed(5))  # both are read once this is
    until(lambda: rig.queue.shed)
    assert rig.gate.begin(permit, 1, 1000)  # they crossed
    assert arbiter.hear(wire.Start).grant_id == 78


def test_a_standing_grant_dies_with_its_connection(rig: Rig) -> None:
    arbiter = rig.join()
    arbiter.say(wire.Grant(77, 2, 40.0, LONG, 0, True))
    until(lambda: rig.gate.stats.standing_grants)
    arbiter.hang_up()
    until(lambda: not rig.gate.stats.gated)
    permit = rig.gate.take()  # leave to run without the arbiter
    assert permit is not None and permit.batch_size == JOIN.batch_size


def test_a_plan_is_in_force_also_after_the_connection(rig: Rig) -> None:
    arbiter = rig.join()
    arbiter.say(wire.Plan(6, 9_000, True))
    until(lambda: rig.queue.plans)
    assert rig.queue.plans == [(6, 9_000, True)]
    arbiter.hang_up()
    again = rig.arbiter().welcome()
    assert (again.batch_size, again.slo_us, again.reject_late) == (6, 9_000, True)


def test_telemetry_is_told(rig: Rig) -> None:
    assert rig.join().hear(wire.Telemetry) == wire.Telemetry({"answer": 42})


def test_shed_reaches_the_queue(rig: Rig) -> None:
    arbiter = rig.join()
    arbiter.say(wire.Shed(12345))
    until(lambda: rig.queue.shed == [12345])


def test_what_is_left_after_a_shed_is_told_even_if_nothing_was_shed(rig: Rig) -> None:
    """Guards against rows that starve: the arbiter guesses what a shed leaves, and where it guessed none
    while a row stayed, nobody would have told it until another request came."""
    arbiter = rig.join()
    rig.want(9, 5_000)
    assert arbiter.hear(wire.Work) == wire.Work(9, 5_000)
    arbiter.say(wire.Shed(4_999))  # nothing is due before this
    assert arbiter.hear(wire.Work) == wire.Work(9, 5_000)


def test_without_an_arbiter_batches_run_two_at_most_and_one_joins_later(rig: Rig) -> None:
    rig.gate.start(rig.queue)
    rig.want(100)
    rig.want(100)
    rig.want(100)
    assert [permit.batch_size for permit in rig.queue.permits] == [4, 4]
    running, behind = rig.queue.permits
    assert rig.gate.begin(running, 1, 60_000_000)
    join = rig.arbiter().welcome()
    assert join.running_percent == 40.0
    assert join.running_until_us > 0
    until(lambda: rig.gate.stats.gated)
    assert not rig.gate.begin(behind, 1, 1000)  # from now on only grants count
    arbiter = rig.arbiters[-1]
    rig.gate.done(running, 4, 0, 10)
    assert arbiter.hear(wire.Done).grant_id == 0  # the share of the ungated batch is free
    rig.queue.waiting = (96, 1_000_000)
    rig.gate.done(behind, 0, 0, 0)
    arbiter.say(wire.Grant(1, 4, 40.0, LONG))
    assert rig.gate.begin(rig.permit(3), 1, 1000)


def test_an_expired_lease_is_not_used(rig: Rig) -> None:
    arbiter = rig.join()
    rig.want(1)
    arbiter.say(wire.Grant(5, 4, 40.0, 1))
    permit = rig.permit()
    assert not rig.gate.begin(permit, 1, 1000)
    rig.gate.done(permit, 0, 0, 0)
    assert arbiter.hear(wire.Done).rows == 0


def test_a_lost_arbiter_opens_the_gate_and_its_return_closes_it(rig: Rig) -> None:
    arbiter = rig.join()
    rig.want(1)
    arbiter.hear(wire.Work)
    arbiter.close()
    permit = rig.permit()  # ungated, at once
    assert rig.gate.begin(permit, 1, 1000)
    rig.queue.waiting = (0, 0)
    rig.gate.done(permit, 1, 0, 10)
    rig.arbiter().welcome()
    until(lambda: rig.gate.stats.arbiter_connects == 2)
    assert rig.gate.stats.arbiter_disconnects == 1
    assert rig.gate.stats.ungated_batches == 1


def test_a_grant_of_an_arbiter_that_is_gone_is_void_once_its_successor_rules(rig: Rig) -> None:
    """The successor knows nothing of it: its share would be given twice."""
    arbiter = rig.join()
    arbiter.say(wire.Grant(5, 4, 40.0, LONG))
    permit = rig.permit()
    arbiter.close()
    rig.arbiter().welcome()
    until(lambda: rig.gate.stats.arbiter_connects == 2)
    assert not rig.gate.begin(permit, 1, 1000)


def test_an_arbiter_that_accepts_but_never_answers_does_not_hold_work_up(rig: Rig) -> None:
    """A stopped process: the kernel accepts for it."""
    rig.arbiter()
    rig.gate.start(rig.queue)
    rig.want(1)
    assert rig.gate.begin(rig.permit(), 1, 1000)


def test_an_arbiter_that_falls_silent_is_left(rig: Rig) -> None:
    arbiter = rig.join()
    rig.want(1)
    arbiter.hear(wire.Ping, answer_pings=False)
    assert rig.gate.begin(rig.permit(), 1, 1000)
    assert rig.gate.stats.arbiter_disconnects == 1


def test_an_arbiter_that_answers_pings_but_never_grants_is_left(rig: Rig) -> None:
    arbiter = rig.join()
    listening = threading.Thread(target=hear_until_closed, args=(arbiter,))
    listening.start()
    rig.want(1)
    assert rig.gate.begin(rig.permit(), 1, 1000)
    listening.join(PATIENCE_S)


def hear_until_closed(arbiter: Arbiter) -> None:
    while packet := arbiter.connection.recv(wire.MAX_MESSAGE_BYTES):
        message = wire.decode(packet)
        if isinstance(message, wire.Ping):
            arbiter.say(wire.Pong(message.nonce))


@pytest.mark.parametrize("packet", [b"nonsense", wire.encode(wire.Refuse("no"))], ids=["garbage", "refusal"])
def test_garbage_or_refusal_opens_the_gate(rig: Rig, packet: bytes) -> None:
    arbiter = rig.join()
    rig.want(1)
    arbiter.connection.send(packet)
    assert rig.gate.begin(rig.permit(), 1, 1000)


def test_unloading_says_so(rig: Rig) -> None:
    arbiter = rig.join()
    rig.gate.close()
    assert arbiter.hear(wire.Leave) == wire.Leave()
