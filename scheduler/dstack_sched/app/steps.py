"""What the control loop has done for it, as a Protocol; cli/live_steps.py does it on a real deployment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from dstack_sched.app.changes import Reach
from dstack_sched.app.replan import Held
from dstack_sched.domain.change import ApplyReport
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import Correction, ProfileSet
from dstack_sched.domain.workload import Workload


class Steps(Protocol):
    """What the loop has done for it. Errors: any DstackError; what it was about then stays as it was."""

    def wanted(self) -> Workload:
        """What the operator wants now: the workload file, read again when it has changed."""
        ...

    def profile(self, models: Iterable[str]) -> ProfileSet:
        """Profiles of these models on this device; measured where they are not stored yet."""
        ...

    def plan(self, profiles: ProfileSet, workload: Workload, held: Held, *, lenient: bool) -> Plan:
        """held: what models keep of what is in force. lenient: an SLO below the fastest run is no error."""
        ...

    def reach(self) -> Reach:
        """What running instances can be told now."""
        ...

    def stated(self, plan: Plan) -> Plan:
        """The plan with what the configs state now in place of its own; models without that are left out."""
        ...

    def stated_instances(self, models: Iterable[str]) -> Held:
        """Model -> GPU% and instances that its config states; those whose config does not are left out."""
        ...

    def tell(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> bool:
        """Tell the arbiter; False where none answers or it refuses: health tells one that comes back. Never
        fails."""
        ...

    def apply(self, plan: Plan, reach: Reach) -> ApplyReport:
        """The configs, and the loads that they need beyond what was told."""
        ...

    def urgent(self) -> str | None:
        """Why a new plan cannot wait: a GPU went or came back."""
        ...

    def corrections(self, profiles: ProfileSet) -> Mapping[str, Correction]:
        """Those kept from before, by model."""
        ...

    def keep_corrections(self, profiles: ProfileSet, corrections: Mapping[str, Correction]) -> None: ...
    def check_health(self) -> None:
        """Find faults and mend them. Never fails."""
        ...
