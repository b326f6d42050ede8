"""Plans that could not be put in force: the same is not tried every round, but ever more rarely."""

from __future__ import annotations

from dstack_sched.app.backoff import Backoff, BackoffSettings
from dstack_sched.domain.plan import Plan
from dstack_sched.errors import PlanRefusedError

WAITS = BackoffSettings(first_s=30.0, last_s=3600.0)


class Refusals:
    """Remembers which model a plan failed by. Times in microseconds, monotonic."""

    def __init__(self, settings: BackoffSettings = WAITS) -> None:
        self._settings = settings
        self._tries: dict[str, Backoff] = {}
        self._why: dict[str, str] = {}

    def refused(self, error: PlanRefusedError, now_us: int) -> float:
        """A plan was undone; how long such plans are held back from now, in seconds."""
        tries = self._tries.setdefault(error.model, Backoff(self._settings))
        tries.tried(now_us)
        self._why[error.model] = str(error)
        return tries.wait_s

    def holds_back(self, plan: Plan, in_force: Plan, now_us: int) -> str | None:
        """Why this plan should not be tried now: it changes a model that failed lately; None where it may."""
        for model, tries in self._tries.items():
            new, old = plan.models.get(model), in_force.models.get(model)
            changes = new is not None and (
                old is None or (new.gpu_percent, new.batch_size) != (old.gpu_percent, old.batch_size)
            )
            if changes and not tries.due(now_us):
                left_s = (tries.retry_at_us - now_us) / 1e6
                return f"held back for {left_s:.0f} s more: {self._why[model]}"
        return None

    def applied(self, plan: Plan) -> None:
        """A plan is in force: what it names does load."""
        for model in plan.models.keys() & self._tries.keys():
            del self._tries[model], self._why[model]

    def present(self) -> dict[str, str]:
        """Model -> why its plan was refused, of those that are held back or will be tried again."""
        return dict(self._why)
