"""ports.EditJournal in the state directory: one file while a plan is being put in force.

STATE/edits/<repository>/edits.json, where <repository> is a hash of its real path. A lock file beside it
keeps two controllers from rewriting one repository at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO

from dstack_sched.domain.change import ConfigEdit
from dstack_sched.errors import InputError, MachineError

VERSION = 1


class FileEditJournal:
    """The journal of one repository; hold it as a context manager while rewriting.

    Raises MachineError while another controller holds it, InputError where the state directory fails.
    """

    def __init__(self, state: Path, repository: Path) -> None:
        identity = hashlib.sha256(os.fsencode(repository.resolve())).hexdigest()[:16]
        self.folder = state / "edits" / identity
        self._path = self.folder / "edits.json"
        self._repository = repository
        self._lock: IO[str] | None = None

    def __enter__(self) -> FileEditJournal:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("a+")
        except OSError as error:
            raise InputError(f"{self.folder}: {error.strerror}; choose another with --state DIR") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read(20).strip()
            lock.close()
            raise MachineError(
                f"{self._repository}: dstackctl (pid {holder or 'unknown'}) is rewriting it; wait for its end"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()  # and with it goes the lock
            self._lock = None

    def begin(self, edits: Iterable[ConfigEdit]) -> None:
        body = {"version": VERSION, "edits": [asdict(edit) for edit in edits]}
        temporary = self._path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="ascii") as file:
                json.dump(body, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(
                f"{self._path}: the journal cannot be written ({error.strerror}); nothing was changed"
            ) from error

    def end(self) -> None:
        self._path.unlink(missing_ok=True)

    def pending(self) -> tuple[ConfigEdit, ...]:
        """The edits of a plan that was begun and not ended. Raises InputError for a file that is broken."""
        try:
            body = json.loads(self._path.read_text(encoding="ascii"))
            if body["version"] != VERSION:
                raise ValueError("another version")
            return tuple(ConfigEdit(**edit) for edit in body["edits"])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._path}: this journal cannot be read ({error}); look at the configs, then delete it"
            ) from None
