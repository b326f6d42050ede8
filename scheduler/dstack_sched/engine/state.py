"""What an engine remembers: models, instances, and the batches that run. Mutable, one engine's own."""

from __future__ import annotations

from collections import deque

from dstack_sched.domain.event import BackendJoined, EngineModel
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.run_times import RunTimes

NEVER = 1 << 62


class ModelState:
    """One model: its plan, and its place on the scoreboard."""

    __slots__ = (
        "exponent",
        "late_rows",
        "name",
        "plan",
        "reported_us",
        "sensitivity",
        "served_percent_us",
        "shed_count",
        "slo_us",
        "vtime",
        "weight",
    )  # fmt: skip

    def __init__(self, plan: EngineModel) -> None:
        self.name = plan.name
        self.served_percent_us = 0.0
        self.vtime = 0.0  # GPU%-time served over weight, lifted to the others' when it was away
        self.late_rows = 0
        self.shed_count = 0
        self.reported_us = -NEVER
        self.adopt(plan)

    def adopt(self, plan: EngineModel) -> None:
        self.plan = plan
        self.slo_us = plan.slo_us
        self.weight = max(plan.weight, 1e-6)
        self.sensitivity = 100.0 * plan.interference_per_percent
        self.exponent = plan.interference_exponent

    def crowd(self, co_percent: float) -> float:
        """(q / 100)^g of co-runners that hold q = co_percent of the GPU in all (policy/interference.py)."""
        if co_percent <= 0.0:
            return 0.0
        x = co_percent / 100.0
        return x if self.exponent == 1.0 else x**self.exponent

    def slowdown(self, co_percent: float) -> float:
        """f'/f while co-runners hold co_percent of the GPU in all."""
        return 1.0 + self.sensitivity * self.crowd(co_percent)


class Run:
    """One grant, from its decision to its end. Times in us; `left_us` is what would be left of it, alone."""

    __slots__ = (
        "alone_us", "batch", "charged", "end_us", "grant_id", "lease_us", "left_us", "level", "mask",
        "percent", "rows", "slow", "start_us", "touched_us",
    )  # fmt: skip

    def __init__(self, grant_id: int, level: int, percent: float, batch: int, rows: int) -> None:
        self.grant_id = grant_id
        self.level = level
        self.percent = percent
        self.batch = batch
        self.rows = rows  # expected; the grant allows `batch`
        self.mask = 0  # SM groups, a bit each; 0: the instance has none
        self.alone_us = 1.0
        self.left_us = 1.0
        self.slow = 1.0
        self.charged = 0.0  # GPU%-time put on the scoreboard in advance
        self.start_us = self.touched_us = self.end_us = self.lease_us = 0


class Instance:
    """One running copy of a model and the state of its queue as it last reported it."""

    __slots__ = (
        "active_us",
        "batch_size",
        "boosted",
        "busy_us",
        "chainable",
        "chained",
        "claim_weight",
        "deadline_us",
        "duty",
        "entry",
        "expected",
        "go_us",
        "held",
        "lag_us",
        "last_masks",
        "late_seen",
        "level",
        "levels",
        "lost_grant",
        "lost_us",
        "max_batch",
        "model",
        "name",
        "parked",
        "plan_level",
        "rate_per_us",
        "rate_rows",
        "rate_since_us",
        "reject",
        "revoked",
        "run",
        "serial",
        "share",
        "shed_us",
        "slo_us",
        "slow_seen",
        "sm_groups",
        "standing",
        "times",
        "waiting",
        "work_since_us",
    )  # fmt: skip

    def __init__(self, joined: BackendJoined, model: ModelState, serial: int) -> None:
        self.name = joined.instance
        self.model = model
        self.levels = tuple(sorted(set(joined.levels))) or (joined.gpu_percent,)
        self.max_batch = joined.max_batch_size
        self.run: Run | None = None
        self.chained: Run | None = None
        self.standing: Run | None = None  # granted ahead of its work, not begun
        self.revoked = False  # and wanted back
        self.sm_groups = joined.sm_groups
        self.held = 0  # SM groups it holds
        self.last_masks: tuple[int, ...] = ()  # SM groups it ran on before, the last ones first
        self.share = 0.0  # what it counts for in the sum of grants
        self.waiting = 0
        self.deadline_us = 0
        self.work_since_us = NEVER
        self.lost_grant = 0
        self.lost_us = 0
        self.shed_us = 0  # the most urgent deadline that was ordered to be rejected
        self.serial = serial
        self.entry: tuple[int, int, Instance, bool] | None = None
        self.chainable = False  # runs, and its next batch may be decided
        self.go_us = 0
        self.expected = 0  # rows that will wait when the grant in question starts
        self.parked = False  # waits for more rows, aside from those that may be granted
        self.late_seen = 0.0  # part of its rows that ended late, moving average over batches
        self.lag_us = 0.0  # of a grant that the device does not run, moving average
        self.slow_seen = 1.0  # slowdown by co-runners, moving average
        self.duty = 0.0
        self.claim_weight = 0.0  # what it counts for among those that share the GPU
        self.active_us = -NEVER
        self.busy_us = 0
        self.boosted = False  # waited a whole session
        self.rate_per_us = 0.0
        self.rate_rows = 0
        self.rate_since_us = 0
        self.adopt()

    def adopt(self) -> None:
        """Take the model's plan over, also while running."""
        plan = self.model.plan
        self.slo_us = plan.slo_us
        self.reject = plan.on_late is OnLate.REJECT
        self.batch_size = max(1, min(plan.batch_size, self.max_batch))
        old = getattr(self, "times", None)
        self.times = RunTimes(self.levels, self.max_batch, plan)
        if old is not None and not self.times.known and not old.known:
            self.times = old  # nothing new is known: keep what was learned
        elif old is not None:
            self.times.go_on_from(old)
        nearest = min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - plan.gpu_percent))
        self.level = self.plan_level = nearest

    @property
    def busy(self) -> bool:
        return self.run is not None


class Story(deque[tuple[int, object]]):
    """The last events, for the message of a broken invariant."""

    def __init__(self) -> None:
        super().__init__(maxlen=24)

    def __str__(self) -> str:
        return "\n".join(f"  {at_us} us: {event}" for at_us, event in self)
