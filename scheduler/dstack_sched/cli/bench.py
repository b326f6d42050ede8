"""`dstackctl bench`: load the models of a workload with perf_analyzer and hold it against the SLOs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.perf_analyzer import LoadOptions, PerfAnalyzerLoad, find_perf_analyzer
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.bench import BenchOptions, again_if_silent, check_served, run_bench
from dstack_sched.cli import app
from dstack_sched.cli.common import JsonOption, connects, print_json, print_table, say
from dstack_sched.config import read_workload
from dstack_sched.domain.load import BenchResult
from dstack_sched.domain.workload import Workload
from dstack_sched.errors import InputError


@app.command()
@connects
def bench(
    workload: Annotated[Path, typer.Option("--workload", metavar="FILE", help="Rates and SLOs.")],
    connection: ConnectionOptions,
    http_url: Annotated[
        str, typer.Option("--http-url", metavar="HOST:PORT", help="Send the load over HTTP, to here.")
    ] = "",
    seconds: Annotated[float, typer.Option("--seconds", help="Length of the measured window.")] = 20.0,
    warmup: Annotated[float, typer.Option("--warmup", help="Seconds of load before it.")] = 2.0,
    scale: Annotated[float, typer.Option("--scale", help="A factor on all rates.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the Poisson arrivals.")] = 1,
    shared_memory: Annotated[
        str, typer.Option("--shared-memory", metavar="none|system|cuda", help="How tensors travel.")
    ] = "none",
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="MODEL/INPUT:DIMS", help="For dynamic inputs: m/x:3,224,224."),
    ] = None,
    input_data: Annotated[
        list[str] | None,
        typer.Option("--input-data", metavar="MODEL=FILE", help="perf_analyzer's JSON input data."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Drive perf_analyzer, one process a model, at the workload's rates; exit 1 when an SLO is missed.

    Example: dstackctl bench --workload perf/workloads/sample.yaml --seconds 30
    """
    if shared_memory not in ("none", "system", "cuda"):
        raise InputError(f"--shared-memory {shared_memory}: none, system or cuda")
    options = LoadOptions(
        url=http_url or connection.url,
        protocol="http" if http_url else "grpc",
        connection=connection,
        shared_memory=shared_memory,
        shapes=parse_shapes(shape or []),
        data=parse_data(input_data or []),
    )
    if connection.headers and not http_url:
        say("perf_analyzer sends no headers over gRPC: where inference is restricted, use --http-url")
    result = bench_workload(
        read_workload(workload),
        connection,
        options,
        BenchOptions(seconds, warmup, seed, scale),
        quiet=json_output,
    )
    if json_output:
        print_json(bench_document(result))
    else:
        print_bench(result)
    for model in result.missed:
        each = result.models[model]
        say(f"{model}: SLO missed: {each.slo_attainment:.1%} within {each.slo_ms:g} ms, wanted "
            f"{result.attainment:.1%}")  # fmt: skip
    if result.missed:
        raise typer.Exit(1)


def bench_workload(
    workload: Workload,
    connection: ConnectionOptions | str,
    load: LoadOptions,
    options: BenchOptions,
    *,
    quiet: bool = False,
) -> BenchResult:
    """Wire perf_analyzer and Triton into the use case; each distinct error under the load is told once.

    Errors: InputError, MachineError.
    """
    program = find_perf_analyzer()
    with TritonClient(connection) as server:
        server.require_ready()
        check_served(workload, server)
        configs = {demand.name: server.config(demand.name) for demand in workload.models}
        with PerfAnalyzerLoad(program, load, configs) as generator:
            if not quiet:
                total_s = options.warmup_s + options.seconds
                say(f"load on {len(configs)} models for {total_s:g} s, seed {options.seed}")
            result = again_if_silent(
                lambda: run_bench(workload, generator, server, SystemClock(), options), say
            )
    for model, each in result.models.items():
        for error in each.errors:
            say(f"{model}: the load was interrupted: {error}")
    return result


def bench_document(result: BenchResult) -> dict[str, Any]:
    """The result as JSON; keys as in run/result.json."""
    return {
        "version": 1,
        "seconds": result.seconds,
        "warmup_s": result.warmup_s,
        "seed": result.seed,
        "attainment": result.attainment,
        "met": not result.missed,
        "models": {name: dataclasses.asdict(each) for name, each in result.models.items()},
    }


def print_bench(result: BenchResult) -> None:
    """The table of results."""
    columns = [
        "model",
        "rate/s",
        "SLO ms",
        "requests",
        "failed",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "in SLO %",
        "goodput/s",
    ]
    rows = [
        [
            name,
            each.rate_per_s,
            each.slo_ms,
            each.requests,
            each.failed,
            each.latency_ms_p50,
            each.latency_ms_p95,
            each.latency_ms_p99,
            None if each.slo_attainment is None else 100 * each.slo_attainment,
            each.goodput_per_s,
        ]
        for name, each in result.models.items()
    ]
    print_table(f"{result.seconds:g} s of Poisson load", columns, rows)


def parse_shapes(texts: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """MODEL/INPUT:D1,D2 -> model -> input -> dimensions. The input's name may itself hold / and :."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for text in texts:
        model, slash, rest = text.partition("/")
        name, colon, dims = rest.rpartition(":")
        try:
            numbers = tuple(int(dim) for dim in dims.split(","))
        except ValueError:
            numbers = ()
        if not (model and slash and name and colon and numbers) or min(numbers) < 0:
            raise InputError(f"--shape {text}: expected MODEL/INPUT:DIMS, as in detector/images:3,640,640")
        shapes.setdefault(model, {})[name] = numbers
    return shapes


def parse_data(texts: list[str]) -> dict[str, Path]:
    """MODEL=FILE -> model -> file."""
    files: dict[str, Path] = {}
    for text in texts:
        model, equals, name = text.partition("=")
        if not (model and equals and Path(name).is_file()):
            raise InputError(f"--input-data {text}: expected MODEL=FILE with a file that is there")
        files[model] = Path(name)
    return files
