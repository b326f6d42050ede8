"""Which GPUs are used: those that answer, had no grave error lately, and that nobody excluded."""

from __future__ import annotations

import pytest

from dstack_sched.app.gpus import EXCLUDED, GRAVE_XIDS, GpuGuard, GpuWatch, foreign_bytes, gpu_rows, host_gpus
from dstack_sched.domain.fault import FaultKind
from dstack_sched.domain.gpu import GpuProcess, GpuReading, mps_client_limit
from fakes.gpus import GIB, FakeInventory
from fakes.serving import FakeClock


class World:
    def __init__(self, count: int = 2) -> None:
        self.inventory, self.clock, self.excluded = FakeInventory(count), FakeClock(), set[str]()
        self.watch = GpuWatch(self.inventory, self.clock, lambda: self.excluded)
        self.watch.look()

    def usable(self) -> list[int]:
        self.watch.look()
        return [gpu.index for gpu in host_gpus(self.watch.states).usable]


def test_all_well_is_no_news() -> None:
    world = World()
    assert world.usable() == [0, 1]
    assert world.watch.news() == ()
    assert GpuGuard(world.watch).look(0) == ()


def test_a_lost_gpu_is_out_and_comes_back_when_it_answers() -> None:
    world = World()
    world.inventory.set(1, lost="NVML: GPU is lost")
    assert world.usable() == [0]
    assert world.watch.news() == ("GPU 1 is out: NVML: GPU is lost",)
    assert world.watch.news() == (), "news are told once"
    assert len(host_gpus(world.watch.states).names) == 2, "the others keep their numbers"
    world.inventory.set(1, lost="")
    assert world.usable() == [0, 1]
    assert world.watch.news() == ("GPU 1 is back: NVML: GPU is lost",)


@pytest.mark.parametrize("xid", [48, 63, 64, 74, 79, 94, 95])
def test_a_grave_error_keeps_a_gpu_out_for_a_while(xid: int) -> None:
    """Guards against a GPU that errs again and again being planned with in between."""
    world = World()
    world.inventory.set(0, xids=(xid,))
    assert world.usable() == [1]
    assert world.watch.news() == (f"GPU 0 is out: Xid {xid}, {GRAVE_XIDS[xid]}",)
    world.clock.sleep_s(599)
    assert world.usable() == [1]
    world.inventory.set(0, xids=(xid,))
    assert world.usable() == [1]
    world.clock.sleep_s(599)
    assert world.usable() == [1], "the time counts from the last error"
    world.clock.sleep_s(2)
    assert world.usable() == [0, 1]


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 68, 69, 109])
def test_an_error_of_a_program_says_nothing_about_the_gpu(xid: int) -> None:
    world = World()
    world.inventory.set(0, xids=(xid,))
    assert world.usable() == [0, 1]


def test_a_gpu_that_needs_a_reset_stays_out_until_it_had_one() -> None:
    world = World()
    world.inventory.set(0, xids=(63,), reset_pending=True)
    assert world.usable() == [1]
    world.clock.sleep_s(1e5)
    assert world.usable() == [1]
    (fault,) = GpuGuard(world.watch).look(0)
    assert fault.kind is FaultKind.GPU_LOST and fault.subject == "GPU 0"
    assert fault.detail == "memory errors; it needs a reset (nvidia-smi -r)"
    world.inventory.set(0, reset_pending=False)
    assert world.usable() == [0, 1]


@pytest.mark.parametrize("named", ["1", "GPU-1111"])
def test_an_operator_takes_a_gpu_out_and_gives_it_back(named: str) -> None:
    world = World()
    world.excluded.add(named)
    assert world.usable() == [0]
    assert world.watch.news() == (f"GPU 1 is out: {EXCLUDED}",)
    assert GpuGuard(world.watch).look(0) == (), "that is no fault"
    world.excluded.clear()
    assert world.usable() == [0, 1]


def test_a_fault_lasts_since_it_began_and_no_guard_mends_it() -> None:
    world = World()
    world.clock.sleep_s(5)
    world.inventory.set(1, lost="NVML: GPU is lost")
    guard = GpuGuard(world.watch)
    (first,) = guard.look(0)
    world.clock.sleep_s(5)
    (later,) = guard.look(0)
    assert first.since_us == later.since_us == 5_000_000
    assert guard.mend(later) is None


def test_memory_of_others_is_not_ours_to_plan_with() -> None:
    processes = (GpuProcess(10, 3 * GIB), GpuProcess(11, 4 * GIB), GpuProcess(99, 20 * GIB))
    reading = GpuReading(0, "GPU-a", "H100", 80 * GIB, 28 * GIB, processes=processes)
    assert foreign_bytes(reading, {10, 11}) == 21 * GIB, "20 of another program, 1 of the driver"
    assert foreign_bytes(reading, ()) == 28 * GIB
    world = World(1)
    world.inventory.set(0, used_bytes=28 * GIB, processes=processes)
    world.watch.look()
    (gpu,) = host_gpus(world.watch.states, {10, 11}, clients={0: 2}).usable
    assert gpu.memory_bytes == 59 * GIB and gpu.clients == 2
    assert gpu_rows(world.watch.states, {10})["0"]["used_by_others_bytes"] == 25 * GIB


def test_where_no_process_id_is_told_our_instances_reports_count() -> None:
    """Guards against planning as if our own models' memory were somebody else's, in a container."""
    reading = GpuReading(0, "GPU-a", "H100", 80 * GIB, 28 * GIB, processes=(GpuProcess(7, None),))
    assert foreign_bytes(reading, {10}, own_bytes=8 * GIB) == 20 * GIB
    assert foreign_bytes(reading, {10}, own_bytes=90 * GIB) == 0


@pytest.mark.parametrize(
    ("driver", "limit"), [("580.159.04", 48), ("590.44.01", 60), ("595.1", 60), ("470.1", 48), ("cpu", 48)]
)
def test_the_limit_of_mps_clients_follows_the_driver(driver: str, limit: int) -> None:
    assert mps_client_limit(driver) == limit
