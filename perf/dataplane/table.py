"""The figures of the report from what the parts found, and the table beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dataplane.study import COMMAND, Study

# What issue 5 asks for. Throughput: served over raw, at least. Overhead: ms at most.
SERVED_WANTED = {"resnet50": 0.90, "bert_base": 0.90, "vgg19": 0.90, "mobilenet_v2": 0.80}
CUDA_WANTED = 0.95
OVERHEAD_WANTED_MS = {"resnet50": 0.4, "mobilenet_v2": 0.4}
LEVEL_SWITCH_WANTED_MS = 2.0
EQUAL_WITHIN = 0.05
RAW_MODES = ("device", "copies", "pauses")
LEAK_SLACK_BYTES = 16 << 20  # of allocators; a leak of 200 KiB a cycle would show over 100


def figures(study: Study) -> dict[str, Any]:
    """The keys that issue 5 names, null where their part has not run or failed; whether targets are met."""
    found = {
        "served_over_raw": served_over_raw(study),
        "overhead_ms_p50": overhead_ms(study),
        "cuda_graphs": study.result("graphs").get("models"),
        "level_switch_ms_p50": section(study, "switch").get("started_ms_p50"),
        "reload_s_p50": reload_s(study),
        "leak": leak(study),
        "mps_recovery_s": mps_recovery_s(study),
        "raw": "onnxruntime loop with I/O binding on device buffers and a CUDA graph, in its own process,"
        " without copies between host and device and in the faster layout (with copies: parts.raw)",
        "cuda_shared_memory_over_raw": cuda_over_raw(study),
    }
    return {**found, "targets": targets(study, found)}


def raw_row(row: Mapping[str, Any], mode: str = "device") -> Mapping[str, Any]:
    """The raw loop's figures that a model's row of a part is compared with."""
    found: Mapping[str, Any] = row.get("raw", {}).get(mode, {})
    return found


def served_over_raw(study: Study) -> dict[str, float] | None:
    """Best throughput of clients that send 16 rows a request, over the raw loop's at batch 16."""
    ratios = {}
    for model, row in study.result("served").get("models", {}).items():
        raw = raw_row(row).get("rows_per_s")
        if raw:
            ratios[model] = round(row["client_batch_16"]["best"]["rows_per_s"] / raw, 4)
    return ratios or None


def cuda_over_raw(study: Study) -> dict[str, float] | None:
    """The same with clients whose tensors are in CUDA shared memory."""
    ratios = {}
    for model, row in study.result("served").get("models", {}).items():
        raw = raw_row(row).get("rows_per_s")
        best = row.get("cuda_shared_memory", {}).get("best")
        if raw and best and row["cuda_shared_memory"]["memory"] == "cuda":
            ratios[model] = round(best["rows_per_s"] / raw, 4)
    return ratios or None


def overhead_ms(study: Study) -> dict[str, float] | None:
    """Median latency of one client with one row, less that of the raw loop."""
    found = {}
    for model, row in study.result("overhead").get("models", {}).items():
        raw = raw_row(row).get("latency_ms_p50")
        if raw:
            found[model] = round(row["latency_ms_p50"] - raw, 4)
    return found or None


def section(study: Study, name: str) -> dict[str, Any]:
    found: dict[str, Any] = study.result("levels").get(name, {})
    return {} if "error" in found else found


def reload_s(study: Study) -> float | None:
    """Of all reloads of all models."""
    taken = sorted(each for row in section(study, "reload").values() for each in row["reload_s"])
    return taken[len(taken) // 2] if taken else None


def leak(study: Study) -> dict[str, Any] | None:
    found = study.result("leak")
    wanted = ("cycles", "device_bytes", "host_bytes", "open_files", "threads", "shared_memory_bytes")
    wanted += ("device_bytes_per_cycle", "host_bytes_per_cycle")
    return {key: found[key] for key in wanted} if found else None


def mps_recovery_s(study: Study) -> float | None:
    """Of the scenario in which the daemon and its server are killed."""
    found = study.result("mps").get("scenarios", {}).get("daemon", {})
    recovery: float | None = found.get("recovery_s")
    return recovery


def targets(study: Study, found: Mapping[str, Any]) -> dict[str, bool]:
    """By target: whether it is met. Those whose part has not run are left out."""
    met: dict[str, bool] = {}
    for model, ratio in (found["served_over_raw"] or {}).items():
        if model in SERVED_WANTED:
            wanted = SERVED_WANTED[model]
            met[f"{model}: served over raw >= {wanted:g}"] = ratio >= wanted
    for model, ratio in (found["cuda_shared_memory_over_raw"] or {}).items():
        met[f"{model}: CUDA shared memory over raw >= {CUDA_WANTED:g}"] = ratio >= CUDA_WANTED
    for model, overhead in (found["overhead_ms_p50"] or {}).items():
        if model in OVERHEAD_WANTED_MS:
            wanted = OVERHEAD_WANTED_MS[model]
            met[f"{model}: served - raw <= {wanted:g} ms at p50"] = overhead <= wanted
    for model, by_batch in (found["cuda_graphs"] or {}).items():
        met[f"{model}: outputs with and without graphs equal"] = all(
            row["outputs_equal"] for row in by_batch.values()
        )
    if found["level_switch_ms_p50"] is not None:
        met[f"level switch <= {LEVEL_SWITCH_WANTED_MS:g} ms"] = (
            found["level_switch_ms_p50"] <= LEVEL_SWITCH_WANTED_MS
        )
    for level, ratio in section(study, "alone").get("level_over_mps", {}).items():
        met[f"level {level}: throughput within 5% of MPS at equal SMs"] = ratio >= 1 - EQUAL_WITHIN
    instances = study.result("instances")
    if instances:
        met[f"{sum(instances['instances'].values())} instances load, serve, unload"] = bool(
            instances["all_served"] and not instances["processes_left"]
        )
    if found["leak"]:
        met[f"{found['leak']['cycles']} load/unload cycles leave memory as it was"] = all(
            found["leak"][key] <= LEAK_SLACK_BYTES for key in ("device_bytes", "host_bytes")
        )
    levelled = study.result("leak").get("with_levels")
    if levelled:
        met[f"{levelled['cycles']} cycles with levels leave memory as it was"] = all(
            levelled[key] <= LEAK_SLACK_BYTES for key in ("device_bytes", "host_bytes")
        )
    for scenario, row in study.result("mps").get("scenarios", {}).items():
        met[f"{scenario} killed: all serving again, no wrong answer"] = bool(
            row["recovered"] and not row["wrong_answers"]
        )
    return met


def markdown(study: Study, found: Mapping[str, Any]) -> str:
    """dataplane.md."""
    lines = ["# The data plane at GPU speed", "", f"Made by `{COMMAND}`; provider {study.provider}.", ""]
    if study.provider == "cpu":
        lines += ["**A dry run on the CPU provider: no measure of speed.**", ""]
    lines += throughput_table(study, found) + overhead_table(study, found) + graphs_table(study)
    lines += levels_text(study) + endurance_text(study)
    lines += ["## Targets", ""]
    lines += [f"- {'met' if met else '**not met**'}: {target}" for target, met in found["targets"].items()]
    lines += ["", "## Problems", ""] if study.problems else []
    lines += [f"- {problem}" for problem in study.problems]
    return "\n".join(lines).rstrip() + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    head = list(head)
    body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body, ""]


def number(value: Any, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def throughput_table(study: Study, found: Mapping[str, Any]) -> list[str]:
    rows = []
    for model, row in study.result("served").get("models", {}).items():
        best, single = row["client_batch_16"]["best"], row["client_batch_1"]["best"]
        rows.append(
            [
                model,
                number(raw_row(row).get("rows_per_s")),
                number(raw_row(row, "copies").get("rows_per_s")),
                f"{best['rows_per_s']:.0f} ({best['concurrency']} x 16)",
                f"{single['rows_per_s']:.0f} ({single['concurrency']} x 1)",
                number((found["served_over_raw"] or {}).get(model), ".2f"),
                number((found["cuda_shared_memory_over_raw"] or {}).get(model), ".2f"),
                number(floor_of(study, model).get("rows_per_s_client_batch_16")),
            ]
        )
    head = ["model", "raw", "raw with copies", "served, clients of 16 rows", "served, clients of 1 row"]
    head += ["served / raw", "CUDA shm / raw", "floor, clients of 16 rows"]
    text = (
        "Rows per second at batch size 16; system shared memory clients, best concurrency in brackets. Floor:"
        " a model of the same tensors in Triton's Python backend that answers at once."
    )
    return (
        ["## Throughput at saturation", "", text, "", *table(head, rows), *stages_table(study)]
        if rows
        else []
    )


def stages_table(study: Study) -> list[str]:
    """Where a batch's time goes under clients of 16 rows."""
    found = {
        model: row["client_batch_16"].get("stages_us", {})
        for model, row in study.result("served").get("models", {}).items()
    }
    stages = sorted({stage for row in found.values() for stage in row})
    rows = [[model, *(number(row.get(stage)) for stage in stages)] for model, row in found.items()]
    text = "Stages with clients of 16 rows, means in us; they overlap from batch to batch."
    return [text, "", *table(["model", *stages], rows)] if stages else []


def floor_of(study: Study, model: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = study.result("overhead").get("models", {}).get(model, {}).get("floor", {})
    return found


def overhead_table(study: Study, found: Mapping[str, Any]) -> list[str]:
    models = study.result("overhead").get("models", {})
    stages = list(dict.fromkeys(stage for row in models.values() for stage in sorted(row["stages_us"])))
    rows = [
        [
            model,
            *(number(raw_row(row, mode).get("latency_ms_p50"), ".3f") for mode in RAW_MODES),
            number(row["latency_ms_p50"], ".3f"),
            number((found["overhead_ms_p50"] or {}).get(model), ".3f"),
            number(floor_of(study, model).get("latency_ms_p50"), ".3f"),
            number(floor_of(study, model).get("busy_latency_ms_p50"), ".3f"),
            *(number(row["stages_us"].get(stage)) for stage in stages),
        ]
        for model, row in models.items()
    ]
    head = ["model", "raw p50, ms", "raw with copies", "raw with pauses", "served p50, ms"]
    head += ["served - raw, ms", "floor p50, ms", "floor that spins", *(f"{stage}, us" for stage in stages)]
    text = (
        "One client, one row at a time; stages are means of the backend's own metrics. Raw with pauses:"
        " half a millisecond of sleep between runs, as the device idles between the requests of one client."
        " The floor that spins answers after as long as the raw run takes: served less that is our own share."
    )
    turns = [
        f"- {model}: {row['by_turns']['now_over_before']} of what the backend of an earlier commit takes"
        f" ({row['by_turns']['before_ms_p50']} and {row['by_turns']['now_ms_p50']} ms, by turns)"
        for model, row in models.items()
        if "by_turns" in row
    ]
    lines = ["## Latency of one client", "", text, "", *table(head, rows), *turns, *([""] if turns else [])]
    return lines if rows else []


def graphs_table(study: Study) -> list[str]:
    rows = [
        [
            model,
            batch,
            f"{row['with_rows_per_s']:.0f}",
            f"{row['without_rows_per_s']:.0f}",
            f"{row['speed_up']:.2f}",
            f"{row['relative_difference']:.1e}",
        ]
        for model, by_batch in study.result("graphs").get("models", {}).items()
        for batch, row in by_batch.items()
    ]
    head = ["model", "client batch", "with, rows/s", "without, rows/s", "ratio", "outputs differ by (norm)"]
    return ["## CUDA graphs", "", *table(head, rows)] if rows else []


def levels_text(study: Study) -> list[str]:
    if not study.result("levels"):
        return []
    lines = ["## GPU% by level and by reload", ""]
    switch, alone, beside = (section(study, name) for name in ("switch", "alone", "side_by_side"))
    if switch:
        lines += [
            f"- {switch['model']}: {switch['started_ms_p50']} ms (median of {switch['switches']}, largest"
            f" {switch['started_ms_max']}) from the decision until the first batch at the new GPU% began,"
            f" {switch['ended_ms_p50']} ms until it had run"
        ]
    for model, row in section(study, "reload").items():
        lines += [f"- {model}: {row['reload_s_p50']} s from the decision by a reload ({row['reload_s']})"]
    if alone:
        lines += [
            f"- {alone['model']}: device memory {alone['without_levels']['device_bytes'] / 2**20:.0f} MiB"
            f" without levels, {alone['device_bytes_with_levels'] / 2**20:.0f} MiB with"
            f" {len(alone['levels'])}, {alone['device_bytes_a_level'] / 2**20:.0f} MiB a level more"
        ]
    if beside:
        lines += [
            f"- {' and '.join(beside['models'])} side by side at half the GPU each:"
            f" {beside['levels_disjoint']['total_rows_per_s']:.0f} rows/s on disjoint SM groups,"
            f" {beside['mps_halves']['total_rows_per_s']:.0f} as MPS percentages"
        ]
    rows = [
        [
            level,
            row["sms"],
            row["rows_per_s"],
            alone["mps"].get(level, {}).get("sms", "-"),
            alone["mps"].get(level, {}).get("rows_per_s", "-"),
            number(alone["level_over_mps"].get(level), ".3f"),
        ]
        for level, row in alone.get("levels", {}).items()
    ]
    head = ["level", "SMs", "rows/s", "MPS: SMs", "rows/s", "level / MPS"]
    return [*lines, "", *(table(head, rows) if rows else [])]


def endurance_text(study: Study) -> list[str]:
    lines = []
    instances, leaked = study.result("instances"), study.result("leak")
    if instances:
        left = instances["left_behind"]
        lines += [
            f"- {sum(instances['instances'].values())} instances: loaded in"
            f" {max(instances['load_s'].values()):.1f} s, each served: {instances['all_served']}; after"
            f" unloading {instances['processes_left']} processes,"
            f" {left['device_bytes'] / 2**20:+.1f} MiB device, {left['host_bytes'] / 2**20:+.1f} MiB host"
        ]
    for each in filter(None, (leaked, leaked.get("with_levels"))):
        lines += [
            f"- {each['model']}: {each['cycles']} load/unload cycles:"
            f" {each['device_bytes'] / 2**20:+.2f} MiB device, {each['host_bytes'] / 2**20:+.2f} MiB host"
            f" ({each['host_bytes_per_cycle'] / 2**10:+.1f} KiB a cycle at the end),"
            f" {each['open_files']:+d} files, {each['threads']:+d} threads"
        ]
    loading = study.result("loading")
    if loading:
        lines += [
            f"- {loading['model']} answers {loading['first_s']} s after its first load was asked for (all"
            f" batch sizes {loading['first_all_programs_s']} s), {loading['again_s']} s"
            f" ({loading['again_all_programs_s']} s) with what the cache remembers"
        ]
    other = loading.get("conv_algo_search_default")
    if other:
        lines += [
            f"- with conv_algo_search DEFAULT {other['first_s']} and {other['again_s']} s; it serves"
            f" {other['rows_per_s_client_batch_1']:.0f} rows/s to one client and"
            f" {other['rows_per_s_client_batch_16']:.0f} to 8 clients of 16 rows, where HEURISTIC serves"
            f" {loading['rows_per_s_client_batch_1']:.0f} and {loading['rows_per_s_client_batch_16']:.0f}"
        ]
    for scenario, row in study.result("mps").get("scenarios", {}).items():
        lines += [
            f"- {scenario} killed under load: started again after {row['restarted_s']} s, all models serving"
            f" after {row['recovery_s']} s; {row['answered']} answered right, {row['failed']} failed,"
            f" {row['wrong_answers']} wrong"
        ]
    return ["## Endurance", "", *lines, ""] if lines else []
