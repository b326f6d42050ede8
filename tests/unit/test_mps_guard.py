"""The MPS guard: who is ended after a server's death or in FAULT, and who is left alone."""

from __future__ import annotations

from dstack_sched.app.mps_guard import FAULT_GRACE_S, GRACE_S, MpsGuard
from dstack_sched.domain.mps import MpsClient, MpsServer


class World:
    """StubProcesses and an MPS daemon: processes by id, servers as they tell themselves."""

    def __init__(self) -> None:
        self.processes = {501, 11, 12, 13, 99}  # a server, three stubs of ours, a client of somebody else
        self.ours = {11, 12, 13}
        self.told: tuple[MpsServer, ...] | None = (server(501, 11, 12, 99),)
        self.asked = 0
        self.now_us = 0
        self.guard = MpsGuard(self.servers, self, ask_every_s=1.0)  # type: ignore[arg-type]

    def servers(self) -> tuple[MpsServer, ...] | None:
        self.asked += 1
        return self.told

    def alive(self, pids: frozenset[int]) -> frozenset[int]:
        return pids & self.processes

    def all_pids(self) -> frozenset[int]:
        return frozenset(self.ours & self.processes)

    def kill(self, pids: frozenset[int]) -> None:
        self.processes -= pids & self.ours

    def faults(self, after_s: float = 0.0) -> dict[str, str]:
        self.now_us += round(after_s * 1e6)
        return {fault.subject: fault.detail for fault in self.guard.look(self.now_us)}

    def mend(self) -> list[str | None]:
        return [self.guard.mend(fault) for fault in self.guard.look(self.now_us)]


def server(pid: int, *clients: int, status: str = "ACTIVE") -> MpsServer:
    return MpsServer(pid, status, tuple(MpsClient(each) for each in clients))


def test_nothing_is_wrong_where_no_daemon_ever_answered() -> None:
    world = World()
    world.told = None
    assert world.faults() == {} and world.faults(10.0) == {}


def test_all_well_costs_one_question_a_second() -> None:
    world = World()
    for _ in range(10):
        assert world.faults(0.5) == {}
    assert world.asked == 5


def test_a_dead_daemon_is_told_and_its_hanging_clients_are_ended_after_the_grace() -> None:
    """11 notices by itself; 12 hangs in the driver; 13 never was a client; 99 is not ours."""
    world = World()
    world.faults()
    world.told = None
    world.processes -= {501}
    assert set(world.faults(1.0)) == {"MPS daemon"}
    world.processes -= {11}
    assert set(world.faults(GRACE_S - 0.1)) == {"MPS daemon"}, "within the grace nobody is ended"
    assert world.faults(0.2)["MPS clients"] == "1 backends hang without their MPS server"
    assert world.mend() == [None, "ended 1 backends that hung without their MPS server"]
    assert world.processes == {13, 99}
    world.told = ()
    assert world.faults(1.0) == {}, "the daemon is back and nobody is left"


def test_stubs_that_came_after_the_new_daemon_are_left_alone() -> None:
    world = World()
    world.faults()
    world.told = None
    world.processes -= {501}
    world.faults(1.0)
    world.processes |= {502, 21}
    world.ours |= {21}
    world.told = (server(502, 21),)
    world.faults(GRACE_S + 1.0)
    world.mend()
    assert world.processes == {13, 99, 502, 21}, "11 and 12 outlived their server"
    assert world.faults(5.0) == {}


def test_a_server_that_outlives_its_daemon_keeps_its_clients() -> None:
    """Somebody killed the control daemon of another owner: the models go on."""
    world = World()
    world.faults()
    world.told = None
    assert set(world.faults(GRACE_S + 5.0)) == {"MPS daemon"}
    world.mend()
    assert {11, 12} <= world.processes


def test_a_server_that_went_with_its_last_client_is_no_fault() -> None:
    world = World()
    world.told = (server(501, 99),)
    world.faults()
    world.told, world.processes = (), {11, 12, 13}
    assert world.faults(10.0) == {} and world.faults(10.0) == {}


def test_in_fault_clients_get_time_and_are_then_ended_so_that_new_ones_can_come() -> None:
    world = World()
    world.faults()
    world.told = (server(501, 11, 12, status="FAULT"),)
    assert world.faults(1.0) == {}
    world.told = (server(501, 12, status="FAULT"),)
    world.processes -= {11}
    assert "MPS clients" in world.faults(FAULT_GRACE_S)
    world.mend()
    assert world.processes == {501, 13, 99}
    world.told = (server(501),)
    assert world.faults(1.0) == {}


def test_a_fault_that_clears_by_itself_ends_nobody() -> None:
    world = World()
    world.faults()
    world.told = (server(501, 11, 12, status="FAULT"),)
    world.faults(1.0)
    world.told = (server(501, 11, 12),)
    assert world.faults(FAULT_GRACE_S) == {}
    world.told = (server(501, 11, 12, status="FAULT"),)
    assert world.faults(1.0) == {}, "the time counts anew"
    assert {11, 12} <= world.processes
