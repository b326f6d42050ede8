"""Adoption and its way back over random configs and random histories."""

from __future__ import annotations

import tempfile
from pathlib import Path

from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from dstack_sched.adapters.config_pbtxt import edit_config
from dstack_sched.adapters.model_look import DiskModelLook
from dstack_sched.adapters.originals import FILE_NAME
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.app.adopt import Adoption
from dstack_sched.app.suitability import suitability
from dstack_sched.domain.adoption import ModelFacts, Suitability
from dstack_sched.domain.model_config import ConfigChange
from dstack_sched.errors import InputError
from fakes.config_texts import changes, protobuf, relaxed, written_configs

onnx_backends = st.sampled_from(["onnxruntime", ""])


class ConfigOnly(DiskModelLook):
    """A look that has no graph to hold the config against."""

    def check(self, facts: ModelFacts, found: Suitability) -> None: ...


def lay_out(root: Path, text: bytes | None) -> DiskRepository:
    (root / "m" / "1").mkdir(parents=True)
    (root / "m" / "1" / "model.onnx").write_bytes(b"")
    if text is not None:
        (root / "m" / "config.pbtxt").write_bytes(text)
    return DiskRepository(root)


@relaxed
@given(written_configs(), onnx_backends)
def test_adoption_changes_the_backend_adds_what_it_says_and_nothing_else(written, backend):
    """Guards every field that is not ours, known or not, against being lost on the way."""
    text, _ = written
    text = edit_config(text, ConfigChange(backend=backend or None), "c")
    with tempfile.TemporaryDirectory() as folder:
        disk = lay_out(Path(folder), text.encode())
        before = protobuf(text)
        (verdict,) = Adoption(disk, ConfigOnly(disk)).judge(["m"])
        facts = DiskModelLook(disk).facts("m")
    if verdict.decision != "adopt":
        assert verdict.new_text == verdict.old_text or verdict.new_text is None
        assert verdict.why or verdict.decision == "already"
        return
    after = protobuf(verdict.new_text)
    assert after.backend == "dstack"
    added = suitability(facts).parameters
    assert {key: after.parameters[key].string_value for key in added} == added
    for key in added:
        assert key not in before.parameters
        del after.parameters[key]
    after.backend = before.backend
    assert after == before


steps = st.lists(
    st.tuples(st.just("apply"), changes)
    | st.tuples(st.just("edit"), st.sampled_from(["# mine\n", "max_batch_size: 9\n", " ", ""]))
    | st.tuples(st.just("look"), st.none()),
    max_size=5,
)


@relaxed
@given(st.none() | written_configs(), st.binary(max_size=8), steps)
def test_whatever_happens_in_between_the_original_comes_back_byte_for_byte(written, noise, history):
    """A hand edit is noticed, whenever it was made and whatever was applied on top of it."""
    text = None
    if written is not None:
        noise = noise.replace(b"\n", b"").replace(b"\0", b"")  # a comment may hold any other byte
        text = written[0].encode() + b"\n# " + noise
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        disk = lay_out(root, text)
        original = disk.read_config("m")
        disk.keep_originals({"m": (original, None)})
        disk.write_config("m", disk.edited("m", ConfigChange(backend="dstack")))
        adopted = disk.read_config("m") != original
        edited = False
        for what, content in history:
            now = disk.read_config("m") or ""
            if what == "apply":
                apply(disk, content)
            elif what == "edit" and parses(now + content):
                with (root / "m" / "config.pbtxt").open("ab") as file:
                    file.write(content.encode())
                edited = edited or bool(content and adopted)
            elif what == "look":
                disk = DiskRepository(root)  # another process
        record = disk.original("m")
        if record is not None:
            assert record.edited == edited or not adopted
            assert record.text == original
            disk.write_config("m", record.text)
        disk.drop_unneeded_originals()
        if adopted:
            assert disk.read_config("m") == original
            assert not (root / FILE_NAME).exists()
            path = root / "m" / "config.pbtxt"
            assert (path.read_bytes() if path.exists() else None) == text


def apply(disk: DiskRepository, change: ConfigChange) -> None:
    """As an apply does; one that the editor refuses (two schedulers, say) is none."""
    try:
        disk.write_config("m", disk.edited("m", change))
    except InputError:
        return


def parses(text: str) -> bool:
    try:
        text_format.Parse(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
                          model_config_pb2.ModelConfig())  # fmt: skip
    except text_format.ParseError:
        return False
    return True
