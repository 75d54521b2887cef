from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tunerkit import cli, plugins
from tunerkit.demo import encoder, job
from tunerkit.demo.data import read_split

METHODS = sorted({info.method for info in plugins.installed() if info.kind == "method"})


@pytest.fixture(scope="module")
def split():
    # A sixth of what the demo holds out: encoding it is most of what these tests cost.
    return read_split(held_out=100)


@pytest.fixture
def run(monkeypatch, split, tmp_path):
    """Run the demo as a shell would, in a folder of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(job, "read_split", lambda: split)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(cli.main, ["demo", *args], prog_name="tunerkit")


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps(run, method, tmp_path):
    result = run("--method", method, "--steps", "20")
    assert result.exit_code == 0, result.output
    output = result.output
    assert f"Method {method}: " in output
    assert "640 pairs to train on, 100 held out; no package is on both sides." in output
    assert output.count("20/20 steps") == 2
    for row in ("frozen model", "linear map on it", "adapter"):
        assert f"│ {row} " in output
    assert output.count("    right: ") == 3
    assert "equal when loaded into a fresh base" in output
    assert "equal when merged into the base" in output or "not merged: " in output
    assert "NOT EQUAL" not in output
    # Equal outputs would mean little if the adapter did nothing.
    moved = output.partition("The adapter moved the vectors by up to ")[2].split()[0].rstrip(".")
    assert float(moved) > 1e-3
    folder = tmp_path / "tunerkit-demo"
    assert f"The checkpoint is in {folder}" in output
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["inference_mode"] is True


def test_no_method_is_named_and_several_are_installed(run, monkeypatch):
    monkeypatch.setattr("tunerkit.demo.adapting.method_ids", lambda: ["one", "two"])
    result = run()
    assert result.exit_code == 2
    assert result.output == (
        "Error: Several methods are installed. Say which one:\n  tunerkit demo --method one\n"
        "  tunerkit demo --method two\n"
    )


def test_the_extra_is_missing(run, monkeypatch):
    monkeypatch.setattr(encoder, "find_spec", lambda _: None)
    result = run()
    assert result.exit_code == 2
    assert result.output.endswith("pip install 'tunerkit[demo]'\n")


def test_unknown_method(run):
    result = run("--method", "nosuch")
    assert result.exit_code == 2
    assert "Error: No installed package offers the method 'nosuch'" in result.output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--set", "nosuchsetting=1"], "has no setting 'nosuchsetting'."),
        (["--set", "target_modules=3"], "Config.target_modules"),
        (["--set", "r"], "--set takes KEY=VALUE"),
        (["--steps", "64"], "--steps 64 is more than one epoch. Give 1 to 63"),
        (["--out", __file__], "there is a file of that name. Choose another with --out."),
    ],
)
def test_options_that_cannot_be_followed(run, method, settings, message):
    result = run("--method", method, *settings)
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert message in result.output


@pytest.mark.parametrize("method", METHODS)
def test_targets_that_match_nothing(run, method):
    result = run("--method", method, "--set", 'target_modules=["qery"]')
    assert result.exit_code == 2
    assert 'Say what to adapt, for example: --set \'target_modules=["query", "key"]\'' in result.output
    assert "The names of this model's linear layers end in: query, key, value, dense." in result.output


@pytest.mark.parametrize("option", [["--steps", "0"], ["--learning-rate", "0"], ["--seed", "-1"], ["--set"]])
def test_usage(run, option):
    result = run(*option)
    assert result.exit_code == 2
    assert option[0] in result.output


@pytest.mark.parametrize(("equal", "code"), [(True, 0), (False, 1)])
def test_the_exit_status_says_whether_the_outputs_were_equal(run, monkeypatch, equal, code):
    seen = []
    monkeypatch.setattr(job, "run_demo", lambda options, _: seen.append(options) or equal)
    result = run(
        "--method", "any", "--set", "r=4", "--steps", "5", "--learning-rate", "0.1", "--seed", "3", "--out", "x"
    )
    assert result.exit_code == code
    assert (seen[0].method, seen[0].settings, seen[0].steps) == ("any", {"r": 4}, 5)
    assert (seen[0].learning_rate, seen[0].seed, str(seen[0].out)) == (0.1, 3, "x")


def test_help_says_what_the_exit_status_means(run):
    output = run("--help").output
    assert "pip install 'tunerkit[demo]'" in output
    assert "  1  they did not\n" in output
