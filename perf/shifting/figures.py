"""What came of it: attainment, goodput, reloads, minute by minute; and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shifting.open_loop import ANSWERED, FAILED, PENDING, REFUSED
from shifting.scenario import Script, StudyModel

COLOURS = {"static": "#888888", "adaptive": "#1f77b4", "oracle": "#2ca02c"}


def figures(
    script: Script, sent: Mapping[str, np.ndarray], decisions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One policy. attainment: rows answered within their SLO over all rows sent, refused and failed included;
    goodput: those rows a second; lost: requests that failed for any reason but a refusal."""
    models = {model.name: of_model(script, model, sent) for model in script.models}
    rows = sum(each["rows"] for each in models.values())
    good = sum(each["good_rows"] for each in models.values())
    loads = [entry for entry in decisions if entry.get("what") == "applied"]
    first = loads[:1]
    return {
        "attainment": good / rows,
        "goodput_rows_per_s": good / script.seconds,
        "worst_model_attainment": min(each["attainment"] for each in models.values()),
        "lost_requests": sum(each["failed"] for each in models.values()),
        "reloads": sum(int(entry.get("loads", 0)) for entry in loads[1:]),
        "rounds_applied": len(loads) - len(first),
        "plans_told_without_a_load": sum(int(entry.get("loads", 0)) == 0 for entry in loads[1:]),
        "first_plan": first[0]["plan"] if first else None,
        "minute_attainment": minutes(script, sent),
        "models": models,
        "decisions": [compact(entry) for entry in decisions if entry.get("what") != "kept"],
        "kept": sum(entry.get("what") == "kept" for entry in decisions),
    }


def of_model(script: Script, model: StudyModel, sent: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The figures of one model."""
    outcome, latency_ms = sent[f"{model.name}.outcome"], sent[f"{model.name}.latency_ms"]
    good = in_time(model, sent)
    answered = latency_ms[outcome == ANSWERED]
    lag_ms = (sent[f"{model.name}.sent_s"] - script.times_s[model.name]) * 1e3
    return {
        "requests": int(outcome.size),
        "rows": int(outcome.size) * model.rows,
        "good_rows": int(good.sum()) * model.rows,
        "attainment": float(good.mean()),
        "refused": int((outcome == REFUSED).sum()),
        "failed": int(((outcome == FAILED) | (outcome == PENDING)).sum()),
        "latency_ms_p50": percentile(answered, 50),
        "latency_ms_p99": percentile(answered, 99),
        "send_lag_ms_p99": percentile(lag_ms, 99),
        "minute_attainment": [
            round(float(good[here].mean()), 4) if here.any() else None for here in by_minute(script, model)
        ],
    }


def in_time(model: StudyModel, sent: Mapping[str, np.ndarray]) -> np.ndarray:
    return (sent[f"{model.name}.outcome"] == ANSWERED) & (sent[f"{model.name}.latency_ms"] <= model.slo_ms)


def by_minute(script: Script, model: StudyModel) -> list[np.ndarray]:
    minute = (script.times_s[model.name] / script.minute_s).astype(int)
    return [minute == k for k in range(script.minutes)]


def minutes(script: Script, sent: Mapping[str, np.ndarray]) -> list[float]:
    """Attainment of all rows, minute by minute."""
    found = []
    for k in range(script.minutes):
        good = rows = 0
        for model in script.models:
            here = by_minute(script, model)[k]
            good += int(in_time(model, sent)[here].sum()) * model.rows
            rows += int(here.sum()) * model.rows
        found.append(round(good / rows, 4))
    return found


def percentile(values: np.ndarray, percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 3) if values.size else None


def compact(entry: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("time_s", "what", "cause", "reason", "loads", "headroom", "rates", "plan")
    return {key: entry[key] for key in keys if key in entry}


def plot(script: Script, results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Rates asked for above, attainment of each policy by minute below, reloads as marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 6.5), sharex=True, height_ratios=(1, 1.4))
    edges = np.arange(script.minutes + 1)
    for model in script.models:
        rates = [
            script.minute_rates(k)[model.name] / max(script.mean_rates()[model.name], 1e-9)
            for k in edges[:-1]
        ]
        above.stairs(
            rates, edges, label=f"{model.name} ({script.mean_rates()[model.name]:.0f} rows/s mean)", lw=1.8
        )
    above.set_ylabel("rate over its mean")
    above.legend(fontsize=8, ncols=3, loc="upper center")
    above.set_ylim(0, None)
    for name, result in results.items():
        colour = COLOURS.get(name)
        label = (
            f"{name}: {result['attainment']:.1%} in time, {result['goodput_rows_per_s']:.0f} rows/s, "
            f"{result['reloads']} reloads"
        )
        below.stairs(
            100 * np.array(result["minute_attainment"]),
            edges,
            label=label,
            color=colour,
            lw=1.8,
            baseline=None,
        )
    below.set_ylabel("rows within their SLO, %")
    below.set_xlabel("minute")
    below.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
