"""A Triton that lives in memory: loads configs from a repository on disk, has stubs, can fail a load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.domain.served_model import UNLOADED_BY_HAND, ServedModel
from dstack_sched.errors import ServerError


class FakeClock:
    """Time that moves only when someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def now_us(self) -> int:
        return int(self.now * 1e6)

    def wall_time_s(self) -> float:
        return 1_800_000_000 + self.now

    def sleep_s(self, seconds: float) -> None:
        self.now += seconds


class FakeServer:
    """ports.ModelServer and ports.StubProcesses. Make-before-break: a failed load leaves the old version."""

    def __init__(self, repository: DiskRepository, *loaded: str) -> None:
        self.repository = repository
        self.in_force: dict[str, Mapping[str, Any]] = {}
        self.loads: list[str] = []
        self.fails: Callable[[str, Mapping[str, str]], str] = lambda model, parameters: ""
        self.stubs: dict[str, int] = {}
        self.lingering: dict[int, int] = {}
        self.linger_polls = 3
        self.counts: dict[str, dict[str, int]] = {}
        self.queue: dict[str, tuple[int, int]] = {}  # model -> requests that left Triton's queue, ns in it
        self.away = False
        self.by_hand: set[str] = set()
        self._version_ns: dict[str, int] = {}
        self._next_pid = 1000
        for model in loaded:
            self.load(model)
        self.loads.clear()

    def load(self, model: str) -> None:
        """As in Triton 2.51 a model whose stub died gets a new one only if its version is newer."""
        self.loads.append(model)
        config = self.repository.config(model)
        why = self.fails(model, config.parameters)
        if why:
            raise ServerError(f"Triton: {model}: load failed: {why}")
        newest_ns, before_ns = self._newest_ns(model), self._version_ns.get(model)
        if model in self.in_force and model not in self.stubs and newest_ns == before_ns:
            return
        self._version_ns[model] = newest_ns
        self.by_hand.discard(model)
        if model in self.stubs:
            self.lingering[self.stubs[model]] = self.linger_polls
        self._next_pid += 1
        self.stubs[model] = self._next_pid
        self.in_force[model] = {
            "backend": config.backend,
            "max_batch_size": 8 if config.max_batch_size is None else config.max_batch_size,
            "parameters": {key: {"string_value": value} for key, value in config.parameters.items()},
        }

    def _newest_ns(self, model: str) -> int:
        files = (self.repository.root / model).rglob("*")
        return max((path.stat().st_mtime_ns for path in files if path.name != "config.pbtxt"), default=0)

    def unload(self, model: str) -> None:
        self.by_hand.add(model)
        self.in_force.pop(model, None)
        self.stubs.pop(model, None)

    def kill_stub(self, model: str) -> None:
        """The model stays READY; its process is gone."""
        del self.stubs[model]

    def restart(self) -> None:
        """As after its death, in explicit mode: nothing is loaded, nothing is known of before."""
        self.away = False
        for known in (self.in_force, self.stubs, self.lingering, self.by_hand, self._version_ns):
            known.clear()

    def is_ready(self) -> bool:
        return not self.away

    def metadata(self) -> Mapping[str, Any]:
        if self.away:
            raise ServerError("Triton: server metadata failed: connection refused")
        return {"name": "fake", "version": "0"}

    def models(self) -> Mapping[str, str]:
        return {m: "READY" if m in self.in_force else "UNAVAILABLE" for m in self.repository.models()}

    def index(self) -> Mapping[str, ServedModel]:
        if self.away:
            raise ServerError("Triton: the repository index failed: connection refused")
        return {
            model: ServedModel(
                state, UNLOADED_BY_HAND if model in self.by_hand else "", int(state == "READY")
            )
            for model, state in self.models().items()
        }

    def is_model_ready(self, model: str) -> bool:
        return model in self.in_force

    def config(self, model: str) -> Mapping[str, Any]:
        if model not in self.in_force:
            raise ServerError(f"Triton: {model}: not loaded")
        return self.in_force[model]

    def statistics(self, model: str) -> Mapping[str, Any]:
        names = [model] if model else list(self.in_force)
        return {"model_stats": [self._entry(name) for name in names]}

    def _entry(self, model: str) -> dict[str, Any]:
        counts = self.counts.get(model, {"rows": 0, "failed": 0})
        queued, queue_ns = self.queue.get(model, (0, 0))
        return {
            "name": model,
            "version": "1",
            "inference_count": counts["rows"],
            "inference_stats": {
                "success": {"count": counts["rows"], "ns": 0},
                "fail": {"count": counts["failed"], "ns": 0},
                "queue": {"count": queued, "ns": queue_ns},
            },
        }

    def pids(self, model: str) -> frozenset[int] | None:
        return frozenset({self.stubs[model]} if model in self.stubs else ())

    def alive(self, pids: frozenset[int]) -> frozenset[int]:
        for pid in pids & self.lingering.keys():
            self.lingering[pid] -= 1
        return frozenset(pid for pid in pids if self.lingering.get(pid, 0) > 0 or pid in self.stubs.values())

    def all_pids(self) -> frozenset[int]:
        return frozenset(self.stubs.values())

    def kill(self, pids: frozenset[int]) -> None:
        self.stubs = {model: pid for model, pid in self.stubs.items() if pid not in pids}

    def blind_reason(self) -> str:
        return ""
