"""How much of the GPU a batch gets and how large it is: what D-STACK's passes choose from.

Share: that of the plan, stretched so that the shares of all instances together fill the capacity; the next
larger ones within what is free where the rows that wait would else not make their deadlines. Batch: as many
rows as wait, as long as the most urgent one makes its deadline and no run is too long for its objective.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from dstack_sched.engine.base import ROUNDING, EngineBase
from dstack_sched.engine.state import NEVER, Instance

WIDEST_PERCENT = 200 / 3  # beyond, a batch of one model hardly gains and the others lose (decisions/0051)
MIN_SESSION_US = 100_000  # where no model has an objective


@dataclass(frozen=True, slots=True)
class Rules:
    """The engine's rules and their settings; every one can be switched off to measure what it brings.

    chain: decide the next batch chain_lead_us before the running one ends (not under overload). levels:
    choose the share of each batch. need_slack: a larger share is sought where less than this part of the
    objective would be left. reserve: nobody overtakes the first one that does not fit. scoreboard:
    order by service under overload. shed: reject what cannot make it (where the model allows). run_fraction:
    no run longer than this part of the objective. safety: part of a run time kept in hand when a deadline is
    checked. patience: a batch that is not full may wait until this part of the objective is left beyond its
    run time (1: never).
    jitter: who may wait counts on a run time this many mean deviations above the prediction.
    haste: so much is added to patience for all rows late lately, in proportion for a part of them.
    foresee: predict with the slowdown by co-runners seen lately where it is more than now's. stand: give
    standing grants.
    """

    chain: bool = True
    chain_lead_us: int = 400
    levels: bool = True
    need_slack: float = 0.1
    reserve: bool = True
    scoreboard: bool = True
    shed: bool = True
    run_fraction: float = 0.7
    safety: float = 0.02
    patience: float = 0.3
    jitter: float = 3.0
    haste: float = 20.0
    foresee: bool = True
    stand: bool = True


class Pick:
    """A candidate grant. batch 0: shed only."""

    __slots__ = ("batch", "end_us", "left", "level", "missed", "percent", "rows", "shed_before_us")

    def __init__(
        self, level: int, percent: float, batch: int, rows: int, end_us: int,
        shed_before_us: int = 0, left: int = 0, missed: float = 0.0,
    ) -> None:  # fmt: skip
        self.level = level
        self.percent = percent
        self.batch = batch
        self.rows = rows
        self.end_us = end_us
        self.shed_before_us = shed_before_us
        self.left = left  # rows that stay after the shedding
        self.missed = missed  # part of the waiting rows that is lost or late


class Place:
    """A reservation: nobody behind may run beyond at_us with more than `spare` percent."""

    __slots__ = ("at_us", "spare")

    def __init__(self, at_us: int, spare: float) -> None:
        self.at_us = at_us
        self.spare = spare

    def admits(self, pick: Pick) -> bool:
        return pick.end_us <= self.at_us or pick.percent <= self.spare + ROUNDING


class ChoosingEngine(EngineBase):
    """Chooses share and batch of one instance's next run; who is next is its heir's business."""

    def __init__(self, rules: Rules | None = None) -> None:
        super().__init__()
        self.rules = rules or Rules()
        self.session_us = MIN_SESSION_US
        self.overloaded = False
        self._shortest_slo_us = NEVER
        self._weights = 0.0  # weights of those that have work, or mostly have

    # ---- shares ---------------------------------------------------------------------------------------

    def _stretch(self) -> None:
        """Stretch the planned shares of those that have a choice in proportion, until together they fill the
        capacity or the largest is WIDEST_PERCENT, or an equal part where that is more (two models at a
        capacity of 200%: all of the GPU each, decisions/0122); the rounding to levels goes to who lost most
        by it.

        Fewer batches at once that run faster: with a small share each a run takes so long that a request
        which comes in the middle of one is late (decisions/0051)."""
        instances = self.instances.values()
        planned = [min(i.model.plan.gpu_percent, self.capacity) for i in instances]
        stretch = 1.0
        if planned and min(planned) > 0:
            widest = min(100.0, max(WIDEST_PERCENT, self.capacity / len(planned)))
            stretch = max(1.0, min(self.capacity / sum(planned), widest / max(planned)))
        lost: list[tuple[float, Instance]] = []  # by rounding down to a level
        for instance in instances:
            if len(instance.levels) > 1 and self.rules.levels:
                share = min(instance.model.plan.gpu_percent * stretch, self.capacity)
                instance.plan_level = max(bisect_right(instance.levels, share + ROUNDING) - 1, 0)
                lost.append((share - instance.levels[instance.plan_level], instance))
        room = self.capacity - sum(i.levels[i.plan_level] for i in instances)
        for below, instance in sorted(lost, key=lambda each: (-each[0], each[1].serial)):
            above = instance.levels[instance.plan_level : instance.plan_level + 2]
            if below > ROUNDING and len(above) == 2 and above[1] - above[0] <= room + ROUNDING:
                instance.plan_level += 1
                room -= above[1] - above[0]
            self._fill(instance)

    def _fill(self, instance: Instance) -> None:
        """The batch worth waiting for at its share: it runs in half the objective beside the others."""
        if instance.slo_us and instance.times.known:
            slow = instance.model.slowdown(self.capacity - instance.levels[instance.plan_level])
            half = instance.times.largest_batch(instance.plan_level, instance.slo_us / 2 / slow)
            instance.batch_size = max(1, min(half, instance.max_batch))

    def _choose(self, instance: Instance, available: float, start: int, slow: float, now: int) -> Pick | None:
        """Share and batch within `available` percent, or None when it should wait for more."""
        level, levels = instance.plan_level, instance.levels
        if not instance.slo_us and self.rules.levels:  # best effort takes what there is
            level = min(level, max(bisect_right(levels, available + ROUNDING) - 1, 0))
        if min(levels[level], self.capacity) > available + ROUNDING:
            return None
        pick = self._batch(instance, level, start, slow, now)
        if not self.rules.levels or not instance.slo_us:
            return pick
        want = min(instance.expected, instance.batch_size)
        due_us = instance.deadline_us - int(self.rules.need_slack * instance.slo_us)
        while pick.rows < want or pick.end_us > due_us:  # it needs more than its share
            level += 1
            if level == len(levels) or levels[level] > available + ROUNDING:
                break
            pick = self._batch(instance, level, start, slow, now)
        return pick

    # ---- batches --------------------------------------------------------------------------------------

    def _batch(self, instance: Instance, level: int, start: int, slow: float, now: int) -> Pick:
        """The best batch at this level, starting at `start` with this slowdown by co-runners."""
        times, waiting, slo_us = instance.times, instance.expected, instance.slo_us
        percent = min(instance.levels[level], self.capacity)
        factor = slow * (1.0 + self.rules.safety)
        if not slo_us:
            batch = max(1, times.largest_batch(level, self._shortest_slo_us / 2 / factor))
            return self._filled(instance, level, percent, batch, start, factor)
        longest_us = self.rules.run_fraction * slo_us
        if self.overloaded:  # nobody runs longer than its part of a session
            part = instance.model.weight / max(self._weights, instance.model.weight)
            longest_us = min(longest_us, part * self.session_us * self.capacity / percent)
        batch = max(1, times.largest_batch(level, longest_us / factor))
        slack = instance.deadline_us - start
        fit = times.largest_batch(level, slack / factor) if slack > 0 else 0
        want = min(waiting, batch)
        if fit >= want:
            return self._filled(instance, level, percent, min(batch, fit), start, factor)
        return self._rescue(instance, level, percent, batch, fit, start, factor, now)

    def _filled(
        self, instance: Instance, level: int, percent: float, batch: int, start: int, factor: float
    ) -> Pick:
        """All rows of the batch make it."""
        rows = min(instance.expected, batch)
        run_us = instance.times.us[level][rows] * instance.times.scale * factor
        return Pick(level, percent, batch, rows, start + int(run_us))

    def _rescue(
        self,
        instance: Instance,
        level: int,
        percent: float,
        batch: int,
        fit: int,
        start: int,
        factor: float,
        now: int,
    ) -> Pick:
        """Not all make it: serve the `fit` most urgent in time, or give them up for a larger batch of
        younger ones, whichever brings more rows in time per microsecond."""
        times, waiting = instance.times, instance.expected
        row_us = times.us[level]
        want = min(waiting, batch)
        whole_us = row_us[want] * times.scale * factor
        end = start + int(whole_us)
        latest = now + instance.slo_us  # deadlines of those that wait lie between the earliest and this
        width = max(latest - instance.deadline_us, 1)
        alive = int(waiting * min(max((latest - end) / width, 0.0), 1.0))
        missed = (waiting - alive) / waiting
        # What was shed and is reported again cannot be shed: an order a pass would keep it waiting for ever.
        shed = instance.reject and self.rules.shed and instance.deadline_us > instance.shed_us
        if not shed:  # those that are late stand before the others
            in_time = want - (waiting - alive)
            fit_us = row_us[fit] * times.scale * factor
            if fit and fit / fit_us >= in_time / whole_us:
                return Pick(level, percent, fit, fit, start + int(fit_us))
            return Pick(level, percent, want, want, end, missed=missed)
        young = min(alive, want)
        young_us = row_us[young] * times.scale * factor if young else whole_us
        if fit:
            fit_us = row_us[fit] * times.scale * factor
            if fit / fit_us >= young / young_us:
                return Pick(level, percent, fit, fit, start + int(fit_us))
        if not young:
            end = start + int(row_us[1] * times.scale * factor)
            return Pick(level, percent, 0, 0, start, end, 0, missed)
        end = start + int(young_us)
        return Pick(level, percent, young, young, end, end, alive, missed)
