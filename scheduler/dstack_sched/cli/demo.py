"""`dstackctl demo`: the main job from end to end on a copy of a repository; what `make run` runs."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.json_files import write_json
from dstack_sched.adapters.perf_analyzer import LoadOptions
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.app.bench import BenchOptions
from dstack_sched.app.control_loop import Round
from dstack_sched.app.planning import CONTROL_OPTIONS
from dstack_sched.app.profiling import ProfilingOptions
from dstack_sched.app.telemetry import NoMetrics
from dstack_sched.cli import app
from dstack_sched.cli.bench import bench_workload, print_bench
from dstack_sched.cli.common import TritonServerOption, say, state_dir
from dstack_sched.cli.deployment import Deployment
from dstack_sched.cli.host import Host, HostOptions, open_host
from dstack_sched.cli.run import check_models, live_loop, show
from dstack_sched.cli.timeline import save_timelines
from dstack_sched.config import read_workload
from dstack_sched.domain.load import BenchResult
from dstack_sched.domain.workload import Workload
from dstack_sched.errors import DstackError, InputError, ServerError

RESULT_KEYS = (
    "slo_ms",
    "rate_per_s",
    "gpu_percent",
    "batch_size",
    "requests",
    "failed",
    "latency_ms_p50",
    "latency_ms_p99",
    "slo_attainment",
    "goodput_per_s",
)


@app.command()
def demo(
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="Model repository.")],
    workload: Annotated[Path, typer.Option("--workload", metavar="FILE", help="Rates and SLOs.")],
    run_dir: Annotated[
        Path, typer.Option("--run-dir", metavar="DIR", help="For the copy, state, logs and result.json.")
    ] = Path("run"),
    seconds: Annotated[float, typer.Option("--seconds", help="Length of the load.")] = 20.0,
    time_budget_s: Annotated[
        float, typer.Option("--time-budget-s", help="For profiling one new model.")
    ] = 10.0,
    target_error: Annotated[float, typer.Option("--target-error", help="Of the profiles.")] = 0.1,
    tritonserver: TritonServerOption = None,
) -> None:
    """Serve a copy of a repository, profile, plan, rewrite, reload, drive load, and report; then stop all.

    The repository itself is not touched. Profiles are kept in the run directory and reused. The figures go to
    DIR/result.json.

    Example: dstackctl demo model_repository --workload perf/workloads/sample.yaml
    """
    wanted = read_workload(workload)
    state_dir(run_dir)
    copy = working_copy(DiskRepository(repository), run_dir / "models")
    with tempfile.TemporaryDirectory(prefix="dstack-demo-") as private:  # a socket's path must be short
        socket = Path(private) / "arbiter.sock"
        options = HostOptions(
            repository=copy.root,
            log_dir=run_dir / "logs",
            tritonserver=tritonserver,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            socket=socket,
        )
        try:
            with open_host(options) as host, TritonClient(host.triton.grpc_url) as server:
                deployment = Deployment(copy, server, run_dir, socket)
                check_models(wanted, deployment, workload)
                load_all(host)
                loop = live_loop(
                    deployment,
                    lambda: wanted,
                    NoMetrics(),
                    ProfilingOptions(target_error=target_error, time_budget_s=time_budget_s),
                    CONTROL_OPTIONS,
                )
                done = loop.once("demo")
                show(done, json_output=False)
                result = bench_workload(
                    wanted, host.triton.grpc_url, LoadOptions(host.triton.grpc_url), BenchOptions(seconds)
                )
                version = server.metadata()["version"]
                draw_timeline(socket, run_dir / "timeline.html", seconds)
        except KeyboardInterrupt:
            say("stopped before the end; no result was written")
            raise typer.Exit(1) from None
    print_bench(result)
    write_json(run_dir / "result.json", result_document(done, result, wanted, version))
    reloads = done.report.reloads if done.report else 0
    say(f"{run_dir / 'result.json'} written; Triton {version}, {reloads} reloads")


def draw_timeline(socket: Path, path: Path, seconds: float) -> None:
    """What the arbiter granted under the load, as a chart. Nothing to draw is said, no error."""
    arbiter = SocketArbiterClient(socket)
    try:
        for drawn, what in save_timelines(arbiter, path, seconds):
            say(f"{drawn}: {what}")
    except DstackError as error:
        say(str(error))
    finally:
        arbiter.close()


def working_copy(source: DiskRepository, target: Path) -> DiskRepository:
    """A copy that may be rewritten: weights only where they differ, everything else afresh.

    Errors: InputError where the source is empty or the target cannot be written.
    """
    try:
        for model in source.models():
            shutil.copytree(
                source.root / model, target / model, dirs_exist_ok=True, copy_function=_copy_if_changed
            )
            if source.read_config(model) is None:
                (target / model / "config.pbtxt").unlink(missing_ok=True)
        for stale in target.iterdir():
            if stale.is_dir() and not (source.root / stale.name).is_dir():
                shutil.rmtree(stale)
    except (OSError, shutil.Error) as error:
        raise InputError(f"{target}: the working copy of {source.root} cannot be made ({error})") from error
    return DiskRepository(target)


def _copy_if_changed(source: str, target: str) -> str:
    """shutil.copy2, but not for a file that is there with equal size and time."""
    old, new = Path(target), Path(source)
    if old.exists():
        a, b = old.stat(), new.stat()
        if (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns):
            return target
    return str(shutil.copy2(source, target))


def load_all(host: Host) -> None:
    """Load every model as it stands. Errors: ServerError naming the first that does not."""
    for model, error in host.load_models().items():
        if error is not None:
            raise ServerError(f"{model}: {error}")
    say(f"serving {len(host.models)} models: {', '.join(host.models)}")


def result_document(
    done: Round, result: BenchResult, workload: Workload, triton_version: str
) -> dict[str, Any]:
    """run/result.json."""
    models = {}
    for demand in workload.models:
        row = done.plan.models[demand.name]
        figures = asdict(result.models[demand.name]) | {
            "gpu_percent": row.gpu_percent,
            "batch_size": row.batch_size,
        }
        models[demand.name] = {key: figures[key] for key in RESULT_KEYS}
    return {
        "version": 1,
        "triton_version": triton_version,
        "reloads": done.report.reloads if done.report else 0,
        "models": models,
    }
