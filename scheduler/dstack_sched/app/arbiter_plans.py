"""Tell the arbiter what to schedule by, a plan with the latency tables behind it; and whether it was told."""

from __future__ import annotations

from typing import Any

from dstack_sched.domain.json_form import CPU_INDEX, gpus_to_json
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import ProfileSet
from dstack_sched.domain.workload import Workload
from dstack_sched.engine.from_plan import engine_plans
from dstack_sched.ports import ArbiterClient, Clock

CPU_DRIVER = "cpu"
UPTIME_STEP_S = 0.1  # what its word on its age may be off, by rounding and the time of the answer


def arbiter_form(plan: Plan, profiles: ProfileSet, workload: Workload) -> dict[str, Any]:
    """The plan as the arbiter's `plan` verb takes it: GPU index -> plan of its engine."""
    plans = engine_plans(plan, profiles, workload)
    if profiles.device.driver == CPU_DRIVER or CPU_INDEX in plans:
        # The instances of a host without a GPU join as CPU_INDEX; a plan of a CPU has nothing elsewhere.
        plans = {CPU_INDEX: plans[CPU_INDEX] if CPU_INDEX in plans else plans[0]}
    return gpus_to_json(plans)


class ArbiterPlans:
    """What the arbiter should know. A new arbiter, or one that was away, is told again with `send`.

    Errors of `tell` and `send`: MachineError when no arbiter answers, InputError when it refuses the plan.
    """

    def __init__(self, arbiter: ArbiterClient, clock: Clock) -> None:
        self.arbiter = arbiter
        self._clock = clock
        self._gpus: dict[str, Any] | None = None
        self._told_at_us: int | None = None

    def tell(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> None:
        """This is the plan in force from now on, whether the arbiter can be told or not."""
        self._gpus = arbiter_form(plan, profiles, workload)
        self._told_at_us = None
        self.send()

    def send(self) -> None:
        """Tell it (again) what it should know; nothing where there is no plan yet."""
        if self._gpus is not None:
            self.arbiter.request("plan", gpus=self._gpus)
            self._told_at_us = self._clock.now_us()

    def missing(self) -> str:
        """Why the arbiter that answers now has to be told, "" where it was. Errors: MachineError."""
        if self._gpus is None:
            return ""
        age_s = float(self.arbiter.request("ping").get("uptime_s", 0.0))
        if self._told_at_us is None:
            return "the arbiter has not been told the plan in force"
        if age_s + UPTIME_STEP_S < (self._clock.now_us() - self._told_at_us) / 1e6:
            return f"another arbiter answers, {age_s:.1f} s old: it has not been told the plan in force"
        return ""

    def close(self) -> None:
        self.arbiter.close()
