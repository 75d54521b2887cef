from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from tunerkit import cli
from tunerkit.errors import TunerkitError


@pytest.fixture
def run(monkeypatch):
    """Run the command as a shell would."""
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *args: CliRunner().invoke(cli.main, list(args), prog_name="tunerkit")


class TestMain:
    def test_help_imports_no_command(self, run, monkeypatch):
        for name in ("tunerkit.cli.demo", "tunerkit.cli.plugins"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        result = run("--help")
        assert result.exit_code == 0
        assert "  demo     Train, save, load and merge an adapter on a real model." in result.output
        assert "  plugins  List the installed methods and how they stand." in result.output
        assert {"tunerkit.cli.demo", "tunerkit.cli.plugins"}.isdisjoint(sys.modules)

    @pytest.mark.parametrize("name", sorted(cli.main.lazy))
    def test_every_command_is_there(self, name):
        with click.Context(cli.main) as context:
            command = cli.main.get_command(context, name)
        assert command.name == name

    def test_unknown_command(self, run):
        result = run("plugin")
        assert result.exit_code == 2
        assert "Error: No such command 'plugin'. Did you mean 'plugins'?" in result.output
        result = run("qqqqqq")
        assert result.exit_code == 2
        assert "Error: No such command 'qqqqqq'." in result.output

    def test_runs_as_a_module(self):
        done = subprocess.run([sys.executable, "-m", "tunerkit", "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: tunerkit [OPTIONS] COMMAND")

    def test_a_command_whose_dependency_is_missing(self, run, monkeypatch):
        monkeypatch.setattr(cli.main, "lazy", {"demo": ("nowhere_at_all:demo", "Not there.")})
        assert "Not there." in run("--help").output
        result = run("demo")
        assert result.exit_code == 1
        assert result.output == (
            "Error: The command 'demo' cannot be used: ModuleNotFoundError: No module named 'nowhere_at_all'. Try `pip "
            "install tunerkit[demo]`.\n"
        )

    def test_a_command_whose_dependency_is_broken(self, run, monkeypatch):
        monkeypatch.setattr(cli.main, "lazy", {"demo": ("click:nothing", "")})
        monkeypatch.setitem(sys.modules, "broken", None)

        def fail(name):
            msg = "cannot load libtorch"
            raise ImportError(msg)

        monkeypatch.setattr(cli.importlib, "import_module", fail)
        result = run("demo")
        assert result.output == "Error: The command 'demo' cannot be used: ImportError: cannot load libtorch.\n"

    def test_our_errors_are_shown_without_a_traceback(self, run, monkeypatch):
        def fail():
            raise TunerkitError("There is no such thing.")

        command = click.Command("demo", callback=fail)
        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)
        result = run("demo")
        assert (result.exit_code, result.output) == (1, "Error: There is no such thing.\n")

    def test_version(self, run, environment):
        environment.describe("tunerkit", entries="", version="1.2.3")
        result = run("--version")
        assert (result.exit_code, result.output) == (0, "tunerkit, version 1.2.3\n")


class TestPlugins:
    def test_none(self, run, environment):
        result = run("plugins")
        assert result.exit_code == 0
        assert result.output.startswith("No methods are installed.")
        assert json.loads(run("plugins", "--json").output) == []
        assert run("plugins", "--check").exit_code == 0

    def test_table(self, run, environment, monkeypatch):
        environment.install("tunerkit-foo", version="1.5")
        environment.install("tunerkit-bar")
        environment.install("acme", "", entries="[tunerkit.extensions]\ntimer = acme\n")
        monkeypatch.setenv("TUNERKIT_PLUGINS", "foo,timer")
        lines = [line.split() for line in run("plugins").output.splitlines()]
        assert lines[0] == ["Method", "Package", "Version", "Status", "Why"]
        assert lines[1][:6] == ["bar", "tunerkit-bar", "1.0", "not", "allowed", "The"]
        assert lines[2] == ["foo", "tunerkit-foo", "1.5", "not", "loaded"]
        assert lines[3] == ["timer", "(extension)", "acme", "1.0", "not", "loaded"]
        assert {"tunerkit_foo", "tunerkit_bar", "acme"}.isdisjoint(sys.modules)

    def test_square_brackets_are_shown(self, run, environment):
        environment.install("tunerkit-bad", "raise ValueError('see [red]x[/red]')")
        assert "ValueError: see [red]x[/red]." in run("plugins", "--check").output

    def test_json(self, run, environment):
        environment.install("tunerkit-foo")
        assert json.loads(run("plugins", "--json").output) == [
            {
                "method": "foo",
                "kind": "method",
                "package": "tunerkit-foo",
                "version": "1.0",
                "path": str(environment.folder),
                "status": "not loaded",
                "reason": "",
                "capabilities": None,
            }
        ]

    def test_what_methods_can_do(self, run, environment):
        source = (
            "class Part(tunerkit.adapter.Part):\n"
            "    def around(self, call): ...\n\n"
            "class Small(Adapter):\n"
            "    kinds = frozenset({'linear', 'conv2d'})\n"
            "    unfoldable = 'it is [not] linear'\n\n"
            "class Large(Adapter):\n"
            "    kinds = frozenset({'embedding'})\n"
            "    crosses_rows = 'it centres the batch'\n\n"
            "method = Method(config=Config, adapter=(Small, Large), part=Part)\n"
        )
        environment.install("tunerkit-bar", before="import tunerkit.adapter\n", after=source)
        environment.install("tunerkit-foo")
        result = run("plugins", "--check", "--json")
        bar, foo = (row["capabilities"] for row in json.loads(result.output))
        depends = "what one changes depends on those below it"
        surrounds = "it does something around a call of the whole model"
        assert foo == {
            "kinds": ["linear"],
            "shares": False,
            "absent": [{"what": "merge out of order", "why": depends, "classes": ["Adapter"]}],
        }
        assert bar == {
            "kinds": ["conv2d", "embedding", "linear"],
            "shares": True,
            "absent": [
                {"what": "merge", "why": "it is [not] linear", "classes": ["Small"]},
                {"what": "merge out of order", "why": depends, "classes": ["Large"]},
                {"what": "rows", "why": "it centres the batch", "classes": ["Large"]},
                {"what": "rows", "why": surrounds, "classes": ["Part"]},
            ],
        }
        lines = run("plugins", "--check").output.splitlines()
        assert lines[0].split() == ["Method", "Package", "Version", "Status", "Adapts"]
        assert "conv2d, embedding, linear" in lines[1]
        assert "bar cannot merge: it is [not] linear (Small)." in lines
        assert "bar cannot have adapters of their own for rows of a batch: it centres the batch (Large)." in lines

    def test_method_with_layers_of_its_own(self, run, environment):
        environment.install(
            "tunerkit-foo",
            after="from tunerkit.tuner import BaseTuner\nmethod = Method(config=Config, tuner=BaseTuner)\n",
        )
        assert "loaded  its own layers" in run("plugins", "--check").output.replace("   ", " ")

    def test_check_passes(self, run, environment):
        environment.install("tunerkit-foo")
        result = run("plugins", "--check", "--json")
        assert result.exit_code == 0
        assert [row["status"] for row in json.loads(result.output)] == ["loaded"]

    def test_check_fails_for_a_broken_one(self, run, environment):
        environment.install("tunerkit-foo")
        environment.install("tunerkit-bad", "import sys; sys.exit()")
        result = run("plugins", "--check", "--json")
        assert result.exit_code == 1
        rows = {row["method"]: (row["status"], row["reason"]) for row in json.loads(result.output)}
        assert rows == {"bad": ("broken", "importing tunerkit_bad raised SystemExit."), "foo": ("loaded", "")}

    def test_check_fails_for_a_conflict(self, run, environment):
        environment.install("tunerkit-foo")
        environment.install("acme-foo", name="foo")
        assert run("plugins").exit_code == 0
        assert run("plugins", "--check").exit_code == 1

    def test_check_fails_for_a_broken_extension(self, run, environment):
        environment.install("acme", "1 / 0", entries="[tunerkit.extensions]\ntimer = acme\n")
        result = run("plugins", "--check", "--json")
        assert result.exit_code == 1
        assert (
            "Warning: The extension 'timer' of acme 1.0 is left out: importing acme raised ZeroDivisionError"
            in result.stderr
        )
        assert json.loads(result.stdout)[0]["status"] == "broken"

    def test_warnings_are_told_plainly(self, run, environment, monkeypatch):
        monkeypatch.setenv("TUNERKIT_PLUGINS", "foo")
        result = run("plugins")
        assert result.stderr == (
            "Warning: TUNERKIT_PLUGINS names 'foo', and no installed plugin is called that. Installed: none.\n"
        )

    def test_the_registered_are_listed(self, run, environment):
        import importlib

        from tunerkit import plugins

        environment.install("foo", entries="[console_scripts]\nfoo = foo:main\n")
        plugins.register("foo", importlib.import_module("foo"))
        assert run("plugins").output.splitlines()[1].split() == ["foo", "(registered)", "not", "loaded"]
