"""perf/reports/h100/README.md and its plots, from compare.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare.alternatives import ALTERNATIVES

OURS = "dstack"
GPU_FIGURES = ("sm_activity", "sm_occupancy", "dram_bandwidth")
FREE_RIVALS = ("mps-default", "mps-static", "rate-limiter", "one-process")  # (c), (d), (f), (g)


def by_cell(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """cell -> policy -> result."""
    cells: dict[str, dict[str, Mapping[str, Any]]] = {}
    for each in results:
        cells.setdefault(each["cell"], {})[each["policy"]] = each
    return cells


def ratio(cell: Mapping[str, Mapping[str, Any]], rival: str) -> float | None:
    """Our peak over a rival's; None where one is missing."""
    if OURS not in cell or rival not in cell or not cell[rival]["peak_per_s"]:
        return None
    return float(cell[OURS]["peak_per_s"] / cell[rival]["peak_per_s"])


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that the issue has targets for."""
    cells = by_cell(document["cells"])
    against_best = {
        key: min(found)
        for key, cell in cells.items()
        if (found := [r for rival in FREE_RIVALS if (r := ratio(cell, rival)) is not None])
    }
    against = {
        rival: {key: round(r, 3) for key, cell in cells.items() if (r := ratio(cell, rival)) is not None}
        for rival in ALTERNATIVES
        if rival != OURS
    }
    ideal = {
        key: round(cell[OURS]["peak_per_s"] / cell[OURS]["ideal_corun_per_s"], 3)
        for key, cell in cells.items()
        if OURS in cell and cell[OURS]["ideal_corun_per_s"]
    }
    predicted = {
        f"{key} {policy}": round(each["predicted_peak_per_s"] / each["peak_per_s"], 3)
        for key, cell in cells.items()
        for policy, each in cell.items()
        if each.get("predicted_peak_per_s") and each["peak_per_s"]
    }
    return {
        "against": against,
        "against_best_free": {key: round(value, 3) for key, value in against_best.items()},
        "against_best_free_median": median_of(against_best.values()),
        "fraction_of_ideal": ideal,
        "predicted_over_measured": predicted,
        "prediction_error_median": median_of(abs(value - 1) for value in predicted.values()),
    }


def median_of(values: Iterable[float]) -> float | None:
    """None of nothing."""
    known = list(values)
    return round(statistics.median(known), 3) if known else None


def peaks_table(document: Mapping[str, Any]) -> list[str]:
    """Peak of every alternative in every cell."""
    policies = [name for name in ALTERNATIVES if any(e["policy"] == name for e in document["cells"])]
    lines = [
        "| cell | " + " | ".join(f"({ALTERNATIVES[name].letter}) {name}" for name in policies) + " | ideal |",
        "| --- |" + " --- |" * (len(policies) + 1),
    ]
    for key, cell in by_cell(document["cells"]).items():
        peaks = [cell[name]["peak_per_s"] if name in cell else None for name in policies]
        best = max(peak for peak in peaks if peak is not None)
        shown = ["" if p is None else f"**{p:.0f}**" if p == best else f"{p:.0f}" for p in peaks]
        ideal = next(iter(cell.values()))["ideal_corun_per_s"]
        lines.append(f"| {key} | " + " | ".join(shown) + f" | {ideal:.0f} |")
    return lines


def at_peak_table(document: Mapping[str, Any]) -> list[str]:
    """What the GPU did at each peak."""
    lines = [
        "| cell | alternative | peak/s | SM activity | occupancy | DRAM | W | mJ each | fairness | spread |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in document["cells"]:
        figures = (each["at_peak"] or {}).get("figures", {})
        gpu = figures.get("gpu", {})
        peaks = [repeat["peak_per_s"] for repeat in each["repeats"]]
        spread = f"{(max(peaks) - min(peaks)) / each['peak_per_s']:.1%}" if len(peaks) > 1 else ""
        lines.append(
            f"| {each['cell']} | {each['policy']} | {each['peak_per_s']:.0f} | "
            + " | ".join(shown(gpu.get(key), percent=True) for key in GPU_FIGURES)
            + f" | {shown(gpu.get('power_w'))} | {shown(figures.get('energy_mj_per_inference'))}"
            f" | {figures.get('jain_fairness', '')} | {spread} |"
        )  # fmt: skip
    return lines


def shown(value: float | None, *, percent: bool = False) -> str:
    """A table cell."""
    if value is None:
        return ""
    return f"{value:.0%}" if percent else f"{value:.0f}"


def plot_curves(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """Goodput against offered load, a picture a cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for key, cell in by_cell(document["cells"]).items():
        figure, axes = plt.subplots(figsize=(6.4, 4.0))
        for name, each in cell.items():
            curve: Sequence[Mapping[str, float]] = each["goodput_curve"]
            axes.plot(
                [p["offered_per_s"] for p in curve], [p["goodput_per_s"] for p in curve], "o-", ms=3,
                lw=2.2 if name == OURS else 1.0, label=f"({each['letter']}) {name}",
            )  # fmt: skip
        limit = max(p["offered_per_s"] for each in cell.values() for p in each["goodput_curve"])
        axes.plot([0, limit], [0, limit], color="0.8", lw=1, zorder=0)
        axes.set(xlabel="offered requests/s", ylabel="answered within their SLO, /s", title=key)
        axes.legend(fontsize=7)
        path = directory / f"goodput_{key.replace(':', '_')}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def write(document: Mapping[str, Any], directory: Path) -> Path:
    """README.md and the plots into `directory`; the path of the README."""
    plots = plot_curves(document, directory)
    figures = summary(document)
    lines = [
        "# D-STACK against the alternatives, measured",
        "",
        f"Made by `{document['command']}` at commit {document['commit']}, {document['date']}.",
        "Raw figures: compare.json.",
        "",
        "Peak: largest total rate at which every model keeps 99% of its requests within its SLO.",
        "SLO: at the client; the cell's factor times the latency of a lone batch-1 request.",
        "",
        *peaks_table(document),
        "",
        *at_peak_table(document),
        "",
        "D-STACK's peak over that of each alternative, by cell:",
        "",
        *(f"- {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in cells.items())
          for name, cells in figures["against"].items() if cells),
        f"- best of (c), (d), (f), (g): median {figures['against_best_free_median']}",
        "",
        "Fraction of the ideal: " + ", ".join(f"{k} {v}" for k, v in figures["fraction_of_ideal"].items()),
        "",
        f"Simulator against measurement: median error of the peak {figures['prediction_error_median']}.",
        "",
        *(f"![{path.stem}]({path.name})" for path in plots),
    ]  # fmt: skip
    path = directory / "README.md"
    path.write_text("\n".join(lines) + "\n")
    return path
