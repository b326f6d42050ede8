"""One Triton with its repository, arbiter and profiles, wired for the verbs that change it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from dstack_backend.endpoint import socket_path
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.edit_journal import FileEditJournal
from dstack_sched.adapters.model_files import find_models
from dstack_sched.adapters.profile_store import FileProfileStore, model_sha256
from dstack_sched.adapters.pushed_repository import PushedRepository, PushingClient
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.adapters.stub_processes import LocalStubProcesses
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.app.apply import Applier, stated_instances, stated_plan
from dstack_sched.app.arbiter_plans import ArbiterPlans
from dstack_sched.app.changes import Reach
from dstack_sched.app.edits import ConfigEdits
from dstack_sched.cli.common import say
from dstack_sched.domain.change import ApplyReport
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import Device, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import DstackError, InputError, MachineError

OTHERS_END_WITHIN_S = 30.0  # `serve` and `run` reload what died, which takes a moment


Repository: TypeAlias = DiskRepository | PushedRepository

PushOption = Annotated[
    bool,
    typer.Option(
        "--push",
        help="Hand each config to Triton with its load and write no file: for a repository that is not on a "
        "path here. It replaces the one there as a whole, and a restart of Triton forgets it.",
    ),
]


@dataclass(frozen=True)
class Deployment:
    """Where everything is. `url`: HOST:PORT of Triton's gRPC; `socket` None: the host's usual arbiter."""

    repository: Repository
    server: TritonClient
    state: Path
    socket: Path | None = None

    @cached_property
    def arbiter_plans(self) -> ArbiterPlans:
        """What the arbiter was told last."""
        return ArbiterPlans(SocketArbiterClient(self.socket or socket_path()), SystemClock())

    def apply(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> ApplyReport:
        """Finish what an earlier controller left, put the plan in force, and tell the arbiter.

        Errors: InputError with all as before; MachineError while another controller is at it.
        """
        report = self.rewrite(plan, self.reach())
        self.tell(plan, profiles, workload)
        return report

    def rewrite(self, plan: Plan, reach: Reach) -> ApplyReport:
        """State the plan in the configs, with the loads that it needs beyond what instances are told
        (`reach`).

        Errors: InputError with all as before; MachineError while another controller is at it.
        """
        with self.edits() as edits:
            report = Applier(self.repository, self.server, edits).apply(plan, reach)
        for note in report.notes:
            say(note)
        return report

    def reach(self) -> Reach:
        """What running instances can be told now."""
        try:
            instances = self.arbiter_plans.arbiter.request("status")["backends"]
        except DstackError:
            return Reach(arbiter=False)
        return Reach.to(instances)

    def recover(self) -> None:
        """Finish or undo what an earlier controller left. Errors: MachineError while another one is at it."""
        with self.edits():
            pass

    @contextmanager
    def edits(self) -> Iterator[ConfigEdits]:
        """The only one at work on this repository, with nothing half done behind it.

        Errors: MachineError for a Triton that takes no loads, or while another one is at it.
        """
        if not self.server.takes_loads():
            raise MachineError(
                f"Triton at {self.server.url} takes no loads (POLL or NONE mode): start it with "
                "--model-control-mode=explicit"
            )
        with locked_edits(self.repository, self.server, self.state) as edits:
            yield edits

    def tell(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> bool:
        """The plan as the engines take it. Trouble here is said only: without an arbiter the models run
        ungated, and one that refuses a plan keeps its old one. Whether it was told."""
        try:
            self.arbiter_plans.tell(plan, profiles, workload)
        except MachineError as error:
            say(f"{error}; until then models run ungated at their GPU%")
            return False
        except InputError as error:
            say(f"{error}; the arbiter keeps its old plan")
            return False
        return True

    def stated(self, plan: Plan) -> Plan:
        return stated_plan(self.repository, plan)

    def placement(self, models: Iterable[str]) -> dict[str, frozenset[int]]:
        """Model -> the GPUs that its config names; {} of those that leave it to Triton."""
        present = self.repository.models()
        groups = {name: self.repository.config(name).instance_groups for name in models if name in present}
        return {name: frozenset(gpu for each in found for gpu in each.gpus) for name, found in groups.items()}

    def stated_instances(self, models: Iterable[str]) -> dict[str, tuple[float, int]]:
        """Model -> GPU% and instances that its config states; those whose config does not are left out."""
        present = self.repository.models()
        configs = {name: self.repository.config(name) for name in models if name in present}
        return {name: held for name, config in configs.items() if (held := stated_instances(config))[0] > 0}


@contextmanager
def locked_edits(repository: Repository, server: TritonClient | None, state: Path) -> Iterator[ConfigEdits]:
    """Deployment.edits; without a server, for edits that touch files only."""
    stubs = LocalStubProcesses(server.url if server else "")
    with FileEditJournal(state, repository.root, wait_s=OTHERS_END_WITHIN_S) as journal:
        repository.sweep()
        edits = ConfigEdits(repository, server, journal, stubs, SystemClock(), say_progress)
        for line in edits.recover():
            say(line)
        try:
            yield edits
        finally:
            if not edits.unfinished():  # else the next start may adopt a model after all
                repository.drop_unneeded_originals()


def say_progress(line: str) -> None:
    """For people who wait: nothing where stderr is not a terminal."""
    if sys.stderr.isatty():
        say(line)


@contextmanager
def connected(
    connection: ConnectionOptions, named: Path | None, state: Path, *, push: bool
) -> Iterator[tuple[Repository, TritonClient]]:
    """The Triton at a URL and its repository: the one named, else the one that it serves if that is visible
    here, else (or with `push`) none: configs then travel with the loads.

    Errors: InputError for a repository that cannot be used, MachineError where no Triton answers.
    """
    if push and named is not None:
        raise InputError(f"--push writes no file: leave out {named}, or --push")
    repository = None if push else visible_repository(connection.url, named)
    if repository is not None:
        with TritonClient(connection) as server:
            server.require_ready()
            yield repository, server
        return
    pushing = PushingClient(connection)
    with pushing:
        pushing.require_ready()
        if not push:
            say(
                f"the repository of Triton at {connection.url} is not visible here: configs are pushed with "
                "each load (as with --push)"
            )
        yield PushedRepository(pushing, state / "pushed"), pushing


def visible_repository(url: str, named: Path | None) -> DiskRepository | None:
    """The repository named, else the one that the Triton at `url` serves; None where it is not to be seen."""
    if named is not None:
        return DiskRepository(named)
    found = LocalStubProcesses(url).repositories()
    if len(found) > 1:
        raise InputError(
            f"Triton at {url} serves {', '.join(map(str, found))}: name the one with the models of the plan"
        )
    return DiskRepository(found[0]) if found and found[0].is_dir() else None


def demand_of(plan: Plan) -> Workload:
    """The workload that a plan was made for, as its rows repeat it."""
    return Workload(
        tuple(
            ModelDemand(name, row.slo_ms, row.rate_per_s, row.weight, row.on_late)
            for name, row in plan.models.items()
        )
    )


def model_hashes(repository: Repository, models: Iterable[str]) -> dict[str, str]:
    """Model -> sha256 of the file that is served (with its external weights); {} where none is visible."""
    if isinstance(repository, PushedRepository):
        return {}
    return {model.name: model_sha256(model.path) for model in find_models([repository.root], list(models))}


def stored_profiles(state: Path, plan: Plan, hashes: dict[str, str]) -> ProfileSet:
    """What the profile store knows of these models on the plan's device; empty where it knows nothing.

    One store may know several devices of one name (another driver, another runtime): the one with most of
    the models is taken.
    """
    store = FileProfileStore(state / "profiles")
    name = plan.gpus[0] if plan.gpus else ""
    wanted = set(hashes.values())
    known: dict[Device, int] = {}
    for device, profile in store.profiles():
        if profile.sha256 in wanted and (not name or device.name == name):
            known[device] = known.get(device, 0) + 1
    if not known:
        return ProfileSet(Device(name, 1, 1, "", ""), {})
    return store.export(max(known, key=lambda device: known[device]), hashes)
