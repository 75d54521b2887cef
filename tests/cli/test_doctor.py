from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tunerkit import cli


@pytest.fixture
def run(environment):
    """Run the command beside a tunerkit of version 0.1.0."""
    environment.describe("tunerkit", entries="", version="0.1.0")
    return lambda *args: CliRunner().invoke(cli.main, ["doctor", *args], prog_name="tunerkit")


def requiring(environment, package, requirement):
    with (environment.folder / f"{package.replace('-', '_')}-1.0.dist-info" / "METADATA").open("a") as file:
        file.write(f"Requires-Dist: {requirement}\n")


def test_all_is_well(run, environment):
    environment.install("tunerkit-foo")
    requiring(environment, "tunerkit-foo", "tunerkit>=0.1,<0.2")
    result = run()
    assert result.exit_code == 0, result.output
    file = environment.folder / "tunerkit_foo.py"
    assert f"  foo (method): tunerkit-foo 1.0 in {environment.folder}, tunerkit_foo from {file}\n" in result.output
    assert "  tunerkit: 0.1.0\n" in result.output
    assert "  tunerkit-foo: 1.0\n" in result.output
    assert result.output.endswith("Problems\n  none\n\n")


def test_nothing_is_installed(run):
    result = run()
    assert result.exit_code == 0
    assert "Plugins\n  none\n" in result.output


def problems(result):
    assert result.exit_code == 1, result.output
    return json.loads(result.output)["problems"]


def test_every_copy_is_shown(run, environment):
    environment.install("tunerkit-foo", version="2.0")
    environment.describe("tunerkit-foo", version="1.0", entries="[tunerkit]\nfoo = tunerkit_foo\n")
    result = run("--json")
    assert {row["version"] for row in json.loads(result.output)["candidates"]} == {"1.0", "2.0"}
    [problem] = problems(result)
    assert problem.startswith("tunerkit-foo is there in several versions, ")
    assert "Run `pip uninstall tunerkit-foo` until none is left" in problem


def test_one_problem_for_a_conflict(run, environment):
    environment.install("tunerkit-foo")
    environment.install("acme-foo", name="foo")
    [problem] = problems(run("--json"))
    assert problem == (
        "The method 'foo' is offered by acme-foo 1.0 and tunerkit-foo 1.0. Uninstall one of them, for example with "
        "`pip uninstall tunerkit-foo`."
    )


@pytest.mark.parametrize(
    ("name", "way"), [("Ln_Foo", "write 'ln-foo' there"), ("ln.foo", "use small letters, digits and single hyphens")]
)
def test_an_entry_point_that_is_not_called_by_the_id(run, environment, name, way):
    environment.install("tunerkit-ln-foo", name=name)
    [problem] = problems(run("--json"))
    assert way in problem


def test_a_module_that_is_missing(run, environment):
    environment.describe("tunerkit-foo", entries="[tunerkit]\nfoo = tunerkit_foo\n")
    result = run("--json")
    assert json.loads(result.output)["candidates"][0]["imported_from"] is None
    [problem] = problems(result)
    assert "its module tunerkit_foo is not there" in problem
    assert f"Mend or reinstall tunerkit-foo (in {environment.folder})" in problem


def test_a_module_that_cannot_be_imported_costs_no_other(run, environment):
    environment.install("tunerkit-foo")
    environment.install("tunerkit-bad", "1 / 0")
    [problem] = problems(run("--json"))
    assert "importing tunerkit_bad raised ZeroDivisionError" in problem


def test_a_broken_extension(run, environment):
    environment.install("acme", "1 / 0", entries="[tunerkit.extensions]\ntimer = acme\n")
    [problem] = problems(run("--json"))
    assert problem.startswith("The extension 'timer' is left out: importing acme raised ZeroDivisionError")
    assert problem.endswith("Mend, reinstall or remove acme.")


def test_a_requirement_on_the_core_that_is_not_met(run, environment):
    environment.install("tunerkit-foo")
    requiring(environment, "tunerkit-foo", "tunerkit>=0.2")
    requiring(environment, "tunerkit-foo", 'tunerkit>=9; python_version < "3"')
    requiring(environment, "tunerkit-foo", "numpy>=999")
    [problem] = problems(run("--json"))
    assert "requires tunerkit>=0.2, and tunerkit 0.1.0 is installed. Run `pip install --upgrade" in problem


def test_a_requirement_that_is_none(run, environment):
    environment.install("tunerkit-foo")
    requiring(environment, "tunerkit-foo", "tunerkit >> 1")
    [problem] = problems(run("--json"))
    assert "requires 'tunerkit >> 1', which is no requirement. Reinstall it." in problem


def test_metadata_that_cannot_be_read(run, environment):
    environment.describe("tunerkit-foo", entries="[tunerkit]\nfoo = tunerkit_foo\n")
    (environment.folder / "tunerkit_foo-1.0.dist-info" / "entry_points.txt").write_bytes(b"[tunerkit]\n\xff")
    [problem] = problems(run("--json"))
    assert "cannot be read" in problem


def test_the_environment(run, environment, monkeypatch):
    environment.install("tunerkit-foo")
    environment.install("tunerkit-bad", "1 / 0")
    assert "TUNERKIT_PLUGINS: not set: every installed method may be imported" in run().output
    monkeypatch.setenv("TUNERKIT_PLUGINS", "foo")
    monkeypatch.setenv("TUNERKIT_PLUGIN", "bad")
    monkeypatch.setenv("PYTHONPATH", "/path/to/here")
    result = run("--json")
    assert result.exit_code == 0, result.output  # what is not allowed is not loaded, and so is no problem
    found = json.loads(result.output)
    assert found["environment"]["TUNERKIT_PLUGINS"] == "'foo': only these may be imported: foo"
    assert found["environment"]["TUNERKIT_PLUGIN"] == "'bad': tunerkit does not read it"
    assert found["environment"]["PYTHONPATH"] == "/path/to/here"
    assert found["devices"][0] == "cpu"


def test_a_name_on_the_allow_list_that_is_not_installed(run, environment, monkeypatch):
    environment.install("tunerkit-foo")
    monkeypatch.setenv("TUNERKIT_PLUGINS", "fooo")
    [problem] = problems(run("--json"))
    assert problem == ("TUNERKIT_PLUGINS names 'fooo', and no installed plugin is called that. Did you mean 'foo'?")
