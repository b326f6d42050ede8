"""The host as the controller sees it: what is planned with, and when a change of it cannot wait."""

from __future__ import annotations

import pytest

from dstack_sched.app.gpus import GpuWatch
from dstack_sched.app.host_view import FRESH_S, RETRY_S, HostView
from dstack_sched.domain.gpu import GpuProcess
from dstack_sched.domain.mps import MpsClient, MpsServer
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.errors import InputError
from fakes.gpus import GIB, FakeInventory
from fakes.serving import FakeClock


class World:
    """Two GPUs, a Triton of processes 10 and 11, an MPS server 501 that another program uses too."""

    def __init__(self) -> None:
        self.inventory, self.clock = FakeInventory(2), FakeClock()
        uuids = [gpu.uuid for gpu in self.inventory.gpus]
        self.clients = [MpsClient(11, uuids[0]), MpsClient(99, uuids[0]), MpsClient(11, uuids[1])]
        self.asked = 0
        self.view = HostView(GpuWatch(self.inventory, self.clock), self.clock, lambda: {10, 11}, self.servers)

    def servers(self) -> tuple[MpsServer, ...]:
        self.asked += 1
        return (MpsServer(501, "ACTIVE", tuple(self.clients)),)

    def usable(self, after_s: float = FRESH_S) -> list[int]:
        self.clock.sleep_s(after_s)
        return [gpu.index for gpu in self.view.host().usable]

    def urgent(self, after_s: float = 1.0) -> str | None:
        """As the loop asks: the health check has looked at the GPUs before."""
        self.clock.sleep_s(after_s)
        self.view.watch.look()
        return self.view.urgent()


def test_memory_and_clients_of_others_are_taken_off() -> None:
    world = World()
    processes = (GpuProcess(11, 4 * GIB), GpuProcess(501, GIB), GpuProcess(99, 9 * GIB))
    world.inventory.set(0, used_bytes=14 * GIB, processes=processes)
    first, second = world.view.host().usable
    assert (first.memory_bytes, first.clients) == (71 * GIB, 1), "ours and the MPS server's are not others'"
    assert (second.memory_bytes, second.clients) == (80 * GIB, 0)


def test_the_plans_of_one_round_see_one_host() -> None:
    world = World()
    world.view.host()
    asked = world.asked
    for _ in range(5):
        world.view.host()
    assert world.asked == asked
    world.inventory.set(1, lost="NVML: GPU is lost")
    world.view.watch.look()
    assert world.usable(after_s=0.0) == [0], "a GPU that went is seen at once"


def test_a_gpu_that_goes_is_urgent_until_a_plan_without_it_is_in_force() -> None:
    world = World()
    world.usable()
    assert world.urgent() is None, "before the first plan nothing is"
    world.view.put_in_force()
    assert world.urgent() is None
    world.inventory.set(1, lost="NVML: GPU is lost")
    assert world.urgent() == "GPU 1 is out: NVML: GPU is lost"
    assert world.urgent() is None, "one try at a time"
    assert world.urgent(RETRY_S) == "GPU 1 is out: NVML: GPU is lost", "that try failed: again"
    assert world.usable() == [0]
    world.view.put_in_force()
    assert world.urgent(RETRY_S) is None


def test_one_that_comes_back_is_used_again() -> None:
    world = World()
    world.inventory.set(1, lost="NVML: GPU is lost")
    world.usable()
    world.view.put_in_force()
    world.inventory.set(1, lost="")
    assert world.urgent() == "GPU 1 is back: NVML: GPU is lost"
    assert world.usable() == [0, 1]


def test_one_that_goes_and_comes_before_anybody_planned_changes_nothing() -> None:
    world = World()
    world.usable()
    world.view.put_in_force()
    world.inventory.set(1, lost="x")
    world.view.watch.look()
    world.inventory.set(1, lost="")
    assert world.urgent() is None


def placed(*gpus: int) -> Plan:
    row = ModelPlan(gpus[0], 10.0, 1, 0, 1.0, 1.0, 1.0, 1.0, 0.1, tuple(Replica(g, 10.0, 1.0) for g in gpus))
    return Plan(100.0, ("one",), {"m": row}, True, (), 1.0)


def test_a_plan_of_fewer_gpus_is_one_for_this_host() -> None:
    """Guards against a config without gpus on a host with two: Triton would use both."""
    world = World()
    world.view.host()
    assert len(world.view.fitted(placed(1)).gpus) == 2
    cpu = placed(-1)
    assert world.view.fitted(cpu) is cpu
    with pytest.raises(InputError, match=r"places m on GPU 2: this host has 2, counted from 0; plan again"):
        world.view.fitted(placed(0, 2))
    world.inventory.set(1, lost="NVML: GPU is lost")
    world.view.watch.look()
    with pytest.raises(InputError, match=r"places m on GPU 1: NVML: GPU is lost; plan again"):
        world.view.fitted(placed(1))


def test_a_plan_that_needs_too_many_clients_is_refused_before_it_is_applied() -> None:
    world = World()
    world.view.host()
    row = ModelPlan(0, 10.0, 1, 0, 1.0, 1.0, 1.0, 1.0, 0.1)
    plan = Plan(100.0, ("x", "x"), {f"m{n}": row for n in range(46)}, True, (), 1.0)
    assert world.view.check_clients(plan) == ("GPU 0: 46 MPS clients planned, 1 of others, 48 at most",)
    world.clients.append(MpsClient(98, world.inventory.gpus[0].uuid))
    with pytest.raises(InputError, match="GPU 0: the plan needs 46 MPS clients"):
        world.view.check_clients(plan)
    without = HostView(world.view.watch, world.clock)
    assert without.check_clients(plan) == (), "no MPS, no limit"
