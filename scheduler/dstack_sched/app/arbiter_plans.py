"""Tell the arbiter what to schedule by: a plan, with the latency tables behind it."""

from __future__ import annotations

from dstack_sched.domain.json_form import CPU_INDEX, gpus_to_json
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import Workload
from dstack_sched.engine.from_plan import engine_plans
from dstack_sched.ports import ArbiterClient

CPU_DRIVER = "cpu"


def send_plans(arbiter: ArbiterClient, plan: Plan, profiles: ProfileSet, workload: Workload) -> None:
    """Errors: MachineError when no arbiter answers, InputError when it refuses the plan."""
    plans = engine_plans(plan, profiles, workload)
    if profiles.device.driver == CPU_DRIVER or CPU_INDEX in plans:
        # The instances of a host without a GPU join as CPU_INDEX; a plan of a CPU has nothing elsewhere.
        plans = {CPU_INDEX: plans[CPU_INDEX] if CPU_INDEX in plans else plans[0]}
    arbiter.request("plan", gpus=gpus_to_json(plans))
