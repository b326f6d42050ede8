"""Config edits put in force on disk and server: one model at a time, all or nothing.

All edits go to the journal first. Then, for each: replace config.pbtxt, load (Triton makes the new version
before it breaks the old), check that what is in force is what was written, and wait until the old stub
processes are gone (until then memory and GPU% count twice). If one fails, every config goes back byte for
byte and the old versions serve on. A controller that dies in between leaves its journal, and the next one
finishes or undoes the edits as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstack_sched.app.instances import instances
from dstack_sched.domain.change import ConfigEdit
from dstack_sched.errors import DstackError, MachineError, PlanRefusedError, ServerError
from dstack_sched.ports import Clock, EditJournal, ModelRepository, ModelServer, StubProcesses

READY_TIMEOUT_S = 120.0
STUBS_GONE_TIMEOUT_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Step:
    """An edit, what to say while it is put in force, and whether a config that Triton reports has it."""

    edit: ConfigEdit
    what: str
    in_force: Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class Done:
    """A step in force. `old_stubs_gone` is None where they cannot be seen (a remote Triton), or none was.

    error: why the server refused a text that is kept on disk all the same; "" where it did not.
    """

    model: str
    load_s: float = 0.0
    old_stubs_gone: bool | None = None
    error: str = ""


class ConfigEdits:
    """Edits of one repository and its server. Not for several threads; hold the journal's lock.

    Without a server only edits that touch nothing but files can be made.
    """

    def __init__(
        self,
        repository: ModelRepository,
        server: ModelServer | None,
        journal: EditJournal,
        stubs: StubProcesses,
        clock: Clock,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._repository = repository
        self._server = server
        self._journal = journal
        self._stubs = stubs
        self._clock = clock
        self._say = say

    def put_in_force(self, steps: Sequence[Step], name: str) -> list[Done]:
        """All steps, in order. `name` is what they are together, for the error.

        Raises PlanRefusedError with all as it was before.
        """
        if not steps:
            return []
        for step in steps:
            if step.edit.old_text != step.edit.new_text:
                self._repository.check_writable(step.edit.model)
        self._journal.begin(step.edit for step in steps)
        done = []
        for number, step in enumerate(steps):
            try:
                done.append(self._put_in_force(step))
            except DstackError as error:
                if step.edit.keep and self._repository.read_config(step.edit.model) == step.edit.new_text:
                    done.append(Done(step.edit.model, error=str(error)))
                    continue
                outcome = self._undo(steps[: number + 1])
                raise PlanRefusedError(
                    step.edit.model,
                    f"{step.edit.model}: {name} could not be put in force, {outcome}: {error}",
                ) from error
        self._journal.end()
        return done

    def unfinished(self) -> bool:
        """Whether the journal holds edits that the next start has to finish or undo."""
        return bool(self._journal.pending())

    def blind_reason(self) -> str:
        """Why old stub processes cannot be seen, where they cannot."""
        return self._stubs.blind_reason()

    def _put_in_force(self, step: Step) -> Done:
        edit = step.edit
        self._say(f"{edit.model}: {step.what}{'' if edit.then == 'nothing' else f', {edit.then}ing'}")
        began_us = self._clock.now_us()
        if edit.old_text != edit.new_text or edit.was_ready:  # an equal text, but newer, makes Triton load it
            self._repository.write_config(edit.model, edit.new_text)
        if edit.then == "nothing":
            return Done(edit.model)
        old_stubs = self._follow(edit)
        if edit.then == "load" and not step.in_force(self._asked().config(edit.model)):
            raise ServerError("Triton serves another config than the one on disk")
        gone = self._wait_gone(edit.model, old_stubs)
        return Done(edit.model, (self._clock.now_us() - began_us) / 1e6, gone)

    def _asked(self) -> ModelServer:
        if self._server is None:
            raise MachineError("no Triton is given to load it; name one with --url HOST:PORT")
        return self._server

    def _follow(self, edit: ConfigEdit) -> frozenset[int] | None:
        """The server does what an edit asks of it. Stubs to wait for; None where none can be seen."""
        if edit.then == "load":
            return self._load(edit.model)
        self._asked().unload(edit.model)
        return None

    def _load(self, model: str) -> frozenset[int] | None:
        """Load and wait until ready. The old version's stubs, None where they cannot be seen."""
        server, old_stubs = self._asked(), self._stubs.pids(model)
        server.load(model)
        until_us = self._clock.now_us() + int(READY_TIMEOUT_S * 1e6)
        while not server.is_model_ready(model):
            if self._clock.now_us() > until_us:
                raise ServerError(f"not ready within {READY_TIMEOUT_S:g} s of its load")
            self._clock.sleep_s(POLL_S)
        return old_stubs

    def _wait_gone(self, model: str, pids: frozenset[int] | None) -> bool | None:
        """Until the old stubs are gone, but for those that serve on: where only the number of instances has
        changed, Triton makes and ends as many as it must."""
        if pids is None:
            return None
        until_us = self._clock.now_us() + int(STUBS_GONE_TIMEOUT_S * 1e6)
        while alive := self._stubs.alive(pids):
            if self._kept(model, alive):
                return True
            if self._clock.now_us() > until_us:
                self._say(
                    f"old stub processes {sorted(alive)} are still there after {STUBS_GONE_TIMEOUT_S:g} s"
                )
                return False
            self._clock.sleep_s(POLL_S)
        return True

    def _kept(self, model: str, alive: frozenset[int]) -> bool:
        """Whether these old stubs are instances of what is in force now."""
        now = self._stubs.pids(model)
        if now is None or not alive <= now:
            return False
        try:
            return len(now) <= instances(self._asked().config(model))
        except DstackError:
            return False

    # -- the way back -----------------------------------------------------------------------------------

    def _undo(self, steps: Sequence[Step]) -> str:
        """Every step back, last first, one that sticks (a full disk) notwithstanding; says how it stands.

        Where one sticks the journal stays, so that the next start ends the matter.
        """
        stuck = []
        for step in reversed(steps):
            try:
                self._put_back(step.edit, load=self._serves_new(step))
            except DstackError as error:
                stuck.append(f"{step.edit.model} is not as before yet ({error})")
        if stuck:
            return "; ".join(stuck)
        self._journal.end()
        return "all is as before"

    def _serves_new(self, step: Step) -> bool:
        """Whether the old config needs a load to be in force again: the new one is, or none."""
        model = step.edit.model
        if step.edit.then == "nothing" or step.edit.old_text == step.edit.new_text:
            return False
        try:
            server = self._asked()
            return not server.is_model_ready(model) or step.in_force(server.config(model))
        except DstackError:
            return True

    def _put_back(self, edit: ConfigEdit, *, load: bool) -> None:
        """The old text back on disk; with `load`, in force too (or unloaded, as it was before)."""
        if self._repository.read_config(edit.model) != edit.old_text:
            self._repository.write_config(edit.model, edit.old_text)
        if not load:
            return
        try:
            if edit.was_ready:
                self._wait_gone(edit.model, self._load(edit.model))
            else:
                self._asked().unload(edit.model)
        except DstackError as error:
            self._say(f"{edit.model}: its old config is back on disk but could not be loaded: {error}")

    def recover(self) -> tuple[str, ...]:
        """Finish the edits that a controller left half done; undo all of them where that fails.

        Returns lines for people, none when there was nothing to do. A config that someone has changed since
        is theirs and stays.
        """
        pending = self._journal.pending()
        edits = [edit for edit in pending if self._is_as_left(edit)]
        lines = [
            f"{edit.model}: an apply was interrupted here; its config has changed since and is left alone"
            for edit in pending
            if edit not in edits
        ]
        if self._server is None and any(edit.then != "nothing" for edit in edits):
            raise MachineError(
                f"{edits[0].model}: an earlier dstackctl was interrupted while Triton loaded it; "
                "give --url HOST:PORT so that it can be finished"
            )
        tried, outcomes = [], []
        try:
            for edit in edits:
                tried.append(edit)
                outcomes.append(self._finish(edit))
        except DstackError as error:
            for edit in reversed(tried):
                self._put_back(edit, load=edit.then != "nothing")
            outcomes = [f"an interrupted apply was undone ({error})"] * len(edits)
        lines += [f"{edit.model}: {outcome}" for edit, outcome in zip(edits, outcomes, strict=True)]
        if pending:
            self._journal.end()
        return tuple(lines)

    def _is_as_left(self, edit: ConfigEdit) -> bool:
        return edit.model in self._repository.models() and self._repository.read_config(edit.model) in (
            edit.old_text,
            edit.new_text,
        )

    def _finish(self, edit: ConfigEdit) -> str:
        """What came of it."""
        self._say(f"{edit.model}: finishing an interrupted apply")
        if self._repository.read_config(edit.model) != edit.new_text:
            self._repository.write_config(edit.model, edit.new_text)
        try:
            if edit.then != "nothing":
                self._wait_gone(edit.model, self._follow(edit))
        except DstackError as error:
            if not edit.keep:
                raise
            return f"an interrupted apply was finished on disk, Triton refuses it: {error}"
        return "an interrupted apply was finished"
