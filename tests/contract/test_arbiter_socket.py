"""The arbiter behind a real socket: what one client does must cost the others nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_backend import wire
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.arbiter_socket import FLOOD_MESSAGES_PER_S, MAX_QUEUED_PACKETS, listening
from dstack_sched.app.changes import Reach
from dstack_sched.app.timeline import read_timeline
from dstack_sched.cli.timeline import save_timelines
from dstack_sched.domain.decision import Decision
from dstack_sched.domain.event import Event
from dstack_sched.domain.json_form import gpus_to_json
from dstack_sched.engine.registry import make_engine
from dstack_sched.errors import InputError, MachineError
from fakes.arbiter_bench import (
    PATIENCE_S,
    Arbiter,
    Backend,
    Client,
    arbiter,
    deadline_us,
    in_threads,
    model_plan,
    plan_of,
    works,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "private" / "arbiter.sock"


@pytest.fixture
def running(path: Path) -> Iterator[Arbiter]:
    with arbiter(path) as it:
        yield it


@pytest.fixture
def control(running: Arbiter) -> Iterator[SocketArbiterClient]:
    client = SocketArbiterClient(running.path, timeout_s=PATIENCE_S)
    yield client
    client.close()


# -- the place -----------------------------------------------------------------------------------------------


def test_socket_is_private_and_gone_at_the_end(path: Path) -> None:
    with arbiter(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == []


def test_second_arbiter_is_refused_and_the_first_goes_on(running: Arbiter) -> None:
    with pytest.raises(MachineError, match="already answers"), listening(running.path):
        pass
    works(running.path)


def test_socket_of_a_dead_arbiter_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    with arbiter(path):
        works(path)


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")
    with pytest.raises(InputError, match="not a socket"), listening(path):
        pass
    assert path.read_text() == "precious"


def test_directory_that_others_can_write_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(InputError, match="chmod 700"), listening(path):
        pass


def test_link_in_place_of_the_directory_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="socket directory"), listening(path):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_even_where_the_mode_lets_it_in(running: Arbiter) -> None:
    running.path.chmod(0o666)
    running.path.parent.chmod(0o755)
    script = (
        "import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.settimeout(20); s.connect('arbiter.sock'); print(s.recv(1000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=running.path.parent, capture_output=True, text=True, timeout=60
    )
    assert "may not connect" in done.stdout, done.stderr
    works(running.path)


# -- clients that misbehave ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packet", [b"x", b"DS\x02\x03", b"DS\x63\x07", os.urandom(500), b"D" * (wire.MAX_MESSAGE_BYTES + 10)]
)
def test_malformed_packet_drops_its_sender_only(running: Arbiter, packet: bytes) -> None:
    with Backend(running.path, "bystander") as bystander, Backend(running.path, "culprit") as culprit:
        culprit.socket.send(packet)
        assert culprit.is_dropped()
        assert bystander.ask(wire.Ping(1)) == wire.Pong(1)
        bystander.send(wire.Work(1, deadline_us()))
        bystander.finish(bystander.granted())


@pytest.mark.parametrize("message", [wire.Leave(), wire.Welcome(1, 1.0), wire.Work(1, 1)])
def test_message_out_of_order_drops_its_sender(running: Arbiter, message: wire.Message) -> None:
    with Client(running.path) as client:
        assert isinstance(client.ask(message), wire.Refuse)
        assert client.receive() is None
    works(running.path)


def test_empty_packet_drops_its_sender(running: Arbiter) -> None:
    with Client(running.path) as client:
        client.socket.send(b"")
        assert client.is_dropped()
    works(running.path)


def test_client_that_does_not_read_is_dropped_and_stalls_nobody(running: Arbiter) -> None:
    with Client(running.path) as deaf:
        deaf.socket.settimeout(PATIENCE_S)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for nonce in range(100 * MAX_QUEUED_PACKETS):
                deaf.send(wire.Ping(nonce))
        works(running.path)
    assert running.loop.dropped["slow"] == 1


def test_client_that_reads_late_gets_everything_in_order(running: Arbiter) -> None:
    """More than the kernel holds, less than the bound: the queue behind it is sent on when it reads."""
    with Client(running.path) as late:
        late.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for nonce in range(MAX_QUEUED_PACKETS // 2):
            late.send(wire.Ping(nonce))
        works(running.path)
        assert [late.receive() for _ in range(MAX_QUEUED_PACKETS // 2)] == [
            wire.Pong(nonce) for nonce in range(MAX_QUEUED_PACKETS // 2)
        ]


def test_flood_is_dropped_and_others_are_served(running: Arbiter) -> None:
    with Client(running.path) as flood:
        packet = wire.encode(wire.Ping(1))

        def pour() -> None:
            reader = threading.Thread(target=drain)
            reader.start()
            try:
                while True:
                    flood.socket.send(packet)
            except OSError:
                pass
            reader.join()

        def drain() -> None:
            try:
                while flood.socket.recv(64):
                    pass
            except OSError:
                pass

        flooding = threading.Thread(target=pour)
        flooding.start()
        works(running.path, rounds=50)
        flooding.join(PATIENCE_S)
        if flooding.is_alive():  # too slow a machine to reach the limit: end it, nothing was stalled
            flood.socket.shutdown(socket.SHUT_RDWR)
            flooding.join(PATIENCE_S)
        else:
            assert running.loop.dropped["flood"] + running.loop.dropped["slow"] == 1
    assert FLOOD_MESSAGES_PER_S > 0


def test_silent_connection_is_closed(path: Path) -> None:
    with arbiter(path, first_message_within_us=100_000), Client(path) as silent, Backend(path, "m") as joined:
        assert silent.is_dropped()
        assert joined.ask(wire.Ping(1)) == wire.Pong(1)


def test_drops_are_counted(running: Arbiter, control: SocketArbiterClient) -> None:
    with Client(running.path) as client:
        client.socket.send(b"nonsense")
        assert client.is_dropped()
    status = control.request("status")
    assert status["dropped"]["malformed"] == 1 and status["clients"] == 1


def test_client_limit(path: Path) -> None:
    with arbiter(path, max_clients=2), Backend(path, "a") as first, Backend(path, "b") as second:
        with Client(path) as third:
            answer = third.receive()
            assert isinstance(answer, wire.Refuse) and "2 clients" in answer.reason
        first.close()
        assert second.ask(wire.Ping(1)) == wire.Pong(1)
        assert second.ask(wire.Ping(2)) == wire.Pong(2)  # a round later: the place is free
        works(path)


def test_hang_up_in_the_middle_frees_its_share(running: Arbiter) -> None:
    with Backend(running.path, "second", gpu_percent=80.0) as second:
        first = Backend(running.path, "first", gpu_percent=80.0)
        first.send(wire.Work(1, deadline_us()))
        first.granted()
        second.send(wire.Work(1, deadline_us()))
        assert second.ask(wire.Ping(1)) == wire.Pong(1)  # no grant came before: there is no room for both
        first.close()
        second.finish(second.granted())


# -- what it is for ------------------------------------------------------------------------------------------


def test_lease_of_a_hung_backend_ends_and_its_share_is_used(
    running: Arbiter, control: SocketArbiterClient
) -> None:
    plans = plan_of(model_plan("hung", gpu_percent=80.0), model_plan("sound", gpu_percent=80.0))
    control.request("plan", gpus=gpus_to_json(plans))
    with (
        Backend(running.path, "hung", gpu_percent=80.0) as hung,
        Backend(running.path, "sound", gpu_percent=80.0) as sound,
    ):
        hung.send(wire.Work(1, deadline_us()))
        lost = hung.granted()
        sound.send(wire.Work(1, deadline_us()))
        grant = sound.granted()  # comes when the lease is over
        assert time.monotonic_ns() // 1000 >= lost.lease_until_us
        states = control.request("status")["backend_states"]
        assert (states["hung"], states["running"]) == (1, 1)
        sound.finish(grant)
        hung.finish(lost, waiting=1, deadline_us=deadline_us())  # it comes back and is used again
        hung.finish(hung.granted())
        assert control.request("status")["models"]["hung"]["leases_ended"] == 1


def test_48_clients_share_and_never_exceed_the_capacity(
    running: Arbiter, control: SocketArbiterClient
) -> None:
    lock = threading.Lock()
    granted = [0.0, 0.0]  # now, most

    def work(i: int) -> None:
        with Backend(running.path, f"model_{i}", gpu_percent=25.0) as backend:
            backend.send(wire.Work(4, deadline_us()))
            for left in range(10, 0, -1):
                grant = backend.granted()
                with lock:
                    granted[0] += grant.gpu_percent
                    granted[1] = max(granted)
                time.sleep(0.001)
                with lock:
                    granted[0] -= grant.gpu_percent
                more = left > 1
                backend.finish(grant, waiting=4 if more else 0, deadline_us=deadline_us() if more else 0)

    in_threads(48, work)
    assert 50.0 <= granted[1] <= 100.0
    give_up = time.monotonic() + PATIENCE_S
    while (status := control.request("status"))["backends"]:  # the last ends may still be on their way
        assert time.monotonic() < give_up
    assert status["gpus"]["0"]["granted_percent"] == 0


def test_engine_and_arbiter_decide_alike_on_a_recorded_stream(path: Path) -> None:
    """What went over the socket is recorded; a fresh engine, fed the same events, answers the same."""
    record: list[tuple[int, Event, int, list[Decision]]] = []

    def observe(gpu: int, event: Event, now_us: int, decisions: list[Decision]) -> None:
        record.append((gpu, event, now_us, list(decisions)))

    def work(i: int) -> None:
        with Backend(path, f"model_{i % 4}", gpu=i % 2, gpu_percent=30.0 + i) as backend:
            backend.send(wire.Work(1 + i, deadline_us(20 + i)))
            for left in range(30, 0, -1):
                grant = backend.granted()
                if i == 3 and left == 20:
                    return  # dies with a grant
                time.sleep(0.0002 * i)
                more = left > 1
                backend.finish(
                    grant, waiting=i + 1 if more else 0, deadline_us=deadline_us(20) if more else 0
                )

    with arbiter(path, observe=observe) as it:
        client = SocketArbiterClient(path, timeout_s=PATIENCE_S)
        plans = plan_of(*(model_plan(f"model_{i}", gpu_percent=30.0 + i) for i in range(4)))
        client.request("plan", gpus=gpus_to_json(plans))
        in_threads(10, work)
        client.close()
        assert len(it.engines) >= 2
    assert sum(len(decisions) for _, _, _, decisions in record) > 250
    for gpu in (0, 1):
        fresh = make_engine("dstack")
        for at, event, now_us, decisions in record:
            if at == gpu:
                assert fresh.handle(event, now_us) == decisions, event


def test_policy_changes_while_grants_are_out(running: Arbiter, control: SocketArbiterClient) -> None:
    with (
        Backend(running.path, "a", gpu_percent=80.0) as first,
        Backend(running.path, "b", gpu_percent=80.0) as second,
    ):
        first.send(wire.Work(1, deadline_us()))
        grant = first.granted()
        control.request("policy", name="dstack")
        second.send(wire.Work(1, deadline_us()))
        assert second.ask(wire.Ping(1)) == wire.Pong(1)  # the first one's batch still counts
        first.finish(grant)
        second.finish(second.granted())


def test_big_answers_and_errors_reach_the_client(running: Arbiter, control: SocketArbiterClient) -> None:
    works(running.path, rounds=300)
    rows, since = [], 0
    while True:
        page = control.request("timeline", since_seq=since)
        rows += page["rows"]
        since = page["next_since"]
        if not page["more"]:
            break
    assert len(rows) == 300
    with pytest.raises(InputError, match="unknown verb"):
        control.request("dance")
    with pytest.raises(InputError, match="capacity_percent"):
        control.request("plan", gpus={"0": {"capacity_percent": -1, "models": []}})
    assert control.request("ping")["pid"] == os.getpid()


def test_timeline_of_the_last_seconds_is_drawn(
    running: Arbiter, control: SocketArbiterClient, tmp_path
) -> None:
    works(running.path, rounds=250, model="drawn")
    timeline = read_timeline(control, last_s=PATIENCE_S)[0]
    assert len(timeline.batches) == 250 and timeline.lost == 0
    assert {batch.model for batch in timeline.batches} == {"drawn"}
    assert all(
        batch.start_us <= batch.end_us and batch.gpu_percent == 40.0 and batch.rows == 8
        for batch in timeline.batches
    )
    ((path, said),) = save_timelines(control, tmp_path / "gpu.html", last_s=PATIENCE_S)
    page = path.read_text()
    assert "250 batches" in said and "drawn" in page and page.startswith("<!doctype html>")


def test_timeline_before_anything_ran_says_so(control: SocketArbiterClient, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no GPU yet"):
        save_timelines(control, tmp_path / "gpu.html", last_s=1.0)


def test_client_without_an_arbiter_says_so(tmp_path: Path) -> None:
    client = SocketArbiterClient(tmp_path / "nobody.sock")
    with pytest.raises(MachineError, match="no arbiter answers"):
        client.request("ping")


def test_client_of_an_arbiter_that_hangs_gives_up(tmp_path: Path) -> None:
    path = tmp_path / "hung.sock"
    with listening(path):  # nobody reads
        client = SocketArbiterClient(path, timeout_s=0.1)
        with pytest.raises(MachineError, match="no answer"):
            client.request("ping")
        client.close()


def test_a_share_is_told_to_instances_that_joined_with_levels(
    running: Arbiter, control: SocketArbiterClient
) -> None:
    """Guards against a share that is told to an instance whose config asks for levels and which has none."""
    with (
        Backend(running.path, "a", levels=(25.0, 40.0, 100.0)),
        Backend(running.path, "b"),
        Backend(running.path, "c", levels=(25.0, 40.0, 100.0)),
        Backend(running.path, "c", gpu=1),
    ):
        reach = Reach.to(control.request("status")["backends"])
    assert (reach.arbiter, reach.levels) == (True, {"a"})


def test_full_house_still_has_a_status(path: Path) -> None:
    """Guards the answer's size: as many backends as there are places, each of a model of its own."""
    with arbiter(path, max_clients=256), contextlib.ExitStack() as stack:
        for i in range(255):
            stack.enter_context(Backend(path, f"a_model_with_quite_a_long_name_{i:03d}"))
        client = SocketArbiterClient(path, timeout_s=PATIENCE_S)
        status = client.request("status")
        client.close()
    assert len(status["backends"]) == 255


def test_clients_that_come_and_go_leave_nothing_behind(
    running: Arbiter, control: SocketArbiterClient
) -> None:
    control.request("ping")
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for i in range(300):
        with Backend(running.path, f"model_{i % 3}") as backend:
            backend.send(wire.Work(1, deadline_us()))
            if i % 2:
                backend.granted()
    give_up = time.monotonic() + PATIENCE_S
    while (status := control.request("status"))["backends"]:
        assert time.monotonic() < give_up
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert status["gpus"]["0"]["granted_percent"] == 0
    assert running.engines[-1].snapshot()["instances"] == {}
    assert status["clients"] == 1
