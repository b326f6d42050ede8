"""Logs: one line an event in both formats, fields kept, bounded files, and a disk that is full."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dstack_sched.adapters import logs
from dstack_sched.adapters.logs import FILE_BYTES, LogOptions, bound, fields, logging_active, logging_to
from dstack_sched.cli.common import say
from dstack_sched.errors import InfeasibleError, InputError

log = logging.getLogger("dstack.test")


def test_json_lines_carry_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to("controller", LogOptions("json")):
        log.info("applied: %s", "m: batch 4 -> 8", extra=fields(what="applied", model="m", loads=1))
        log.debug("below the level")
        say("for people\nand tools")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["applied: m: batch 4 -> 8", "for people\nand tools"]
    assert lines[0] | {"time_s": 0} == {
        "time_s": 0, "level": "info", "part": "controller", "message": "applied: m: batch 4 -> 8",
        "what": "applied", "model": "m", "loads": 1,
    }  # fmt: skip
    assert lines[0]["time_s"] > 1.7e9


def test_text_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A model name with a line break must not forge a record."""
    with logging_to("arbiter", LogOptions()):
        log.warning("joined: %s", "m\n2026-01-01 00:00:00 arbiter: forged\x1b[31m")
    (line,) = capsys.readouterr().err.splitlines()
    assert line[20:] == r"arbiter: warning: joined: m\n2026-01-01 00:00:00 arbiter: forged\x1b[31m"


def test_without_a_log_people_are_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert not logging_active()
    say("hello")
    assert capsys.readouterr().err == "hello\n"


def test_the_level_holds_and_goes_with_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    before = logs.OURS.level, list(logging.getLogger().handlers)
    with logging_to("serve", LogOptions(level="error")):
        log.warning("no")
        log.error("yes")
    assert capsys.readouterr().err.endswith("serve: error: yes\n")
    assert (logs.OURS.level, logging.getLogger().handlers) == before


def test_what_ends_the_program_is_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator who collects JSON must find the reason there, and nothing on stderr that is not JSON."""
    with pytest.raises(SystemExit) as stopped, logging_to("controller", LogOptions("json")):
        raise InfeasibleError("m: too slow")
    assert stopped.value.code == 1
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("error", "m: too slow")

    file = tmp_path / "log" / "run.jsonl"
    with pytest.raises(ZeroDivisionError), logging_to("controller", LogOptions("json", file=file)):
        raise ZeroDivisionError("a defect")
    line = json.loads(file.read_text())
    assert line["level"] == "critical" and "ZeroDivisionError: a defect" in line["error"]


def test_files_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 1000)
    with logging_to("controller", LogOptions(file=tmp_path / "run.log")):
        for number in range(200):
            log.info("line %d", number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + logs.FILES_KEPT
    assert all(file.stat().st_size <= 1000 for file in files)
    assert "line 199" in (tmp_path / "run.log").read_text()


def test_a_full_disk_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to("controller", LogOptions(file=Path("/dev/full"))):
        for _ in range(3):
            log.info("lost")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"format": "xml"}, "--log-format xml"),
        ({"level": "loud"}, "--log-level loud"),
    ],
)
def test_unknown_words_are_refused(options: dict[str, str], names: str) -> None:
    with pytest.raises(InputError, match=names):
        LogOptions(**options)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=f"--log-file {tmp_path}: "),
        logging_to("controller", LogOptions(file=tmp_path)),
    ):
        pass


def test_a_child_s_log_is_bounded_under_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "triton.log"
    with path.open("ab", buffering=0) as child:
        child.write(b"x" * 600)
        bound([path, tmp_path / "absent.log"], 500)
        assert (path.stat().st_size, (tmp_path / "triton.log.1").stat().st_size) == (0, 600)
        child.write(b"next\n")
        bound([path], 500)
    assert path.read_bytes() == b"next\n"
    assert FILE_BYTES == 10 << 20
