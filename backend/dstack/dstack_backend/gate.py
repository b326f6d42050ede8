"""The arbiter's client: when a batch may run, and what happens when nobody is there to say so.

    OPEN     no arbiter: batches run ungated, one running and one behind it, at the configured GPU%
    JOINING  Join is sent, Welcome awaited: nothing new starts (bounded by Timing.welcome_us)
    GATED    batches run under the arbiter's grants

It fails open: when the socket is gone, or the arbiter does not answer a ping (stopped, hung), or work waits
far too long without a grant. Then it reconnects, with growing pauses, by itself: a ping first, so that a
stopped arbiter, whose socket still accepts, never holds up a batch.

A standing grant is kept here until there is work for it, or until it is revoked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstack_backend import wire
from dstack_backend.arbiter_line import USUAL, Line, Timing, Wake
from dstack_backend.executor import monotonic_us
from dstack_backend.interfaces import Listener, Permit
from dstack_backend.stats import Stats

log = logging.getLogger("dstack")

OPEN, JOINING, GATED = "open", "joining", "gated"
MAX_OUTSTANDING = 2  # one running, one behind it
SHORT_RUN_US = 500  # a run under a standing grant that ends this soon is told by its Done alone
NEVER = 1 << 62
# Equals no queue: the next report is sent, lest rows starve that the arbiter does not know of.
UNTOLD = (-1, 0)


@dataclass(frozen=True, slots=True)
class _Token:
    """What a permit stands for: a grant of one connection (epoch), or a run without the arbiter (epoch 0)."""

    epoch: int
    grant_id: int
    lease_until_us: int
    standing: bool = False


class ArbiterGate:
    """A gate over the arbiter's socket. `join` describes the instance. telemetry: what the arbiter is told
    once a second. Thread-safe.

    Lock order: this gate's lock, then the executor's (its callbacks run under ours).
    """

    def __init__(
        self,
        path: Path,
        join: wire.Join,
        *,
        stats: Stats | None = None,
        telemetry: Callable[[], Mapping[str, Any]] | None = None,
        timing: Timing = USUAL,
        clock_us: Callable[[], int] = monotonic_us,
    ):
        self._path = path
        self._join = join
        self._timing = timing
        self._now_us = clock_us
        self.stats = stats or Stats()
        self._telemetry = telemetry
        self._tell_at_us = 0
        self._lock = threading.RLock()
        self._listener: Listener | None = None
        self._state = OPEN
        self._line: Line | None = None
        self._epoch = 0  # of the connection in force; grows with each
        self._outstanding = 0  # permits given to the executor and not yet done
        self._standing: Permit | None = None  # a grant ahead of the work, not yet used
        self._running: tuple[Permit, int] | None = None  # the batch on the device, and when it should end
        self._joined_running: Permit | None = None  # the ungated batch that Join told the arbiter about
        self._reported: tuple[int, int] = (0, 0)
        self._batch_size = join.batch_size  # a live plan may grant more
        self._heard_us = self._asked_us = self._wanting_since_us = 0
        self._told_absent = False
        self._wake = Wake()  # called: closing
        self._thread = threading.Thread(target=self._loop, name="dstack-gate", daemon=True)

    # The executor's side

    def start(self, listener: Listener) -> None:
        self._listener = listener
        self._thread.start()

    def work(self) -> None:
        """Tell the arbiter of the queue, or open the gate for a batch where there is none."""
        with self._lock:
            if self._state == OPEN:
                self._open_grants()
            elif self._state == GATED and not self._give_standing():
                self._report()

    def take(self) -> Permit | None:
        """See Gate.take: the standing grant, or leave to run where nobody is asked and nothing runs."""
        with self._lock:
            if self._state == OPEN and not self._outstanding and not self._wake.called:
                self._outstanding = 1
                return self._open_permit()
            permit, self._standing = self._standing, None
            if permit is not None:
                self._outstanding += 1
            return permit

    def begin(self, permit: Permit, rows: int, expected_us: int) -> bool:
        now = self._now_us()
        token = permit.token
        assert isinstance(token, _Token)
        with self._lock:
            void = self._state == JOINING or (self._state == GATED and token.epoch != self._epoch)
            if void or now >= token.lease_until_us:
                return False
            self._running = (permit, now + expected_us)
            if token.epoch == 0:
                self.stats.ungated_batches += 1
            elif token.standing and self._state == GATED and expected_us > SHORT_RUN_US:
                self._send_start(token.grant_id, rows)
            return True

    def done(self, permit: Permit, rows: int, late: int, run_us: int) -> None:
        token = permit.token
        assert isinstance(token, _Token)
        with self._lock:
            self._outstanding -= 1
            if self._running and self._running[0] is permit:
                self._running = None
            if self._state == GATED and token.epoch == self._epoch:
                self._send_done(token.grant_id, rows, late, run_us)
            elif self._state != OPEN and permit is self._joined_running:
                self._joined_running = None
                self._send_done(0, rows, late, run_us)
            elif self._state == OPEN:
                self._open_grants()
            else:
                self._report()

    def close(self) -> None:
        with self._lock:
            if self._wake.called:
                return
            self._wake.call()
            if self._line and self._state == GATED:
                self._send(wire.Leave())
            self._drop(None)
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._wake.close()

    # Without the arbiter

    def _open_grants(self) -> None:
        if self._wake.called or self._listener is None:
            return
        waiting, _ = self._listener.state()
        if waiting and self._outstanding < MAX_OUTSTANDING:
            self._outstanding += 1
            self._listener.on_grant(self._open_permit())

    def _open_permit(self) -> Permit:
        return Permit(self._join.batch_size, self._join.gpu_percent, _Token(0, 0, NEVER))

    # To the arbiter

    def _report(self) -> None:
        """Send Work, unless the arbiter knows of all it can grant already and nothing is more urgent."""
        assert self._listener is not None
        waiting, deadline_us = self._listener.state()
        known, known_deadline_us = self._reported
        enough = MAX_OUTSTANDING * self._batch_size
        urgent = deadline_us < known_deadline_us or not known_deadline_us
        if (waiting, deadline_us) == self._reported or (waiting and known >= enough and not urgent):
            return
        self._note_report(waiting, deadline_us)
        self._send(wire.Work(waiting, deadline_us))

    def _give_standing(self) -> bool:
        """Let work that waits run under the standing grant; False where there is none, or no work."""
        assert self._listener is not None
        if self._standing is None or not self._listener.state()[0]:
            return False
        permit, self._standing = self._standing, None
        self._outstanding += 1
        self._listener.on_grant(permit)
        return True

    def _send_start(self, grant_id: int, rows: int) -> None:
        assert self._listener is not None
        waiting, deadline_us = self._listener.state()
        self._note_report(waiting, deadline_us)
        self._send(wire.Start(grant_id, rows, waiting, deadline_us))

    def _send_done(self, grant_id: int, rows: int, late: int, run_us: int) -> None:
        assert self._listener is not None
        waiting, deadline_us = self._listener.state()
        self._wanting_since_us = self._now_us()
        self._note_report(waiting, deadline_us)
        self._send(wire.Done(grant_id, rows, late, min(run_us, 0xFFFFFFFF), waiting, deadline_us))

    def _note_report(self, waiting: int, deadline_us: int) -> None:
        if waiting and not self._reported[0]:
            self._wanting_since_us = self._now_us()
        self._reported = (waiting, deadline_us)

    def _send(self, message: wire.Message) -> None:
        if self._line is None:
            return
        try:
            self._line.send(message)
        except OSError as error:  # gone, or so far behind that its buffer is full
            self._drop(f"sending failed: {error}")

    # From the arbiter: the gate's thread

    def _loop(self) -> None:
        pause_us = self._timing.first_pause_us
        while not self._wake.called:
            if self._connect():
                pause_us = self._timing.first_pause_us
                self._listen()
            if not self._wake.called:
                self._wake.pause(pause_us)
                pause_us = min(2 * pause_us, self._timing.longest_pause_us)

    def _connect(self) -> bool:
        """Connect, see that somebody is awake there, join. True once Welcome has come."""
        line = Line(self._wake, self._now_us)
        try:
            line.connect(self._path)
            line.send(wire.Ping(self._epoch))
            line.receive_until(wire.Pong, self._timing.pong_within_us)
            self._send_join(line)
            line.receive_until(wire.Welcome, self._timing.welcome_us)
        except (OSError, ValueError) as error:  # ValueError: a WireError, or dropped meanwhile
            with self._lock:
                self._fall_open(line, f"no arbiter at {self._path} ({error})")
            return False
        with self._lock:
            if self._state != JOINING:  # dropped while Welcome was on its way
                return False
            self._become_gated()
        return True

    def _send_join(self, line: Line) -> None:
        """From here on nothing new starts ungated, so what Join says of the running batch stays true."""
        with self._lock:
            self._state = JOINING
            join = self._join
            if self._running:
                permit, until_us = self._running
                join = replace(join, running_percent=permit.gpu_percent, running_until_us=until_us)
                self._joined_running = permit
            self._line = line
            line.send(join)

    def _become_gated(self) -> None:
        self._state = GATED
        self._epoch += 1
        self.stats.arbiter_connects += 1
        self.stats.gated = 1
        self._heard_us = self._now_us()
        self._asked_us = 0
        self._reported = (0, 0)
        if self._told_absent or self._epoch > 1:
            log.info("the arbiter at %s is there: batches run under its grants", self._path)
        self._told_absent = False
        self._report()

    def _listen(self) -> None:
        """Handle messages until the connection ends."""
        line = self._line
        while line is not None and line is self._line and not self._wake.called:
            try:
                self._tell()
                if line.is_readable(self._timing.tick_us):
                    self._handle(line.receive())
                else:
                    self._check_alive()
            except BlockingIOError:
                continue
            except (OSError, ValueError) as error:
                with self._lock:
                    if line is self._line:
                        self._drop(str(error))

    def _handle(self, message: wire.Message) -> None:
        with self._lock:
            self._heard_us = self._now_us()
            self._asked_us = 0
            assert self._listener is not None
            if isinstance(message, wire.Grant):
                self._granted(message)
            elif isinstance(message, wire.Revoke):
                self._revoked(message.grant_id)
            elif isinstance(message, wire.Plan):
                self._adopt(message)
        if isinstance(message, wire.Shed):
            self._listener.on_shed(message.deadline_before_us)
            with self._lock:
                self._reported = UNTOLD  # the arbiter guessed what is left
            self.work()

    def _granted(self, grant: wire.Grant) -> None:
        assert self._listener is not None
        self._wanting_since_us = self._heard_us
        self._batch_size = max(self._join.batch_size, grant.batch_size)
        self.stats.grants += 1
        token = _Token(self._epoch, grant.grant_id, grant.lease_until_us, grant.standing)
        permit = Permit(grant.batch_size, grant.gpu_percent, token, grant.sm_groups)
        if grant.standing:
            self.stats.standing_grants += 1
            self._standing = permit
            self._give_standing()
            return
        self._outstanding += 1
        self._listener.on_grant(permit)

    def _revoked(self, grant_id: int) -> None:
        """Give the standing grant back. One that is in use, or about to be, was started before we knew."""
        token = self._standing.token if self._standing else None
        if isinstance(token, _Token) and token.grant_id == grant_id:
            self._standing = None
            self._send_done(grant_id, 0, 0, 0)

    def _adopt(self, plan: wire.Plan) -> None:
        """From now on this is in force, also while the arbiter is away: the config file says the same."""
        assert self._listener is not None
        batch_size = max(1, min(plan.batch_size, self._join.max_batch_size))
        self._join = replace(
            self._join, batch_size=batch_size, slo_us=plan.slo_us, reject_late=plan.reject_late
        )
        self._batch_size = batch_size
        self._listener.on_plan(batch_size, plan.slo_us, plan.reject_late)

    def _tell(self) -> None:
        """Telemetry, once a period."""
        now_us = self._now_us()
        if self._telemetry is None or now_us < self._tell_at_us:
            return
        self._tell_at_us = now_us + self._timing.telemetry_us
        message = wire.Telemetry(dict(self._telemetry()))
        with self._lock:
            if self._state == GATED:
                self._send(message)

    def _check_alive(self) -> None:
        """Ask for a sign of life after silence; fail open where none comes, or where work starves."""
        with self._lock:
            now, timing = self._now_us(), self._timing
            waiting = self._reported[0] > 0
            if self._asked_us:
                if now - self._asked_us > timing.pong_within_us:
                    self._drop("it does not answer (stopped or hung)")
            elif now - self._heard_us > (timing.ping_after_us if waiting else timing.idle_ping_after_us):
                self._asked_us = now
                self._send(wire.Ping(self._epoch))
            elif waiting and not self._outstanding and now - self._wanting_since_us > timing.starved_after_us:
                self._drop("it grants nothing though work waits")

    def _drop(self, why: str | None) -> None:
        """End the connection and open the gate."""
        line, self._line = self._line, None
        if line is not None:
            line.close()
        was_gated, self._state = self._state == GATED, OPEN
        self._joined_running = self._standing = None
        self.stats.gated = 0
        if was_gated and why:
            self.stats.arbiter_disconnects += 1
            log.warning(
                "lost the arbiter (%s): batches run ungated at %g%% until it is back",
                why,
                self._join.gpu_percent,
            )
        if not self._wake.called:
            self._open_grants()

    def _fall_open(self, line: Line, why: str) -> None:
        line.close()
        if not self._told_absent and not self._wake.called:
            self._told_absent = True
            log.warning("%s: batches run ungated at %g%%", why, self._join.gpu_percent)
        self._drop(None)
