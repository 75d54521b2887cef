"""`tunerkit check`: what it prints of a method, and how it exits."""

import re
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from toys import bottleneck, registered, rotation

from tunerkit import Method, cli
from tunerkit.errors import PluginError
from tunerkit.testing import MethodConformance
from tunerkit.testing.installed import case_of


class OnLinearLayers(MethodConformance):
    """As a plugin names it in `Method.conformance`."""

    kinds = ("linear",)
    absent = {"test_pickle": "for the test's sake"}  # noqa: RUF012 - as authors write it
    xfail = {"test_deepcopy": "for the test's sake too"}  # noqa: RUF012

    def config(self):
        return rotation.Config()


class Forgetful(rotation.RotationAdapter):
    def merged(self, below):
        weight, _ = super().merged(below)
        return weight, None


@pytest.fixture
def run(monkeypatch):
    """Run the command as a shell would."""
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *args: CliRunner().invoke(cli.main, ["check", *args], prog_name="tunerkit")


def test_method_that_passes(run):
    with registered(rotation):
        result = run("toy-rotation")
    assert result.exit_code == 0, result.output
    assert "test_merge_keeps_the_output" in result.output
    assert "every adapter has a merged form" in result.output
    assert "and 0 failed; 0 were declared absent, and 0 failed as expected." in result.output


def test_what_failed_stands_below_the_table(run):
    method = Method(config=rotation.Config, adapter=Forgetful)
    with registered(SimpleNamespace(Config=rotation.Config, method=method)):
        result = run("toy-rotation")
    _, heading, below = result.output.partition("What failed, the most basic first")
    assert heading
    below = below.partition("\n\n")[2]
    assert below.startswith(
        "(1) test_identity_at_start\n    The output with a new adapter and that of the base model differ by up to "
    )
    assert "    To mend: let one of the factors start at zero, a scale at one, a rotation at the identity.\n" in below
    assert below.count("(1) ") == 1


def test_same_message_is_told_once(run):
    class Undeclared(rotation.RotationAdapter):
        entries = ("misspelt",)

    method = Method(config=rotation.Config, adapter=Undeclared)
    with registered(SimpleNamespace(Config=rotation.Config, method=method)):
        result = run("toy-rotation")
    assert result.exit_code == 1
    assert re.search(r"^\(1\) test_identity_at_start and \d+ others$", result.output, re.MULTILINE)
    assert "(2)" not in result.output
    assert result.output.count("The adapter class Undeclared of 'toy-rotation' holds tensors under") == 1
    assert "To mend" not in result.output


def test_method_that_fails_and_names_its_class(run, monkeypatch):
    module = SimpleNamespace(OnLinearLayers=OnLinearLayers)
    monkeypatch.setitem(sys.modules, "kit_case", module)
    method = Method(config=rotation.Config, adapter=Forgetful, conformance="kit_case:OnLinearLayers")
    with registered(SimpleNamespace(Config=rotation.Config, method=method)):
        result = run("toy-rotation", "--verbose")
    assert result.exit_code == 1
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip().startswith("test_")}
    assert "failed: 1" in lines["test_identity_at_start"]
    assert "absent: 1" in lines["test_pickle"]
    assert "for the test's sake" in lines["test_pickle"]
    assert "see (3) below" in lines["test_deepcopy"]
    assert "    [XPASS(strict)] for the test's sake too\n" in result.output
    assert "; 1 were declared absent, and 0 failed as expected." in result.output
    assert "= conformance =" in result.output


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("no_such_module:Case", "ModuleNotFoundError"),
        ("tests", "AttributeError|ModuleNotFoundError|ValueError"),
        ("tunerkit.testing.installed:Case", "AttributeError"),
        ("tunerkit.testing.installed:Result", "class 'tunerkit.testing.installed.Result'"),
        ("", "ValueError"),
    ],
)
def test_class_that_is_none(run, where, found):
    method = Method(config=rotation.Config, adapter=rotation.RotationAdapter, conformance=where)
    with registered(SimpleNamespace(Config=rotation.Config, method=method)):
        with pytest.raises(PluginError, match=r"must be 'module:Class' of a MethodConformance; found") as caught:
            case_of("toy-rotation")
        assert re.search(found, str(caught.value))
        result = run("toy-rotation")
    assert result.exit_code == 1
    assert f"conformance={where!r}" in result.output


def test_what_a_method_declares_counts_as_absent(run):
    with registered(bottleneck):
        result = run("toy-bottleneck")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.split()[:1] == ["test_unmerge_is_exact"])
    assert "absent: 1" in line
    assert "BottleneckAdapter has no merged form: its output is not linear" in line
    assert re.search("; [1-9][0-9]* were declared absent", result.output)


def test_unknown_method(run):
    result = run("nothing-of-the-kind")
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "nothing-of-the-kind" in result.output


def test_without_pytest(run, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tunerkit.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    result = run("toy-rotation")
    assert result.exit_code == 1
    assert "pip install 'tunerkit[testing]'" in result.output
