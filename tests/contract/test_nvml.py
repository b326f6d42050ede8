"""NvmlInventory against a made-up NVML (fakes/nvml): what is there, in the order of CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstack_sched.adapters.nvml import NvmlInventory
from dstack_sched.domain.gpu import GpuProcess
from dstack_sched.errors import MachineError
from fakes.gpus import GIB, use_fake_nvml, write_host

A, B, C = "GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_fake_nvml(monkeypatch, tmp_path / "host.json")
    return write_host(tmp_path / "host.json", [{"uuid": A}, {"uuid": B}])


def seen(environ: dict[str, str]) -> list[str]:
    return [gpu.uuid for gpu in NvmlInventory(environ).read()]


def test_everything_of_a_gpu_is_read(host: Path) -> None:
    write_host(host, [{"uuid": A, "utilization": 37, "used": 9 * GIB, "processes": [[5, GIB], [6, None]],
                       "clients": [[5, 2 * GIB], [7, GIB]]}], driver="590.1")  # fmt: skip
    (gpu,) = NvmlInventory({}).read()
    assert (gpu.index, gpu.uuid, gpu.driver) == (0, A, "590.1")
    assert (gpu.memory_bytes, gpu.used_bytes, gpu.utilization_percent) == (80 * GIB, 9 * GIB, 37.0)
    assert gpu.processes == (GpuProcess(5, 2 * GIB), GpuProcess(6, None), GpuProcess(7, GIB))
    assert not gpu.lost and not gpu.reset_pending and gpu.xids == ()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [A, B, C]),
        ("2,0", [C, A]),
        ("GPU-bbbb", [B]),
        ("0, GPU-cccc-3", [A, C]),
        ("1,7,0", [B]),
        ("0,0,1", [A]),
        ("-1", []),
        ("", []),
    ],
)
def test_the_order_is_that_of_cuda(host: Path, visible: str | None, expected: list[str]) -> None:
    """Guards against planning GPU 1 where CUDA calls another one so. It stops at an invalid entry."""
    write_host(host, [{"uuid": A}, {"uuid": B}, {"uuid": C}])
    assert seen({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_one_that_disappears_stays_in_the_list_as_lost_and_returns(host: Path) -> None:
    inventory = NvmlInventory({})
    inventory.read()
    for gone in ([{"uuid": B}], [{"uuid": A, "lost": True}, {"uuid": B}]):
        write_host(host, gone)
        first, second = inventory.read()
        assert (first.index, first.uuid, second.index) == (0, A, 1)
        assert first.lost.startswith("NVML: ") and not second.lost
        assert first.memory_bytes == 80 * GIB and first.used_bytes == 0
        write_host(host, [{"uuid": A}, {"uuid": B}])
        assert not any(gpu.lost for gpu in inventory.read())


def test_a_controller_that_starts_while_one_is_gone_is_told_the_order(host: Path) -> None:
    write_host(host, [{"uuid": B}])
    lost, there = NvmlInventory({}, (A, B)).read()
    assert (lost.index, there.index, there.uuid) == (0, 1, B)
    assert lost.lost and not there.lost


def test_each_xid_is_told_once_and_none_of_before(host: Path) -> None:
    write_host(host, [{"uuid": A, "xids": [31]}, {"uuid": B}])
    inventory = NvmlInventory({})
    assert [gpu.xids for gpu in inventory.read()] == [(), ()]
    write_host(host, [{"uuid": A, "xids": [31, 63, 79]}, {"uuid": B}])
    assert [gpu.xids for gpu in inventory.read()] == [(63, 79), ()]
    assert [gpu.xids for gpu in inventory.read()] == [(), ()]
    write_host(host, [{"uuid": A, "xids": [31, 63, 79, 48], "lost": True}, {"uuid": B}])
    assert inventory.read()[0].xids == (48,), "also told of one that is lost already"
    inventory.close()
    assert len(inventory.read()) == 2, "closed, it starts again"


def test_memory_errors_that_wait_for_a_reset_and_mig_show(host: Path) -> None:
    write_host(host, [{"uuid": A, "pending": True}, {"uuid": B, "mig": True}])
    one, two = NvmlInventory({}).read()
    assert one.reset_pending and not one.lost
    assert two.lost == "MIG mode is on; turn it off with nvidia-smi -mig 0"


def test_no_driver_is_no_gpu_and_a_broken_one_is_a_clear_line(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_host(host, [], broken="Driver/library version mismatch")
    with pytest.raises(MachineError, match="NVML: Driver/library version mismatch; check the NVIDIA driver"):
        NvmlInventory({}).read()
    monkeypatch.delenv("FAKE_NVML")
    assert NvmlInventory({}).read() == ()
