"""What a plan is made from: options, profiles and workload, checked and brought into one `Case`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dstack_sched.domain.gpu import HostGpus, mps_client_limit
from dstack_sched.domain.profile import Device, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import InputError
from dstack_sched.policy.candidates import JointTask
from dstack_sched.policy.interference import Interference, interference_of, measured_capacity_percent
from dstack_sched.policy.joint_program import JointSetting
from dstack_sched.policy.latency import LatencySurface
from dstack_sched.policy.runnable import CPU_DRIVER, runnable_grid

CPU_INDEX = -1
_JOINT_STEP_PERCENT = 5

Objective = Literal["demand", "efficacy"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """How to plan.

    gpus: of the profiled kind (with minimize_gpus: at most so many). host: the GPUs that there are, in place
    of `gpus`; current: where the models run now, so that they stay there if they can. capacity_percent: what
    may be promised at once; None: the measured oversubscription, at least 100. objective "efficacy" takes
    each model's batch program alone and only places the results. time_limit_s: for each integer program.
    memory_limits: bound each instance's GPU memory, with room above what was measured. memory_bytes: of
    each GPU, None: all of the profiled device's. clients_of_others: MPS clients not ours, on each GPU.
    held: model -> (GPU%, instances) that stay as they are. lenient: an SLO below the fastest run makes a
    plan that does not fit, no error. rehearsal_trials: simulations of each GPU in which better shares are
    sought (planning_rehearsal.py), 0: none. in_force: model -> the GPU% that it has now, which a rehearsal
    leaves where no others are better.
    """

    objective: Objective = "demand"
    gpus: int = 1
    minimize_gpus: bool = False
    maximize_headroom: bool = False
    capacity_percent: float | None = None
    time_limit_s: float = 2.0
    host: HostGpus | None = None
    current: Mapping[str, Collection[int]] = field(default_factory=dict)
    memory_limits: bool = False
    memory_bytes: int | None = None
    clients_of_others: int = 0
    held: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    lenient: bool = False
    rehearsal_trials: int = 0
    in_force: Mapping[str, float] = field(default_factory=dict)


DEFAULT_OPTIONS = PlanOptions()
REHEARSAL_TRIALS = 50
# Of the control loop (decisions/0124, 0127).
CONTROL_OPTIONS = PlanOptions(maximize_headroom=True, rehearsal_trials=REHEARSAL_TRIALS)


@dataclass(frozen=True, slots=True)
class Case:
    """Everything a plan is made from."""

    device: Device
    demands: Mapping[str, ModelDemand]
    attainment: float
    tasks: tuple[JointTask, ...]
    interference: Interference
    capacities: tuple[float, ...]
    options: PlanOptions

    def setting(self) -> JointSetting:
        return JointSetting(
            gpus=self.options.gpus,
            memory_bytes=min(self.device.memory_bytes, self.options.memory_bytes or self.device.memory_bytes),
            interference=self.interference,
            capacities=self.capacities,
            max_clients=max(1, mps_client_limit(self.device.driver) - self.options.clients_of_others),
            time_limit_s=self.options.time_limit_s,
        )


def make_case(profiles: ProfileSet, workload: Workload, options: PlanOptions) -> Case:
    """Errors: InputError for a model without a profile, or an option out of range."""
    if options.gpus < 1:
        raise InputError(f"--gpus is {options.gpus}; at least 1 is wanted")
    if options.minimize_gpus and options.maximize_headroom:
        raise InputError("--minimize gpus and --maximize headroom are two goals; name one")
    if options.objective == "efficacy" and (options.minimize_gpus or options.maximize_headroom):
        raise InputError(
            "--objective efficacy plans each model by itself; leave --minimize and --maximize out"
        )
    if options.objective == "efficacy" and options.rehearsal_trials:
        raise InputError("--objective efficacy plans each model by itself; leave --rehearse out")
    if options.capacity_percent is not None and not 0 < options.capacity_percent < math.inf:
        raise InputError(f"--capacity is {options.capacity_percent:g}; a percentage above 0 is wanted")
    if not workload.models:
        raise InputError("the workload has no models")
    cpu = profiles.device.driver == CPU_DRIVER
    if cpu and options.gpus > 1:
        raise InputError(f"--gpus is {options.gpus}, but the profiles are of a CPU ({profiles.device.name})")
    for demand in workload.models:
        if demand.name not in profiles.models:
            known = ", ".join(sorted(profiles.models))
            raise InputError(
                f"{demand.name}: no profile; the profiles hold {known}; run `dstackctl profile {demand.name}`"
            )
    surfaces = {d.name: LatencySurface.from_profile(profiles.models[d.name]) for d in workload.models}
    others = {n: LatencySurface.from_profile(p) for n, p in profiles.models.items() if n not in surfaces}
    tasks = tuple(
        JointTask(
            surface=surfaces[d.name],
            slo_ms=d.slo_ms,
            rate_per_s=d.rate_per_s,
            weight=d.weight,
            memory_bytes=profiles.models[d.name].memory_bytes,
            grid=runnable_grid(
                surfaces[d.name],
                profiles.device,
                step_percent=1 if options.objective == "efficacy" else _JOINT_STEP_PERCENT,
                held_percent=options.held[d.name][0] if d.name in options.held else None,
            ),
            replicas=options.held[d.name][1] if d.name in options.held else None,
        )
        for d in workload.models
    )
    measured = 100.0 if cpu else measured_capacity_percent(profiles.corun)
    top = measured if options.capacity_percent is None else options.capacity_percent
    return Case(
        device=profiles.device,
        demands={d.name: d for d in workload.models},
        attainment=workload.attainment,
        tasks=tasks,
        interference=interference_of(profiles, {**others, **surfaces}),
        capacities=tuple(sorted({100.0, top})) if top > 100 else (top,),
        options=options,
    )


def notes(case: Case) -> tuple[str, ...]:
    """What the user should know of the data behind the plan, one line each."""
    lines: list[str] = []
    for task in case.tasks:
        surface = task.surface
        if surface.kind == "grid":
            lines.append(
                f"{surface.name}: the fit misses a point by {100 * surface.fit_error:.0f}%, "
                "planned on the measured grid"
            )
        lines += surface.unknown
    after = case.interference.after
    if after is not None and case.interference.before is not None:
        lines.append(
            f"interference: mean error on the measured co-runs {100 * after.mean:.0f}%, "
            f"{100 * case.interference.before.mean:.0f}% without the model"
        )
    elif case.device.driver != CPU_DRIVER and len(case.tasks) > 1:
        lines.append("interference: no co-runs measured, so none is assumed")
    return tuple(lines)


def gpu_names(case: Case, gpus: int) -> tuple[str, ...]:
    """Plan.gpus: a CPU host is one device, whatever it is cut into."""
    return (case.device.name,) * (1 if case.device.driver == CPU_DRIVER else gpus)


def gpu_index(case: Case, gpu: int) -> int:
    """ModelPlan.gpu: CPU_INDEX on a CPU host."""
    return CPU_INDEX if case.device.driver == CPU_DRIVER else gpu
