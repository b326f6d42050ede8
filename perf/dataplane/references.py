"""Inputs for the models under study, and what the CPU provider answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from dstack_backend.runtime import CpuSession, cpu_cores
from dstack_backend.synthetic import feeds as made_up

TOLERANCE = 2e-2  # relative, by norm: TF32 and other algorithms against float32 on the CPU


@lru_cache(maxsize=32)
def reference(path: Path, rows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(inputs, outputs) of one batch, by name; shape (rows, ...)."""
    session = CpuSession(path, threads=cpu_cores())
    try:
        inputs = made_up(session.inputs, rows, {})
        names = [spec.name for spec in session.outputs]
        return inputs, dict(zip(names, session.run(inputs, names), strict=True))
    finally:
        session.close()


def relative_error(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    """The largest ||got - wanted|| / ||wanted|| over the outputs; infinite where one is missing."""
    worst = 0.0
    for name, want in wanted.items():
        have = got.get(name)
        if have is None or have.shape != want.shape or not np.isfinite(have).all():
            return float("inf")
        a, b = have.astype(np.float64), want.astype(np.float64)
        worst = max(worst, float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-12)))
    return worst
