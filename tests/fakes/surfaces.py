"""Latency surfaces for tests of the policy: random ones by seed, and those measured on an H100."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dstack_sched.domain.profile import (
    CorunMember,
    CorunPoint,
    Device,
    ModelProfile,
    ProfilePoint,
    ProfileSet,
)
from dstack_sched.policy.interference import CorunTotal
from dstack_sched.policy.latency import LatencySurface, Posynomial

H100_FILE = Path(__file__).parents[1] / "data" / "h100_2026-11-22.json"
GPU = Device("Test GPU", 132, 80 * 2**30, "580", "onnxruntime-gpu 1.31")
CPU = Device("Test CPU", 2, 24 * 2**30, "cpu", "onnxruntime 1.23")


def points(shape, percents, batches, rng=None, noise: float = 0.0, tail: float = 1.05):
    """Profile points of a shape f(p, b) on a grid, with log-normal noise if asked for."""
    found = []
    for p in percents:
        for b in batches:
            factor = float(np.exp(rng.normal(0.0, noise))) if noise else 1.0
            p50 = float(shape(p, b)) * factor
            found.append(ProfilePoint(float(p), int(b), p50, p50 * tail, 40))
    return tuple(found)


def random_shape(rng: np.random.Generator) -> Posynomial:
    """A posynomial of plausible size in which terms may be missing, but not all of them."""
    a = np.array([0.6, 0.05, 20.0, 10.0]) * np.exp(rng.normal(0.0, 0.8, 4)) * (rng.random(4) > 0.2)
    if a[2] + a[3] == 0.0:
        a[3] = 8.0
    return Posynomial(tuple(float(x) for x in a))


def random_surface(
    rng: np.random.Generator, name: str = "m", noise: float = 0.0, largest_batch: int = 32
) -> LatencySurface:
    """A surface from 3 to 6 GPU% and 2 to 4 batch sizes; noise above about 0.1 makes it a grid."""
    percents = np.sort(rng.choice(np.arange(5, 100), rng.integers(2, 6), replace=False))
    sizes = np.arange(2, largest_batch + 1)
    batches = np.sort(rng.choice(sizes, min(int(rng.integers(1, 4)), sizes.size), replace=False))
    shape = random_shape(rng)
    return LatencySurface(name, points(shape, [*percents, 100], [1, *batches], rng, noise))


def profile_set(surfaces: dict[str, tuple[ProfilePoint, ...]], device: Device = GPU, memory_gib: float = 1.0):
    """A ProfileSet of these points, every model of the same size."""
    models = {
        name: ModelProfile(name, "0" * 64, int(memory_gib * 2**30), found) for name, found in surfaces.items()
    }
    return ProfileSet(device, models)


def h100_surfaces() -> dict[str, LatencySurface]:
    """The four models measured on an H100."""
    return {
        name: LatencySurface(name, [ProfilePoint(**x) for x in body["points"]])
        for name, body in h100_raw()["models"].items()
    }


def h100_raw() -> dict:
    return json.loads(H100_FILE.read_text())


def h100_coruns() -> list[CorunPoint]:
    """The MPS co-runs with a latency for each member."""
    return [
        CorunPoint(
            tuple(
                CorunMember(model, entry["gpu_percent"], entry["batch_size"], latency, rate)
                for model, latency, rate in zip(
                    entry["models"], entry["latency_ms_p50"], entry["throughput_per_s"], strict=True
                )
            )
        )
        for entry in h100_raw()["corun"]
        if entry["setting"] == "MPS"
    ]


def h100_totals(batches: tuple[int, ...]) -> list[CorunTotal]:
    """The MPS co-runs of which only the total is known: the four models, batch 1, 4, 8 and 16."""
    four = ("resnet50", "mobilenet_v2", "vgg19", "bert")
    closed = [each for each in h100_raw()["corun"] if "one process each" in each["setting"]]
    table, at_8 = closed[0]["total_per_s"], closed[1]["total_per_s"]
    found = []
    for setting, percent in (("MPS unlimited", 100.0), ("MPS 25", 25.0), ("MPS 50", 50.0)):
        for b, total in zip((1, 4, 16), table[setting], strict=True):
            found.append((b, (percent,) * 4, total))
    shares = {"MPS unlimited": (100.0,) * 4, "70 each": (70.0,) * 4}
    shares |= {key: tuple(map(float, key.split("/"))) for key in at_8 if "/" in key}
    found += [(8, shares[setting], total) for setting, total in at_8.items()]
    return [
        CorunTotal(tuple((m, p, b) for m, p in zip(four, percents, strict=True)), float(total))
        for b, percents, total in found
        if b in batches
    ]
