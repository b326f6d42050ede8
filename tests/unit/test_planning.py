"""The use case `plan` and its verb: what the plan says, recomputed; what it refuses."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dstack_sched.adapters.plan_files import read_plan
from dstack_sched.adapters.profile_files import read_profiles, write_profiles
from dstack_sched.app.planning import CONTROL_OPTIONS, PlanOptions, explain_plan, make_plan
from dstack_sched.cli import app, register
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import InfeasibleError, InputError
from dstack_sched.policy.interference import fit_interference
from dstack_sched.policy.knee import knee_percent
from dstack_sched.policy.latency import LatencySurface, Posynomial
from dstack_sched.sim.scenario import BUSY_HOST, TRITON_H100
from dstack_sched.sim.study import make_case, result_of
from fakes.surfaces import CPU, h100_coruns, h100_raw, points, profile_set


def h100_profiles() -> ProfileSet:
    raw = h100_raw()
    models = {
        name: ModelProfile(name, "0" * 64, 2**30, tuple(ProfilePoint(**x) for x in body["points"]))
        for name, body in raw["models"].items()
    }
    return ProfileSet(Device(**raw["gpu"]), models, tuple(h100_coruns()))


def workload(scale: float = 1.0, **slos: float) -> Workload:
    rows = {
        "resnet50": (50.0, 500.0),
        "mobilenet_v2": (50.0, 300.0),
        "vgg19": (100.0, 200.0),
        "bert": (80.0, 300.0),
    }
    return Workload(tuple(ModelDemand(n, slos.get(n, slo), rate * scale) for n, (slo, rate) in rows.items()))


def recompute(plan: Plan, profiles: ProfileSet) -> None:
    """Every number of every row again, from the profile and the formulas."""
    surfaces = {n: LatencySurface.from_profile(p) for n, p in profiles.models.items()}
    interference = fit_interference(surfaces, profiles.corun)
    demand = dict.fromkeys(range(-1, len(plan.gpus)), 0.0)
    for name, row in plan.models.items():
        f = float(surfaces[name].latency_ms(row.gpu_percent, row.batch_size))
        slowed = []
        for replica in row.replicas:
            others = sum(
                r.gpu_percent for n, x in plan.models.items() for r in x.replicas
                if n != name and r.gpu == replica.gpu
            )  # fmt: skip
            beside = min(others, max(0.0, plan.capacity_percent - replica.gpu_percent))
            slowed.append(f * float(interference.slowdown(name, beside)))
            demand[replica.gpu] += (
                replica.rate_per_s * replica.gpu_percent * slowed[-1] / row.batch_size / 1000
            )
        assert row.latency_ms == pytest.approx(max(slowed))
        assert row.throughput_per_s == pytest.approx(sum(1000 * row.batch_size / ms for ms in slowed))
        assert row.utilization == pytest.approx(row.rate_per_s / row.throughput_per_s)
        assert row.utilization <= 1 + 1e-9
        assert row.efficacy == pytest.approx(row.batch_size / (row.gpu_percent * f * f))
        assert sum(r.rate_per_s for r in row.replicas) == pytest.approx(row.rate_per_s)
        assert row.gpu == row.replicas[0].gpu and row.gpu_percent == row.replicas[0].gpu_percent
        if row.slo_ms is not None:
            assert 2 * row.latency_ms <= row.slo_ms * (1 + 1e-9)
            fill_ms = 1000 * (row.batch_size - 1) / row.replicas[0].rate_per_s
            assert row.max_queue_delay_us / 1000 <= min(fill_ms, row.slo_ms - row.latency_ms) + 0.001
    assert max(demand.values()) <= plan.capacity_percent * (1 + 1e-6)


def test_the_plan_fits_and_every_number_can_be_recomputed():
    plan = make_plan(h100_profiles(), workload())
    assert plan.feasible and plan.headroom > 1 and plan.binding and plan.gap < 0.05
    assert set(plan.models) == {"resnet50", "mobilenet_v2", "vgg19", "bert"}
    assert plan.gpus == ("NVIDIA H100 80GB HBM3",)
    recompute(plan, h100_profiles())
    row = plan.models["resnet50"]
    surface = LatencySurface.from_profile(h100_profiles().models["resnet50"])
    assert row.knee_percent >= knee_percent(surface, row.batch_size)
    assert (row.slo_ms, row.rate_per_s) == (50.0, 500.0)


def test_headroom_means_what_it_says():
    """Rates times a little less fit, rates times a little more do not: also for an infeasible workload."""
    headroom = make_plan(h100_profiles(), workload()).headroom
    assert make_plan(h100_profiles(), workload(headroom * 0.95)).feasible
    over = make_plan(h100_profiles(), workload(headroom * 1.5))
    assert not over.feasible
    assert over.headroom == pytest.approx(1 / 1.5, rel=0.05)
    assert "the rates fit when scaled by 0.6" in over.binding[0]
    assert "capacity of gpu 0 (200%)" in over.binding[0]
    recompute(over, h100_profiles())  # the plan it carries is one for the scaled rates
    assert over.models["bert"].rate_per_s == pytest.approx(300 * headroom * 1.5 * over.headroom)


def test_several_gpus_and_the_fewest_of_them():
    heavy = workload(8.0)
    assert not make_plan(h100_profiles(), heavy).feasible
    wide = make_plan(h100_profiles(), heavy, PlanOptions(gpus=4))
    assert wide.feasible and len(wide.gpus) == 4
    recompute(wide, h100_profiles())
    few = make_plan(h100_profiles(), heavy, PlanOptions(gpus=8, minimize_gpus=True))
    assert few.feasible and 2 <= len(few.gpus) <= 4
    assert not make_plan(h100_profiles(), heavy, PlanOptions(gpus=len(few.gpus) - 1)).feasible


def test_maximal_headroom_leaves_at_least_as_much_room():
    usual = make_plan(h100_profiles(), workload())
    most = make_plan(h100_profiles(), workload(), PlanOptions(maximize_headroom=True))
    assert most.feasible and most.headroom >= usual.headroom * 0.98
    recompute(most, h100_profiles())
    # With that plan as it is, the rates can grow almost as far.
    assert max(row.utilization for row in most.models.values()) * most.headroom < 1.6


def test_efficacy_takes_each_model_alone():
    from dstack_sched.policy.batch_program import solve_batch_program
    from dstack_sched.policy.runnable import runnable_grid

    profiles = h100_profiles()
    plan = make_plan(profiles, workload(), PlanOptions(objective="efficacy"))
    assert plan.feasible
    for demand in workload().models:
        surface = LatencySurface.from_profile(profiles.models[demand.name])
        best = solve_batch_program(
            surface,
            slo_ms=demand.slo_ms,
            rate_per_s=demand.rate_per_s,
            grid=runnable_grid(surface, profiles.device),
        )
        row = plan.models[demand.name]
        assert (row.gpu_percent, row.batch_size) == (best.gpu_percent, best.batch_size)
        assert row.efficacy == pytest.approx(best.efficacy)
    over = make_plan(profiles, workload(20.0), PlanOptions(objective="efficacy"))
    assert not over.feasible and over.headroom < 1 and "throughput" in over.binding[0]


def test_an_slo_below_two_fastest_runs_says_what_would_do():
    plan = make_plan(h100_profiles(), workload(vgg19=8.0))
    assert not plan.feasible and plan.models == {} and plan.headroom == 0.0
    assert plan.binding == (
        "SLO 8 ms of vgg19 cannot be met: the fastest run is 5.27 ms at 100%, b=1; "
        "the SLO must be at least 10.6 ms",
    )
    assert make_plan(h100_profiles(), workload(0.01, vgg19=10.6)).binding[0] != plan.binding[0]
    with pytest.raises(InputError, match=r"SLO 5 ms of vgg19 cannot be met: the fastest run is 5\.27 ms"):
        make_plan(h100_profiles(), workload(vgg19=5.0))


def test_notes_say_what_the_profile_cannot_tell():
    notes = make_plan(h100_profiles(), workload()).notes
    assert any("vgg19: measured at batch size 16 only" in line for line in notes)
    assert any(line.startswith("interference: mean error on the measured co-runs") for line in notes)
    bare = dataclasses.replace(h100_profiles(), corun=())
    assert any("no co-runs measured" in line for line in make_plan(bare, workload()).notes)


def test_capacity_is_as_measured_or_as_told():
    """The arbiter may promise what was measured to pay, also where the models would fit in less."""
    assert make_plan(h100_profiles(), workload()).capacity_percent == 200.0
    told = PlanOptions(capacity_percent=100.0)
    assert make_plan(h100_profiles(), workload(), told).capacity_percent == 100.0
    tight = make_plan(h100_profiles(), workload(4.0))
    assert tight.feasible and tight.capacity_percent == 200.0
    assert not make_plan(h100_profiles(), workload(4.0), told).feasible


def _cpu_profiles(cores: int = 2) -> ProfileSet:
    shape = {"digits": Posynomial((0.2, 0.1, 10.0, 40.0)), "voices": Posynomial((0.5, 0.05, 20.0, 90.0))}
    device = dataclasses.replace(CPU, sms=cores)
    percents = (100.0 / cores, 100.0)
    return profile_set({n: points(f, percents, (1, 4, 8)) for n, f in shape.items()}, device)


def test_a_two_core_host_is_planned_like_a_gpu():
    """2 x 3 points, runnable shares 50 and 100, GPU index -1: what `make run` does on any machine."""
    demands = Workload((ModelDemand("digits", 50.0, 100.0), ModelDemand("voices", 80.0, 50.0)))
    plan = make_plan(_cpu_profiles(), demands)
    assert plan.feasible and plan.capacity_percent == 100.0 and plan.gpus == ("Test CPU",)
    assert {row.gpu for row in plan.models.values()} == {-1}
    assert {row.gpu_percent for row in plan.models.values()} <= {50.0, 100.0}
    recompute(plan, _cpu_profiles())
    with pytest.raises(InputError, match="of a CPU"):
        make_plan(_cpu_profiles(), demands, PlanOptions(gpus=2))


def test_profiles_with_levels_are_planned_at_their_levels():
    profiles = h100_profiles()
    leveled = dataclasses.replace(profiles.models["resnet50"], levels=(12.0, 24.0, 48.0, 91.0))
    plan = make_plan(
        dataclasses.replace(profiles, models={**profiles.models, "resnet50": leveled}), workload()
    )
    assert plan.models["resnet50"].gpu_percent in leveled.levels


def test_best_effort_models_get_a_place_and_no_promise():
    demands = Workload((*workload().models[:2], ModelDemand("vgg19", None, 1e6)))
    plan = make_plan(h100_profiles(), demands)
    assert plan.feasible and plan.models["vgg19"].slo_ms is None
    assert plan.models["vgg19"].max_queue_delay_us >= 0
    only = make_plan(h100_profiles(), Workload((ModelDemand("vgg19", None, 10.0),)))
    assert only.feasible and only.headroom == float("inf")


@pytest.mark.parametrize(
    "options,words",
    [
        (PlanOptions(gpus=0), "--gpus is 0"),
        (PlanOptions(minimize_gpus=True, maximize_headroom=True), "name one"),
        (PlanOptions(objective="efficacy", minimize_gpus=True), "leave --minimize"),
        (PlanOptions(capacity_percent=-5.0), "--capacity is -5"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        make_plan(h100_profiles(), workload(), options)


def test_a_model_without_a_profile_is_refused():
    with pytest.raises(InputError, match=r"gpt: no profile; the profiles hold bert, .*dstackctl profile gpt"):
        make_plan(h100_profiles(), Workload((ModelDemand("gpt", 10.0, 1.0),)))


def test_explaining_names_fits_limits_and_bounds():
    plan = make_plan(h100_profiles(), workload())
    lines = explain_plan(plan, h100_profiles(), workload())
    assert any("resnet50: posynomial surface of 10 points, largest error 2.9%" in line for line in lines)
    assert any("greatest efficacy" in line and "bound" in line for line in lines)


@pytest.fixture
def files(tmp_path):
    """profiles.json and a workload.yaml that fits."""
    write_profiles(tmp_path / "profiles.json", h100_profiles())
    (tmp_path / "workload.yaml").write_text(
        "models:\n"
        "  - {name: resnet50, slo_ms: 50, rate_per_s: 500}\n"
        "  - {name: bert, slo_ms: 80, rate_per_s: 300}\n"
    )
    return tmp_path


def _run(*arguments: object):
    register(["plan"])
    counted = () if "--minimize" in arguments else ("--gpus", 1)  # else it would look at this machine's
    return CliRunner().invoke(app, ["plan", *map(str, (*arguments, *counted))])


def test_the_verb_prints_json_and_writes_the_plan(files):
    done = _run(
        "--profiles", files / "profiles.json", "--workload", files / "workload.yaml", "--json",
        "--out", files / "plan.json", "--explain",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["feasible"] is True and set(content["models"]) == {"resnet50", "bert"}
    assert (
        read_plan(files / "plan.json").models["bert"].gpu_percent == content["models"]["bert"]["gpu_percent"]
    )


def test_the_verb_finds_the_fewest_gpus_by_itself(files):
    text = (files / "workload.yaml").read_text().replace("rate_per_s: 500", "rate_per_s: 9000")
    (files / "workload.yaml").write_text(text)
    done = _run(
        "--profiles", files / "profiles.json", "--workload", files / "workload.yaml", "--json",
        "--minimize", "gpus",
    )  # fmt: skip
    content = json.loads(done.stdout)
    assert done.exit_code == 0 and content["feasible"] and 2 <= len(content["gpus"]) <= 4
    assert len(content["models"]["resnet50"]["replicas"]) >= 2


def test_the_verb_shows_a_table(files):
    done = _run("--profiles", files / "profiles.json", "--workload", files / "workload.yaml")
    assert done.exit_code == 0 and "resnet50" in done.stdout and "fits" in done.stdout


def test_the_verb_still_prints_the_plan_when_nothing_fits_and_raises_the_line(files):
    """`main` turns the error into one line on stderr and exit status 1."""
    text = (files / "workload.yaml").read_text().replace("slo_ms: 50", "slo_ms: 1.5")
    (files / "workload.yaml").write_text(text)
    done = _run("--profiles", files / "profiles.json", "--workload", files / "workload.yaml", "--json")
    assert json.loads(done.stdout)["feasible"] is False
    assert isinstance(done.exception, InfeasibleError) and done.exception.exit_status == 1
    assert str(done.exception).startswith("SLO 1.5 ms of resnet50 cannot be met")


# -- rehearsed shares -------------------------------------------------------------------------------------


MEASURED = Path(__file__).parents[2] / "perf" / "reports" / "h100" / "profiles.json"
TIGHT = Workload((ModelDemand("resnet50", 13.0, 1000.0), ModelDemand("bert_base", 15.0, 700.0)))
QUICK = replace(CONTROL_OPTIONS, rehearsal_trials=16)


def test_the_controller_s_plan_is_rehearsed_and_carries_what_it_says():
    """Simulated with what serving costs, at arrivals of other seeds: the rehearsed shares keep every SLO at
    0.9 of the headroom stated, where those of the joint program alone miss."""
    profiles = read_profiles(MEASURED)
    plain = make_plan(profiles, TIGHT, replace(CONTROL_OPTIONS, rehearsal_trials=0))
    plan = make_plan(profiles, TIGHT, QUICK)
    assert plan.feasible and plan.headroom > 1 and "rehearsal" in plan.notes[-1]
    assert "misses its SLO first, in rehearsal" in plan.binding[0]
    shares = {name: row.gpu_percent for name, row in plan.models.items()}
    assert shares != {name: row.gpu_percent for name, row in plain.models.items()}

    def worst(of: Plan, seed: int) -> float:
        case = make_case(profiles, TIGHT, plan=of, serving=TRITON_H100)
        case = replace(case, delays=BUSY_HOST).scaled(0.9 * plan.headroom)
        return result_of(case, "dstack", 4.0, seed).worst_attainment

    assert all(worst(plan, seed) >= 0.99 > worst(plain, seed) for seed in (1, 2))


def test_a_plan_begins_with_what_is_in_force_and_leaves_it_where_nothing_is_clearly_better():
    """Guards against reloads for nothing. 30% and 10% are a bad start; the best ones found stay."""
    profiles = read_profiles(MEASURED)
    bad = make_plan(profiles, TIGHT, replace(QUICK, in_force={"resnet50": 30.0, "bert_base": 10.0}))
    assert "with the shares it began with" in bad.notes[-1] and bad.models["bert_base"].gpu_percent > 10.0
    best = make_plan(profiles, TIGHT, CONTROL_OPTIONS)
    in_force = {name: row.gpu_percent for name, row in best.models.items()}
    kept = make_plan(profiles, TIGHT, replace(QUICK, in_force=in_force))
    assert {name: row.gpu_percent for name, row in kept.models.items()} == in_force
    assert "no other shares carry more" in kept.notes[-1]


def test_what_is_held_is_rehearsed_as_it_is():
    """So that the controller weighs a plan without loads against the best one by the same measure."""
    held = {"resnet50": (30.0, 1), "bert_base": (40.0, 1)}
    plan = make_plan(read_profiles(MEASURED), TIGHT, replace(QUICK, held=held))
    assert {n: (r.gpu_percent, len(r.replicas)) for n, r in plan.models.items()} == held
    best = make_plan(read_profiles(MEASURED), TIGHT, QUICK)
    assert plan.headroom <= best.headroom * 1.05 and "rehearsal" in plan.notes[-1]


def test_a_rehearsal_on_two_gpus_keeps_every_model_where_it_is():
    options = replace(QUICK, gpus=2)
    plan = make_plan(read_profiles(MEASURED), TIGHT, options)
    plain = make_plan(read_profiles(MEASURED), TIGHT, replace(options, rehearsal_trials=0))
    assert plan.feasible and len(plan.gpus) == 2
    for name, row in plan.models.items():
        assert [r.gpu for r in row.replicas] == [r.gpu for r in plain.models[name].replicas]


@pytest.mark.parametrize("slo_ms", [5.5, 6.0])
def test_a_plan_is_found_where_the_joint_program_has_none(slo_ms):
    one = Workload((ModelDemand("resnet50", slo_ms, 5.0), ModelDemand("bert", 2 * slo_ms, 5.0)))
    assert not make_plan(h100_profiles(), one, replace(CONTROL_OPTIONS, rehearsal_trials=0)).models
    assert make_plan(h100_profiles(), one, QUICK).feasible


def test_the_verb_rehearses_on_request(files):
    (files / "workload.yaml").write_text(
        "models:\n"
        "  - {name: resnet50, slo_ms: 13, rate_per_s: 1000}\n"
        "  - {name: bert_base, slo_ms: 15, rate_per_s: 700}\n"
    )
    arguments = ("--profiles", MEASURED, "--workload", files / "workload.yaml")
    done = _run(*arguments, "--rehearse", "--json", "--out", files / "plan.json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["feasible"] and "rehearsal" in content["notes"][-1]
    assert read_plan(files / "plan.json").capacity_percent == content["capacity_percent"]
    refused = _run(*arguments, "--rehearse", "--objective", "efficacy")
    assert isinstance(refused.exception, InputError) and "--rehearse" in str(refused.exception)


def test_models_of_which_nobody_knows_what_co_runners_do_to_them_are_not_rehearsed():
    """Guards against shares of 100% each, which cost nothing where no interference is assumed."""
    profiles = replace(read_profiles(MEASURED), corun=())
    plan = make_plan(profiles, TIGHT, QUICK)
    assert "what co-runners do to resnet50, bert_base is not known yet" in plan.notes[-1]
    plain = make_plan(profiles, TIGHT, replace(QUICK, rehearsal_trials=0))
    assert plan == replace(plain, notes=plan.notes)
    shown = make_plan(replace(profiles, slowdown={"resnet50": 0.5, "bert_base": 0.4}), TIGHT, QUICK)
    assert "times the rates" in shown.notes[-1]


def test_a_cpu_is_not_rehearsed():
    plan = cpu_plan(60.0, 60.0, rehearsal_trials=20)
    assert plan.feasible and plan.notes[-1] == "rehearsal: of GPUs only, the profiles are of a CPU"


# -- a CPU's cores ----------------------------------------------------------------------------------------


def cpu_profiles(speed_up: float) -> ProfileSet:
    """Two models on two cores; a batch on both is speed_up times as fast as on one."""
    device = Device("cpu", 2, 8 << 30, "cpu", "onnxruntime")
    points = tuple(
        ProfilePoint(p, b, 10.0 * b / (1.0 if p == 50.0 else speed_up), 12.0 * b, 100)
        for p in (50.0, 100.0)
        for b in (1, 2, 4)
    )
    return ProfileSet(device, {name: ModelProfile(name, "0" * 64, 1 << 20, points) for name in "ab"})


def cpu_plan(hot_per_s: float, other_per_s: float, speed_up: float = 1.3, **options):
    demand = Workload((ModelDemand("a", 200.0, hot_per_s), ModelDemand("b", 200.0, other_per_s)))
    return make_plan(cpu_profiles(speed_up), demand, PlanOptions(**options))


def test_a_model_that_outgrows_a_core_gets_an_instance_on_each():
    """Guards against one process with many threads where the threads wait for each other."""
    plan = cpu_plan(140.0, 10.0)
    assert plan.feasible
    assert (plan.capacity_percent, plan.gpus) == (100.0, ("cpu",))
    row = plan.models["a"]
    assert (row.gpu, row.gpu_percent, len(row.replicas)) == (-1, 50.0, 2)
    assert {replica.gpu for replica in row.replicas} == {-1}
    assert row.rate_per_s == 140.0
    assert len(plan.models["b"].replicas) == 1


def test_models_that_fit_a_core_each_stay_one_instance():
    plan = cpu_plan(60.0, 60.0)
    assert plan.feasible
    assert [len(row.replicas) for row in plan.models.values()] == [1, 1]


def test_instances_that_are_held_stay_as_many():
    one = cpu_plan(140.0, 10.0, held={"a": (50.0, 1), "b": (50.0, 1)})
    assert len(one.models["a"].replicas) == 1
    assert not one.feasible
    two = cpu_plan(20.0, 10.0, held={"a": (50.0, 2), "b": (50.0, 1)})
    assert two.feasible
    assert len(two.models["a"].replicas) == 2


def test_a_share_that_is_held_is_planned_with():
    plan = cpu_plan(20.0, 10.0, held={"a": (100.0, 1)})
    assert plan.models["a"].gpu_percent == 100.0


def test_models_that_all_have_levels_are_promised_what_was_measured_side_by_side():
    """The capacity is the device's, however shares are enforced; without co-runs 100 is all there is."""
    profiles = h100_profiles()
    shares = (12.0, 24.0, 48.0, 91.0)
    leveled = dataclasses.replace(
        profiles, models={n: dataclasses.replace(m, levels=shares) for n, m in profiles.models.items()}
    )
    most = PlanOptions(maximize_headroom=True)
    plan = make_plan(leveled, workload(), most)
    recompute(plan, leveled)
    assert plan.capacity_percent == 200.0
    assert {row.gpu_percent for row in plan.models.values()} <= set(shares)
    alone = make_plan(dataclasses.replace(leveled, corun=()), workload(), most)
    assert alone.capacity_percent == 100.0
