"""The benchmark suite: every job runs, all sides of it compute the same, and what was measured is written."""

import dataclasses
import json
import statistics

import pytest
import torch
from click.testing import CliRunner

from suite import checkpoints, libraries, many, probes, report, runner, switching
from suite.__main__ import main
from suite.by_hand import HandModel
from suite.job import TOLERANCE, DifferentWorkError, ProbedJob, TimedJob, Turn, distance, seconds
from suite.libraries import SIDES, library
from suite.models import MIXTURE_WIDTH, inputs, mixture, stack
from suite.result import Result, Spread
from suite.scale import FULL, SHORT

TINY = dataclasses.replace(SHORT, layers=1, experts=1, many_experts=2, adapters=4, copies=2, effort=0.001, slow=True)
TIMED = [job for job in runner.JOBS if isinstance(job, TimedJob)]


def job_with(outputs, **settings):
    """A job whose sides compute the given numbers and take no time."""
    made = iter(outputs)

    def make(side, scale):
        output = next(made)
        return Turn(lambda: None, output=None if output is None else lambda: torch.tensor(output))

    return TimedJob(name="toy.job", title="a toy", make=make, **settings)


# --- All sides do the same work.


@pytest.mark.parametrize("job", TIMED, ids=lambda job: job.name)
def test_all_sides_of_a_job_compute_the_same(job):
    result = runner.run(job, TINY, rounds=1)
    assert set(result.rounds[0]) == set(SIDES)
    assert all(seconds > 0 for seconds in result.rounds[0].values())


SHOWS_NO_ADAPTER = {"switching.disable", "many.attach", "many.set", "many.save"}
MOVED = [job for job in TIMED if job.name not in {*SHOWS_NO_ADAPTER, "compiling.trace"}]


@pytest.mark.parametrize("job", MOVED, ids=lambda job: job.name)
def test_what_is_compared_depends_on_the_adapter(job, monkeypatch):
    def output():
        for made in (checkpoints.of_mixture, many.crowd, switching.two_adapters):
            made.cache_clear()
        turn = job.turn("ours", TINY)
        turn.run()
        return turn.output()

    usual = output()
    monkeypatch.setattr(libraries, "numbers", lambda path, factor, adapter, tensor: torch.zeros_like(tensor))
    assert (output() - usual).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", ["peft", "floor"])
def test_different_work_is_not_timed(wrong):
    job = job_with([[1.0, 2.0] if side != wrong else [1.0, 2.1] for side in SIDES])
    with pytest.raises(DifferentWorkError, match=rf"toy\.job: what {wrong} computes differs from ours by 4\.8e-02"):
        runner.run(job, TINY, rounds=1)


@pytest.mark.parametrize("other", [[1.0], [1.0, float("nan")]])
def test_other_shapes_and_nan_are_different_work(other):
    with pytest.raises(DifferentWorkError):
        runner.run(job_with([[1.0, 2.0], [1.0, 2.0], other]), TINY, rounds=1)


def test_a_floor_that_is_something_else_is_not_compared():
    job = job_with([[1.0], [1.0], [2.0]], same=("ours", "peft"))
    assert len(runner.run(job, TINY, rounds=1).rounds) == 1


def test_outputs_of_the_mixture_show_one_wrong_adapter_and_no_rounding():
    model = HandModel(mixture(FULL.layers, FULL.experts), "default")
    model.fill("default")
    x = inputs(4, MIXTURE_WIDTH)
    with torch.no_grad():
        usual = model(x)
        model.merge_adapter()
        assert distance(model(x), usual) < TOLERANCE / 10
        model.unmerge_adapter()
        model.layers["0.experts.0.up_proj"].b.zero_()
        assert distance(model(x), usual) > TOLERANCE * 10


def test_floor_trains_two_tensors_a_layer():
    model = HandModel(stack(4, 2), "default")
    model.model(inputs(3, 4)).sum().backward()
    assert sum(parameter.grad is not None for parameter in model.model.parameters()) == 4


def test_mixture_has_as_many_linear_layers_as_the_tables_say():
    with torch.device("meta"):
        for experts, count in ((FULL.experts, 4_800), (FULL.many_experts, 18_624)):
            model = mixture(1, experts)
            assert FULL.layers * sum(isinstance(module, torch.nn.Linear) for module in model.modules()) == count


# --- Measuring.


def test_what_is_not_the_job_is_not_timed():
    clock = iter(range(100))
    order = []
    turn = Turn(lambda: order.append("run"), lambda: order.append("reset"))
    assert seconds(turn, 3, lambda: order.append("clock") or next(clock)) == pytest.approx(1 / 3)
    assert order == ["clock", "run", "run", "run", "clock", "reset"]


def test_sides_take_turns_at_being_first():
    order = []

    def make(side, scale):
        name = next(name for name in SIDES if library(name) is side)
        return Turn(lambda: order.append(name))

    runner.run(TimedJob(name="toy.job", title="a toy", make=make), TINY, rounds=3)
    assert order == [*SIDES, *SIDES, "peft", "floor", "ours", "floor", "ours", "peft"]


def test_slow_sides_are_run_if_asked_for():
    job = job_with([None] * 6, slow=("peft",))
    assert set(runner.run(job, dataclasses.replace(TINY, slow=False), rounds=1).rounds[0]) == {"ours", "floor"}
    assert set(runner.run(job, TINY, rounds=1).rounds[0]) == set(SIDES)


def test_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        probed = ProbedJob(
            name="toy.job", title="a toy", probe=lambda _: seen.append(torch.get_num_threads()) or {"ours": 1.0}
        )
        runner.run(probed, TINY, rounds=1)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_memory_of_another_process_is_measured(tmp_path):
    # One layer of 1024 x 1024 numbers takes 4 MiB, and merging by hand 4 more.
    held = probes.probe("unload", "floor", width=1024, depth=4, folder="")
    assert 15 < held < 40


def test_cost_of_importing_is_a_multiple_of_that_of_torch():
    assert probes.probe("import", "floor") == pytest.approx(1, abs=0.01)


# --- What is made of the figures.


def measured(*rounds, **goals):
    job = ProbedJob(name="toy.job", title="a toy", probe=dict, **goals)
    return Result(job, [dict(zip(SIDES, figures, strict=False)) for figures in rounds])


def test_ratios_are_of_figures_of_one_round():
    result = measured((1, 2, 1), (10, 10, 5), (4, 16, 1))
    assert result.ratio("peft") == Spread(0.375, 0.5, 0.75)
    assert result.ratio("floor").median == 2
    assert result.figure("ours").median == statistics.median([1, 10, 4])


def test_goals_are_met_by_medians():
    result = measured((1, 2, 1), peft=0.5, floor=0.9)
    assert (result.met("peft"), result.met("floor")) == (True, False)
    assert report.verdict([result]) == "1 of 2 goals are met. Not met: toy.job (ours / floor)."


def test_without_a_goal_or_a_figure_nothing_is_judged():
    result = measured((1, 2), floor=1.0)
    assert (result.met("peft"), result.met("floor"), result.ratio("floor")) == (None, None, None)
    assert report.verdict([result]) == "0 of 0 goals are met."


# --- The command.


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_table_json_and_plot_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="without matplotlib there is no plot")
    done = run("--only", "rows.mixed", "--only", "forward.64", "--short", "--rounds", 2, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "rows.mixed" in done.output
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [job["name"] for job in found["jobs"]] == ["forward.64", "rows.mixed"]
    assert [len(job["rounds"]) for job in found["jobs"]] == [2, 2]
    assert found["scale"] == "short"
    assert found["jobs"][0]["goals"] == {"peft": 0.7, "floor": 1.1}
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| forward.64 | forward, 1 row, width 64, 8 layers |" in table
    assert (tmp_path / "out" / "ratios.svg").read_text(encoding="utf-8").count("rows.mixed") == 1
    assert (tmp_path / "out" / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_jobs_are_listed():
    lines = run("--list").output.splitlines()
    assert [line.split()[0] for line in lines] == [job.name for job in runner.JOBS]
    assert [line.split()[0] for line in run("--list", "--only", "merging").output.splitlines()] == [
        "merging.merge",
        "merging.unmerge",
        "merging.unload",
    ]


def test_a_name_of_no_job_is_refused():
    done = run("--only", "attach.nothing")
    assert done.exit_code == 2
    assert "No job's name begins with 'attach.nothing'; there are importing.all, attach.first" in done.output


def test_profile_names_functions_of_ours():
    output = run("--only", "switching.set", "--only", "importing", "--short", "--profile").output
    assert "importing.all is measured in other processes" in output
    assert "set_adapter" in output
