"""The originals of adopted models: REPO/.dstack-adopted.json.

In the repository, so that they travel with it and any dstackctl can revert; a file in its root, because
Triton takes a directory there for a model, and any file in a model's directory for a change of that model
(decisions/0080). A record is there before its config is touched, and goes once the config is the original
again and no edit of it is unfinished; in between it means something only while the two differ.

{"version": 1, "models": {NAME: {"original": TEXT | null, "was_loaded": true | false | null,
                                 "ours": [sha256 of a config that dstackctl wrote, ...], "edited": bool}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstack_sched.adapters.atomic_file import failed, replace_file
from dstack_sched.domain.adoption import Original
from dstack_sched.errors import InputError

FILE_NAME = ".dstack-adopted.json"
VERSION = 1
# The text on disk and the one about to be written: which of the two is there after a crash is not known.
TEXTS_KNOWN = 2


class Originals:
    """The file of one repository; absent where no model is adopted. Texts are UTF-8 with surrogateescape.

    Raises InputError for a file that cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FILE_NAME

    def models(self) -> tuple[str, ...]:
        return tuple(sorted(self._read()))

    def get(self, model: str, text: str | None) -> Original | None:
        """The original of a model whose config is `text` now; None where that is it, or none is kept."""
        record = self._read().get(model)
        if record is None or record["original"] == text:
            return None
        edited = record["edited"] or _sha256(text) not in record["ours"]
        return Original(record["original"], record["was_loaded"], edited)

    def keep(self, originals: Mapping[str, tuple[str | None, bool | None]]) -> None:
        """Model -> its config as it is, and whether Triton serves it."""
        records = self._read()
        for model, (text, was_loaded) in originals.items():
            records[model] = {"original": text, "was_loaded": was_loaded, "ours": [], "edited": False}
        self._write(records)

    def note(self, model: str, text: str | None, new_text: str | None) -> None:
        """Before `new_text` takes the place of `text`: it is ours; where `text` is not, someone edited it."""
        records = self._read()
        record = records.get(model)
        if record is None:
            return
        before = _sha256(text)
        known = before in record["ours"] or text == record["original"]
        record["edited"] = record["edited"] or not known
        record["ours"] = [*([before] if known else []), _sha256(new_text)][-TEXTS_KNOWN:]
        self._write(records)

    def drop_where_back(self, texts: Mapping[str, str | None]) -> None:
        """Drop the records of models whose config, as given here, is the original again."""
        records = self._read()
        back = {model for model, text in texts.items() if records[model]["original"] == text}
        if back:
            self._write({model: record for model, record in records.items() if model not in back})

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            body = json.loads(self._path.read_text(encoding="ascii"))
            if body["version"] != VERSION:
                raise ValueError(f"version {body['version']}, this dstackctl reads version {VERSION}")
            return {model: _checked(record) for model, record in body["models"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self._path}: the originals of adopted models cannot be read ({error}); mend or restore it"
            ) from None

    def _write(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            if not records:
                self._path.unlink(missing_ok=True)
                return
            body = json.dumps({"version": VERSION, "models": records}, indent=1)
            replace_file(self._path, self._path.parent, body.encode("ascii"))
        except OSError as error:
            raise failed(self._path, "cannot be written", error) from error


def _checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with all its fields. Raises KeyError, TypeError, ValueError."""
    if not (record["original"] is None or isinstance(record["original"], str)):
        raise ValueError("an original is a text or null")
    return {
        "original": record["original"],
        "was_loaded": record["was_loaded"],
        "ours": [str(each) for each in record["ours"]],
        "edited": bool(record["edited"]),
    }


def _sha256(text: str | None) -> str:
    """Of a config text; of an absent file, a word that is no hash."""
    return "absent" if text is None else hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
