"""ports.EditJournal in the state directory: one file while a plan is being put in force.

STATE/edits/<repository>/edits.json, where <repository> is a hash of its real path. The repository is locked
meanwhile, so that no two rewrite it at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from dstack_sched.adapters.repository_lock import RepositoryLock
from dstack_sched.domain.change import ConfigEdit
from dstack_sched.errors import InputError

VERSION = 1


class FileEditJournal:
    """The journal of one repository; hold it as a context manager while rewriting.

    wait_s: how long to wait for another one to end. Raises MachineError while another one holds it,
    InputError where the state directory fails.
    """

    def __init__(self, state: Path, repository: Path, *, wait_s: float = 0.0) -> None:
        identity = hashlib.sha256(os.fsencode(repository.resolve())).hexdigest()[:16]
        self.folder = state / "edits" / identity
        self._path = self.folder / "edits.json"
        self.lock = RepositoryLock(repository, beside=self.folder / "lock", wait_s=wait_s)

    def __enter__(self) -> FileEditJournal:
        self.lock.__enter__()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.lock.__exit__()
            raise InputError(f"{self.folder}: {error.strerror}; choose another with --state DIR") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.__exit__()

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
        """Raises InputError where the file cannot be removed: what it says will be finished (again)."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self._path}: the journal cannot be removed ({error.strerror})") from error

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
