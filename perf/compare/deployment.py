"""Alternatives in operation: a server an alternative (or several that can share one), and load on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare.alternatives import Alternative, Served, server_arguments, write_config, write_repository
from compare.cells import Cell, arrivals_of, served_name
from compare.gpu_watch import GpuWatch, Nvml
from compare.one_process.repository import SEPARATOR
from compare.peak import Trial
from compare.stalls import StallProbe
from compare.traces import Recorder, spans, trial_of
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.mps_console import PIPE_VARIABLE
from dstack_sched.adapters.perf_analyzer import LoadOptions, PerfAnalyzerLoad, find_perf_analyzer
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_metrics import TritonMetrics
from dstack_sched.app.bench import BenchOptions, again_if_silent, run_bench
from dstack_sched.app.timeline import read_timeline
from dstack_sched.cli.host import Host, HostOptions
from dstack_sched.cli.live_steps import seen_of
from dstack_sched.domain.load import BenchResult
from dstack_sched.domain.workload import ModelDemand, OnLate, Workload
from dstack_sched.engine.run_times import Seen
from dstack_sched.errors import DstackError, ServerError

SETTLED_LIMIT_S = 60.0  # of the CUDA programs that an instance makes after it is ready
READY_S = 0.5  # a backend notices within a fifth of a second that the arbiter is gone
JOINED_LIMIT_S = 10.0
SLICE_S = 0.15  # of a trial that the timelines show

Stages = Mapping[str, Mapping[str, tuple[float, int]]]  # model -> stage -> (seconds, batches)


class RenamedServer:
    """What run_bench asks of a server, by the mix's names of the models."""

    def __init__(self, server: TritonClient, names: Mapping[str, str]) -> None:
        self._server, self._names = server, names

    def models(self) -> dict[str, str]:
        """Model -> state."""
        states = self._server.models()
        return {model: states.get(name, "UNAVAILABLE") for model, name in self._names.items()}

    def statistics(self, model: str) -> Mapping[str, Any]:
        """Triton's counters of a model."""
        return self._server.statistics(self._names[model])


@dataclass(frozen=True, slots=True)
class Site:
    """Where and how alternatives are deployed. directory: of a server's files. kind: KIND_GPU or KIND_CPU.
    load_environment: of perf_analyzers."""

    directory: Path
    models_dir: Path
    kind: str
    shared_memory: str
    nvml: Nvml
    load_environment: Mapping[str, str] = field(default_factory=dict)


class Deployment:
    """A running server with its load generator. Close it. Errors: MachineError, ServerError, InputError."""

    def __init__(self, site: Site, alternative: Alternative, served: Mapping[str, Served]) -> None:
        directory = site.directory
        shutil.rmtree(directory, ignore_errors=True)
        self.site, self.alternative = site, alternative
        self.served = dict(served)
        started = time.monotonic()
        self.repository = directory / "models"
        self._names = write_repository(self.repository, site.models_dir, served, alternative, site.kind)
        self.host = Host(
            HostOptions(
                repository=self.repository, log_dir=directory / "logs", http_port=0, grpc_port=0,
                metrics_port=0, socket=directory / "arbiter.sock", mps=alternative.mps,
                triton_arguments=server_arguments(alternative),
                env={} if alternative.mps else {PIPE_VARIABLE: str(directory / "no-daemon")},
            )
        )  # fmt: skip
        self._load: PerfAnalyzerLoad | None = None
        self.server: TritonClient | None = None
        try:
            self.host.start()
            self._metrics = TritonMetrics(self.host.triton.metrics_url)
            self._load_all(sorted(set(self._names.values())))
            self._wait_prepared()
            self.server = TritonClient(self.host.triton.grpc_url)
            self._load = self._load_generator(self.server)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - started
        self.arbiter_runs = True

    def _load_generator(self, server: TritonClient) -> PerfAnalyzerLoad:
        configs = {
            model: inputs_of(server.config(name), model, self.alternative)
            for model, name in self._names.items()
        }
        self._renamed = RenamedServer(server, self._names)
        options = LoadOptions(
            self.host.triton.grpc_url, shared_memory=self.site.shared_memory, names=self._names,
            environment=self.site.load_environment,
        )  # fmt: skip
        return PerfAnalyzerLoad(find_perf_analyzer(), options, configs)

    def _load_all(self, models: list[str]) -> None:
        """Load all at once. Errors: ServerError that names the first that does not load."""

        def load(model: str) -> None:
            with TritonClient(self.host.triton.grpc_url) as client:
                client.load(model)

        with ThreadPoolExecutor(len(models)) as pool:
            for model, done in [(model, pool.submit(load, model)) for model in models]:
                try:
                    done.result()
                except ServerError as error:
                    raise ServerError(f"{self.alternative.name}: {model}: {error}") from error

    def _wait_prepared(self) -> None:
        """Wait until no instance makes programs any more: that takes cores and GPU from who is measured."""
        until = time.monotonic() + SETTLED_LIMIT_S
        metrics = self._metrics
        expected = len(set(self._names.values())) if not self.alternative.one_process else 0
        while time.monotonic() < until:
            left = metrics.preparing()
            if len(left) >= expected and not any(left.values()):
                return
            time.sleep(0.3)
        print(f"{self.alternative.name}: programs are still being made: {left}", flush=True)

    def triton_version(self) -> str:
        assert self.server is not None
        return str(self.server.metadata()["version"])

    def change(self, served: Mapping[str, Served]) -> list[str]:
        """Deploy the models anew as told, on the same server; returns those that loaded: what stays as it is
        does not."""
        changed = [model for model, how in served.items() if self.served.get(model) != how]
        for model in changed:
            write_config(self.repository, model, served[model], self.alternative, self.site.kind)
        if changed:
            self._load_all([served_name(model) for model in changed])
        self.served = dict(served)
        return changed

    def settle(self) -> None:
        """Wait until nothing is prepared any more and, where the arbiter runs, all instances have joined."""
        self._wait_prepared()
        if self.arbiter_runs:
            self._wait_joined()

    def seen(self, model: str) -> list[Seen]:
        """What the arbiter has seen of a model's runs."""
        return seen_of(self.control("run_times", model=self._names[model]))

    def use(self, alternative: Alternative) -> None:
        """Let another alternative have this server; it must suit (Alternative.server)."""
        self.alternative = alternative
        if alternative.policy is None:
            if self.arbiter_runs:
                self.host.arbiter.stop()
                self.arbiter_runs = False
                time.sleep(READY_S)
            return
        if not self.arbiter_runs:
            self.host.arbiter.start()
            self.arbiter_runs = True
            self._wait_joined()
        self.control("policy", name=alternative.policy)

    def _wait_joined(self) -> None:
        """Backends come back one by one. Errors: ServerError when some do not."""
        until = time.monotonic() + JOINED_LIMIT_S
        missing = set(self._names.values())
        while missing:
            missing -= {each["model"] for each in self.control("status")["backends"]}
            if time.monotonic() > until:
                raise ServerError(f"{', '.join(sorted(missing))}: did not join the arbiter again")
            time.sleep(0.1)

    def control(self, verb: str, **fields: object) -> dict[str, Any]:
        """One request to the arbiter."""
        client = SocketArbiterClient(self.host.socket)
        try:
            return client.request(verb, **fields)
        finally:
            client.close()

    def _granted(self) -> float:
        """GPU%-ms granted so far, on all devices."""
        try:
            gpus = self.control("status")["gpus"]
        except DstackError:
            return 0.0
        return float(sum(gpu["gpu_percent_ms"] for gpu in gpus.values()))

    def trial(self, cell: Cell, workload: Workload, options: BenchOptions, repeat: int) -> Trial:
        """Load at the workload's rates for a while behind a warm-up, and what came of it."""
        assert self._load is not None
        recorder = Recorder(self._load)
        batches: list[list[Any]] = []

        def read_batches() -> None:
            if self.arbiter_runs:
                batches.extend(self._batches())

        watch = GpuWatch(
            self.site.nvml, options.warmup_s, options.seconds,
            granted=self._granted if self.arbiter_runs else None, at_end=read_batches,
        )  # fmt: skip
        stages = self._metrics.stages()
        with StallProbe() as probe:
            result = run_bench(
                workload, recorder, self._renamed, SystemClock(), options, watch.start,
                arrivals_of(cell, repeat),
            )  # fmt: skip
        watch.join()
        trial = trial_of(result, recorder.traces, watch.window_s, watch.figures, probe.stalls_s)
        means_ms = stage_means_ms(stages, self._metrics.stages())
        trial.figures["stages_ms"] = {
            m: means_ms[name] for m, name in self._names.items() if name in means_ms
        }
        end_s = watch.window_s[1]
        trial.figures["timeline"] = {
            "seconds": SLICE_S,
            "requests": spans(recorder.traces, end_s - SLICE_S, end_s),
            "batches": batches,
        }
        return trial

    def _batches(self) -> list[list[Any]]:
        """[model, start ms, end ms, GPU%, rows] of what was granted in the last moments."""
        client = SocketArbiterClient(self.host.socket)
        try:
            lines = read_timeline(client, SLICE_S)
        except DstackError:
            return []
        finally:
            client.close()
        return [
            [each.model, *(round((us - line.since_us) / 1e3, 2) for us in (each.start_us, each.end_us)),
             each.gpu_percent, each.rows]
            for line in lines.values() for each in line.batches
        ]  # fmt: skip

    def solo_ms(self, model: str, seconds: float) -> float:
        """Median latency at the client of lone batch-1 requests, 40 a second."""
        assert self._load is not None
        demand = ModelDemand(model, 1000.0, 40.0, 1.0, OnLate.SERVE)
        options = BenchOptions(seconds, 0.3, 1, tail_s=0.1)
        load = self._load
        result: BenchResult = again_if_silent(
            lambda: run_bench(Workload((demand,)), load, self._renamed, SystemClock(), options)
        )
        latency = result.models[model].latency_ms_p50
        if latency is None:
            raise ServerError(f"{model}: no answer to lone requests")
        return latency

    def stop_load(self) -> None:
        """Kill what still sends."""
        if self._load is not None:
            self._load.__exit__()

    def close(self) -> None:
        """Stop load and server."""
        for stop in (self.stop_load, self._close_client, self.host.stop):
            stop_quietly(stop)

    def _close_client(self) -> None:
        if self.server is not None:
            self.server.close()


def stop_quietly(stop: Callable[[], None]) -> None:
    """What cannot be stopped must not keep the rest from it."""
    try:
        stop()
    except (DstackError, OSError) as error:
        print(f"while stopping: {error}", flush=True)


def stage_means_ms(before: Stages, after: Stages) -> dict[str, dict[str, float]]:
    """Model -> stage -> what a batch took of it between two readings."""
    means: dict[str, dict[str, float]] = {}
    for model, stages in after.items():
        for stage, (seconds, count) in stages.items():
            seconds_before, count_before = before.get(model, {}).get(stage, (0.0, 0))
            if count > count_before:
                mean_ms = 1e3 * (seconds - seconds_before) / (count - count_before)
                means.setdefault(model, {})[stage] = round(mean_ms, 3)
    return means


def inputs_of(config: Mapping[str, Any], model: str, alternative: Alternative) -> Mapping[str, Any]:
    """The config as far as requests to one model are made up from it."""
    if not alternative.one_process:
        return config
    own = [
        {**each, "optional": False}
        for each in config["input"]
        if each["name"].startswith(f"{served_name(model)}{SEPARATOR}")
    ]
    return {**config, "input": own}
