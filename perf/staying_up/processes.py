"""What each process of a deployment holds, by role: memory, descriptors, sockets, threads, shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

SHM = Path("/dev/shm")
QUANTITIES = ("rss_mib", "anonymous_mib", "pss_mib", "descriptors", "sockets", "threads")


@dataclass(frozen=True)
class Sample:
    """One process at one moment. dead_stubs: zombies among its children, that is for Triton models that it
    still holds though their process is gone."""

    at_s: float
    role: str
    pid: int
    age_s: float
    rss_mib: float
    anonymous_mib: float
    pss_mib: float
    descriptors: int
    sockets: int
    threads: int
    dead_stubs: int


def take(roots: Iterable[int], at_s: float) -> list[Sample]:
    """Every process below these, themselves included. One that ends meanwhile is left out."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            process = psutil.Process(root)
            found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        except psutil.NoSuchProcess:
            continue
    samples = []
    for process in found.values():
        try:
            sample = look_at(process, at_s)
        except (psutil.Error, OSError):
            continue
        if sample is not None:
            samples.append(sample)
    return samples


def look_at(process: psutil.Process, at_s: float) -> Sample | None:
    """None for a process that plays no role: a zombie, or one that is not part of the deployment."""
    role = role_of(process.cmdline())
    if role is None:
        return None
    memory = process.memory_info()
    targets = [target_of(each) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
    zombies = sum(child.status() == psutil.STATUS_ZOMBIE for child in process.children())
    return Sample(
        at_s,
        role,
        process.pid,
        age_s=age_s(process.pid),
        rss_mib=memory.rss / 2**20,
        anonymous_mib=rolled_up(process.pid, "Anonymous") / 2**20,
        pss_mib=rolled_up(process.pid, "Pss") / 2**20,
        descriptors=len(targets),
        sockets=sum(target.startswith("socket:") for target in targets),
        threads=process.num_threads(),
        dead_stubs=zombies,
    )


def role_of(argv: list[str]) -> str | None:
    """serve, keeper, arbiter, controller, triton, stub of MODEL; None for anything else."""
    if not argv:
        return None
    if argv[0].endswith("tritonserver"):
        return "triton"
    if argv[0].endswith("_stub"):
        return f"stub of {Path(argv[1]).parts[-3]}"
    if any(word.endswith("keeper.py") for word in argv):
        return "keeper"
    if "dstack_sched" in argv:
        verb = argv[argv.index("dstack_sched") + 1]
        return {"serve": "serve", "arbiter": "arbiter", "run": "controller"}.get(verb)
    return None


def target_of(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def rolled_up(pid: int, what: str) -> int:
    """Bytes. Pss: what is shared with n others counts 1/n; Anonymous: of no file, so nobody else's."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return 0


def age_s(pid: int) -> float:
    """Since its start, by the boot clock: no jump of the wall clock matters."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - ticks / os.sysconf("SC_CLK_TCK")


def shared_memory(prefix: str) -> dict[str, float]:
    """POSIX regions with this prefix, and all System V segments of the host."""
    regions = []
    for path in SHM.glob(f"{prefix}*"):
        try:
            regions.append(path.stat().st_blocks * 512)
        except FileNotFoundError:
            continue
    segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {"regions": len(regions), "mib": sum(regions) / 2**20, "sysv_segments": len(segments)}
