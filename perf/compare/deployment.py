"""Alternatives in operation: a server an alternative (or several that can share one), and load on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compare.alternatives import Alternative, Served, write_repository
from compare.gpu_watch import GpuWatch
from compare.one_process.repository import SEPARATOR
from compare.peak import Trial
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.perf_analyzer import LoadOptions, PerfAnalyzerLoad, find_perf_analyzer
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.app.bench import BenchOptions, run_bench
from dstack_sched.cli.host import Host, HostOptions
from dstack_sched.domain.load import BenchResult
from dstack_sched.domain.workload import ModelDemand, OnLate, Workload
from dstack_sched.errors import ServerError

READY_S = 0.5  # a backend notices within a fifth of a second that the arbiter is gone


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


class Deployment:
    """A running server with its load generator. Close it."""

    def __init__(
        self,
        directory: Path,
        models_dir: Path,
        served: Mapping[str, Served],
        alternative: Alternative,
        *,
        kind: str,
        shared_memory: str,
    ) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        self.alternative = alternative
        started = time.monotonic()
        names = write_repository(directory / "models", models_dir, served, alternative, kind)
        self.host = Host(
            HostOptions(
                repository=directory / "models", log_dir=directory / "logs", http_port=0, grpc_port=0,
                metrics_port=0, socket=directory / "arbiter.sock", mps=alternative.mps,
            )
        )  # fmt: skip
        try:
            self.host.start()
            self._load_all(sorted(set(names.values())))
            url = self.host.triton.grpc_url
            self.server = TritonClient(url)
            configs = {
                model: inputs_of(self.server.config(name), model, alternative)
                for model, name in names.items()
            }
            self._load = PerfAnalyzerLoad(
                find_perf_analyzer(), LoadOptions(url, shared_memory=shared_memory, names=names), configs
            )
            self._renamed = RenamedServer(self.server, names)
        except BaseException:
            self.host.stop()
            raise
        self.start_s = time.monotonic() - started
        self.arbiter_runs = True

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
            time.sleep(READY_S * 4)  # backends come back one by one
        self.control("policy", name=alternative.policy)

    def control(self, verb: str, **fields: object) -> dict[str, object]:
        """One request to the arbiter."""
        client = SocketArbiterClient(self.host.socket)
        try:
            return client.request(verb, **fields)
        finally:
            client.close()

    def trial(self, workload: Workload, seconds: float, warmup_s: float, seed: int) -> Trial:
        """Load at the workload's rates for `seconds` behind a warm-up, and what came of it."""
        with GpuWatch() as gpu:
            result = self._bench(workload, BenchOptions(seconds, warmup_s, seed))
        return trial_of(result, gpu.figures)

    def solo_ms(self, model: str, seconds: float = 1.5) -> float:
        """Median latency at the client of lone batch-1 requests, 40 a second."""
        demand = ModelDemand(model, 1000.0, 40.0, 1.0, OnLate.SERVE)
        result = self._bench(Workload((demand,)), BenchOptions(seconds, 0.5, 1))
        latency = result.models[model].latency_ms_p50
        if latency is None:
            raise ServerError(f"{model}: no answer to lone requests")
        return latency

    def _bench(self, workload: Workload, options: BenchOptions) -> BenchResult:
        return run_bench(workload, self._load, self._renamed, SystemClock(), options)

    def close(self) -> None:
        """Stop load and server."""
        self._load.__exit__()
        self.server.close()
        self.host.stop()


def inputs_of(config: Mapping[str, Any], model: str, alternative: Alternative) -> Mapping[str, Any]:
    """The config as far as requests to one model are made up from it."""
    if not alternative.one_process:
        return config
    own = [
        {**each, "optional": False}
        for each in config["input"]
        if each["name"].startswith(f"{model}{SEPARATOR}")
    ]
    return {**config, "input": own}


def trial_of(result: BenchResult, gpu: Mapping[str, float]) -> Trial:
    """The figures of a stretch: by model, and of the worst of them."""
    models = {
        name: {
            "rate_per_s": round(each.rate_per_s, 2), "requests": each.requests, "failed": each.failed,
            "p50_ms": each.latency_ms_p50, "p99_ms": each.latency_ms_p99,
            "attainment": each.slo_attainment, "goodput_per_s": round(each.goodput_per_s, 2),
        }
        for name, each in result.models.items()
    }  # fmt: skip
    for name, each in result.models.items():
        if each.slo_attainment is None:
            raise ServerError(f"{name}: the load could not be measured ({each.requests} requests)")
    attainments = [each.slo_attainment or 0.0 for each in result.models.values()]
    goodputs = [each.goodput_per_s for each in result.models.values()]
    served = [each.goodput_per_s / each.rate_per_s for each in result.models.values()]
    energy = gpu.get("energy_j")
    answered = sum(each.requests - each.failed for each in result.models.values())
    return Trial(
        rate_per_s=sum(each.rate_per_s for each in result.models.values()),
        attainment=min(attainments),
        goodput_per_s=sum(goodputs),
        figures={
            "models": models,
            "gpu": {key: round(value, 4) for key, value in gpu.items()},
            "jain_fairness": round(sum(served) ** 2 / (len(served) * sum(x * x for x in served)), 4)
            if any(served)
            else 0.0,
            "energy_mj_per_inference": round(1e3 * energy / answered, 2) if energy and answered else None,
        },
    )
