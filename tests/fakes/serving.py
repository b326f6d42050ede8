"""A Triton that lives in memory: loads configs from a repository on disk, has stubs, can fail a load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.domain.served_model import ServedModel
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
        self._next_pid = 1000
        for model in loaded:
            self.load(model)
        self.loads.clear()

    def load(self, model: str) -> None:
        self.loads.append(model)
        config = self.repository.config(model)
        why = self.fails(model, config.parameters)
        if why:
            raise ServerError(f"Triton: {model}: load failed: {why}")
        if model in self.stubs:
            self.lingering[self.stubs[model]] = self.linger_polls
        self._next_pid += 1
        self.stubs[model] = self._next_pid
        self.in_force[model] = {
            "max_batch_size": 8 if config.max_batch_size is None else config.max_batch_size,
            "parameters": {key: {"string_value": value} for key, value in config.parameters.items()},
        }

    def unload(self, model: str) -> None:
        self.in_force.pop(model, None)
        self.stubs.pop(model, None)

    def is_ready(self) -> bool:
        return True

    def metadata(self) -> Mapping[str, Any]:
        return {"name": "fake", "version": "0"}

    def models(self) -> Mapping[str, str]:
        return {m: "READY" if m in self.in_force else "UNAVAILABLE" for m in self.repository.models()}

    def index(self) -> Mapping[str, ServedModel]:
        return {
            model: ServedModel(state, "", int(state == "READY")) for model, state in self.models().items()
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
        return {
            "name": model,
            "version": "1",
            "inference_count": counts["rows"],
            "inference_stats": {
                "success": {"count": counts["rows"], "ns": 0},
                "fail": {"count": counts["failed"], "ns": 0},
            },
        }

    def pids(self, model: str) -> frozenset[int] | None:
        return frozenset({self.stubs[model]} if model in self.stubs else ())

    def alive(self, pids: frozenset[int]) -> frozenset[int]:
        for pid in pids & self.lingering.keys():
            self.lingering[pid] -= 1
        return frozenset(pid for pid in pids if self.lingering.get(pid, 0) > 0 or pid in self.stubs.values())

    def blind_reason(self) -> str:
        return ""
