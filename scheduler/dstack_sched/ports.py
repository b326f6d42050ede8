"""What the use cases need of the world, as Protocols. Adapters implement them; tests bring fakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dstack_sched.domain.adoption import ModelFacts, Original, Suitability
from dstack_sched.domain.change import ConfigEdit
from dstack_sched.domain.gpu import GpuReading
from dstack_sched.domain.metrics import Metric
from dstack_sched.domain.model_config import ConfigChange, ModelConfig
from dstack_sched.domain.profile import CorunPoint, Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.served_model import ServedModel


class Clock(Protocol):
    """Time. `now_us` is CLOCK_MONOTONIC; `wall_time_s` is for records people read."""

    def now_us(self) -> int: ...
    def wall_time_s(self) -> float: ...
    def sleep_s(self, seconds: float) -> None: ...


class ModelServer(Protocol):
    """A running Triton, reached over gRPC. Errors: ServerError."""

    def is_ready(self) -> bool: ...
    def metadata(self) -> Mapping[str, Any]: ...
    def models(self) -> Mapping[str, str]:
        """Model name -> state ("READY", "UNAVAILABLE", ...) of everything in the repository index."""
        ...

    def index(self) -> Mapping[str, ServedModel]:
        """Everything in the repository index, with reasons."""
        ...

    def is_model_ready(self, model: str) -> bool: ...
    def config(self, model: str) -> Mapping[str, Any]: ...
    def statistics(self, model: str) -> Mapping[str, Any]: ...
    def load(self, model: str) -> None: ...
    def unload(self, model: str) -> None: ...


class ProfileStore(Protocol):
    """Profiles kept by model hash and device; co-run members are named by hash here.

    Errors: InputError for a file that cannot be used."""

    def get(self, sha256: str, device: Device) -> ModelProfile | None: ...
    def put(self, profile: ModelProfile, device: Device) -> None: ...
    def corun(self, device: Device) -> tuple[CorunPoint, ...]: ...
    def put_corun(self, points: Iterable[CorunPoint], device: Device) -> None: ...
    def export(self, device: Device, hashes: Mapping[str, str]) -> ProfileSet:
        """The profiles of the named models (name -> sha256), as profiles.json would hold them."""
        ...


class LatencyProbe(Protocol):
    """Measures one model with the backend's own runtime, at chosen points. Close it to free the device.

    Errors: MachineError for a worker that dies or stays silent, InputError where the model cannot run so.
    """

    def device(self) -> Device: ...
    def prepare(self, gpu_percents: Iterable[float], batch_sizes: Iterable[int] = ()) -> None:
        """Make these GPU% ready to measure, all together: that is faster than one after the other.

        batch_sizes are made ready and kept, too; others are made ready, and forgotten, one at a time."""
        ...

    def measure(self, gpu_percent: float, batch_size: int) -> ProfilePoint: ...
    def memory_bytes(self) -> int:
        """The most that one instance of the model held so far."""
        ...

    def close(self) -> None: ...


class MpsControl(Protocol):
    """The MPS daemon of this host. On a host without a GPU `available` is False."""

    def available(self) -> bool: ...
    def running(self) -> bool: ...
    def start(self) -> Mapping[str, str]:
        """Start it if need be; returns the environment that clients need."""
        ...

    def stop(self) -> None: ...


class GpuInventory(Protocol):
    """The GPUs of this host, in CUDA's order; () where there is none. Errors: MachineError."""

    def read(self) -> tuple[GpuReading, ...]: ...
    def close(self) -> None: ...


class ArbiterClient(Protocol):
    """The controller's line to the arbiter. Errors: MachineError when nobody answers."""

    def request(self, verb: str, **fields: Any) -> dict[str, Any]: ...
    def close(self) -> None: ...


class ModelRepository(Protocol):
    """A Triton model repository on disk. Errors: InputError, one line that names the file.

    Texts are UTF-8 with surrogateescape, so that bytes of any kind survive; None means no config file.
    `name` is what people call it.
    """

    root: Path
    name: str

    def models(self) -> tuple[str, ...]: ...
    def config_path(self, model: str) -> Path: ...
    def read_config(self, model: str) -> str | None: ...
    def write_config(self, model: str, text: str | None) -> None:
        """Atomic, and newer than what was there: Triton reloads by time stamp. None removes the file."""
        ...

    def config(self, model: str) -> ModelConfig:
        """What the config states of interest to us; the defaults where there is no file."""
        ...

    def edited(self, model: str, change: ConfigChange) -> str:
        """The config text with a change in it, all else byte for byte; nothing is written."""
        ...

    def make_newer(self, model: str) -> None:
        """Time stamps of the model's versions grow, so that the next load starts new processes; no content
        changes. Errors: InputError where that cannot be done (a read-only file system)."""
        ...

    def check_writable(self, model: str) -> None:
        """Errors: InputError where write_config could not work. Changes nothing."""
        ...


class AdoptableRepository(ModelRepository, Protocol):
    """A repository that keeps the originals of adopted configs, in itself and crash-safe."""

    def adopted(self) -> tuple[str, ...]: ...
    def original(self, model: str) -> Original | None:
        """None for a model that is as it was, or was never adopted."""
        ...

    def keep_originals(self, originals: Mapping[str, tuple[str | None, bool | None]]) -> None:
        """Model -> its config, and whether the server serves it (None: unknown). On disk when it returns."""
        ...

    def drop_unneeded_originals(self) -> None: ...


class ModelLook(Protocol):
    """What a model is, told by its files. Errors: InputError, one line that names the file and the fault."""

    def facts(self, model: str) -> ModelFacts: ...
    def check(self, facts: ModelFacts, found: Suitability) -> None:
        """Raises where the dstack backend could not serve its versions under its config."""
        ...


class EditJournal(Protocol):
    """The rewrites of one plan under way, on disk, so that a controller that died can be cleaned up after."""

    def begin(self, edits: Iterable[ConfigEdit]) -> None:
        """Replaces what was there; on disk when it returns."""
        ...

    def end(self) -> None: ...
    def pending(self) -> tuple[ConfigEdit, ...]: ...


class StubProcesses(Protocol):
    """The stub processes of the models of a Triton on this host."""

    def pids(self, model: str) -> frozenset[int] | None:
        """Process ids of a model's stubs; None where they cannot be seen, say why in `blind_reason`."""
        ...

    def alive(self, pids: frozenset[int]) -> frozenset[int]: ...
    def all_pids(self) -> frozenset[int]:
        """Process ids of all its stubs; empty where they cannot be seen."""
        ...

    def kill(self, pids: frozenset[int]) -> None:
        """End those of them that are stubs of this server, at once. Others are left alone."""
        ...

    def blind_reason(self) -> str: ...


class DecisionLog(Protocol):
    """What the controller decided and why: plain JSON objects, oldest first. Never fails: what cannot be
    written is lost, and said."""

    def append(self, entry: dict[str, Any]) -> None: ...
    def last(self, count: int) -> list[dict[str, Any]]: ...


class Metrics(Protocol):
    """Counters, gauges and histograms of the table in domain.metrics. Thread-safe; never blocks, never fails
    for a metric of the table with its labels.

    metrics.count(FAULTS, kind="stub_death", subject="resnet50")
    """

    def count(self, metric: Metric, by: float = 1.0, **labels: str) -> None:
        """Add to a counter; by >= 0."""
        ...

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        ...

    def replace(self, metric: Metric, values: Mapping[tuple[str, ...], float]) -> None:
        """Set every series of a gauge: label values in the table's order -> value. Those not named go."""
        ...


class StatusBoard(Protocol):
    """Where the controller says what it sees, for `dstackctl status`. Never fails."""

    def write(self, document: Mapping[str, Any]) -> None:
        """Replace what it said before. Plain JSON types."""
        ...
