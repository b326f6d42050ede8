"""Applying a plan, on a real directory and a fake Triton: what changes, what must not, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dstack_backend import settings
from dstack_sched.adapters.edit_journal import FileEditJournal
from dstack_sched.adapters.repository import DiskRepository
from dstack_sched.app.apply import Applier, has_levels, stated_plan
from dstack_sched.app.changes import Reach
from dstack_sched.app.edits import ConfigEdits
from dstack_sched.domain.model_config import InstanceGroup, ModelConfig
from dstack_sched.domain.plan import ModelPlan, Plan, Replica
from dstack_sched.errors import InputError, MachineError
from fakes.serving import FakeClock, FakeServer

DETECT = '# text detection\nbackend: "dstack"\nmax_batch_size: 8\n'
VOICE = (
    'backend: "dstack"\nmax_batch_size: 0\nparameters { key: "gpu_percent" value { string_value: "90" } }\n'
)


def row(gpu_percent: float, batch_size: int, slo_ms: float | None = 50.0, **extra: object) -> ModelPlan:
    return ModelPlan(
        gpu=0, gpu_percent=gpu_percent, batch_size=batch_size, max_queue_delay_us=500, latency_ms=10.0,
        throughput_per_s=100.0, efficacy=1.0, knee_percent=40.0, utilization=0.5, slo_ms=slo_ms, **extra,
    )  # fmt: skip


def plan(gpus: tuple[str, ...] = ("cpu",), **models: ModelPlan) -> Plan:
    return Plan(100.0, gpus, dict(models), True, (), 1.5)


class World:
    """A repository with two models, both loaded, and an applier."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "models"
        for name, text in (("detect", DETECT), ("voice", VOICE)):
            (self.root / name / "1").mkdir(parents=True)
            (self.root / name / "1" / "model.onnx").write_bytes(b"onnx")
            (self.root / name / "config.pbtxt").write_text(text)
        self.repository = DiskRepository(self.root)
        self.server = FakeServer(self.repository, "detect", "voice")
        self.clock = FakeClock()
        self.journal = FileEditJournal(tmp_path / "state", self.root)
        self.journal.folder.mkdir(parents=True)
        self.said: list[str] = []
        self.applier = self.new_applier()

    def new_edits(self) -> ConfigEdits:
        return ConfigEdits(
            self.repository, self.server, self.journal, self.server, self.clock, self.said.append
        )

    def new_applier(self) -> Applier:
        return Applier(self.repository, self.server, self.new_edits())

    def texts(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.root)): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_plan_is_written_loaded_and_reported(world: World) -> None:
    report = world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    assert world.repository.read_config("detect") == (
        DETECT
        + "dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 0 }\n"
        + 'parameters { key: "gpu_percent" value { string_value: "60" } }\n'
        + 'parameters { key: "batch_size" value { string_value: "4" } }\n'
        + 'parameters { key: "slo_ms" value { string_value: "50" } }\n'
        + 'parameters { key: "on_late" value { string_value: "serve" } }\n'
    )
    assert "dynamic_batching" not in str(world.repository.read_config("voice")), "it has no batch dimension"
    assert world.server.loads == ["voice", "detect"], "the one that shrinks makes room first"
    assert report.reloads == 2
    assert all(outcome.old_stubs_gone for outcome in report.outcomes)
    assert not world.server.lingering or not world.server.alive(frozenset(world.server.lingering))
    assert world.journal.pending() == ()


def test_the_same_plan_again_reloads_nothing_and_touches_no_file(world: World) -> None:
    world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    before = {p: p.stat().st_mtime_ns for p in world.root.rglob("*")}
    world.server.loads.clear()
    report = world.applier.apply(plan(detect=row(60.0, 4), voice=row(30, 1)))
    assert world.server.loads == []
    assert {outcome.action for outcome in report.outcomes} == {"unchanged"}
    assert {p: p.stat().st_mtime_ns for p in world.root.rglob("*")} == before


def test_a_config_on_disk_that_is_not_in_force_is_loaded(world: World) -> None:
    """Guards against trusting the file alone: someone may have edited it without loading."""
    world.applier.apply(plan(detect=row(60, 4)))
    world.server.in_force["detect"] = {"max_batch_size": 8, "parameters": {}}
    stamp = world.repository.config_path("detect").stat().st_mtime_ns
    assert world.applier.apply(plan(detect=row(60, 4))).reloads == 1
    assert world.repository.config_path("detect").stat().st_mtime_ns > stamp, "Triton would ignore the load"


def test_a_failed_load_puts_every_model_back(world: World) -> None:
    before, in_force = world.texts(), dict(world.server.in_force)
    world.server.fails = lambda model, parameters: (
        "out of memory" if parameters.get("gpu_percent") == "60" else ""
    )
    with pytest.raises(
        InputError, match=r"^detect: the plan could not be put in force, all is as before: .*out of"
    ):
        world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    assert world.texts() == before
    assert world.server.in_force == in_force, "voice had the new config and must have the old one again"
    assert world.journal.pending() == ()


def test_a_model_that_was_not_loaded_is_unloaded_again_on_failure(world: World) -> None:
    world.server.unload("voice")
    world.server.fails = lambda model, parameters: "no" if parameters.get("gpu_percent") == "60" else ""
    with pytest.raises(InputError):
        world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    assert not world.server.is_model_ready("voice")


@pytest.mark.parametrize(
    ("text", "batch", "message"),
    [
        ('backend: "onnxruntime"\n', 1, r'belongs to backend "onnxruntime".*dstackctl adopt'),
        ('platform: "onnxruntime_onnx"\n', 1, r'belongs to backend "onnxruntime_onnx"'),
        ("max_batch_size: 8\n", 1, r'belongs to backend "unnamed"'),
        ('backend: "dstack"\nmax_batch_size: eight\n', 1, r"config.pbtxt:2: a whole number is wanted"),
        ('backend: "dstack"\nsequence_batching { }\n', 1, r"uses sequence_batching"),
        (DETECT, 16, r"max_batch_size is 8, the plan wants batches of 16"),
        (VOICE, 2, r"max_batch_size is 0, the plan wants batches of 2"),
    ],
)
def test_a_config_that_cannot_take_the_plan_changes_nothing(
    world: World, text: str, batch: int, message: str
) -> None:
    (world.root / "detect" / "config.pbtxt").write_text(text)
    before = world.texts()
    with pytest.raises(InputError, match=message):
        world.applier.apply(plan(voice=row(30, 1), detect=row(60, batch)))
    assert world.texts() == before
    assert world.server.loads == []


def test_a_plan_for_a_model_that_is_not_there(world: World) -> None:
    with pytest.raises(InputError, match=r"the plan names ghost, not in .*; it has detect, voice"):
        world.applier.apply(plan(voice=row(30, 1), ghost=row(60, 1)))
    assert world.server.loads == []


def test_a_model_without_a_config_file_gets_one_and_loses_it_on_failure(world: World) -> None:
    path = world.root / "detect" / "config.pbtxt"
    path.unlink()
    world.server.fails = lambda model, parameters: "no"
    with pytest.raises(InputError):
        world.applier.apply(plan(detect=row(60, 4)))
    assert not path.exists()
    world.server.fails = lambda model, parameters: ""
    world.applier.apply(plan(detect=row(60, 4)))
    assert path.read_text().startswith('backend: "dstack"\n')


def gpus_stated(world: World, model: str = "detect") -> list[tuple[int, ...]]:
    return [group.gpus for group in world.repository.config(model).instance_groups]


def test_several_gpus_become_an_instance_group(world: World) -> None:
    replicas = (Replica(0, 60, 50.0), Replica(1, 60, 50.0))
    world.applier.apply(plan(gpus=("H100", "H100"), detect=row(60, 4, replicas=replicas)))
    assert "instance_group [ { count: 1 kind: KIND_GPU gpus: [ 0, 1 ] } ]" in str(
        world.repository.read_config("detect")
    )


def test_a_model_on_one_gpu_of_two_says_which(world: World) -> None:
    """Guards against an instance on every GPU, which is what Triton makes of a config without gpus."""
    world.applier.apply(plan(gpus=("H100", "H100"), detect=row(60, 4)))
    assert gpus_stated(world) == [(0,)]


def test_a_model_leaves_a_gpu_that_is_out_and_comes_back_to_it(world: World) -> None:
    both = row(60, 4, replicas=(Replica(0, 60, 50.0), Replica(1, 60, 50.0)))
    world.applier.apply(plan(gpus=("H100", "H100"), detect=both, voice=row(30, 1)))
    world.server.loads.clear()
    report = world.applier.apply(
        plan(gpus=("H100", "H100"), detect=row(60, 4, replicas=(Replica(1, 60, 100.0),)), voice=row(30, 1))
    )
    assert gpus_stated(world) == [(1,)] and world.server.loads == ["detect"] and report.reloads == 1
    world.applier.apply(plan(gpus=("H100", "H100"), detect=both, voice=row(30, 1)))
    assert gpus_stated(world) == [(0, 1)]


def test_on_a_host_with_one_gpu_only_a_wrong_gpu_is_rewritten(world: World) -> None:
    world.applier.apply(plan(gpus=("H100",), detect=row(60, 4)))
    assert gpus_stated(world) == []
    replicas = (Replica(1, 60, 50.0),)
    world.applier.apply(plan(gpus=("H100", "H100"), detect=row(60, 4, replicas=replicas)))
    assert gpus_stated(world) == [(1,)]
    world.applier.apply(plan(gpus=("H100",), detect=row(60, 4)))
    assert gpus_stated(world) == [(0,)]


def test_a_memory_limit_is_stated_and_an_operator_s_own_is_kept(world: World) -> None:
    world.applier.apply(plan(detect=row(60, 4, memory_limit_mb=2048), voice=row(30, 1)))
    assert world.repository.config("detect").parameters["process_memory_limit_mb"] == "2048"
    assert "process_memory_limit_mb" not in world.repository.config("voice").parameters
    world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    assert world.repository.config("detect").parameters["process_memory_limit_mb"] == "2048"


class Killed(BaseException):
    """Stands for kill -9: nothing of the applier runs after it."""


REFUSES = "detect does not load with 60%"


@pytest.mark.parametrize("at", range(14))
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("broken", ["never", "at the next start", "from the first"])
def test_a_controller_killed_anywhere_is_cleaned_up_after(
    world: World, at: int, after: bool, broken: str
) -> None:
    """Guards against half a plan in force: the next start finishes it whole or undoes it whole. Killed before
    and after every step that changes something, those of the way back included."""
    old, wanted = world.texts(), plan(detect=row(60, 4), voice=row(30, 1))
    world.applier.apply(wanted)
    new = world.texts()
    for name, data in old.items():
        (world.root / name).write_bytes(data)
    world.server = FakeServer(world.repository, "detect", "voice")
    world.applier = world.new_applier()
    if broken == "from the first":
        world.server.fails = refuse_60
    step = _kill_at(world, at, after)
    try:
        world.applier.apply(wanted)
    except Killed:
        pass
    except InputError:
        assert broken == "from the first" and step() <= at, "it was undone before the kill came"
    else:
        assert step() <= at, "the kill came too late to matter"
        return
    _revive(world)
    if broken == "at the next start":
        world.server.fails = refuse_60
    pending = world.journal.pending() != ()
    lines = world.new_edits().recover()
    finished = broken == "never" if pending else world.texts() == new
    assert world.texts() == (new if finished else old)
    assert not finished or broken != "from the first"
    shares = {
        m: c["parameters"].get("gpu_percent", {}).get("string_value")
        for m, c in world.server.in_force.items()
    }
    on_disk = {m: world.repository.config(m).parameters.get("gpu_percent") for m in shares}
    assert shares == on_disk, "what is on disk must be what is in force"
    assert world.journal.pending() == ()
    assert world.new_edits().recover() == ()
    if pending and finished:
        assert lines == (
            "voice: an interrupted apply was finished",
            "detect: an interrupted apply was finished",
        )


def refuse_60(model: str, parameters: Mapping[str, str]) -> str:
    return REFUSES if parameters.get("gpu_percent") == "60" else ""


def _kill_at(world: World, at: int, after: bool):
    """Raise before or after the at-th step that changes something."""
    count = 0

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object) -> object:
            nonlocal count
            count += 1
            this = count
            if this == at + 1 and not after:
                raise Killed
            try:
                return original(*args)
            finally:
                if this == at + 1:
                    raise Killed

        setattr(owner, name, call)

    wrap(world.repository, "write_config")
    for name in ("begin", "end"):
        wrap(world.journal, name)
    for name in ("load", "unload", "alive"):
        wrap(world.server, name)
    return lambda: count


def test_a_way_back_that_sticks_goes_on_for_the_others_and_is_ended_later(world: World) -> None:
    """Guards against a full disk in the middle of a rollback that leaves the other models changed, too."""
    old, write = world.texts(), world.repository.write_config
    world.server.fails = refuse_60

    def full(model: str, text: str | None) -> None:
        if model == "detect" and world.server.loads:
            stuck.append(model)
            raise InputError("config.pbtxt: cannot be written (No space left on device); free some space")
        write(model, text)

    stuck: list[str] = []
    world.repository.write_config = full  # type: ignore[method-assign]
    world.server.loads.clear()
    with pytest.raises(InputError, match=r"detect: the plan could not be put in force"):
        world.applier.apply(plan(voice=row(30, 1), detect=row(60, 4)))
    assert stuck and world.texts()["voice/config.pbtxt"] == old["voice/config.pbtxt"]
    world.repository.write_config = write  # type: ignore[method-assign]
    world.new_edits().recover()
    assert world.texts() == old and world.journal.pending() == ()


def _revive(world: World) -> None:
    for owner in (world.journal, world.repository, world.server):
        for name in ("begin", "write_config", "load", "unload", "alive", "end"):
            vars(owner).pop(name, None)


def test_a_config_changed_by_hand_after_a_crash_is_left_alone(world: World) -> None:
    edits = [rewrite.edit for rewrite in world.applier.check(plan(detect=row(60, 4)))]
    world.journal.begin(edits)
    world.repository.write_config("detect", DETECT + "# mine now\n")
    assert world.new_edits().recover() == (
        "detect: an apply was interrupted here; its config has changed since and is left alone",
    )
    assert world.repository.read_config("detect") == DETECT + "# mine now\n"


def test_two_controllers_do_not_rewrite_one_repository(world: World, tmp_path: Path) -> None:
    with (
        FileEditJournal(tmp_path / "state", world.root),
        pytest.raises(MachineError, match="is rewriting it"),
        FileEditJournal(tmp_path / "state", world.root),
    ):
        pass
    with FileEditJournal(tmp_path / "state", world.root):
        pass


def test_a_broken_journal_is_said_so(world: World) -> None:
    (world.journal.folder / "edits.json").write_text('{"version": 1')
    with pytest.raises(InputError, match=r"edits.json: this journal cannot be read"):
        world.new_edits().recover()


def test_old_stubs_that_never_go_are_reported_not_waited_for_ever(world: World) -> None:
    world.server.linger_polls = 10**9
    report = world.applier.apply(plan(detect=row(60, 4)))
    assert [outcome.old_stubs_gone for outcome in report.outcomes] == [False]
    assert any("are still there after 60 s" in line for line in world.said)


def test_what_instances_are_told_is_stated_without_a_load(world: World) -> None:
    """Guards against reloads for a batch size: the arbiter told the instances, the file follows."""
    world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    world.server.loads.clear()
    told = plan(detect=row(60, 8, slo_ms=80.0), voice=row(30, 1))
    report = world.applier.apply(told, Reach(arbiter=True))
    assert world.server.loads == []
    assert {each.model: each.action for each in report.outcomes} == {"detect": "told", "voice": "unchanged"}
    assert report.loads == 0
    text = str(world.repository.read_config("detect"))
    assert 'key: "batch_size" value { string_value: "8" }' in text
    assert 'key: "slo_ms" value { string_value: "80" }' in text
    assert world.applier.apply(told, Reach(arbiter=True)).outcomes[0].action == "unchanged"
    # Without an arbiter nobody was told: the next plan brings all of it into force.
    assert world.applier.apply(told).reloads == 1


def test_a_share_is_a_load_unless_the_model_has_levels(world: World) -> None:
    world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    reach = Reach(arbiter=True, levels=("detect",))
    assert world.applier.apply(plan(detect=row(40, 4)), reach).reloads == 1, "its config has no levels"
    path = world.repository.config_path("detect")
    path.write_text(path.read_text() + 'parameters { key: "levels" value { string_value: "auto" } }\n')
    world.server.loads.clear()
    report = world.applier.apply(plan(detect=row(20, 4), voice=row(50, 1)), reach)
    assert {each.model: each.action for each in report.outcomes} == {"detect": "told", "voice": "reloaded"}
    assert world.server.loads == ["voice"]
    assert '"gpu_percent" value { string_value: "20" }' in str(world.repository.read_config("detect"))


@pytest.mark.parametrize(
    ("kind", "default", "told"), [("GPU", "auto", True), ("CPU", "auto", False), ("GPU", "off", False)]
)
def test_the_default_of_levels_is_the_backend_s(
    monkeypatch: pytest.MonkeyPatch, kind: str, default: str, told: bool
) -> None:
    """Else a plan would be told to instances that cannot follow it, or loaded where telling is enough."""
    monkeypatch.setattr(settings, "LEVELS_DEFAULT", default)
    assert has_levels(ModelConfig(instance_groups=(InstanceGroup(f"KIND_{kind}"),))) is told
    assert not has_levels(ModelConfig(parameters={"levels": "off"}))
    assert has_levels(ModelConfig(parameters={"levels": "25,50"}))


def test_files_that_need_no_load_are_put_back_when_a_load_fails(world: World) -> None:
    world.applier.apply(plan(detect=row(60, 4), voice=row(30, 1)))
    before = world.texts()
    world.server.fails = lambda model, parameters: "no" if parameters.get("gpu_percent") == "50" else ""
    with pytest.raises(InputError):
        world.applier.apply(plan(detect=row(60, 8), voice=row(50, 1)), Reach(arbiter=True))
    assert world.texts() == before


def test_instances_on_the_cpu_are_stated_only_where_there_are_several(world: World) -> None:
    def rows(count: int) -> ModelPlan:
        each = replace(row(50, 4), gpu=-1)
        return replace(each, replicas=(Replica(-1, 50.0, 1.0),) * count)

    world.applier.apply(plan(detect=rows(1)))
    assert "instance_group" not in str(world.repository.read_config("detect"))
    world.server.loads.clear()
    report = world.applier.apply(plan(detect=rows(2)), Reach(arbiter=True))
    assert report.reloads == 1
    assert "instance_group [ { count: 2 kind: KIND_CPU } ]" in str(world.repository.read_config("detect"))
    stated = stated_plan(world.repository, plan(detect=rows(1)))
    assert len(stated.models["detect"].replicas) == 2
    assert world.applier.apply(plan(detect=rows(2)), Reach(arbiter=True)).loads == 0
    assert world.applier.apply(plan(detect=rows(1)), Reach(arbiter=True)).reloads == 1
    assert len(stated_plan(world.repository, plan(detect=rows(1))).models["detect"].replicas) == 1


def test_instances_that_stay_are_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton keeps the instances that are there when only their number grows: waiting for their end would
    take a minute, in which nothing else is put in force."""
    world.applier.apply(plan(detect=row(50, 4)))
    old = world.server.stubs["detect"]
    load = world.server.load

    def in_place(model: str) -> None:
        load(model)
        world.server.lingering[old] = 1_000_000
        world.server.in_force[model] = {
            **world.server.in_force[model], "instance_group": [{"kind": "KIND_CPU", "count": 2}],
        }  # fmt: skip

    monkeypatch.setattr(world.server, "load", in_place)
    monkeypatch.setattr(world.server, "pids", lambda model: frozenset({old, world.server.stubs[model]}))
    began_s = world.clock.now
    two = replace(row(50, 4), gpu=-1, replicas=(Replica(-1, 50.0, 1.0),) * 2)
    assert world.applier.apply(plan(detect=two), Reach(arbiter=True)).reloads == 1
    assert world.clock.now - began_s < 1
