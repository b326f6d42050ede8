"""Grants and what they hold: shares, SM groups, leases, predicted ends, the scoreboard.

Predicted ends follow the interference model f' = f (1 + 100 k (q/100)^g), q the co-runners' GPU%, as
co-runners come and go. A standing grant is given ahead of the work: it holds its share, and nothing runs.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

from dstack_sched.domain.decision import Decision, Grant, Revoke, SetTimer, Shed
from dstack_sched.engine.sm_groups import SmGroups, groups_for
from dstack_sched.engine.state import NEVER, Instance, Run

LEASE_FACTOR = 4  # a lease lasts this many predicted run times ...
LEASE_MARGIN_US = 100_000  # ... and this much more: scheduling noise of a busy host is no death
LEASE_UNKNOWN_US = 2_000_000  # first batches of a model without a profile: warm-up can be slow
STANDING_US = 60_000_000  # an idle instance keeps a standing grant this long
REVOKE_WITHIN_US = 50_000  # an instance that does not answer counts as hung
ENDED_KEPT = 64  # runs that are remembered, to tell who ran beside whom
LAG_GAIN = 0.1  # one run's weight
MASKS_KEPT = 8  # sets of SM groups that an instance is remembered to have run on

WAKE_LEASE, WAKE_CHAIN, WAKE_GO, WAKE_SESSION, WAKE_STANDING = range(5)


class Books:
    """What is granted on one GPU, and when to look at it again."""

    def __init__(self) -> None:
        self.capacity = 100.0
        self.granted = 0.0
        self.promised = 0.0  # GPU% of the running batches
        self.instances: dict[str, Instance] = {}
        self.running: list[Instance] = []
        # When runs began and ended on the device, at what share and whose; in the order of their ends.
        self._ended: deque[tuple[int, int, float, Instance]] = deque(maxlen=ENDED_KEPT)
        self.standing = 0  # instances that hold a standing grant
        self.sm = SmGroups(1)
        self._ceiling = 100.0  # capacity, or what was granted when it shrank
        self._out: list[Decision] = []
        self._agenda: list[tuple[int, int, int, Instance, int]] = []
        self._agenda_serial = 0
        self._timer_us = NEVER
        self._grant_serial = 0

    # ---- grants ---------------------------------------------------------------------------------------

    def _grant(self, instance: Instance, level: int, batch: int, rows: int, now: int) -> Run:
        """Grant a batch, now or chained behind the running one. `rows`: how many it will likely hold."""
        self._grant_serial += 1
        percent = min(instance.levels[level], self.capacity)
        run = Run(self._grant_serial, level, percent, batch, rows)
        self._time(instance, run, rows)
        times = instance.times
        whole_us = times.us[level][min(batch, times.max_batch)] * times.scale
        if instance.sm_groups:
            self._place_on_sms(instance, run)
        if instance.run is None:
            slow = instance.model.slowdown(self.promised)
            run.lease_us = now + self._lease(instance, whole_us * slow)
            self._begin(instance, run, now)
        else:
            run.slow = instance.model.slowdown(self.promised - instance.run.percent)
            run.lease_us = instance.run.lease_us + self._lease(instance, whole_us * run.slow)
            instance.chained = run
            self._reshare(instance)
        instance.level = level
        self._out.append(Grant(instance.name, run.grant_id, percent, batch, run.lease_us, run.mask))
        instance.waiting = max(0, instance.waiting - rows)
        instance.work_since_us = now if instance.waiting else NEVER
        return run

    def _time(self, instance: Instance, run: Run, rows: int) -> None:
        """How long a run of `rows` takes alone."""
        times = instance.times
        run.alone_us = run.left_us = max(times.us[run.level][min(rows, times.max_batch)] * times.scale, 1.0)

    def _place_on_sms(self, instance: Instance, run: Run) -> None:
        """Choose SM groups; for a chained run as if those of the one before it were free."""
        own, last = instance.held, instance.last_masks
        self.sm.release(own)
        run.mask = self.sm.choose(groups_for(run.percent, self.sm.groups), last)
        self.sm.hold(own)
        if not last or last[0] != run.mask:
            others = [mask for mask in last if mask != run.mask]
            instance.last_masks = (run.mask, *others[: MASKS_KEPT - 1])

    def _resize_sm(self, groups: int) -> None:
        """A device with more groups than seen so far: all of a GPU's instances split it alike."""
        self.sm = SmGroups(groups)
        for instance in self.instances.values():
            self.sm.hold(instance.held)

    def _stand(self, instance: Instance, level: int, batch: int, now: int) -> None:
        """Grant an idle instance a batch ahead of its work. Its share is held; nothing runs."""
        self._grant_serial += 1
        percent = min(instance.levels[level], self.capacity)
        run = Run(self._grant_serial, level, percent, batch, 1)
        run.lease_us = now + STANDING_US
        if instance.sm_groups:
            self._place_on_sms(instance, run)
        instance.standing, instance.revoked = run, False
        self.standing += 1
        self._reshare(instance)
        self._wake(run.lease_us + REVOKE_WITHIN_US, WAKE_STANDING, instance, run.grant_id)
        self._out.append(Grant(instance.name, run.grant_id, percent, batch, run.lease_us, run.mask, True))

    def _start_standing(self, instance: Instance, run: Run, rows: int, now: int) -> None:
        """What was a standing grant runs `rows` rows from now on."""
        run.rows = max(1, min(rows, run.batch))
        self._time(instance, run, run.rows)
        run.lease_us = now + self._lease(instance, run.alone_us * instance.model.slowdown(self.promised))
        self._begin(instance, run, now)

    def _unstand(self, instance: Instance) -> None:
        """Its standing grant is begun, given back, or over."""
        if instance.standing is not None:
            instance.standing = None
            self.standing -= 1
            self._reshare(instance)

    def _revoke_standing(self, now: int) -> None:
        """Ask for the standing grants back: somebody else wants the GPU."""
        for instance in self.instances.values():
            self._revoke(instance, now)

    def _revoke(self, instance: Instance, now: int) -> None:
        run = instance.standing
        if run is not None and not instance.revoked:
            instance.revoked = True
            self._wake(now + REVOKE_WITHIN_US, WAKE_STANDING, instance, run.grant_id)
            self._out.append(Revoke(instance.name, run.grant_id))

    def _lease(self, instance: Instance, predicted_us: float) -> int:
        if not instance.times.known:
            return max(LEASE_UNKNOWN_US, int(LEASE_FACTOR * predicted_us))
        return int(LEASE_FACTOR * predicted_us) + LEASE_MARGIN_US

    def _begin(self, instance: Instance, run: Run, now: int) -> None:
        """`run` is on the device from now on: its share counts, its co-runners slow down."""
        run.start_us = run.touched_us = now
        run.slow = instance.model.slowdown(self.promised)
        run.end_us = now + int(run.left_us * run.slow)
        run.charged = run.percent * run.left_us * run.slow
        instance.model.vtime += run.charged / instance.model.weight
        self._promise(self.promised + run.percent, now)
        instance.run = run
        self.running.append(instance)
        self._reshare(instance)
        self._wake(run.lease_us, WAKE_LEASE, instance, run.grant_id)

    def _retire(self, instance: Instance, run: Run, rows: int, run_us: int, now: int) -> None:
        """The running batch ended: learn from it, free its share or pass it on to the chained one."""
        if run.grant_id and rows > 0:
            self._learn(instance, run, rows, run_us, now)
        self._score(instance, run, run_us if rows > 0 else 0, now)
        self._drop(instance, now)

    def _drop(self, instance: Instance, now: int) -> None:
        """End the running batch; a chained one starts."""
        run = instance.run
        if run is None:
            return
        instance.run = None
        self.running.remove(instance)
        self._promise(self.promised - run.percent if self.running else 0.0, now)
        chained, instance.chained = instance.chained, None
        if chained is not None:
            self._begin(instance, chained, now)
        else:
            self._reshare(instance)

    def _forget(self, name: str, now: int) -> None:
        instance = self.instances.pop(name, None)
        if instance is None:
            return
        instance.chained = None
        self._unstand(instance)
        self._drop(instance, now)
        instance.waiting = 0
        instance.work_since_us = NEVER

    def _reshare(self, instance: Instance) -> None:
        """Count the instance once, at the largest of its grants; on all SM groups of them."""
        run, chained, standing = instance.run, instance.chained, instance.standing
        share = run.percent if run is not None else 0.0
        if chained is not None and chained.percent > share:
            share = chained.percent
        if standing is not None:
            share = standing.percent
        if instance.sm_groups:
            mask = 0
            for each in (run, chained, standing):
                mask |= each.mask if each is not None else 0
            if mask != instance.held:
                self.sm.release(instance.held)
                self.sm.hold(mask)
                instance.held = mask
        self.granted += share - instance.share
        instance.share = share
        if not self.running and not self.standing:
            self.granted = 0.0  # rounding does not pile up
        if self._ceiling > self.capacity:
            self._ceiling = max(self.capacity, self.granted)

    def _promise(self, promised: float, now: int) -> None:
        """A co-runner came or went: the others' predicted ends move."""
        self.promised = promised
        for other in self.running:
            run = other.run
            if run is None:
                continue
            run.left_us = max(run.left_us - (now - run.touched_us) / run.slow, 0.0)
            run.touched_us = now
            run.slow = other.model.slowdown(promised - run.percent)
            run.end_us = now + int(run.left_us * run.slow)

    def _learn(self, instance: Instance, run: Run, rows: int, run_us: int, now: int) -> None:
        """Compare the run time with the prediction, the slowdown by co-runners taken out."""
        elapsed = now - run.start_us
        if elapsed <= 0 or run_us <= 0:
            return
        alone_progress_us = run.alone_us - run.left_us + (now - run.touched_us) / run.slow
        mean_slow = elapsed / alone_progress_us if alone_progress_us > 0 else run.slow
        instance.slow_seen += 0.1 * (mean_slow - instance.slow_seen)
        instance.busy_us += run_us
        instance.lag_us += LAG_GAIN * (max(elapsed - run_us, 0) - instance.lag_us)
        crowd = instance.model.crowd(self._beside(instance, now - run_us, now) / run_us)
        instance.times.observe(run.level, rows, run_us / max(mean_slow, 1.0), run_us, crowd)
        self._ended.append((now - run_us, now, run.percent, instance))

    def _beside(self, instance: Instance, begin: int, now: int) -> float:
        """GPU%-us of the others on the device from begin to now. A grant holds its share before the device
        runs, too: of those that still run their usual lag is taken off."""
        shared = 0.0
        for start, end, percent, other in reversed(self._ended):
            if end <= begin:
                break
            if other is not instance:
                shared += percent * (end - max(start, begin))
        for other in self.running:
            if other is not instance and other.run is not None:
                start = max(other.run.start_us + int(other.lag_us), begin)
                shared += other.run.percent * max(now - start, 0)
        return shared

    def _score(self, instance: Instance, run: Run, run_us: int, now: int) -> None:
        """Put the GPU%-time on the scoreboard."""
        used = run.percent * run_us
        instance.model.served_percent_us += used
        instance.model.vtime += (used - run.charged) / instance.model.weight
        run.charged = used

    def _shed(self, instance: Instance, before_us: int, left: int) -> None:
        """Reject what is due before before_us; about `left` rows stay."""
        self._out.append(Shed(instance.name, before_us))
        instance.model.shed_count += 1
        instance.shed_us = instance.deadline_us
        instance.waiting = left
        instance.deadline_us = max(instance.deadline_us, before_us)

    # ---- the timer ------------------------------------------------------------------------------------

    def _wake(self, at_us: int, kind: int, instance: Instance, token: int) -> None:
        self._agenda_serial += 1
        heappush(self._agenda, (at_us, self._agenda_serial, kind, instance, token))

    def _is_due(self, kind: int, instance: Instance, token: int) -> bool:
        """Whether an agenda entry still means something; stale ones are dropped unseen."""
        run = instance.run
        if kind == WAKE_LEASE:
            return run is not None and run.grant_id == token
        if kind == WAKE_CHAIN:
            return run is not None and run.grant_id == token and instance.chained is None
        if kind == WAKE_STANDING:
            return instance.standing is not None and instance.standing.grant_id == token
        if kind == WAKE_GO:
            return run is None and instance.waiting > 0 and instance.deadline_us == token
        return instance.work_since_us == token

    def _set_timer(self, now: int) -> None:
        agenda = self._agenda
        while agenda and not self._is_due(agenda[0][2], agenda[0][3], agenda[0][4]):
            heappop(agenda)
        if agenda and agenda[0][0] < self._timer_us:
            self._timer_us = max(agenda[0][0], now + 1)
            self._out.append(SetTimer(self._timer_us))
