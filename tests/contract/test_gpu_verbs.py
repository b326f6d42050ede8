"""`dstackctl gpus`, `plan` and `doctor` on a made-up host with two GPUs (fakes/nvml)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dstack_sched.adapters import machine_checks
from dstack_sched.adapters.gpu_exclusions import GpuExclusions
from dstack_sched.adapters.machine_checks import gpu_checks
from dstack_sched.adapters.profile_files import write_profiles
from dstack_sched.cli import app, register
from dstack_sched.cli.host_gpus import held_bytes
from dstack_sched.errors import DstackError, InfeasibleError, InputError
from fakes.gpus import GIB, use_fake_nvml, write_host
from fakes.surfaces import GPU, points, profile_set

A, B = "GPU-aaaa-1", "GPU-bbbb-2"


class Shell:
    """`dstackctl` in this process; what a verb raises, `main` would print as one line."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.host = tmp_path / "host.json"
        self.set_gpus({}, {})
        grid = points(lambda p, b: 2.5 + 150.0 / p, (20, 40, 60, 100), (1, 2, 4))
        write_profiles(tmp_path / "profiles.json", profile_set(dict.fromkeys("abcd", grid), memory_gib=25.0))
        rows = "".join(f"  - {{name: {name}, slo_ms: 60, rate_per_s: 20}}\n" for name in "abcd")
        (tmp_path / "workload.yaml").write_text("models:\n" + rows)

    def set_gpus(self, *gpus: dict[str, Any]) -> None:
        named = [{"uuid": uuid, "name": GPU.name, **gpu} for uuid, gpu in zip((A, B), gpus, strict=False)]
        write_host(self.host, named)

    def __call__(self, *words: str) -> dict[str, Any]:
        register([words[0]])
        answer = CliRunner().invoke(app, [*words, "--json", "--state", str(self.folder / "state")])
        if isinstance(answer.exception, DstackError):
            raise answer.exception
        assert answer.exit_code == 0, answer.output
        found: dict[str, Any] = json.loads(answer.stdout)
        return found

    def plan(self, *words: str) -> dict[str, Any]:
        files = ["--profiles", f"{self.folder}/profiles.json", "--workload", f"{self.folder}/workload.yaml"]
        return self("plan", *files, *words)

    def used(self, *words: str) -> set[int]:
        return {r["gpu"] for row in self.plan(*words)["models"].values() for r in row["replicas"]}


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    use_fake_nvml(monkeypatch, tmp_path / "host.json")
    return Shell(tmp_path)


def test_plan_takes_the_gpus_of_this_host(shell: Shell) -> None:
    """100 GiB of models: more than one GPU has."""
    assert shell.used() == {0, 1}
    assert len(shell.plan()["gpus"]) == 2
    assert len(shell.plan("--gpus", "3")["gpus"]) == 3, "a number that is named wins"


def test_plan_leaves_out_what_is_excluded_and_what_others_fill(shell: Shell) -> None:
    with pytest.raises(InfeasibleError, match="memory"):
        shell.plan("--exclude-gpu", "0")
    text = (shell.folder / "workload.yaml").read_text().splitlines()
    (shell.folder / "workload.yaml").write_text("\n".join(text[:3]))
    assert shell.used("--exclude-gpu", "0") == {1}
    assert shell.used("--exclude-gpu", "GPU-bbbb") == {0}
    shell.set_gpus({"used": 70 * GIB, "processes": [[os.getpid(), 69 * GIB]]}, {})
    assert shell.used() == {1}
    with pytest.raises(InputError, match="'x' names no GPU; an index"):
        shell.plan("--exclude-gpu", "x")


def test_profiles_of_another_gpu_plan_for_one_as_before(shell: Shell) -> None:
    shell.set_gpus({"name": "Tesla T4"}, {"name": "Tesla T4"})
    with pytest.raises(InfeasibleError, match=r"1 GPU.s. have 80 GiB"):
        shell.plan()
    with pytest.raises(InputError, match="--exclude-gpu: this host has no Test GPU"):
        shell.plan("--exclude-gpu", "1")


def test_a_gpu_is_taken_out_of_service_and_put_back(shell: Shell) -> None:
    shell.set_gpus({"used": 9 * GIB, "utilization": 30, "processes": [[5, 2 * GIB]]}, {})
    rows = shell("gpus")["gpus"]
    assert (rows["0"]["used_bytes"], rows["0"]["processes"], rows["0"]["out"]) == (9 * GIB, 1, None)
    assert shell("gpus", "--exclude", "1")["gpus"]["1"]["out"] == "excluded by the operator"
    assert shell("gpus")["gpus"]["1"]["out"] == "excluded by the operator", "it stays so"
    assert GpuExclusions(shell.folder / "state")() == {"1"}
    assert shell("gpus", "--include", "1")["gpus"]["1"]["out"] is None
    with pytest.raises(InputError, match="'7': no such GPU here; there are 2, counted from 0"):
        shell("gpus", "--exclude", "7")


def test_a_broken_list_of_exclusions_is_said_where_it_is_changed(shell: Shell) -> None:
    path = shell.folder / "state" / "excluded_gpus.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")
    with pytest.raises(InputError, match=r"excluded_gpus\.json: not JSON"):
        shell("gpus", "--exclude", "1")
    assert shell("gpus")["gpus"]["1"]["out"] is None, "a controller goes on"


def test_doctor_names_each_gpu_and_what_is_wrong(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine_checks, "GPU_DEVICE", tmp_path)
    shell.set_gpus({"used": 3 * GIB}, {"pending": True})
    (gpu, _) = gpu_checks()
    assert gpu.ok and gpu.found == (
        "0: Test GPU 80 GiB, 3.0 in use; 1: Test GPU 80 GiB, memory errors, needs a reset; driver 580.159.04"
    )
    shell.set_gpus({"pending": True})
    (gpu, _) = gpu_checks()
    assert not gpu.ok and gpu.mend == "reset it (nvidia-smi -r) or restart the host"
    write_host(shell.host, [])
    (gpu, _) = gpu_checks()
    assert not gpu.ok and gpu.mend.startswith("give this container one")


def test_what_our_instances_hold_is_asked_of_the_arbiter_page_by_page() -> None:
    pages = [
        {"instances": {"a": {"gpu": 0, "device_bytes": 3}, "b": {"gpu": 1, "device_bytes": 5}},
         "next_since": 7,
         "more": True},
        {"instances": {"c": {"gpu": 0, "device_bytes": 4}, "d": {"gpu": -1}}, "next_since": 9, "more": False},
    ]  # fmt: skip

    class Arbiter:
        def request(self, verb: str, **fields: Any) -> dict[str, Any]:
            assert verb == "telemetry" and fields == {"since": 7 if len(pages) == 1 else 0}
            return pages.pop(0)

        def close(self) -> None:
            pass

    assert held_bytes(Arbiter()) == {0: 7, 1: 5, -1: 0}
    assert held_bytes(None) == {}
