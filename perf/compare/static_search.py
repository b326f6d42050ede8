"""Alternative (e): the best fixed shares, found by trial, as Model Analyzer finds configurations.

Each candidate is deployed and its peak searched under real load. Candidates: the knee shares and equal
shares, each scaled to promise a total of 100% to 400% of the GPU, and no limits at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from compare.alternatives import Served

PROMISES_PERCENT = (100.0, 150.0, 200.0, 300.0, 400.0)
LEAST_PERCENT = 5.0


def candidates(knees: Mapping[str, Served]) -> Iterator[tuple[str, dict[str, Served]]]:
    """(name, deployment) of each candidate, the likeliest first. knees: each model at its planned share."""
    total = sum(each.gpu_percent for each in knees.values())
    equal = {model: 100.0 / len(knees) for model in knees}
    proportional = {model: 100.0 * each.gpu_percent / total for model, each in knees.items()}
    for promise in sorted(PROMISES_PERCENT, key=lambda percent: abs(percent - 200.0)):
        for name, split in (("knee", proportional), ("equal", equal)):
            yield (
                f"{name} shares, {promise:g}% promised",
                {
                    model: replace(
                        each,
                        gpu_percent=round(min(100.0, max(LEAST_PERCENT, split[model] * promise / 100.0)), 1),
                    )
                    for model, each in knees.items()
                },
            )
    yield "no limits", {model: replace(each, gpu_percent=100.0) for model, each in knees.items()}
