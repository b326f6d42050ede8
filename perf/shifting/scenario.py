"""What is asked: three models, and how many rows a second of each in each of ten minutes.

The recorded trace gives the timing only. It is striped over the models (each starts elsewhere in it) and its
time is stretched minute by minute such that the minute's rate is as stated; the bursts within a minute stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstack_sched.domain.workload import ModelDemand, OnLate, Workload
from dstack_sched.sim.arrivals import parse_trace

TRACE = Path(__file__).resolve().parents[2].parent / "shared" / "traces" / "azure_llm_2023_conv.csv"
GOLDEN = 0.381966  # no two stripes close


@dataclass(frozen=True, slots=True)
class StudyModel:
    """One sample model. rows: of each request. per_s: rows a second, minute by minute."""

    name: str
    rows: int
    slo_ms: float
    per_s: tuple[float, ...]


# Minutes: all about equal, one hot at a time, two warm, and back. Chosen such that two cores hold every
# minute under the best shares, and the hot ones not under the shares that are best for the means.
MODELS = (
    StudyModel("magika", 4, 200.0, (90, 330, 330, 20, 20, 90, 340, 20, 20, 320)),
    StudyModel("ocr_recognize", 2, 300.0, (32, 5, 5, 110, 8, 32, 5, 8, 110, 5)),
    StudyModel("ocr_detect", 1, 300.0, (24, 4, 4, 4, 78, 24, 4, 78, 4, 4)),
)


@dataclass(frozen=True, slots=True)
class Script:
    """All arrivals of a run. times_s: model -> send times, ascending, from 0. minutes: how many, minute_s
    long."""

    models: tuple[StudyModel, ...]
    minutes: int
    minute_s: float
    times_s: Mapping[str, np.ndarray]

    @property
    def seconds(self) -> float:
        return self.minutes * self.minute_s

    def workload(self, rates: Mapping[str, float]) -> Workload:
        """These models at these rates (rows a second)."""
        demands = [ModelDemand(m.name, m.slo_ms, rates[m.name], 1.0, OnLate.REJECT) for m in self.models]
        return Workload(tuple(demands))

    def mean_rates(self) -> dict[str, float]:
        """Rows a second over the whole run: what the static plan is made for."""
        return {m.name: m.rows * self.times_s[m.name].size / self.seconds for m in self.models}

    def minute_rates(self, minute: int) -> dict[str, float]:
        """Rows a second of one minute, as they will come."""
        begin, end = minute * self.minute_s, (minute + 1) * self.minute_s
        counts = {m.name: np.searchsorted(self.times_s[m.name], (begin, end)) for m in self.models}
        return {m.name: m.rows * int(np.diff(counts[m.name])[0]) / self.minute_s for m in self.models}


def make_script(
    minutes: int, minute_s: float, scale: float = 1.0, models: Sequence[StudyModel] = MODELS
) -> Script:
    """The script of the study. Errors: InputError where the trace cannot be read."""
    trace_us = parse_trace(TRACE.read_text(encoding="utf-8"), str(TRACE))
    times = {
        model.name: warped(
            np.asarray(trace_us, np.float64),
            [scale * rate / model.rows for rate in model.per_s[:minutes]],
            minute_s,
            stripe=index,
        )
        for index, model in enumerate(models)
    }
    return Script(tuple(models), minutes, minute_s, times)


def warped(trace: np.ndarray, per_s: Sequence[float], minute_s: float, stripe: int) -> np.ndarray:
    """Send times in seconds: minute k holds the next per_s[k] x minute_s requests of the trace, turned to its
    stripe and repeated, with the stretch of time that they took laid over the minute."""
    mean_gap = float(trace[-1]) / (trace.size - 1)
    start = int(trace.size * ((stripe * GOLDEN) % 1.0))
    span = float(trace[-1]) + mean_gap
    turned = np.concatenate([trace[start:] - trace[start], trace[:start] + span - trace[start]])
    counts = [round(rate * minute_s) for rate in per_s]
    turns = sum(counts) // trace.size + 2
    whole = np.concatenate([turned + turn * span for turn in range(turns)])
    pieces, first = [], 0
    for minute, count in enumerate(counts):
        piece = whole[first : first + count + 1]  # the next one's time ends the stretch
        pieces.append((minute + (piece[:-1] - piece[0]) / (piece[-1] - piece[0])) * minute_s)
        first += count
    return np.concatenate(pieces)
