"""One model instance, put together: settings -> session -> gate -> executor. Knows no Triton."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from dstack_backend import wire
from dstack_backend.device_watch import DeviceWatch
from dstack_backend.endpoint import socket_path
from dstack_backend.errors import BackendError, ModelError
from dstack_backend.executor import Executor, monotonic_us
from dstack_backend.gate import ArbiterGate
from dstack_backend.interfaces import Request
from dstack_backend.pipeline import Pipeline
from dstack_backend.runtime import PROVIDERS, CpuSession, load_session
from dstack_backend.session import Session, ladder
from dstack_backend.settings import Settings, parameter_texts, parse_settings
from dstack_backend.settings import model_path as path_of_model
from dstack_backend.signature import Completion, check_config, complete, is_complete, sample
from dstack_backend.staging import Staging
from dstack_backend.stats import Stats, Window

WARM_UP_S = 3.0  # before an instance is ready; where cuDNN compiles for each batch size, some follow later
EXIT_LOST = 70  # the process ends because its device is gone; Triton sees a dead stub

log = logging.getLogger("dstack")


class Instance:
    """A loaded model with its queue. Raises ModelError, DeviceError while it is made; then serves."""

    def __init__(self, args: Mapping[str, str]):
        config = json.loads(args["model_config"])
        self.settings, warnings = parse_settings(args)
        for warning in warnings:
            log.warning("%s", warning)
        settings = self.settings
        refuse_decoupled(config, settings.model)
        self.stats = Stats()
        self.before_end: Callable[[], None] = lambda: None
        self._window = Window(self.stats, monotonic_us())
        self._session = load_session(
            settings.model_path,
            provider=settings.provider,
            gpu_percent=settings.gpu_percent,
            device_id=max(settings.device_id, 0),
            **(settings.cuda if settings.provider == "cuda" else {}),
        )
        try:
            check_config(config, self._session, settings.model)
            warm_up(self._session, settings)
            self._executor = self._make_executor()
            self._executor.start()
            self._watch = DeviceWatch(self._session, self._executor, self.stats)
            if settings.provider == "cuda":
                self._watch.start()
        except BaseException:
            self._session.close()
            raise

    def _make_executor(self) -> Executor:
        settings = self.settings
        return Executor(
            Pipeline(self._session, Staging(settings.batch_size, self._session.allocate)),
            ArbiterGate(
                socket_path(),
                join_message(settings, self._session),
                stats=self.stats,
                telemetry=self.telemetry,
            ),
            batched=settings.max_batch_size > 0,
            batch_size=settings.batch_size,
            slo_us=settings.slo_us,
            reject_late=settings.reject_late,
            prefetch=settings.prefetch,
            overlap=settings.provider == "cuda",
            stats=self.stats,
            on_lost=self._end,
        )

    def _end(self) -> None:
        """The device is lost and all is answered: nothing of ours may be inside a call of Triton's now."""
        try:
            self.before_end()
        finally:
            os._exit(EXIT_LOST)

    def gauges(self) -> dict[str, float]:
        """What metrics show of the instance beside its counters."""
        return {
            "gpu_share_ratio": self.settings.gpu_percent / 100,
            "batch_size_rows": self._executor.batch_size,
            "slo_seconds": self._executor.slo_us / 1e6,
            "cuda_graphs": self._session.graphs,
            "preparing_programs": self._session.preparing,
            "device_memory_bytes": self._session.device_bytes,
        }

    def telemetry(self) -> dict[str, Any]:
        """What the arbiter is told once a second: see Window.look, and what the session holds."""
        session = self._session
        return self._window.look(monotonic_us()) | {
            "cuda_graphs": session.graphs,
            "levels": list(session.levels),
            "sm_groups": session.groups,
            "device_bytes": session.device_bytes,
        }

    def submit(self, requests: Iterable[Request]) -> None:
        self._executor.submit(requests)

    def close(self) -> None:
        """Answer everything accepted, stop, free the device."""
        self._watch.stop()
        self._executor.close()
        self._session.close()


def join_message(settings: Settings, session: Session) -> wire.Join:
    """How the instance presents itself to the arbiter. Its name is unique over versions and reloads."""
    return wire.Join(
        model=settings.model,
        instance=f"{settings.instance}.v{settings.version}.{os.getpid()}",
        pid=os.getpid(),
        gpu=settings.device_id,
        gpu_percent=settings.gpu_percent,
        max_batch_size=max(1, settings.max_batch_size),
        batch_size=settings.batch_size,
        slo_us=settings.slo_us,
        reject_late=settings.reject_late,
        levels=tuple(session.levels),
        sm_groups=session.groups,
    )


def warm_up(session: Session, settings: Settings) -> None:
    """Prepare the device for batches up to batch_size, before the instance is ready.

    On the CPU: a run of one row and one of a whole batch, where the graph fixes all other dimensions; a model
    that does not like zeros is warmed by its first request.
    """
    if isinstance(session, CpuSession):
        _warm_cpu(session, settings)
    else:
        session.warm_up(ladder(settings.batch_size), within_s=WARM_UP_S)


def _warm_cpu(session: CpuSession, settings: Settings) -> None:
    inputs = [spec for spec in session.inputs if not spec.optional]
    if any(None in spec.shape[1:] or spec.dtype == "tensor(string)" for spec in inputs):
        return
    for rows in sorted({1, settings.batch_size}):
        try:
            session.run({spec.name: sample(spec, rows) for spec in inputs})
        except BackendError as error:
            log.info("model %r: warm-up with %d rows of zeros failed: %s", settings.model, rows, error)
            return


def complete_config(config: Mapping[str, Any], version_dir: Path) -> Completion:
    """What auto-complete adds to a config, read from the model file of a version."""
    texts, _ = parameter_texts(config, config["name"])
    if is_complete(config):
        return Completion(int(config["max_batch_size"]), (), ())
    path = path_of_model(version_dir, config, texts)
    session = _look_at(path)
    try:
        return complete(config, session)
    finally:
        session.close()


def check_model(config: Mapping[str, Any], version_dir: Path) -> None:
    """What loading a version under this config would refuse, as far as it shows without a device: parameters,
    the model file, the config against the graph. Raises BackendError."""
    model, version = config["name"], version_dir.name
    refuse_decoupled(config, model)
    texts, _ = parameter_texts(config, model)
    session = _look_at(path_of_model(version_dir, config, texts))
    try:
        completion = complete(config, session)
        completed = {
            **config,
            "max_batch_size": completion.max_batch_size,
            "input": merged(config.get("input", ()), completion.inputs),
            "output": merged(config.get("output", ()), completion.outputs),
        }
        for kind in {group["kind"] for group in config.get("instance_group", ())} or {"KIND_AUTO"}:
            parse_settings(
                {
                    "model_config": json.dumps(completed),
                    "model_name": model,
                    "model_version": version,
                    "model_instance_name": model,
                    "model_instance_kind": "GPU" if kind == "KIND_GPU" else kind.replace("AUTO", "CPU"),
                    "model_instance_device_id": "0",
                    "model_repository": str(version_dir.parent),
                }
            )
        check_config(completed, session, model)
    finally:
        session.close()


def merged(
    stated: Iterable[Mapping[str, Any]], completed: Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Stated tensors, the incomplete ones completed, and those that only completion names."""
    by_name = {tensor["name"]: tensor for tensor in [*stated, *completed]}
    return list(by_name.values())


def refuse_decoupled(config: Mapping[str, Any], model: str) -> None:
    if (config.get("model_transaction_policy") or {}).get("decoupled"):
        raise ModelError(
            f"model {model!r}: a decoupled model cannot be served; drop model_transaction_policy"
        )


def _look_at(path: Path) -> Session:
    """The graph, on the CPU provider; on CUDA where it has operators that only CUDA knows."""
    try:
        return CpuSession(path, threads=1, optimize=False)
    except ModelError:
        if PROVIDERS["cuda"] not in ort.get_available_providers():
            raise
    return load_session(path, provider="cuda", gpu_percent=100, cuda_graphs=False)
