"""steps.Steps and watcher.Sources on a real deployment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstack_sched.adapters.correction_store import FileCorrectionStore
from dstack_sched.adapters.model_files import find_models
from dstack_sched.adapters.profile_files import check_models, read_profile_file
from dstack_sched.adapters.profile_store import FileProfileStore
from dstack_sched.adapters.triton_metrics import TritonMetrics
from dstack_sched.app.changes import Reach
from dstack_sched.app.host_view import HostView
from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.app.profiling import ProfilingOptions
from dstack_sched.app.replan import Held
from dstack_sched.cli.common import say, state_dir
from dstack_sched.cli.deployment import Deployment, model_hashes
from dstack_sched.cli.profile import finish, measure_models, probe_settings
from dstack_sched.config import read_workload
from dstack_sched.domain.change import ApplyReport
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import Correction, ProfileSet
from dstack_sched.domain.workload import Workload
from dstack_sched.engine.run_times import Beside, Seen
from dstack_sched.errors import DstackError, InputError


class WorkloadFile:
    """The operator's wishes, read again when the file has changed. Errors (at first): InputError.

    A change that cannot be used is said once, and the last good one stays.
    """

    def __init__(self, path: Path, check: Callable[[Workload, Path], None]) -> None:
        self._path = path
        self._check = check
        self._stamp = self._look()
        self._last = read_workload(path)
        check(self._last, path)

    def read(self) -> Workload:
        """What is wanted now."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                wanted = read_workload(self._path)
                self._check(wanted, self._path)
                self._last = wanted
            except InputError as error:
                say(f"{error}; the workload read before stays")
        return self._last

    def _look(self) -> tuple[int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return (0, 0)
        return (status.st_mtime_ns, status.st_size)


class LiveSteps:
    """See steps.Steps; the deployment is the one that `run` was started for."""

    def __init__(
        self,
        deployment: Deployment,
        wanted: Callable[[], Workload],
        profiling: ProfilingOptions,
        planning: PlanOptions,
        provider: str = "auto",
        health: Callable[[], object] = lambda: None,
        host: HostView | None = None,
        profiles: Path | None = None,
    ) -> None:
        """host: the GPUs to plan with; None: as many as `planning` says. profiles: a file to take latencies
        from; None: they are measured here."""
        self._deployment = deployment
        self._profiling = profiling
        self._planning = planning
        self._provider = provider
        self._corrections = FileCorrectionStore(deployment.state)
        self.wanted = wanted
        self._health = health
        self._host = host
        self._profiles = profiles

    def profile(self, models: Iterable[str]) -> ProfileSet:
        """Stored points are reused. Requests that are served meanwhile disturb the measurement."""
        deployment = self._deployment
        if self._profiles is not None:
            known = read_profile_file(self._profiles).profiles
            check_models(known, model_hashes(deployment.repository, models), str(self._profiles))
            return known
        found = find_models([deployment.repository.root], list(models))
        store = FileProfileStore(deployment.state / "profiles")
        logs = state_dir(deployment.state / "logs")
        usable = self._host.host().usable if self._host else ()
        device = min((gpu.index for gpu in usable), default=0)
        with probe_settings(self._provider, device, logs / "mps.log") as settings:
            results = measure_models(found, store, settings, self._profiling, {})
            return finish(found, results, store, settings, {}, corun=False)

    def plan(self, profiles: ProfileSet, workload: Workload, held: Held, *, lenient: bool) -> Plan:
        names = [model.name for model in workload.models]
        planning = replace(self._planning, held=held, lenient=lenient)
        if held:  # one of several that are weighed: what it carries is wanted, not what else could be had
            planning = replace(planning, rehearsal_trials=min(1, planning.rehearsal_trials))
        else:
            stated = self._deployment.stated_instances(names)
            planning = replace(planning, in_force={name: percent for name, (percent, _) in stated.items()})
        if self._host is not None:
            where = self._deployment.placement(names)
            planning = replace(planning, host=self._host.host(), current=where)
        return make_plan(profiles, workload, planning)

    def reach(self) -> Reach:
        return self._deployment.reach()

    def stated(self, plan: Plan) -> Plan:
        return self._deployment.stated(plan)

    def stated_instances(self, models: Iterable[str]) -> Held:
        return self._deployment.stated_instances(models)

    def tell(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> bool:
        return self._deployment.tell(plan, profiles, workload)

    def apply(self, plan: Plan, reach: Reach) -> ApplyReport:
        notes = self._host.check_clients(plan) if self._host else ()
        report = self._deployment.rewrite(plan, reach)
        if self._host is not None:
            self._host.put_in_force()
        for note in notes if report.loads else ():
            say(note)
        return replace(report, notes=(*report.notes, *notes))

    def check_health(self) -> None:
        self._health()

    def urgent(self) -> str | None:
        return self._host.urgent() if self._host else None

    def corrections(self, profiles: ProfileSet) -> dict[str, Correction]:
        known = self._corrections.read(profiles.device)
        return {name: known[p.sha256] for name, p in profiles.models.items() if p.sha256 in known}

    def keep_corrections(self, profiles: ProfileSet, corrections: Mapping[str, Correction]) -> None:
        rows = {profiles.models[name].sha256: each for name, each in corrections.items()}
        self._corrections.write(profiles.device, rows)


class LiveSources:
    """See watcher.Sources. metrics None: Triton's metrics cannot be read, so backlogs are not known."""

    def __init__(self, deployment: Deployment, metrics: TritonMetrics | None) -> None:
        self._arbiter = deployment.arbiter_plans.arbiter
        self._metrics = metrics

    def waiting(self) -> dict[str, int]:
        return self._metrics.waiting() if self._metrics else {}

    def arbiter_models(self) -> dict[str, Mapping[str, Any]]:
        try:
            return dict(self._arbiter.request("status").get("models", {}))
        except DstackError:
            return {}

    def run_times(self, model: str) -> Sequence[Seen]:
        try:
            return seen_of(self._arbiter.request("run_times", model=model))
        except DstackError:
            return ()


def seen_of(answer: Mapping[str, Any]) -> list[Seen]:
    """The arbiter's answer to `run_times`."""
    return [
        Seen(float(p), int(rows), int(runs), float(p50), float(p99), Beside(*beside) if beside else None)
        for p, rows, runs, p50, p99, beside in answer.get("runs", ())
    ]
