"""Latency against GPU%, with the knee marked: as a PNG and in the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dstack_sched.domain.profile import ModelProfile
from dstack_sched.errors import MachineError
from dstack_sched.policy.latency import LatencySurface

MAX_CURVES = 4
TERMINAL_COLUMNS, TERMINAL_LINES = 100, 20  # ten columns a tick: one every 10%


def curves(profile: ModelProfile) -> tuple[LatencySurface, list[int]]:
    """The surface and the batch sizes worth drawing: a few, spread, that of the knee among them."""
    surface = LatencySurface.from_profile(profile)
    batches = list(surface.batches)
    if len(batches) > MAX_CURVES:
        picked = {batches[round(i * (len(batches) - 1) / (MAX_CURVES - 1))] for i in range(MAX_CURVES)}
        batches = sorted(picked | ({profile.knee.batch_size} & set(batches) if profile.knee else set()))
    return surface, batches


def write_png(profile: ModelProfile, device_name: str, path: Path) -> None:
    """Draw the profile into a PNG file. Errors: MachineError when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MachineError("no PNG without matplotlib: pip install 'dstack-triton[plots]'") from None
    surface, batches = curves(profile)
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    percents = np.linspace(surface.min_percent, 100.0, 200)
    for batch in batches:
        (line,) = axes.plot(percents, surface.latency_ms(percents, batch), label=f"batch {batch}")
        at = [point for point in profile.points if point.batch_size == batch]
        axes.plot(
            [point.gpu_percent for point in at],
            [point.latency_ms_p50 for point in at],
            "o",
            color=line.get_color(),
        )
    if profile.knee:
        knee, batch = profile.knee.gpu_percent, profile.knee.batch_size
        axes.axvline(knee, linestyle="--", color="gray")
        axes.plot(
            [knee], [float(surface.latency_ms(knee, batch))], "kD", label=f"knee {knee:g}%, batch {batch}"
        )
    axes.set(
        xlabel="GPU%", ylabel="latency, median (ms)", yscale="log", title=f"{profile.name} on {device_name}"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def terminal_plot(profile: ModelProfile, *, colour: bool) -> str:
    """The same as text. Errors: MachineError when plotille is not installed."""
    try:
        import plotille
    except ImportError:
        raise MachineError("no plot in the terminal without plotille: pip install plotille") from None
    surface, batches = curves(profile)
    figure = plotille.Figure()
    figure.width, figure.height, figure.with_colors = TERMINAL_COLUMNS, TERMINAL_LINES, colour
    figure.color_mode = "byte"
    figure.x_ticks_fkt = figure.y_ticks_fkt = lambda low, _: f"{low:.3g}"
    figure.x_label, figure.y_label = "GPU%", "median ms"
    percents = np.linspace(surface.min_percent, 100.0, 60)
    highest = 0.0
    for index, batch in enumerate(batches, start=1):
        latencies = surface.latency_ms(percents, batch)
        highest = max(highest, float(latencies.max()))
        figure.plot(percents, latencies, lc=index, label=f"batch {batch}")
    figure.set_x_limits(min_=0.0, max_=100.0)
    figure.set_y_limits(min_=0.0, max_=highest * 1.05)
    if profile.knee:
        knee, batch = profile.knee.gpu_percent, profile.knee.batch_size
        here = float(surface.latency_ms(knee, batch))
        figure.plot([knee, knee], [0.0, highest], label=f"knee at {knee:g}%, batch {batch}: {here:.3g} ms")
        figure.text([knee], [here], ["K"])
    return str(figure.show(legend=True))
