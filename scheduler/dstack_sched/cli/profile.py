"""`dstackctl profile`: measure models on this device, show what is known, import what others measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.model_files import ModelFile, find_models
from dstack_sched.adapters.mps import GPU_DEVICE, MpsDaemon
from dstack_sched.adapters.onnx_graph import graph_kernels
from dstack_sched.adapters.onnx_shapes import has_free_batch, load_graph
from dstack_sched.adapters.probe import CorunSeat, ModelProbe, ProbeSettings, measure_corun
from dstack_sched.adapters.profile_files import profiles_json, read_profile_file, write_profiles
from dstack_sched.adapters.profile_import import read_csv
from dstack_sched.adapters.profile_store import FileProfileStore, model_sha256
from dstack_sched.app.corun_profiling import corun_batches, corun_percents, measure_coruns
from dstack_sched.app.profiling import (
    ProfilingOptions,
    ProfilingResult,
    Progress,
    candidate_batches,
    profile_model,
    with_fit,
)
from dstack_sched.cli import app
from dstack_sched.cli.common import (
    JsonOption,
    StateOption,
    print_json,
    print_table,
    progress,
    say,
    state_dir,
)
from dstack_sched.cli.profile_show import show_profiles
from dstack_sched.domain.kernels import KernelWork
from dstack_sched.domain.profile import ModelProfile, ProfileSet
from dstack_sched.errors import InputError, MachineError
from dstack_sched.policy.sampling import corun_design

DEFAULT = "measure"


class _DefaultGroup(TyperGroup):
    """`profile X` means `profile measure X`, so that measuring needs no second verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else [DEFAULT, *args])


profile_app = typer.Typer(
    cls=_DefaultGroup, help="Measure models on this device, or show or import measurements."
)
app.add_typer(profile_app, name="profile")


def numbers(text: str, what: str, kind: type) -> tuple[Any, ...]:
    """A list by comma as ascending numbers. Errors: InputError."""
    try:
        values = sorted({kind(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise InputError(f"{what} {text!r}: numbers by comma are wanted, like 1,2,4") from None
    if not values or values[0] <= 0:
        raise InputError(f"{what} {text!r}: numbers above 0 are wanted, like 1,2,4")
    return tuple(values)


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """NAME:D1,D2,... as perf_analyzer's --shape takes them. Errors: InputError."""
    shapes = {}
    for text in texts:
        name, _, dims = text.rpartition(":")
        if not name:
            raise InputError(
                f"--shape {text!r}: NAME:D1,D2,... is wanted, without the batch, like image:3,224,224"
            )
        try:
            shapes[name] = tuple(int(dim) for dim in dims.split(","))
        except ValueError:
            raise InputError(f"--shape {text!r}: the dimensions of {name} must be whole numbers") from None
    return shapes


@contextmanager
def probe_settings(provider: str, device_id: int, log: Path) -> Iterator[ProbeSettings]:
    """How to measure on this host: under MPS on a GPU (a daemon of our own where none runs), else on the CPU.

    Errors: InputError for an unknown provider, MachineError where a GPU has no MPS.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise InputError(f"--provider {provider!r}: one of auto, cpu, cuda is wanted")
    if provider == "cpu" or (provider == "auto" and not GPU_DEVICE.exists()):
        yield ProbeSettings("cpu", cap_s=0.25)
        return
    daemon = MpsDaemon(log)
    if not daemon.available():
        raise MachineError("--provider cuda: no GPU with nvidia-cuda-mps-control here; use --provider cpu")
    try:
        yield ProbeSettings("cuda", device_id, dict(daemon.start()), cap_s=0.6)
    finally:
        daemon.stop()


def read_graph(model: ModelFile, shapes: dict[str, tuple[int, ...]]) -> tuple[bool, tuple[KernelWork, ...]]:
    """Whether the batch is free, and the kernels; () with a remark where shapes cannot be inferred."""
    light = load_graph(model.path)
    free = has_free_batch(light) and model.max_batch_size != 0
    try:
        return free, graph_kernels(light, model.name, {**model.shapes, **shapes})
    except InputError as error:
        say(f"{error} (measuring goes on without the parallelism model)")
        return free, ()


def show_progress(bar: Any, task: Any) -> Any:
    def update(state: Progress) -> None:
        error = f"{state.error:.1%}" if state.error < 10 else "?"
        bar.update(
            task,
            description=f"{state.model}: {state.points} points, error {error}, {state.left_s:.0f} s left",
        )

    return update


@profile_app.command(DEFAULT, hidden=True)
def measure(
    state: StateOption,
    targets: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL_OR_REPOSITORY...", help="ONNX files, models, repositories."),
    ] = None,
    models: Annotated[str, typer.Option("--models", metavar="NAME,...", help="Only these.")] = "",
    time_budget_s: Annotated[float, typer.Option("--time-budget-s", help="For one model.")] = 60.0,
    target_error: Annotated[
        float, typer.Option("--target-error", help="Stop at this relative error.")
    ] = 0.05,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", metavar="N,...", help="Candidates.")] = "",
    gpu_percents: Annotated[str, typer.Option("--gpu-percents", metavar="P,...", help="Candidates.")] = "",
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Measure all candidates.")] = False,
    corun: Annotated[bool, typer.Option("--corun", help="Measure models side by side, too.")] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME:D1,D2", help="Size of a free input, without batch."),
    ] = None,
    provider: Annotated[str, typer.Option("--provider", help="auto, cpu or cuda.")] = "auto",
    device_id: Annotated[int, typer.Option("--device-id", help="CUDA device.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write a profiles.json.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Show stored profiles instead of measuring.")] = False,
    profiles: Annotated[
        Path | None, typer.Option("--profiles", metavar="FILE", help="With --show: a profiles.json.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="DIR", help="With --show: where PNGs go.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure latency against GPU% and batch size with the backend's own runtime.

    Points are chosen where they tell the most, until the error is small or the time is over; all are kept in
    the state directory, by model hash, device, driver and runtime, and are not measured twice. With --show,
    arguments are names of models. Measurements of other tools: dstackctl profile import --help.

    Example: dstackctl profile model_repository --corun --out profiles.json

    Example: dstackctl profile --show resnet50
    """
    names = [str(target) for target in targets or ()]
    store = FileProfileStore(state_dir(state) / "profiles")
    if show:
        show_profiles(store, names, profiles, png or store.root / "plots", json_output)
        return
    if not targets:
        raise InputError("profile: name an ONNX file, a model or a repository (see dstackctl profile --help)")
    options = ProfilingOptions(
        percents=numbers(gpu_percents, "--gpu-percents", float) if gpu_percents else (),
        batches=numbers(batch_sizes, "--batch-sizes", int) if batch_sizes else (),
        target_error=target_error,
        time_budget_s=time_budget_s,
        exhaustive=exhaustive,
    )
    if options.percents and options.percents[-1] > 100:
        raise InputError(f"--gpu-percents {gpu_percents!r}: a GPU% is at most 100")
    found = find_models(targets, [name for name in models.split(",") if name])
    logs = state_dir(state / "logs")
    with probe_settings(provider, device_id, logs / "mps.log") as settings:
        results = measure_models(found, store, settings, options, parse_shapes(shape or ()))
        profile_set = finish(found, results, store, settings, parse_shapes(shape or ()), corun)
    if out:
        write_profiles(out, profile_set)
    report(results, profile_set, json_output)


def measure_models(
    found: Sequence[ModelFile],
    store: FileProfileStore,
    settings: ProbeSettings,
    options: ProfilingOptions,
    shapes: dict[str, tuple[int, ...]],
) -> list[ProfilingResult]:
    """One model after the other, each alone on the device."""
    results = []
    with progress() as bar:
        task = bar.add_task("profile", total=len(found))
        for model in found:
            free, kernels = read_graph(model, shapes)
            chosen = replace(settings, shapes=input_shapes(model, shapes))
            with ModelProbe(model.path, chosen) as probe:
                allowed = model.max_batch_size or None if free else 1
                batches = (
                    options.batches
                    if free and options.batches
                    else candidate_batches(probe.device(), allowed)
                )
                result = profile_model(
                    model.name,
                    model_sha256(model.path),
                    probe,
                    store,
                    SystemClock(),
                    replace(options, batches=batches),
                    kernels,
                    show_progress(bar, task),
                )
            for note in result.notes:
                say(note)
            results.append(result)
            bar.advance(task)
    return results


def input_shapes(model: ModelFile, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes to measure with: those of the config, replaced by those of the command line."""
    inputs = {value.name for value in load_graph(model.path).graph.input}
    return {name: dims for name, dims in {**model.shapes, **shapes}.items() if name in inputs}


def finish(
    found: Sequence[ModelFile],
    results: Sequence[ProfilingResult],
    store: FileProfileStore,
    settings: ProbeSettings,
    shapes: dict[str, tuple[int, ...]],
    corun: bool,
) -> ProfileSet:
    """Co-run points where wanted; then everything known of these models."""
    device = results[0].device
    hashes = {result.profile.name: result.profile.sha256 for result in results}
    if corun:
        with ExitStack() as stack, progress() as bar:
            probes = {
                model.name: stack.enter_context(
                    ModelProbe(model.path, replace(settings, shapes=input_shapes(model, shapes)))
                )
                for model in found
            }
            design = corun_design(list(hashes), corun_percents(device))
            for name, percent in {seat for entry in design for seat in entry}:
                probes[name].start([percent])
            task = bar.add_task("side by side", total=len(design))
            measure_coruns(
                design,
                corun_batches([result.profile for result in results]),
                lambda seats: measure_corun([CorunSeat(n, probes[n], p, b) for n, p, b in seats]),
                store,
                device,
                hashes,
                lambda: float("inf"),
                lambda _: bar.advance(task),
            )
    return store.export(device, hashes)


def report(results: Sequence[ProfilingResult], profile_set: ProfileSet, json_output: bool) -> None:
    """The profiles as a table, or as profiles.json with how they were made."""
    if json_output:
        made = {
            result.profile.name: {
                "error": result.error if result.error < float("inf") else None,
                "measured": result.measured,
                "reused": result.reused,
                "seconds": result.seconds,
                "notes": list(result.notes),
            }
            for result in results
        }
        print_json({**profiles_json(profile_set), "profiling": made})
        return
    rows = []
    for result in results:
        profile = result.profile
        assert profile.fit and profile.knee
        rows.append(
            [
                profile.name,
                f"{len(profile.points)} ({result.reused} reused)",
                f"{profile.fit.max_relative_error:.1%}",
                f"{result.error:.1%}" if result.error < float("inf") else None,
                f"{profile.knee.gpu_percent:g}% at {profile.knee.batch_size}",
                f"{profile.memory_bytes / 2**20:.0f}",
                f"{result.seconds:.1f}",
            ]
        )
    columns = ("model", "points", "fit error", "surface error", "knee", "MiB", "seconds")
    print_table(f"Profiles on {profile_set.device.name}", columns, rows)
    if profile_set.corun:
        say(f"{len(profile_set.corun)} measurements side by side")


@profile_app.command("import")
def import_csv(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE.csv...", help="Of Model Analyzer or perf_analyzer.")
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model, as the file names it.")],
    state: StateOption,
    name: Annotated[str, typer.Option("--name", help="Its name from now on; default: --model.")] = "",
    gpu_percent: Annotated[float, typer.Option("--gpu-percent", help="GPU% it was measured at.")] = 100.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Of a perf_analyzer file (its -b).")] = 1,
    gpu: Annotated[
        Path | None,
        typer.Option("--gpu", metavar="FILE", help="A profiles.json whose device it was measured on."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The profiles.json to add to.")] = Path(
        "profiles.json"
    ),
    json_output: JsonOption = False,
) -> None:
    """Take points from CSV files into a profiles.json: one model, one GPU% at a time; repeat for others.

    Only rows without queueing count (one request at a time). The latencies hold network and server, too, so
    they err to the slow side.

    Example: dstackctl profile import metrics-model-inference.csv --model resnet50 --gpu profiles.json
    """
    del state  # the same options everywhere; imported points go into a file, not among measured ones
    if not 0 < gpu_percent <= 100 or batch_size < 1:
        raise InputError("profile import: --gpu-percent lies in (0, 100] and --batch-size is at least 1")
    base = out if out.exists() else gpu
    if base is None:
        raise InputError(
            f"{out}: is not there yet; name the device with --gpu FILE (a profiles.json measured on it)"
        )
    known = read_profile_file(base).profiles
    models = dict(known.models) if base == out else {}
    kept = (
        {(p.gpu_percent, p.batch_size): p for p in models[name or model].points}
        if (name or model) in models
        else {}
    )
    skipped = 0
    for file in files:
        imported = read_csv(file, model, gpu_percent, batch_size)
        kept.update({(p.gpu_percent, p.batch_size): p for p in imported.points})
        skipped += imported.skipped
    if len(kept) < 2:
        raise InputError(
            f"{files[0]}: gives {len(kept)} point of {model}, 2 are needed; name several files at once"
        )
    old = models.get(name or model)
    models[name or model] = with_fit(
        replace(old, points=tuple(kept.values()), fit=None, knee=None)
        if old
        else ModelProfile(name or model, "", 0, tuple(kept.values()))
    )
    result = ProfileSet(known.device, models, known.corun if base == out else ())
    write_profiles(out, result)
    if json_output:
        print_json(profiles_json(result))
    else:
        say(f"{out}: {name or model} has {len(kept)} points now ({skipped} rows with queueing left out)")
