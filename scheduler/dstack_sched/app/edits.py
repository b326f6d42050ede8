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

from dstack_sched.domain.change import ConfigEdit
from dstack_sched.errors import DstackError, InputError, ServerError
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
    """A step in force. `old_stubs_gone` is None where they cannot be seen (a remote Triton), or none was."""

    model: str
    load_s: float = 0.0
    old_stubs_gone: bool | None = None


class ConfigEdits:
    """Edits of one repository and its server. Not for several threads; hold the journal's lock.

    Edits with `load` unset touch files only: without any of those with it, the server is never asked.
    """

    def __init__(
        self,
        repository: ModelRepository,
        server: ModelServer,
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

        Raises InputError with all as it was before.
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
                for tried in reversed(steps[: number + 1]):
                    self._put_back(tried.edit, load=tried.edit.load and self._serves_new(tried))
                self._journal.end()
                raise InputError(
                    f"{step.edit.model}: {name} could not be put in force, all is as before: {error}"
                ) from error
        self._journal.end()
        return done

    def blind_reason(self) -> str:
        """Why old stub processes cannot be seen, where they cannot."""
        return self._stubs.blind_reason()

    def _put_in_force(self, step: Step) -> Done:
        edit = step.edit
        self._say(f"{edit.model}: {step.what}{', loading' if edit.load else ''}")
        began_us = self._clock.now_us()
        if edit.old_text != edit.new_text or edit.was_ready:  # an equal text, but newer, makes Triton load it
            self._repository.write_config(edit.model, edit.new_text)
        if not edit.load:
            return Done(edit.model)
        old_stubs = self._load(edit.model)
        if not step.in_force(self._server.config(edit.model)):
            raise ServerError("Triton serves another config than the one on disk")
        gone = self._wait_gone(old_stubs)
        return Done(edit.model, (self._clock.now_us() - began_us) / 1e6, gone)

    def _load(self, model: str) -> frozenset[int] | None:
        """Load and wait until ready. The old version's stubs, None where they cannot be seen."""
        old_stubs = self._stubs.pids(model)
        self._server.load(model)
        until_us = self._clock.now_us() + int(READY_TIMEOUT_S * 1e6)
        while not self._server.is_model_ready(model):
            if self._clock.now_us() > until_us:
                raise ServerError(f"not ready within {READY_TIMEOUT_S:g} s of its load")
            self._clock.sleep_s(POLL_S)
        return old_stubs

    def _wait_gone(self, pids: frozenset[int] | None) -> bool | None:
        if pids is None:
            return None
        until_us = self._clock.now_us() + int(STUBS_GONE_TIMEOUT_S * 1e6)
        while alive := self._stubs.alive(pids):
            if self._clock.now_us() > until_us:
                self._say(
                    f"old stub processes {sorted(alive)} are still there after {STUBS_GONE_TIMEOUT_S:g} s"
                )
                return False
            self._clock.sleep_s(POLL_S)
        return True

    # -- the way back -----------------------------------------------------------------------------------

    def _serves_new(self, step: Step) -> bool:
        """Whether the old config needs a load to be in force again: the new one is, or none."""
        if step.edit.old_text == step.edit.new_text:
            return False
        try:
            return not self._server.is_model_ready(step.edit.model) or step.in_force(
                self._server.config(step.edit.model)
            )
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
                self._wait_gone(self._load(edit.model))
            else:
                self._server.unload(edit.model)
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
        done: list[ConfigEdit] = []
        try:
            for edit in edits:
                done.append(edit)
                self._finish(edit)
            lines += [f"{edit.model}: an interrupted apply was finished" for edit in edits]
        except DstackError as error:
            for edit in reversed(done):
                self._put_back(edit, load=edit.load)
            lines += [f"{edit.model}: an interrupted apply was undone ({error})" for edit in edits]
        if pending:
            self._journal.end()
        return tuple(lines)

    def _is_as_left(self, edit: ConfigEdit) -> bool:
        return edit.model in self._repository.models() and self._repository.read_config(edit.model) in (
            edit.old_text,
            edit.new_text,
        )

    def _finish(self, edit: ConfigEdit) -> None:
        self._say(f"{edit.model}: finishing an interrupted apply")
        if self._repository.read_config(edit.model) != edit.new_text:
            self._repository.write_config(edit.model, edit.new_text)
        if edit.load:
            self._wait_gone(self._load(edit.model))
