"""`dstackctl status --timeline FILE.html`: the chart of what ran on the GPU in the last seconds."""

from __future__ import annotations

from pathlib import Path

from dstack_sched.app.timeline import GpuTimeline, read_timeline
from dstack_sched.domain.json_form import CPU_INDEX
from dstack_sched.errors import InputError
from dstack_sched.ports import ArbiterClient
from dstack_sched.sim.chart import Interval, timeline_html


def save_timelines(arbiter: ArbiterClient, path: Path, last_s: float) -> list[tuple[Path, str]]:
    """One page a GPU: `path` for the first, NAME.gpu1.html and so on. Returns the files and what is in each.

    Errors: InputError where nothing ever ran or the file cannot be written, MachineError without an arbiter.
    """
    if not 0 < last_s <= 3600:
        raise InputError(f"--last {last_s:g}: seconds in (0, 3600] are wanted")
    timelines = read_timeline(arbiter, last_s)
    if not timelines:
        raise InputError(
            "the arbiter knows of no GPU yet: no model instance has joined it and no plan was sent"
        )
    saved = []
    for at, (gpu, timeline) in enumerate(sorted(timelines.items())):
        target = path if at == 0 else path.with_suffix(f".gpu{gpu}{path.suffix}")
        device = "CPU" if gpu == CPU_INDEX else f"GPU {gpu}"
        try:
            target.write_text(_page(timeline, device, last_s), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{target}: {error.strerror}; choose another file with --timeline") from None
        saved.append((target, f"{device}: {len(timeline.batches)} batches in the last {last_s:g} s"))
    return saved


def _page(timeline: GpuTimeline, device: str, last_s: float) -> str:
    intervals = [
        Interval(batch.model, batch.start_us, batch.end_us, batch.gpu_percent, batch.rows, batch.late_rows)
        for batch in timeline.batches
        if batch.rows
    ]
    title = f"{device}: granted batches of the last {last_s:g} s"
    if timeline.lost:
        title += f" ({timeline.lost} earlier ones are no longer known)"
    return timeline_html(intervals, title=title, capacity_percent=timeline.capacity_percent)
