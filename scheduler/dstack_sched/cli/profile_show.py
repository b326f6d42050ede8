"""`dstackctl profile --show`: what is known of models, as tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dstack_sched.adapters.profile_files import profiles_json, read_profile_file
from dstack_sched.adapters.profile_store import FileProfileStore
from dstack_sched.app.profiling import with_fit
from dstack_sched.cli.common import console, print_json, print_table, say
from dstack_sched.cli.profile_plots import terminal_plot, write_png
from dstack_sched.domain.profile import Device, ModelProfile, ProfileSet
from dstack_sched.errors import InputError, MachineError


def show_profiles(
    store: FileProfileStore, names: Sequence[str], profiles: Path | None, png: Path, json_output: bool
) -> None:
    """Print and plot what is known. Errors: InputError when there is nothing, or a name is not there."""
    shown = [(d, m) for d, m in known_profiles(store, profiles) if not names or m.name in names]
    missing = set(names) - {model.name for _, model in shown}
    where = profiles or store.root
    if missing:
        raise InputError(f"{where}: no profile of {sorted(missing)[0]!r}; make one with dstackctl profile")
    if not shown:
        raise InputError(f"{where}: no profiles yet; make some with dstackctl profile MODEL_OR_REPOSITORY")
    if json_output:
        devices = list(dict.fromkeys(device for device, _ in shown))
        documents = [profiles_json(ProfileSet(d, {m.name: m for at, m in shown if at == d})) for d in devices]
        print_json(documents[0] if len(documents) == 1 else documents)
        return
    for device, model in shown:
        assert model.fit and model.knee
        points = sorted(model.points, key=lambda x: (x.batch_size, x.gpu_percent))
        print_table(
            f"{model.name} on {device.name}, {device.runtime}: knee at GPU% {model.knee.gpu_percent:g}"
            f" (batch {model.knee.batch_size}), fit within {model.fit.max_relative_error:.1%}",
            ("GPU%", "batch", "median ms", "p99 ms", "rows/s", "samples"),
            [
                [
                    f"{x.gpu_percent:g}",
                    x.batch_size,
                    x.latency_ms_p50,
                    x.latency_ms_p99,
                    1000.0 * x.batch_size / x.latency_ms_p50,
                    x.samples,
                ]
                for x in points
            ],
        )
        for draw in (lambda m=model: say_plot(m), lambda d=device, m=model: save_png(m, d, png)):
            try:
                draw()
            except MachineError as error:
                say(str(error))


def say_plot(model: ModelProfile) -> None:
    print(terminal_plot(model, colour=console().is_terminal))  # noqa: T201


def save_png(model: ModelProfile, device: Device, folder: Path) -> None:
    path = folder / f"{model.name}.png"
    write_png(model, device.name, path)
    say(f"{path}")


def known_profiles(store: FileProfileStore, profiles: Path | None) -> list[tuple[Device, ModelProfile]]:
    """From a file, else from the store; with fit and knee, those with too few points left out."""
    if profiles is None:
        pairs = list(store.profiles())
    else:
        content = read_profile_file(profiles)
        for note in content.notes:
            say(note)
        pairs = [(content.profiles.device, model) for model in content.profiles.models.values()]
    return [
        (device, model if model.fit and model.knee else with_fit(model))
        for device, model in pairs
        if len(model.points) > 1
    ]
