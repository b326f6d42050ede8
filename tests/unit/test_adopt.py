"""Adopting and reverting, on real directories and a fake Triton: what changes, what stays, the ways back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstack_sched.adapters import originals, repository
from dstack_sched.adapters.edit_journal import FileEditJournal
from dstack_sched.adapters.model_look import DiskModelLook
from dstack_sched.adapters.originals import FILE_NAME
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.app.adopt import Adoption
from dstack_sched.app.edits import ConfigEdits, Done
from dstack_sched.app.suitability import served_versions
from dstack_sched.domain.adoption import Verdict
from dstack_sched.domain.model_config import ConfigChange
from dstack_sched.errors import DstackError, InputError, PlanRefusedError
from fakes.adopt_corpus import ADOPTED, CORPUS, build, snapshot
from fakes.serving import FakeClock, FakeServer

FEW = ["bare", "minimal", "named_file"]


class World:
    """Some models of the corpus, and a Triton that serves some of them with its own backend."""

    def __init__(self, tmp_path: Path, names: list[str], loaded: tuple[str, ...] = ()) -> None:
        self.root = build(tmp_path / "models", names)
        self.names = names
        self.repository = DiskRepository(self.root)
        self.server = FakeServer(self.repository, *loaded)
        self.journal = FileEditJournal(tmp_path / "state", self.root)
        self.journal.folder.mkdir(parents=True)
        self.adoption = Adoption(self.repository, DiskModelLook(self.repository))
        self.before = snapshot(self.root)

    def edits(self, *, served: bool = True) -> ConfigEdits:
        """As a new process gets them (cli/deployment.locked_edits): what an earlier one left is put right."""
        server = self.server if served else None
        self.repository.sweep()
        edits = ConfigEdits(self.repository, server, self.journal, self.server, FakeClock())
        edits.recover()
        self.tidy(edits)
        return edits

    def tidy(self, edits: ConfigEdits) -> None:
        if not edits.unfinished():
            self.repository.drop_unneeded_originals()

    def adopt(self, *, served: bool = True, load: bool = True) -> tuple[Verdict, ...]:
        edits = self.edits(served=served)
        verdicts = self.adoption.judge(self.names)
        states = self.server.models() if served else None
        try:
            self.adoption.adopt(verdicts, edits, states, load=served and load)
        except DstackError:
            self.tidy(edits)
            raise
        return verdicts

    def revert(self, *, served: bool = True, force: bool = False) -> list[Done]:
        edits = self.edits(served=served)
        verdicts = self.adoption.judge_back(self.repository.adopted(), force=force)
        done = self.adoption.revert(verdicts, edits, self.server.models() if served else None)
        self.tidy(edits)
        return done

    def texts(self) -> dict[str, str | None]:
        return {name: self.repository.read_config(name) for name in self.names}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, FEW)


# -- which models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    root = build(tmp_path_factory.mktemp("corpus") / "models")
    disk = DiskRepository(root)
    return {each.model: each for each in Adoption(disk, DiskModelLook(disk)).judge(CORPUS)}


@pytest.mark.parametrize("name", CORPUS)
def test_each_model_of_the_corpus_is_judged_as_it_should_be(name: str, verdicts: dict[str, Verdict]) -> None:
    verdict, case = verdicts[name], CORPUS[name]
    assert verdict.decision == ("leave" if case.why else "adopt"), verdict.why
    assert case.why in verdict.why
    assert "\n" not in verdict.why
    assert any(case.note in note for note in verdict.notes) or not case.note, verdict.notes


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ({}, (10,)),
        ({"latest": {"num_versions": 2}}, (2, 10)),
        ({"latest": {"num_versions": 9}}, (1, 2, 10)),
        ({"all": {}}, (1, 2, 10)),
        ({"specific": {"versions": [1, 7]}}, (1,)),
    ],
)
def test_only_versions_that_triton_serves_are_looked_at(
    policy: dict[str, Any], served: tuple[int, ...]
) -> None:
    assert served_versions({"version_policy": policy}, (10, 1, 2)) == served


def test_models_on_an_accelerator_are_adopted_where_that_is_asked_for(tmp_path: Path) -> None:
    world = World(tmp_path, ["accelerated"])
    (verdict,) = world.adoption.judge(["accelerated"], without_accelerators=True)
    assert verdict.decision == "adopt"
    assert "execution accelerator 'openvino' stays without effect" in verdict.notes


def test_what_cuda_was_asked_for_is_said_in_our_parameters(tmp_path: Path) -> None:
    world = World(tmp_path, ["on_gpu"])
    world.adopt(served=False)
    assert world.repository.config("on_gpu").parameters == {
        "conv_algo_search": "EXHAUSTIVE",
        "gpu_memory_limit_mb": "2048",
        "tf32": "false",
    }


def test_a_dstack_model_is_left_as_it_is(world: World) -> None:
    (world.root / "minimal" / "config.pbtxt").write_text('backend: "dstack"\n')
    (verdict,) = world.adoption.judge(["minimal"])
    assert (verdict.decision, verdict.old_text) == ("already", verdict.new_text)


def test_a_config_that_is_a_link_is_left_alone(world: World) -> None:
    """Guards the file that the link names: others may read it."""
    path = world.root / "minimal" / "config.pbtxt"
    shared = world.root / "shared.pbtxt"
    path.rename(shared)
    path.symlink_to(shared)
    (verdict,) = world.adoption.judge(["minimal"])
    assert verdict.decision == "leave"
    assert "is a link to" in verdict.why


# -- adopt and revert -------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", [True, False])
def test_only_the_backend_changes_and_revert_restores_every_byte(tmp_path: Path, served: bool) -> None:
    world = World(tmp_path, ADOPTED)
    world.adopt(served=served)
    for name, text in world.texts().items():
        old = world.before.get(f"{name}/config.pbtxt", b"")
        new = (text or "").encode("utf-8", "surrogateescape")
        kept = [line for line in old.splitlines(keepends=True) if b"onnx" not in line]
        assert all(line in new for line in kept), name
        assert world.repository.config(name).backend == "dstack"
    assert world.repository.adopted() == tuple(sorted(ADOPTED))
    world.revert(served=served)
    assert snapshot(world.root) == world.before
    assert not (world.root / FILE_NAME).exists()


def test_time_stamps_grow_both_ways_so_that_triton_reloads(world: World) -> None:
    path = world.root / "minimal" / "config.pbtxt"
    stamps = [path.stat().st_mtime_ns]
    for step in (world.adopt, world.revert):
        step()
        stamps.append(path.stat().st_mtime_ns)
    assert stamps == sorted(set(stamps))


def test_adopting_twice_changes_nothing_the_second_time(world: World) -> None:
    world.adopt()
    after, loads = snapshot(world.root), list(world.server.loads)
    assert {each.decision for each in world.adopt()} == {"already"}
    assert snapshot(world.root) == after
    assert world.server.loads == loads


def test_models_that_were_served_are_loaded_again_and_others_unloaded(tmp_path: Path) -> None:
    world = World(tmp_path, FEW, loaded=("minimal",))
    world.adopt()
    assert world.server.loads == FEW, "one at a time"
    world.server.loads.clear()
    world.revert()
    assert world.server.loads == ["minimal"]
    assert set(world.server.in_force) == {"minimal"}
    assert world.server.in_force["minimal"]["backend"] != "dstack"


def test_a_model_that_does_not_load_takes_all_back(tmp_path: Path) -> None:
    world = World(tmp_path, FEW, loaded=("bare",))
    world.server.fails = lambda model, parameters: "no" if model == "named_file" else ""
    with pytest.raises(PlanRefusedError, match=r"^named_file: its adoption could not be .* all is as before"):
        world.adopt()
    assert snapshot(world.root) == world.before
    assert set(world.server.in_force) == {"bare"}
    assert world.server.in_force["bare"]["backend"] == ""
    assert world.journal.pending() == ()


def test_an_original_that_does_not_load_is_back_all_the_same(tmp_path: Path) -> None:
    """Guards the way out: a Triton without the onnxruntime backend must not bar it."""
    world = World(tmp_path, FEW, loaded=("minimal",))
    world.adopt()
    world.server.fails = lambda model, parameters: "no such backend"
    errors = {each.model: each.error for each in world.revert()}
    assert "no such backend" in errors["minimal"]
    assert errors["bare"] == ""
    assert snapshot(world.root) == world.before
    assert world.server.in_force["minimal"]["backend"] == "dstack", "the old version serves on"


def test_plans_applied_meanwhile_do_not_hinder_the_way_back(world: World) -> None:
    world.adopt()
    for share in ("40", "60", "80"):
        change = ConfigChange(parameters={"gpu_percent": share}, preferred_batch_sizes=(4,), max_batch_size=8)
        for name in FEW:
            world.repository.write_config(name, world.repository.edited(name, change))
    world.revert()
    assert snapshot(world.root) == world.before


@pytest.mark.parametrize("then_apply", [False, True])
def test_what_someone_wrote_since_is_not_lost_silently(world: World, then_apply: bool) -> None:
    """then_apply: a plan rewrites the edited file, and with it keeps the edit."""
    world.adopt()
    path = world.root / "minimal" / "config.pbtxt"
    path.write_text(path.read_text() + "# do not batch more than 4!\n")
    if then_apply:
        change = ConfigChange(parameters={"gpu_percent": "40"})
        world.repository.write_config("minimal", world.repository.edited("minimal", change))
    edited = snapshot(world.root)
    verdicts = {each.model: each for each in world.adoption.judge_back(FEW)}
    assert {name: each.decision for name, each in verdicts.items()} == {
        "bare": "revert", "minimal": "leave", "named_file": "revert"
    }  # fmt: skip
    assert snapshot(world.root) == edited
    world.revert(force=True)
    assert snapshot(world.root) == world.before


def test_one_model_is_reverted_and_the_others_stay_adopted(world: World) -> None:
    world.adopt()
    edits = world.edits()
    world.adoption.revert(world.adoption.judge_back(["bare"]), edits, None)
    world.tidy(edits)
    assert world.repository.adopted() == ("minimal", "named_file")
    assert not (world.root / "bare" / "config.pbtxt").exists()
    assert [each.decision for each in world.adoption.judge_back(["bare"])] == ["already"]


def test_adopted_again_after_the_way_back(world: World) -> None:
    world.adopt()
    world.revert()
    world.adopt()
    world.revert()
    assert snapshot(world.root) == world.before


def test_originals_travel_with_the_repository(world: World, tmp_path: Path) -> None:
    """Guards the choice of place: another machine, another state directory."""
    world.adopt()
    moved = tmp_path / "elsewhere"
    world.root.rename(moved)
    disk = DiskRepository(moved)
    adoption = Adoption(disk, DiskModelLook(disk))
    journal = FileEditJournal(tmp_path / "other-state", moved)
    journal.folder.mkdir(parents=True)
    edits = ConfigEdits(disk, None, journal, world.server, FakeClock())
    adoption.revert(adoption.judge_back(disk.adopted()), edits, None)
    disk.drop_unneeded_originals()
    assert snapshot(moved) == world.before


@pytest.mark.parametrize("text", ["{", '{"version": 2, "models": {}}', '{"version": 1, "models": {"a": {}}}'])
def test_a_broken_record_is_said_so_and_nothing_is_touched(world: World, text: str) -> None:
    world.adopt()
    (world.root / FILE_NAME).write_text(text)
    after = snapshot(world.root)
    with pytest.raises(
        InputError, match=r"dstack-adopted.json: the originals of adopted models cannot be read"
    ):
        world.adoption.judge_back(FEW)
    with pytest.raises(InputError, match=r"dstack-adopted.json"):
        world.repository.write_config("minimal", 'backend: "dstack"\n')
    assert snapshot(world.root) == after


# -- crashes ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing runs after it."""


class Killer:
    """Raises at the n-th write of a file or word to the server, before or after it takes place."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, at: int, *, after: bool) -> None:
        self.count, self._at, self._after = 0, at, after
        for owner, name in (
            (originals, "replace_file"), (repository, "replace_file"), (world.journal, "begin"),
            (world.journal, "end"), (world.server, "load"), (world.server, "unload"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            self.count += 1
            doomed = self.count == self._at + 1
            if doomed and not self._after:
                raise Killed
            result = original(*args)
            if doomed:
                raise Killed
            return result

        return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(20))
@pytest.mark.parametrize("doing", ["adopt", "revert"])
def test_killed_anywhere_the_originals_are_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str, at: int, after: bool
) -> None:
    world = World(tmp_path, FEW, loaded=("minimal",))
    if doing == "revert":
        world.adopt()
    with monkeypatch.context() as patched:
        killer = Killer(world, patched, at, after=after)
        try:
            world.adopt() if doing == "adopt" else world.revert()
        except Killed:
            pass
        else:
            assert killer.count <= at, "the kill came too late to matter"
    world.edits()  # what any dstackctl does first
    for name in FEW:
        on_disk = world.repository.config(name).backend
        in_force = world.server.in_force.get(name, {"backend": on_disk})["backend"]
        assert on_disk == in_force, "what is on disk must be what is in force"
        assert (world.repository.original(name) is not None) == (on_disk == "dstack")
    world.revert()
    assert snapshot(world.root) == world.before
    assert set(world.server.in_force) >= {"minimal"}
    assert world.server.in_force["minimal"]["backend"] != "dstack"


def test_a_full_disk_leaves_all_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(originals, "replace_file", full)
        with pytest.raises(DstackError, match=r"dstack-adopted.json: cannot be written .*free some space"):
            world.adopt()
    assert snapshot(world.root) == world.before


def test_a_disk_that_fills_up_on_the_way_back_loses_no_original(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards records of configs that are the original again, while the journal may still adopt them."""
    world.server.fails = lambda model, parameters: "no" if model == "named_file" else ""
    real = repository.replace_file
    writes = 0

    def fills_up(path: Path, folder: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == 5:  # bare, minimal and named_file adopted, named_file back; then minimal
            raise OSError(28, "No space left on device")
        real(path, folder, data)

    with monkeypatch.context() as patched:
        patched.setattr(repository, "replace_file", fills_up)
        with pytest.raises(PlanRefusedError, match=r"minimal is not as before yet"):
            world.adopt()
    world.server.fails = lambda model, parameters: ""
    world.edits()
    assert {world.repository.config(name).backend for name in FEW} == {"dstack"}, "the next start finished it"
    world.revert()
    assert snapshot(world.root) == world.before


def test_without_a_server_an_interrupted_load_is_not_forgotten(world: World) -> None:
    world.server.load = lambda model: (_ for _ in ()).throw(Killed())  # type: ignore[assignment,method-assign]
    with pytest.raises(Killed):
        world.adopt()
    with pytest.raises(DstackError, match=r"was interrupted while Triton loaded it; give --url"):
        world.edits(served=False)


def test_the_record_is_plain_json_that_a_person_can_use(world: World) -> None:
    world.adopt()
    body = json.loads((world.root / FILE_NAME).read_text())
    assert body["models"]["minimal"]["original"] == world.before["minimal/config.pbtxt"].decode()
    assert body["models"]["bare"]["original"] is None
