"""A status on the screen: lines for the parts, a table of models, a table of stages, decisions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dstack_sched.app.status_model import ALL_STAGES
from dstack_sched.cli.common import cell

SHORTEST_NAME = 10  # characters of a model's name that stay when the screen is narrow
STALE_S = 60.0
FAULTS_SHOWN = 8
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the table of models. rank: where the screen is narrow, the lowest goes first."""

    title: str
    text: Callable[[Row], str]
    rank: int


def pair(*keys: str, between: str = "/") -> Callable[[Row], str]:
    """Figures side by side; a dash where all are missing."""

    def text(row: Row) -> str:
        if all(row[key] is None for key in keys):
            return "-"
        return between.join(cell(row[key]) for key in keys)

    return text


def one(key: str) -> Callable[[Row], str]:
    return lambda row: cell(row[key])


def percent(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[key] is None else f"{100 * row[key]:.1f}"


def instances(row: Row) -> str:
    """How many of each state, shortest form: `2 idle`, `1 running 1 waiting`."""
    states: list[str] = row["instances"]
    if not states:
        return (row["state"] or "-").lower() if row["state"] != "READY" else "ungated"
    return " ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


MODELS = (
    Column("GPU%", one("gpu_percent"), 10),
    Column("level", one("level_percent"), 1),
    Column("batch", pair("batch_rows_mean", "batch_size"), 7),
    Column("rate/s", one("rate_per_s"), 12),
    Column("fcast", one("forecast_per_s"), 4),
    Column("good/s", one("goodput_per_s"), 6),
    Column("SLO", one("slo_ms"), 9),
    Column("in SLO%", percent("within_slo"), 13),
    Column("p50/p99", pair("latency_p50_ms", "latency_p99_ms"), 11),
    Column("run/pred", pair("measured_run_ms", "predicted_run_ms"), 8),
    Column("queue", one("waiting"), 5),
    Column("used%", one("utilization_percent"), 3),
    Column("instances", instances, 2),
)
LEGEND = (
    "batch: rows run/planned; rates in rows/s (good: in time); times in ms (p50/p99 of requests in the "
    "backend, run/predicted of batches)"
)


def view(document: Mapping[str, Any], *, width: int, stages: bool = False) -> Group:
    """All of one reading for a screen of so many columns."""
    parts: list[RenderableType] = [Text(line) for line in heads(document)]
    parts += [Text(line) for line in gpu_lines(document)]
    if document["models"]:
        parts.append(models_table(document["models"], width))
        parts.append(stage_table(document["models"], width) if stages else Text(LEGEND, style="dim"))
    parts += [Text(line, style="bold") for line in fault_lines(document)]
    parts += [Text(line) for line in decision_lines(document.get("decisions", ()))]
    return Group(*parts)


def heads(document: Mapping[str, Any]) -> list[str]:
    """One line for each of Triton, arbiter, controller, MPS: how it is, or that it does not answer."""
    missing, server, arbiter = document["missing"], document["server"], document["arbiter"]
    lines = [
        f"Triton: {server['name']} {server['version']}" if server else str(missing.get("server")),
        _arbiter_line(arbiter)
        if arbiter
        else f"arbiter: none; models run ungated ({missing.get('arbiter')})",
        _controller_line(document["controller"]),
    ]
    mps = document["mps"]
    if mps is not None:
        clients = sum(mps["clients"].values())
        lines.append(f"MPS: {mps['owner']}, {clients} clients of at most {cell(mps['client_limit'])} a GPU")
    elif "mps" in missing:
        lines.append(f"MPS: {missing['mps']}")
    elif document["gpus"].keys() - {"-1"}:
        lines.append("MPS: no daemon answers; processes take turns on the GPU")
    return lines


def _arbiter_line(arbiter: Mapping[str, Any]) -> str:
    sessions = ", ".join(f"{count} {state}" for state, count in arbiter["sessions"].items() if count)
    took = arbiter["decision_us"]
    return (
        f"arbiter: policy {arbiter['policy']}, pid {arbiter['pid']}, up {duration(arbiter['uptime_s'])}; "
        f"{sessions or 'no instance'}; decisions {cell(took['p50'])}/{cell(took['p99'])} us p50/p99"
    )


def _controller_line(board: Mapping[str, Any] | None) -> str:
    if board is None:
        return "controller: none has run with this --state; dstackctl run plans and adapts"
    if not board["running"]:
        return f"controller: not running (last seen {duration(board['age_s'])} ago)"
    plan, last = board.get("plan") or {}, board.get("last_round") or {}
    told = [f"controller: pid {board['pid']}" + (", dry run" if board.get("dry_run") else "")]
    if board["age_s"] > STALE_S:
        told.append(f"SILENT for {duration(board['age_s'])}")
    if plan:
        told.append(
            f"headroom {cell(plan.get('headroom'))}" + ("" if plan.get("feasible") else ", NOT FEASIBLE")
        )
    if last:
        told.append(f"last: {last['what']} ({last['reason']})")
    return "; ".join(told)


def gpu_lines(document: Mapping[str, Any]) -> list[str]:
    """One line a GPU: what is granted, of what, and the memory."""
    lines = []
    for index, gpu in document["gpus"].items():
        name = "CPU" if index == "-1" else f"GPU {index}"
        told = [f"{name} ({gpu['name']})" if gpu["name"] else name]
        if gpu["out"]:
            told.append(f"OUT: {gpu['out']}")
        if gpu["capacity_percent"] is not None:
            told.append(
                f"granted {cell(gpu['granted_percent'])}% now, {cell(gpu['utilization_percent'])}% "
                f"on average, of {cell(gpu['capacity_percent'])}%"
            )
        if gpu["device_percent"] is not None:
            told.append(f"busy {cell(gpu['device_percent'])}%")
        if gpu["memory_bytes"]:
            told.append(f"memory {gpu['used_bytes'] / 2**30:.1f}/{gpu['memory_bytes'] / 2**30:.0f} GiB")
        lines.append(": ".join((told[0], ", ".join(told[1:]))) if told[1:] else told[0])
    return lines


def models_table(models: Mapping[str, Row], width: int) -> Table:
    """The models, with as many columns as the screen takes."""
    cells = {column: [column.text(row) for row in models.values()] for column in MODELS}
    columns = list(MODELS)
    while len(columns) > 1 and _width([(c.title, cells[c]) for c in columns]) + SHORTEST_NAME > width:
        columns.remove(min(columns, key=lambda column: column.rank))
    names = [
        name if row["state"] in ("READY", None) else f"{name} ({row['state'].lower()})"
        for name, row in models.items()
    ]
    return _table("model", names, [(column.title, cells[column]) for column in columns], width)


def stage_table(models: Mapping[str, Row], width: int) -> Table:
    """Where the time of a request goes, milliseconds, of the worst instance: mean and 99th percentile; where
    the screen is narrow the mean alone."""
    for title, tail in (("ms, mean/p99", True), ("ms, mean", False)):
        columns = [
            (stage.replace("_", " "), [_stage(row["stages_us"].get(stage), tail) for row in models.values()])
            for stage in ALL_STAGES
        ]
        if _width(columns) + max(SHORTEST_NAME, len(title)) <= width:
            break
    return _table(title, list(models), columns, width)


def _stage(seen: Mapping[str, float] | None, tail: bool) -> str:
    if not seen:
        return "-"
    return cell(seen["mean"] / 1000) + (f"/{cell(seen['p99'] / 1000)}" if tail and "p99" in seen else "")


def _width(columns: Sequence[tuple[str, Sequence[str]]]) -> int:
    """Characters that the columns take, with one between each two."""
    return sum(1 + max(map(len, (title, *cells))) for title, cells in columns)


def _table(
    first: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]], width: int
) -> Table:
    """No borders, figures whole; long names give way."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    room = max(SHORTEST_NAME, width - _width(columns))
    table.add_column(first, overflow="ellipsis", no_wrap=True, max_width=room)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in zip(names, *(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def fault_lines(document: Mapping[str, Any]) -> list[str]:
    """The faults that are there now, the newest first."""
    found = sorted(document["faults"], key=lambda fault: -fault["since_s"])
    lines = [
        f"FAULT {fault['kind']} {fault['subject']}: {fault['detail']} "
        f"(for {duration(document['time_s'] - fault['since_s'])})"
        for fault in found[:FAULTS_SHOWN]
    ]
    more = len(found) - FAULTS_SHOWN
    return [*lines, f"and {more} faults more: --json"] if more > 0 else lines


def decision_lines(decisions: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was decided and why, oldest first."""
    return [
        f"{time.strftime('%F %T', time.localtime(each.get('time_s', 0)))} "
        f"{each.get('what', '?')}: {each.get('reason', '')}"
        for each in decisions
    ]


def duration(seconds: float | None) -> str:
    """`12 s`, `3 min`, `5 h`, `9 d`."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
