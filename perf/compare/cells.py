"""What is compared: mixes of models, their SLOs, how the rates are split, how requests arrive."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dstack_sched.app.bench import Arrivals, poisson
from dstack_sched.domain.workload import ModelDemand, OnLate, Workload
from dstack_sched.errors import InputError
from dstack_sched.sim.arrivals import Arrivals as Trace
from dstack_sched.sim.arrivals import parse_trace

# The paper's kind of mixes, light and heavy models together. A name with "#2" is a second copy of a model.
MIXES: dict[str, tuple[str, ...]] = {
    "C-2": ("resnet50", "bert_base"),
    "C-3": ("mobilenet_v2", "resnet50", "bert_base"),
    "C-4": ("mobilenet_v2", "resnet50", "bert_base", "vgg19"),
    "C-7": ("alexnet", "mobilenet_v2", "resnet50", "vgg19", "inception_v3", "resnext50", "bert_base"),
    "C-12": (
        "alexnet", "mobilenet_v2", "resnet50", "vgg19", "inception_v3", "resnext50", "bert_base",
        "shufflenet_v2", "mobilenet_v2#2", "resnet50#2", "bert_base#2", "shufflenet_v2#2",
    ),
}  # fmt: skip
SKEW = 3.0  # skewed rates: the first model gets this many times the rate of the last, geometric between
RATES = ("equal", "skewed")
# Azure's LLM inference trace of 2023, its timing alone. A GPU host gets no ../shared: $DSTACK_TRACE names it.
TRACE_VARIABLE = "DSTACK_TRACE"
TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "azure_llm_2023_conv.csv"
ARRIVALS = ("poisson", "trace")


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison. `key` names it in compare.json and on the command line: C-4:5:equal:poisson."""

    mix: str
    slo_factor: float
    rates: str = "equal"
    arrivals: str = "poisson"

    @property
    def key(self) -> str:
        return f"{self.mix}:{self.slo_factor:g}:{self.rates}:{self.arrivals}"

    @property
    def models(self) -> tuple[str, ...]:
        return MIXES[self.mix]

    @classmethod
    def parse(cls, text: str) -> Cell:
        """From MIX[:SLO_FACTOR[:RATES[:ARRIVALS]]]. Errors: InputError that names the part."""
        parts = text.split(":")
        mix = parts[0]
        if mix not in MIXES:
            raise InputError(f"cell {text!r}: no mix {mix!r}; there are {', '.join(MIXES)}")
        try:
            factor = float(parts[1]) if len(parts) > 1 else 5.0
        except ValueError:
            raise InputError(f"cell {text!r}: {parts[1]!r} is no number; an SLO factor is wanted") from None
        rates = parts[2] if len(parts) > 2 else "equal"
        arrivals = parts[3] if len(parts) > 3 else "poisson"
        if factor <= 0 or rates not in RATES or arrivals not in ARRIVALS or len(parts) > 4:
            raise InputError(f"cell {text!r}: MIX:SLO_FACTOR:equal|skewed:poisson|trace is wanted")
        return cls(mix, factor, rates, arrivals)

    def shares_of_rate(self) -> dict[str, float]:
        """Model -> its share of the total rate; they sum to 1."""
        count = len(self.models)
        weights = [
            1.0 if self.rates == "equal" or count == 1 else SKEW ** (1.0 - place / (count - 1))
            for place in range(count)
        ]
        return {model: weight / sum(weights) for model, weight in zip(self.models, weights, strict=True)}

    def workload(self, solo_ms: Mapping[str, float], total_per_s: float, on_late: OnLate) -> Workload:
        """The demands at a total rate. solo_ms: latency at the client of a lone batch-1 request, by model."""
        shares = self.shares_of_rate()
        return Workload(
            tuple(
                ModelDemand(
                    model,
                    round(self.slo_factor * solo_ms[model], 3),
                    total_per_s * shares[model],
                    1.0,
                    on_late,
                )
                for model in self.models
            )
        )


def trace() -> Trace:
    """The recorded arrivals. Errors: InputError where the file is not there."""
    path = Path(os.environ.get(TRACE_VARIABLE, TRACE))
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; name the trace's file in ${TRACE_VARIABLE}, or leave trace cells out"
        ) from None
    return Trace("trace", trace_us=parse_trace(text, str(path)))


def arrivals_of(cell: Cell, repeat: int) -> Arrivals:
    """How the requests of a cell come in its repeat 0, 1, ... The trace is striped over the models, each
    starts elsewhere in it, and in each repeat all start elsewhere again."""
    if cell.arrivals == "poisson":
        return poisson
    recorded, models = trace(), cell.models

    def replay(
        demand: ModelDemand, rate_per_s: float, duration_s: float, rng: np.random.Generator
    ) -> np.ndarray:
        stripe = models.index(demand.name) + repeat * len(models)
        return recorded.times(rate_per_s, round(duration_s * 1e6), rng, stripe) / 1e6

    return replay


def network_of(model: str) -> str:
    """The network behind a name: that of a copy ("resnet50#2") is its model's."""
    return model.split("#")[0]


def served_name(model: str) -> str:
    """The name that a model has at Triton."""
    return model.replace("#", "_")


def file_of(model: str) -> str:
    """The exported file behind a name: images of 8 bits a channel, as services get them, so that clients and
    network take a small part of each request. (Several perf_analyzers cannot use shared memory at once: each
    clears the server's table of regions when it ends.)"""
    network = network_of(model)
    return f"{network}_cls" if network == "bert_base" else f"{network}_u8"


def names_to(table: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: a list by comma."""

    def parse(text: str) -> list[Any]:
        try:
            return [table(part) for part in text.split(",") if part]
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


# Headline cells first: a run that is cut short has these.
CELLS = tuple(
    Cell.parse(text)
    for text in (
        "C-4:5", "C-7:5", "C-4:3", "C-7:3", "C-2:5", "C-3:5", "C-4:12", "C-7:12", "C-12:5", "C-4:5:skewed",
        "C-7:5:equal:trace", "C-2:3", "C-3:3", "C-2:12", "C-3:12", "C-12:12", "C-4:5:equal:trace",
        "C-7:5:skewed",
    )
)  # fmt: skip
HEADLINE = CELLS[:2]
