"""The comparison's pictures, from compare.json alone: goodput, latencies, who ran when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from compare.summary import OURS, Result
from compare.traces import CDF_PERCENTS

TIMELINES = (OURS, "time-sliced")
DPI = 100


def goodput(key: str, cell: Mapping[str, Result], directory: Path) -> Path:
    """Requests answered within their SLO against those offered."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for name, each in sorted(cell.items(), key=lambda item: item[1]["letter"]):
        curve = each["goodput_curve"]
        axes.plot(
            [p["offered_per_s"] for p in curve], [p["goodput_per_s"] for p in curve], "o-", ms=3,
            lw=2.2 if name == OURS else 1.0, label=f"({each['letter']}) {name}",
        )  # fmt: skip
    limit = max((p["offered_per_s"] for each in cell.values() for p in each["goodput_curve"]), default=1.0)
    axes.plot([0, limit], [0, limit], color="0.8", lw=1, zorder=0)
    axes.set(xlabel="offered requests/s", ylabel="answered within their SLO, /s", title=key)
    axes.legend(fontsize=7)
    return _save(figure, directory / f"goodput_{_file(key)}.png")


def latencies(key: str, cell: Mapping[str, Result], directory: Path) -> Path | None:
    """Latency over SLO, of each model at the peak of D-STACK and of time-slicing."""
    shown = [name for name in TIMELINES if name in cell and cell[name]["at_peak"]]
    if not shown:
        return None
    figure, all_axes = plt.subplots(
        1, len(shown), figsize=(4.6 * len(shown), 3.6), sharey=True, squeeze=False
    )
    for axes, name in zip(all_axes[0], shown, strict=True):
        result = cell[name]
        for model, each in result["at_peak"]["figures"]["models"].items():
            over = np.asarray(each["cdf_ms"]) / result["slo_ms"][model]
            axes.plot(over, np.asarray(CDF_PERCENTS) / 100.0, label=model)
        axes.axvline(1.0, color="0.6", lw=1)
        axes.set(xlabel="latency / SLO", title=f"{name} at {result['at_peak']['rate_per_s']:.0f}/s",
                 xlim=(0, 1.5))  # fmt: skip
        axes.legend(fontsize=6)
    all_axes[0][0].set_ylabel("share of requests")
    figure.suptitle(key, fontsize=9)
    return _save(figure, directory / f"latency_{_file(key)}.png")


def timelines(key: str, cell: Mapping[str, Result], directory: Path) -> Path | None:
    """Requests under way at the peak, model by model, and what was granted where somebody grants."""
    panels: list[tuple[str, str, Any]] = []
    for name in TIMELINES:
        line = (cell.get(name, {}).get("at_peak") or {}).get("figures", {}).get("timeline")
        if not line:
            continue
        if line["batches"]:
            panels.append((f"{name}: GPU% granted to batches", "batches", line))
        panels.append((f"{name}: requests at client and server", "requests", line))
    if not panels:
        return None
    figure, all_axes = plt.subplots(len(panels), 1, figsize=(9.0, 1.0 + 1.8 * len(panels)), squeeze=False)
    for axes, (title, what, line) in zip(all_axes[:, 0], panels, strict=True):
        models = sorted(line["requests"])
        for place, model in enumerate(models):
            colour = f"C{place % 10}"
            if what == "requests":
                times, count = in_flight(line["requests"][model], 1e3 * line["seconds"])
                axes.step(times, count, where="post", color=colour, lw=1, label=model)
            else:
                bars = [b for b in line["batches"] if b[0] in (model, model.replace("#", "_"))]
                for _, start, end, percent, _rows in bars:
                    axes.broken_barh([(start, end - start)], (place - percent / 250, percent / 125),
                                     color=colour)  # fmt: skip
        axes.set_title(title, fontsize=8)
        axes.set_xlim(0, 1e3 * line["seconds"])
        if what == "batches":
            axes.set_yticks(range(len(models)), models, fontsize=6)
        else:
            axes.legend(fontsize=5, ncols=4)
    all_axes[-1, 0].set_xlabel("ms")
    figure.suptitle(key, fontsize=9)
    figure.tight_layout()
    return _save(figure, directory / f"timeline_{_file(key)}.png")


def in_flight(spans: list[list[float]], until_ms: float) -> tuple[list[float], list[int]]:
    """Times and how many of [start, end] are under way from then on, within [0, until_ms]."""
    steps = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    times, counts, count = [0.0], [0], 0
    for at, change in steps:
        count += change
        if at <= 0.0:
            counts[0] = count
        elif at <= until_ms:
            times.append(at)
            counts.append(count)
    return times, counts


def _file(key: str) -> str:
    return key.replace(":", "_")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return path
