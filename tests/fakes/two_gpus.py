"""A site with two GPUs in memory: a Triton whose models run where their configs say, a real arbiter service
with its engines, the real planner, applier and control loop, and GPUs that a test takes away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dstack_backend import wire
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.adapters.edit_journal import FileEditJournal
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.app.arbiter import ArbiterService
from dstack_sched.app.arbiter_plans import ArbiterPlans
from dstack_sched.app.control_loop import ControlLoop
from dstack_sched.app.edits import ConfigEdits
from dstack_sched.app.gpus import GpuGuard, GpuWatch
from dstack_sched.app.health import Health
from dstack_sched.app.host_view import HostView
from dstack_sched.app.planning import PlanOptions
from dstack_sched.app.profiling import ProfilingOptions
from dstack_sched.app.replan import ReplanSettings
from dstack_sched.app.telemetry import ControllerTelemetry, NoBoard, NoMetrics
from dstack_sched.app.watcher import Watcher
from dstack_sched.cli.deployment import Deployment
from dstack_sched.cli.live_steps import LiveSteps
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.engine.registry import make_engine
from dstack_sched.errors import InputError
from fakes.controller import FakeSources
from fakes.gpus import FakeInventory
from fakes.scripted_engine import PlanMemory
from fakes.serving import FakeClock, FakeServer
from fakes.surfaces import GPU, points, profile_set

MODELS = ("a", "b", "c", "d")


def profiles() -> ProfileSet:
    """10 ms at 20%, 4 ms at 100%, whatever the batch size up to 4."""
    grid = points(lambda p, b: 2.5 + 150.0 / p, (20, 40, 60, 100), (1, 2, 4))
    return profile_set(dict.fromkeys(MODELS, grid))


class Arbiter:
    """ports.ArbiterClient onto a service in this process, and the instances that have joined it."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.service = ArbiterService(make_engine, "dstack", PlanMemory(), epoch=1, now_us=0)
        self.instances: dict[int, tuple[str, int]] = {}  # connection -> model, GPU
        self._next = 1

    def request(self, verb: str, **fields: Any) -> dict[str, Any]:
        answers = self.service.received(0, wire.Control({"verb": verb, **fields}), self.clock.now_us())
        (reply,) = [message for connection, message in answers if connection == 0]
        assert isinstance(reply, wire.Reply)
        if not reply.body.get("ok"):
            raise InputError(str(reply.body.get("error")))
        return dict(reply.body)

    def close(self) -> None:
        pass

    def join(self, model: str, gpu: int, gpu_percent: float, batch_size: int) -> int:
        """A new instance; its connection."""
        connection, self._next = self._next, self._next + 1
        join = wire.Join(
            model, f"{model}_{connection}", connection, gpu, gpu_percent, 4, batch_size, 0, False
        )
        self.service.received(connection, join, self.clock.now_us())
        self.instances[connection] = (model, gpu)
        return connection

    def leave(self, connection: int) -> None:
        del self.instances[connection]
        self.service.disconnected(connection, self.clock.now_us())

    def work(self, connection: int, rows: int) -> list[wire.Grant]:
        """Rows wait in an instance; the grants that anybody gets by that."""
        deadline_us = self.clock.now_us() + 60_000
        sent = self.service.received(connection, wire.Work(rows, deadline_us), self.clock.now_us())
        return [message for _, message in sent if isinstance(message, wire.Grant)]

    def engine(self, gpu: int) -> list[str]:
        """The models that the engine of a GPU is planned for."""
        return sorted(self.request("status")["gpus"][str(gpu)]["planned_models"])


class Server(FakeServer):
    """Instances join the arbiter from the GPUs that their config names; those of the version before leave."""

    url = "fake"

    def __init__(
        self, repository: DiskRepository, arbiter: Arbiter, clock: FakeClock, rates: Mapping[str, float]
    ) -> None:
        self.arbiter, self.clock, self.rates = arbiter, clock, rates
        self.dead: set[int] = set()
        super().__init__(repository)
        self.fails = self._why_not

    def load(self, model: str) -> None:
        super().load(model)
        config = self.repository.config(model)
        gpus = config.instance_groups[0].gpus if config.instance_groups else (0, 1)
        old = [c for c, (name, _) in self.arbiter.instances.items() if name == model]
        for gpu in gpus:
            self.arbiter.join(model, gpu, float(config.parameters.get("gpu_percent", 100)), 4)
        for connection in old:
            self.arbiter.leave(connection)

    def _why_not(self, model: str, parameters: Mapping[str, str]) -> str:
        groups = self.repository.config(model).instance_groups
        bad = self.dead & set(groups[0].gpus if groups else (0, 1))
        return f"CUDA: no such device {min(bad)}" if bad else ""

    def statistics(self, model: str) -> dict[str, Any]:
        now = self.clock.now
        self.counts = {name: {"rows": round(rate * now), "failed": 0} for name, rate in self.rates.items()}
        return dict(super().statistics(model))

    def loses(self, gpu: int) -> None:
        """The processes there die, and no new one starts."""
        self.dead.add(gpu)
        for connection in [c for c, (_, on) in self.arbiter.instances.items() if on == gpu]:
            self.arbiter.leave(connection)


class Site(Deployment):
    """A deployment whose processes are the fake server's."""

    @contextmanager
    def edits(self) -> Iterator[ConfigEdits]:
        server: Any = self.server
        with FileEditJournal(self.state, self.repository.root) as journal:
            yield ConfigEdits(self.repository, server, journal, server, server.clock, lambda line: None)


class Steps(LiveSteps):
    """LiveSteps with profiles that are there already."""

    def profile(self, models: Iterable[str]) -> ProfileSet:
        return profiles()


class TwoGpus:
    """All of it. `rates`: rows a second that each model is planned for at the start."""

    def __init__(self, folder: Path, rates: Mapping[str, float]) -> None:
        root = folder / "models"
        for name in MODELS:
            (root / name / "1").mkdir(parents=True)
            (root / name / "1" / "model.onnx").write_bytes(b"onnx")
            (root / name / "config.pbtxt").write_text('backend: "dstack"\nmax_batch_size: 4\n')
        self.clock, self.inventory = FakeClock(), FakeInventory(2, GPU.name)
        self.arbiter = Arbiter(self.clock)
        self.repository = DiskRepository(root)
        self.server = Server(self.repository, self.arbiter, self.clock, rates)
        for name in MODELS:
            self.server.load(name)
        server: Any = self.server
        deployment = Site(self.repository, server, folder / "state")
        deployment.__dict__["arbiter_plans"] = ArbiterPlans(self.arbiter, self.clock)
        self.excluded: set[str] = set()
        self.view = HostView(GpuWatch(self.inventory, self.clock, lambda: self.excluded), self.clock)
        self.log = FileDecisionLog(folder)
        telemetry = ControllerTelemetry(NoMetrics(), NoBoard(), self.clock, {})
        self.health = Health([GpuGuard(self.view.watch)], self.clock, self.log, telemetry.health)
        workload = Workload(tuple(ModelDemand(name, 60.0, rates[name]) for name in MODELS))
        steps = Steps(
            deployment, lambda: workload, ProfilingOptions(), PlanOptions(), health=self.health.check,
            host=self.view,
        )  # fmt: skip
        watcher = Watcher(MODELS, server, FakeSources(), self.clock)
        self.loop = ControlLoop(steps, watcher, self.clock, self.log, telemetry, settings=ReplanSettings())
        self.round = self.loop.once()

    def watch(self, looks: int) -> None:
        """So many seconds of the loop."""
        left = iter(range(looks))
        self.round = self.loop.watch(self.round, 1.0, lambda: next(left, None) is not None)

    def placed(self) -> dict[str, tuple[int, ...]]:
        """Model -> GPUs, as the configs state."""
        return {name: self.repository.config(name).instance_groups[0].gpus for name in MODELS}

    def running(self) -> dict[str, tuple[int, ...]]:
        """Model -> GPUs, as the arbiter sees the instances."""
        found = self.arbiter.instances.values()
        return {name: tuple(sorted(gpu for model, gpu in found if model == name)) for name in MODELS}

    def reasons(self, what: str = "applied") -> list[str]:
        return [entry["reason"] for entry in self.log.last(100) if entry["what"] == what]
