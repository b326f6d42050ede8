"""perf/reports/h100/README.md and its plots, from compare.json (and dataplane.json beside it) alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare.alternatives import ALTERNATIVES
from compare.summary import (
    OURS,
    Result,
    by_cell,
    fraction_of_ideal,
    policies_of,
    prediction_error,
    predictions,
    ratio,
    targets,
    time_to_find_s,
)

STAGES = ("wait_grant", "gather", "run", "respond")
FAR_OFF = 0.1  # of a prediction
MET = {True: "yes", False: "**no**", None: "not measured"}
METHOD = """\
Peak: the largest total rate at which every model keeps 99% of its requests within its SLO, found by
bracketing and bisecting with a trial of {seconds:g} s a rate; the mean over the repeats. Failures are misses.
SLO: at the client, the cell's factor times the latency of a lone batch-1 request with all of the GPU (below).
Load: a perf_analyzer a model over gRPC, open loop, the same arrival seeds for every alternative ({seed} and
up, one a repeat). Images travel as 8 bits a channel and BERT answers with its first token's state, so that
clients and network take a small part of a request. All alternatives run the same backend with CUDA graphs
and the pipeline, batches of up to 32 (planned sizes where shares are planned). The servers of a cell are up
together; all but the one that is measured are idle. Moments in which the machine itself stalls
(compare/stalls.py) are left out, requests in time and late alike; "left out" is their share of the trial. No
alternative rejects late requests.

(g) shares one Python interpreter between the models' threads, which Triton's own onnxruntime backend would
not; (f) has 100 units of one resource and each model takes its GPU% of them while it runs. Fairness: Jain's
index of the shares of their offered rates that the models were answered while load came. Ideal:
`ideal_corun`, the bound by column generation over the measured profiles and co-runs. A cell with trace
arrivals replays the timing of Azure's LLM inference trace of 2023, striped over the models; its peak is the
mean rate at which the whole trace would pass."""


def write(document: Mapping[str, Any], directory: Path) -> Path:
    """README.md and the plots into `directory`; the path of the README."""
    cells = by_cell(document)
    gpu = document["gpu"]
    lines = [
        "# D-STACK against the alternatives, measured",
        "",
        f"Made by `{document['command']}` at commit {document['commit']}, {document['date']}, on "
        f"{gpu['name'] or 'no GPU'} (driver {gpu['driver'] or '-'}), "
        + ", ".join(f"{name} {version}" for name, version in sorted(document["versions"].items()))
        + ". Raw figures: compare.json.",
        "",
        *METHOD.format(seconds=document["seconds"], seed=document["seed"]).splitlines(),
        "",
        "## Targets",
        "",
        *table(("target (D-STACK's peak over the other's, where nothing else is said)", "measured", "met"),
               ([t.text, t.measured, MET[t.met]] for t in targets(document))),
        "",
        "## Peaks, requests/s",
        "",
        *peaks_table(document),
        "",
        *table(("cell", *(f"D-STACK / {name}" for name in policies_of(document) if name != OURS),
                "fraction of the ideal"), ratio_rows(document)),
        "",
        "## At the peak",
        "",
        *table(("cell", "alternative", "peak/s", "repeats", "spread", "SM activity", "occupancy", "DRAM",
                "GPU% granted", "W", "mJ a request", "fairness", "at 1.5x", "left out"),
               at_peak_rows(document)),
        "",
        *latency_section(cells),
        *stages_section(cells),
        *variants_section(document, cells),
        *simulator_section(cells),
        *learned_section(document),
        *static_section(document, cells),
        *data_plane_section(directory),
        *solo_section(document),
        *pictures(cells, directory),
        *runs_section(document),
    ]  # fmt: skip
    path = directory / "README.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(head) + " |",
        "| --- |" + " --- |" * (len(head) - 1),
        *("| " + " | ".join(str(value) for value in row) + " |" for row in rows),
    ]


def number(value: float | None, form: str = ".0f") -> str:
    """A table cell; empty where nothing is known."""
    return "" if value is None else format(value, form)


def peaks_table(document: Mapping[str, Any]) -> list[str]:
    """Peak of every alternative in every cell, the best in bold."""
    policies = policies_of(document)
    rows = []
    for key, cell in by_cell(document).items():
        peaks = [cell[name]["peak_per_s"] if name in cell else None for name in policies]
        best = max((peak for peak in peaks if peak is not None), default=None)
        shown = [f"**{p:.0f}**" if p is not None and p == best else number(p) for p in peaks]
        rows.append([key, *shown, number(next(iter(cell.values()))["ideal_corun_per_s"])])
    heads = [f"({ALTERNATIVES[name].letter}) {name}" for name in policies]
    return table(("cell", *heads, "ideal"), rows)


def ratio_rows(document: Mapping[str, Any]) -> list[list[str]]:
    cells = by_cell(document)
    ideal = fraction_of_ideal(cells)
    rivals = [name for name in policies_of(document) if name != OURS]
    return [
        [key, *(number(ratio(cell, rival), ".2f") for rival in rivals), number(ideal.get(key), ".2f")]
        for key, cell in cells.items()
        if OURS in cell
    ]


def spread(result: Result) -> float | None:
    """Largest less smallest peak of the repeats, over their mean; None of fewer than two."""
    peaks = [repeat["peak_per_s"] for repeat in result["repeats"]]
    if len(peaks) < 2 or not result["peak_per_s"]:
        return None
    return float((max(peaks) - min(peaks)) / result["peak_per_s"])


def at_peak_rows(document: Mapping[str, Any]) -> Iterable[list[str]]:
    """What the GPU did at each peak. SM activity where NVML has it."""
    for each in document["cells"]:
        figures = (each["at_peak"] or {}).get("figures", {})
        gpu = figures.get("gpu", {})
        granted = gpu.get("granted_percent")
        yield [
            each["cell"], each["policy"], number(each["peak_per_s"]), str(len(each["repeats"])),
            number(spread(each), ".1%"), number(gpu.get("sm_activity"), ".0%"),
            number(gpu.get("sm_occupancy"), ".0%"), number(gpu.get("dram_bandwidth"), ".0%"),
            "" if granted is None else f"{granted:.0f}%", number(gpu.get("power_w")),
            number(figures.get("energy_mj_per_inference")), number(figures.get("jain_fairness"), ".3f"),
            number(each.get("saturated", {}).get("jain_fairness") if each.get("curve_done") else None, ".3f"),
            number(figures.get("left_out_share"), ".0%"),
        ]  # fmt: skip


def latency_section(cells: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """p50 and p99 of every model at each peak."""
    lines = ["## Latency at the peak, ms: p50 / p99 of each model", ""]
    for key, cell in cells.items():
        models = list(next(iter(cell.values()))["slo_ms"])
        slos = next(iter(cell.values()))["slo_ms"]
        rows = []
        for name, each in cell.items():
            found = (each["at_peak"] or {}).get("figures", {}).get("models", {})
            if found:
                shown = [f"{found[m]['p50_ms']:.1f} / {found[m]['p99_ms']:.1f}" for m in models]
                rows.append([name, number(each["at_peak"]["rate_per_s"]), *shown])
        lines += [
            *table((key, "rate/s", *(f"{m} (SLO {slos[m]:.1f})" for m in models)), rows), ""
        ]  # fmt: skip
    return lines


def stages_section(cells: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """Where a batch of each model spends its time, at each peak."""
    lines: list[str] = []
    for key, cell in cells.items():
        models = list(next(iter(cell.values()))["slo_ms"])
        rows = []
        for name, each in cell.items():
            found = (each["at_peak"] or {}).get("figures", {}).get("stages_ms", {})
            if found:
                shown = [" / ".join(number(found.get(m, {}).get(s), ".1f") for s in STAGES) for m in models]
                rows.append([name, number(each["at_peak"]["rate_per_s"]), *shown])
        if rows:
            lines += [*table((key, "rate/s", *models), rows), ""]
    head = f"## Where a batch spends its time at the peak, ms on average: {' / '.join(STAGES)}"
    return [head, "", *lines] if lines else []


def variants_section(document: Mapping[str, Any], cells: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """Variants beside what they are variants of."""
    rows = []
    for name in policies_of(document, variants=True):
        for key, cell in cells.items():
            if name in cell:
                origin = cell[name]["variant_of"]
                rows.append(
                    [key, name, number(cell[name]["peak_per_s"]),
                     number(cell[origin]["peak_per_s"]) if origin in cell else "",
                     number(ratio(cell, origin, name), ".2f")]
                )  # fmt: skip
    if not rows:
        return []
    return ["## Variants", "", *table(("cell", "variant", "peak/s", "its origin's", "ratio"), rows), ""]


def simulator_section(cells: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """Predicted against measured peaks, and where they part."""
    found = predictions(cells)
    if not found:
        return []
    off = prediction_error(found)
    far = [
        f"{key} {policy} ({a / b - 1:+.0%})" for (key, policy), (a, b) in found.items()
        if abs(a / b - 1) > FAR_OFF
    ]  # fmt: skip
    rows = [[key, policy, number(a), number(b), f"{a / b:.2f}"] for (key, policy), (a, b) in found.items()]
    return [
        "## The simulator's prediction", "",
        f"Median error {off:.1%}. Off by more than 10%: {', '.join(far) or 'nowhere'}.", "",
        *table(("cell", "alternative", "predicted/s", "measured/s", "ratio"), rows), "",
    ]  # fmt: skip


def learned_section(document: Mapping[str, Any]) -> list[str]:
    """What service has shown of the profiles, cell by cell."""
    rows = [
        [key, network, f"{each['scale']:.2f}", len(each["points"]), f"{known['seconds']:.0f}"]
        for key, known in document.get("learned", {}).items()
        for network, each in known["corrections"].items()
    ]
    if not rows:
        return []
    return [
        "## What D-STACK learned of the profiles in service", "",
        "Run times over the profile's, the slowdown by co-runners taken out, as the controller of",
        "`dstackctl run` finds them (decisions/0091); the plan behind the peaks is made with them.", "",
        *table(("cell", "network", "scale", "points replaced", "s, reloads included"), rows), "",
    ]  # fmt: skip


def static_section(document: Mapping[str, Any], cells: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """What the search for the best fixed shares tried."""
    lines: list[str] = []
    for key, search in document.get("static_searches", {}).items():
        found_s = time_to_find_s(document, cells, key)
        beside = f"; D-STACK learned and planned for {found_s:.1f} s at most" if found_s else ""
        tried = [
            [each["shares"], number(each["held_per_s"] or None), number(each["failed_at_per_s"])]
            for each in search["tried"]
        ]
        lines += [
            f"## Best static, {key}", "",
            f"{len(tried)} candidates in {search['search_s']:.0f} s{beside}. Best: {search['best']}. The "
            + ("search is complete." if search["complete"] else "search was cut short."), "",
            *table(("candidate", "held, /s", "failed at, /s"), tried), "",
        ]  # fmt: skip
    return lines


def data_plane_section(directory: Path) -> list[str]:
    """What CUDA graphs add to every alternative, from the data-plane study."""
    path = directory / "dataplane.json"
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    models = document.get("parts", {}).get("graphs", {}).get("models", {})
    rows = [
        [model, batch, number(each["with_rows_per_s"]), number(each["without_rows_per_s"]),
         number(each["speed_up"], ".2f")]
        for model, batches in models.items() for batch, each in batches.items()
    ]  # fmt: skip
    if not rows:
        return []
    return [
        "## What the data plane adds", "",
        "Every alternative above has it. From `make perf-h100-dataplane`, one model at a time.",
        "", *table(("model", "client batch", "with CUDA graphs, rows/s", "without", "ratio"), rows), "",
    ]  # fmt: skip


def solo_section(document: Mapping[str, Any]) -> list[str]:
    rows = [[name, f"{ms:.2f}"] for name, ms in sorted(document["solo_ms"].items())]
    return ["## A lone batch-1 request at the client", "", *table(("model", "ms, p50"), rows), ""]


def pictures(cells: Mapping[str, Mapping[str, Result]], directory: Path) -> list[str]:
    """The plots of every cell, drawn now; none without matplotlib (--predict draws them later, elsewhere)."""
    try:
        from compare import plots
    except ImportError:
        return ["No matplotlib here, no pictures.", ""]
    lines = ["## Pictures", ""]
    for key, cell in cells.items():
        known = {name: each for name, each in cell.items() if each["goodput_curve"]}
        if not known:
            continue
        drawn = [plots.goodput(key, known, directory), plots.latencies(key, known, directory),
                 plots.timelines(key, known, directory)]  # fmt: skip
        lines += [f"![{path.stem}]({path.name})" for path in drawn if path is not None]
    return [*lines, ""]


def runs_section(document: Mapping[str, Any]) -> list[str]:
    """How the figures came about, run by run, and what went wrong."""
    rows = [[each["date"], each["commit"], f"`{' '.join(each['arguments'])}`"] for each in document["runs"]]
    lines = ["## Runs", "", *table(("started", "commit", "perf/h100_compare.py"), rows), ""]
    if document["problems"]:
        lines += ["Problems:", "", *(f"- {each}" for each in document["problems"]), ""]
    return lines
