from __future__ import annotations

import builtins
import copy
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from tunerkit import plugins
from tunerkit.errors import ConfigError, PluginError, PluginWarning, UnknownMethodError
from tunerkit.plugins import loader
from tunerkit.plugins.hooks import hookimpl

COUNTED = "import builtins\nbuiltins.tunerkit_loads = getattr(builtins, 'tunerkit_loads', 0) + 1\n"

WRAPPER = """
from tunerkit.plugins.hooks import hookimpl

@hookimpl(wrapper=True)
def _prepare_adapter_config():
    return [*(yield), "extension"]
"""


@pytest.fixture
def loads(monkeypatch):
    """How many times a module that begins with COUNTED was run."""
    monkeypatch.setattr(builtins, "tunerkit_loads", 0, raising=False)
    return lambda: builtins.tunerkit_loads


class TestFinding:
    @pytest.mark.parametrize("name", ["ln-foo", "LN_FOO", "tunerkit-ln-foo", "tunerkit_ln_foo", " Ln_Foo "])
    def test_every_spelling_finds_the_method(self, environment, name):
        module = environment.install("tunerkit-ln-foo")
        found = plugins.get_method(name)
        assert found is plugins.get_method("ln-foo")
        assert (found.id, found.distribution, found.version) == ("ln-foo", "tunerkit-ln-foo", "1.0")
        assert found.plugin is sys.modules[module]
        assert found.method is sys.modules[module].method

    def test_nothing_is_imported_until_it_is_asked_for(self, environment):
        wanted, other = environment.install("tunerkit-foo"), environment.install("tunerkit-bar")
        assert [info.method for info in plugins.installed()] == ["bar", "foo"]
        assert plugins.method_ids() == ["bar", "foo"]
        assert {wanted, other}.isdisjoint(sys.modules)
        plugins.get_method("foo")
        assert wanted in sys.modules
        assert other not in sys.modules

    def test_a_package_installed_after_the_first_look_is_found(self, environment):
        environment.install("tunerkit-foo")
        plugins.get_method("foo")
        environment.install("tunerkit-late")
        assert plugins.get_method("late").id == "late"

    def test_unknown(self, environment):
        environment.install("tunerkit-foobar")
        with pytest.raises(UnknownMethodError) as caught:
            plugins.get_method("FOOBAZ")
        assert str(caught.value) == (
            "No installed package offers the method 'foobaz' (peft_type 'FOOBAZ'). Install the one that does, by "
            "convention tunerkit-foobaz, or offer it yourself with tunerkit.register('foobaz', plugin). Installed "
            "methods: 'foobar'. Did you mean 'foobar'?"
        )
        assert (caught.value.__cause__, caught.value.__context__) == (None, None)

    def test_unknown_when_nothing_is_installed(self, environment):
        with pytest.raises(UnknownMethodError, match="Installed methods: none"):
            plugins.get_method("foo")

    def test_what_is_no_name(self, environment):
        with pytest.raises(ConfigError, match="'foo/bar' is not a method name"):
            plugins.get_method("foo/bar")

    def test_doubled_and_stale_metadata_are_harmless(self, environment):
        environment.install("tunerkit-foo", version="2.0")
        environment.describe("tunerkit-foo", version="1.0", entries="[tunerkit]\nfoo = tunerkit_foo\n")
        environment.describe(
            "tunerkit_foo", version="2.0", entries="[tunerkit]\nfoo = tunerkit_foo\nfoo = tunerkit_foo\n"
        )
        assert [info.method for info in plugins.installed()] == ["foo"]
        assert plugins.get_method("foo").distribution == "tunerkit-foo"

    def test_two_packages_that_offer_one_method(self, environment):
        environment.install("tunerkit-foo", version="1.2")
        environment.install("acme-foo", name="foo", version="3.4")
        environment.install("tunerkit-bar")
        assert plugins.get_method("bar").id == "bar"
        msg = (
            r"The method 'foo' is offered by acme-foo 3\.4 and tunerkit-foo 1\.2\. Uninstall one of them, for example "
            r"with `pip uninstall tunerkit-foo`\."
        )
        with pytest.raises(PluginError, match=msg):
            plugins.get_method("foo")
        assert {info.status for info in plugins.installed() if info.method == "foo"} == {"conflict"}
        assert {"acme_foo", "tunerkit_foo"}.isdisjoint(sys.modules)

    def test_a_conflict_ends_when_one_package_is_gone(self, environment):
        environment.install("tunerkit-foo")
        environment.install("acme-foo", name="foo")
        with pytest.raises(PluginError, match="is offered by"):
            plugins.get_method("foo")
        (environment.folder / "acme_foo-1.0.dist-info" / "entry_points.txt").unlink()
        assert plugins.get_method("foo").distribution == "tunerkit-foo"

    @pytest.mark.parametrize(
        ("name", "way"),
        [("Ln_Foo", "write 'ln-foo' there"), ("ln.foo", "use small letters, digits and single hyphens")],
    )
    def test_an_entry_point_that_is_not_called_by_the_id(self, environment, name, way):
        environment.install("tunerkit-ln-foo", name=name)
        (info,) = plugins.installed()
        assert (info.method, info.status) == (name, "broken")
        assert f"tunerkit-ln-foo 1.0 offers a method as {name!r}" in info.reason
        assert way in info.reason
        with pytest.raises((PluginError, UnknownMethodError), match="ln-foo"):
            plugins.get_method("ln-foo")

    def test_metadata_that_cannot_be_read_warns_once(self, environment):
        environment.install("tunerkit-foo")
        environment.describe("tunerkit-bad", entries="x")
        bad = environment.folder / "tunerkit_bad-1.0.dist-info" / "entry_points.txt"
        bad.write_bytes(b"[tunerkit]\nbad = \xff\xfe\n")
        with pytest.warns(PluginWarning, match="metadata of a package in .*site cannot be read.*Reinstall the package"):
            assert plugins.get_method("foo").id == "foo"
        assert [info.method for info in plugins.installed()] == ["foo"]

    def test_other_entry_points_are_not_looked_at(self, environment):
        environment.describe("acme", entries="[console_scripts]\ntunerkit = acme:main\n[tunerkit.other]\nacme = acme\n")
        assert plugins.installed() == []


class TestBroken:
    @pytest.mark.parametrize(
        ("source", "reason", "cause"),
        [
            (
                "import nowhere_at_all",
                "raised ModuleNotFoundError: No module named 'nowhere_at_all'",
                ModuleNotFoundError,
            ),
            ("raise ValueError('boom')", "raised ValueError: boom", ValueError),
            ("raise ValueError", r"raised ValueError\. Mend", ValueError),
            ("raise ValueError('One. Two.')", r"raised ValueError: One\. Two\. Mend", ValueError),
            ("def f(:", r"raised SyntaxError: .*tunerkit_bad\.py, line 1", SyntaxError),
            ("import sys; sys.exit(3)", "raised SystemExit: 3", SystemExit),
            ("class Odd(BaseException): pass\nraise Odd('x')", "raised Odd: x", BaseException),
        ],
    )
    def test_costs_only_itself_and_says_why(self, environment, source, reason, cause):
        environment.install("tunerkit-bad", source)
        environment.install("tunerkit-foo")
        errors = []
        for _ in range(2):
            with pytest.raises(
                PluginError, match=f"'bad' of tunerkit-bad 1.0 cannot be used: importing .*{reason}"
            ) as caught:
                plugins.get_method("bad")
            errors.append(caught.value)
        assert isinstance(errors[0].__cause__, PluginError | cause)
        assert errors[0].__cause__ is errors[1].__cause__
        assert "tunerkit_bad" in "".join(traceback.format_exception(errors[0].__cause__))
        assert f"Mend or reinstall tunerkit-bad (in {environment.folder})" in str(errors[0])
        assert plugins.get_method("foo").id == "foo"
        assert {info.method: info.status for info in plugins.installed()} == {"bad": "broken", "foo": "loaded"}

    def test_is_not_tried_again_until_refresh(self, environment, loads):
        environment.install("tunerkit-bad", COUNTED + "raise ValueError")
        for _ in range(3):
            with pytest.raises(PluginError, match="ValueError"):
                plugins.get_method("bad")
        assert loads() == 1
        plugins.refresh()
        with pytest.raises(PluginError, match="ValueError"):
            plugins.get_method("bad")
        assert loads() == 2

    def test_mended_and_refreshed(self, environment):
        module = environment.install("tunerkit-foo", "method = None  # imports well, and is no plugin")
        with pytest.raises(PluginError, match="NoneType"):
            plugins.get_method("foo")
        assert module in sys.modules
        sys.modules[f"{module}x"] = sys.modules[module]
        environment.install("tunerkit-foo")
        plugins.refresh()
        assert plugins.get_method("foo").version == "1.0"
        assert sys.modules.pop(f"{module}x") is not sys.modules[module]

    def test_refresh_keeps_what_is_loaded(self, environment):
        environment.install("tunerkit-foo")
        found = plugins.get_method("foo")
        plugins.refresh()
        assert plugins.get_method("foo") is found

    def test_metadata_without_a_module(self, environment):
        environment.describe("tunerkit-foo", entries="[tunerkit]\nfoo = tunerkit_foo\n")
        with pytest.raises(PluginError, match="its module tunerkit_foo is not there, though the package's metadata is"):
            plugins.get_method("foo")

    def test_an_object_in_a_module_may_be_the_plugin(self, environment):
        after = "import types\nplugin = types.SimpleNamespace(method=method)\n"
        environment.install("tunerkit-foo", after=after, entries="[tunerkit]\nfoo = tunerkit_foo:plugin\n")
        assert plugins.get_method("foo").plugin is sys.modules["tunerkit_foo"].plugin

    def test_interrupt_is_not_kept(self, environment, monkeypatch):
        environment.install("tunerkit-foo", before="import builtins\nbuiltins.tunerkit_interrupt()\n")

        def interrupt():
            raise KeyboardInterrupt

        monkeypatch.setattr(builtins, "tunerkit_interrupt", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            plugins.get_method("foo")
        monkeypatch.setattr(builtins, "tunerkit_interrupt", lambda: None)
        assert plugins.get_method("foo").id == "foo"

    def test_a_failure_outside_the_import_is_kept_too(self, environment):
        environment.install("tunerkit-foo", "def __getattr__(name):\n    raise OSError('gone')\n")
        for _ in range(2):
            with pytest.raises(PluginError, match="cannot be used: loading it raised OSError: gone") as caught:
                plugins.get_method("foo")
            assert isinstance(caught.value.__cause__, OSError)

    def test_a_plugin_that_asks_for_itself(self, environment):
        environment.install("tunerkit-foo", "from tunerkit.plugins import get_method\nget_method('foo')\n")
        with pytest.raises(PluginError, match=r"asks for its own method while it is imported\. Ask for it later"):
            plugins.get_method("foo")

    def test_a_plugin_may_ask_for_another(self, environment):
        environment.install("tunerkit-foo", before="from tunerkit.plugins import get_method\nget_method('bar')\n")
        environment.install("tunerkit-bar")
        assert plugins.get_method("foo").id == "foo"


class TestHooks:
    def test_only_the_plugin_and_the_defaults_are_called(self, environment):
        hook = "\n@hookimpl\ndef _prepare_adapter_config(peft_config):\n    return [__name__, peft_config]\n"
        environment.install("tunerkit-foo", after=hook)
        environment.install("tunerkit-bar")
        foo, bar = plugins.get_method("foo"), plugins.get_method("bar")
        assert foo.hook._prepare_adapter_config(peft_config=1, model_config={}) == ["tunerkit_foo", 1]
        assert bar.hook._prepare_adapter_config(peft_config=1, model_config={}) == ["core", "bar"]
        assert [name for name, _ in foo.manager.list_name_plugin()] == ["tunerkit", "foo"]

    def test_an_argument_with_a_default_is_passed(self, environment):
        hook = (
            "\n@hookimpl\ndef _create_and_replace(target, parameter_name=None):\n    return [target, parameter_name]\n"
        )
        environment.install("tunerkit-foo", after=hook)
        call = dict.fromkeys(["peft_config", "adapter_name", "target", "target_name", "parent", "current_key"], 1)
        hook = plugins.get_method("foo").hook
        assert hook._create_and_replace(**call, parameter_name="bias") == [1, "bias"]
        assert hook._create_and_replace(**call) == [1, None]

    def test_none_is_an_answer(self, environment):
        hook = "\n@hookimpl\ndef _check_target_module_exists(key):\n    return None\n"
        environment.install("tunerkit-foo", after=hook)
        environment.install("tunerkit-bar")
        ask = {"peft_config": None, "key": "q"}
        assert plugins.get_method("foo").hook._check_target_module_exists(**ask) is None
        assert plugins.get_method("bar").hook._check_target_module_exists(**ask) == ["core", "q"]

    def test_a_hook_that_one_function_answers_is_called_directly(self, environment):
        hook = "\n@hookimpl\ndef _check_target_module_exists(key):\n    return key\n"
        environment.install("tunerkit-foo", after=hook)
        environment.install("tunerkit-bar", after=WRAPPER)
        foo, bar = plugins.get_method("foo"), plugins.get_method("bar")
        for method in (foo, bar):
            arguments = {"peft_config": None, "key": "q"}
            answer = method.caller("_check_target_module_exists")(*arguments.values())
            assert answer == method.hook._check_target_module_exists(**arguments)
        arguments = {"peft_config": 1, "model_config": {}}
        answer = bar.caller("_prepare_adapter_config")(*arguments.values())
        assert answer == bar.hook._prepare_adapter_config(**arguments)

    def test_a_hook_that_comes_later_is_called_too(self, environment):
        class Later:
            @hookimpl(wrapper=True)
            def _check_target_module_exists(self):
                return [(yield), "later"]

        environment.install(
            "tunerkit-foo", after="\n@hookimpl\ndef _check_target_module_exists(key):\n    return key\n"
        )
        foo = plugins.get_method("foo")
        assert foo.caller("_check_target_module_exists")(None, "q") == "q"
        foo.manager.register(Later())
        assert foo.caller("_check_target_module_exists")(None, "q") == ["q", "later"]

    def test_a_wrapper_of_the_plugin_gets_the_default(self, environment):
        environment.install("tunerkit-foo", after=WRAPPER)
        hook = plugins.get_method("foo").hook
        assert hook._prepare_adapter_config(peft_config=1, model_config={}) == ["core", "foo", "extension"]

    def test_copies_and_pickles_are_the_method_itself(self, environment):
        environment.install("tunerkit-foo")
        found = plugins.get_method("foo")
        assert copy.deepcopy(found) is found
        assert copy.copy(found) is found
        assert pickle.loads(pickle.dumps(found)) is found  # noqa: S301 - our own bytes


class TestExtensions:
    def install(self, environment, name, source):
        environment.install(name, source, entries=f"[tunerkit.extensions]\n{name} = {name}\n")

    def test_wraps_every_method(self, environment):
        environment.install("tunerkit-foo")
        environment.install("tunerkit-bar")
        self.install(environment, "timer", WRAPPER)
        assert "timer" not in sys.modules
        for name in ("foo", "bar"):
            hook = plugins.get_method(name).hook
            assert hook._prepare_adapter_config(peft_config=1, model_config={}) == ["core", name, "extension"]
        assert [(info.method, info.kind, info.status) for info in plugins.installed()] == [
            ("bar", "method", "loaded"),
            ("foo", "method", "loaded"),
            ("timer", "extension", "loaded"),
        ]

    def test_a_broken_one_warns_once_and_the_rest_works(self, environment):
        environment.install("tunerkit-foo")
        environment.install("tunerkit-bar")
        self.install(environment, "broken", "import sys; sys.exit('no')")
        self.install(environment, "timer", WRAPPER)
        msg = "The extension 'broken' of broken 1.0 is left out: importing broken raised SystemExit: no. Mend,"
        with pytest.warns(PluginWarning, match=msg) as caught:
            hook = plugins.get_method("foo").hook
        assert len(caught) == 1
        assert hook._prepare_adapter_config(peft_config=1, model_config={}) == ["core", "foo", "extension"]
        plugins.get_method("bar")
        (info,) = [info for info in plugins.installed() if info.method == "broken"]
        assert (info.status, info.reason) == ("broken", "importing broken raised SystemExit: no.")

    def test_mended_and_refreshed(self, environment):
        environment.install("tunerkit-foo")
        environment.install("tunerkit-bar")
        self.install(environment, "timer", "import nowhere_at_all")
        with pytest.warns(PluginWarning, match="nowhere_at_all"):
            plugins.get_method("foo")
        self.install(environment, "timer", WRAPPER)
        plugins.refresh()
        assert "timer of timer 1.0" in dict(plugins.get_method("bar").manager.list_name_plugin())
        assert "timer of timer 1.0" not in dict(plugins.get_method("foo").manager.list_name_plugin())

    def test_refresh_keeps_what_is_loaded(self, environment, loads):
        environment.install("tunerkit-foo")
        environment.install("tunerkit-bar")
        self.install(environment, "timer", COUNTED + WRAPPER)
        plugins.get_method("foo")
        plugins.refresh()
        plugins.get_method("bar")
        assert loads() == 1
        assert len(loader.extensions) == 1

    def test_must_not_answer_for_a_method(self, environment):
        environment.install("tunerkit-foo")
        source = (
            "from tunerkit.plugins.hooks import hookimpl\n@hookimpl\ndef _prepare_adapter_config():\n    return 1\n"
        )
        self.install(environment, "usurper", source)
        with pytest.warns(
            PluginWarning, match="would answer in place of every method. Mark it with `@hookimpl.wrapper=True"
        ):
            hook = plugins.get_method("foo").hook
        assert hook._prepare_adapter_config(peft_config=1, model_config={}) == ["core", "foo"]

    def test_one_module_may_be_both(self, environment):
        both = "[tunerkit]\nfoo = tunerkit_foo\n[tunerkit.extensions]\nfoo-timer = tunerkit_foo\n"
        environment.install("tunerkit-foo", after=WRAPPER, entries=both)
        environment.install("tunerkit-bar")
        for name in ("foo", "bar"):
            hook = plugins.get_method(name).hook
            assert hook._prepare_adapter_config(peft_config=1, model_config={}) == ["core", name, "extension"]

    def test_interrupt_is_not_kept(self, environment, monkeypatch):
        environment.install("tunerkit-foo")
        self.install(environment, "timer", "raise KeyboardInterrupt")
        with pytest.raises(KeyboardInterrupt):
            plugins.get_method("foo")
        self.install(environment, "timer", WRAPPER)
        assert "timer of timer 1.0" in dict(plugins.get_method("foo").manager.list_name_plugin())

    def test_one_that_asks_for_a_method(self, environment):
        environment.install("tunerkit-foo")
        self.install(environment, "eager", "from tunerkit.plugins import get_method\nget_method('foo')\n" + WRAPPER)
        found = plugins.get_method("foo")
        assert [name for name, _ in found.manager.list_name_plugin()] == ["tunerkit", "foo"]
        assert found is plugins.get_method("foo")


class TestAllowList:
    def test_names_what_may_be_imported(self, environment, monkeypatch):
        environment.install("tunerkit-foo")
        module = environment.install("tunerkit-bar")
        monkeypatch.setenv("TUNERKIT_PLUGINS", " tunerkit_foo ,")
        assert plugins.get_method("foo").id == "foo"
        with pytest.raises(PluginError) as caught:
            plugins.get_method("bar")
        assert str(caught.value) == (
            "The method 'bar' is installed (tunerkit-bar 1.0), but TUNERKIT_PLUGINS=' tunerkit_foo ,' leaves it out. "
            "Set TUNERKIT_PLUGINS=tunerkit_foo,bar to allow it."
        )
        assert module not in sys.modules
        assert {info.method: info.status for info in plugins.installed()} == {"bar": "not allowed", "foo": "loaded"}
        assert plugins.method_ids() == ["foo"]

    def test_empty_allows_nothing(self, environment, monkeypatch):
        environment.install("tunerkit-foo")
        monkeypatch.setenv("TUNERKIT_PLUGINS", "")
        with pytest.raises(PluginError, match=r"TUNERKIT_PLUGINS='' leaves it out\. Set TUNERKIT_PLUGINS=foo to"):
            plugins.get_method("foo")

    def test_is_read_again_when_a_method_is_not_found(self, environment, monkeypatch):
        environment.install("tunerkit-foo")
        monkeypatch.setenv("TUNERKIT_PLUGINS", "")
        assert plugins.method_ids() == []
        monkeypatch.setenv("TUNERKIT_PLUGINS", "foo")
        assert plugins.get_method("foo").id == "foo"

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("fobar", r"Did you mean 'foobar'\?"),
            ("zzz", r"Installed: 'foobar', 'timer'\."),
            ("Timr", r"Did you mean 'timer'\?"),
        ],
    )
    def test_a_name_that_matches_nothing_warns_once(self, environment, monkeypatch, name, hint):
        environment.install("tunerkit-foobar")
        environment.install("timer", WRAPPER, entries="[tunerkit.extensions]\ntimer = timer\n")
        monkeypatch.setenv("TUNERKIT_PLUGINS", f"foobar,{name}")
        with pytest.warns(
            PluginWarning, match=f"names '{name}', and no installed plugin is called that. {hint}"
        ) as caught:
            plugins.installed()
        assert len(caught) == 1
        plugins.installed()

    def test_extensions_are_on_it_by_their_own_name(self, environment, monkeypatch):
        environment.install("tunerkit-foo")
        environment.install("timer", WRAPPER, entries="[tunerkit.extensions]\nMy_Timer = timer\n")
        monkeypatch.setenv("TUNERKIT_PLUGINS", "foo")
        plugins.get_method("foo")
        assert "timer" not in sys.modules
        (info,) = [info for info in plugins.installed() if info.kind == "extension"]
        assert info.status == "not allowed"
        assert "The extension 'My_Timer' is installed (timer 1.0), but TUNERKIT_PLUGINS='foo'" in info.reason
        monkeypatch.setenv("TUNERKIT_PLUGINS", "foo,my-timer")
        assert plugins.installed()[1].status == "not loaded"

    def test_a_conflict_outside_it_is_none(self, environment, monkeypatch):
        environment.install("tunerkit-foo")
        environment.install("tunerkit-bar")
        environment.install("acme-bar", name="bar")
        monkeypatch.setenv("TUNERKIT_PLUGINS", "foo")
        assert [info.status for info in plugins.installed()] == ["not allowed", "not allowed", "not loaded"]


class TestRegister:
    @pytest.fixture
    def plugin(self, environment):
        """Something that can be registered for `foo`."""
        environment.install("foo", entries="[console_scripts]\nfoo = foo:main\n")
        return importlib.import_module("foo")

    def test_without_a_package(self, plugin):
        plugins.register("FOO", plugin)
        found = plugins.get_method("foo")
        assert (found.plugin, found.distribution, found.version) == (plugin, None, None)
        (info,) = plugins.installed()
        assert (info.method, info.package, info.version, info.path, info.status) == ("foo", None, None, None, "loaded")
        assert plugins.method_ids() == ["foo"]

    def test_the_allow_list_does_not_concern_it(self, plugin, monkeypatch):
        monkeypatch.setenv("TUNERKIT_PLUGINS", "")
        plugins.register("foo", plugin)
        assert plugins.get_method("foo").plugin is plugin
        assert plugins.installed()[0].status == "loaded"

    def test_twice_is_once(self, plugin):
        plugins.register("foo", plugin)
        plugins.register("foo", plugin)
        assert len(plugins.installed()) == 1

    def test_a_taken_name(self, plugin):
        plugins.register("foo", plugin)
        other = type("Other", (), {"method": plugin.method})()
        with pytest.raises(PluginError) as caught:
            plugins.register("foo", other)
        assert str(caught.value) == (
            "Another plugin is registered for the method 'foo'. Register this one under another name, or call "
            "tunerkit.plugins.unregister('foo') first."
        )
        assert plugins.get_method("foo").plugin is plugin

    def test_over_an_installed_package(self, environment, plugin):
        environment.install("tunerkit-foo", version="1.5")
        with pytest.raises(PluginError) as caught:
            plugins.register("foo", plugin)
        assert str(caught.value) == (
            "The method 'foo' is offered by tunerkit-foo 1.5 and the program (tunerkit.register). Register yours under "
            "another name, or run `pip uninstall tunerkit-foo`."
        )
        assert plugins.get_method("foo").distribution == "tunerkit-foo"

    def test_a_package_installed_later(self, environment, plugin):
        plugins.register("foo", plugin)
        environment.install("tunerkit-foo")
        plugins.refresh()
        with pytest.raises(PluginError, match=r"offered by tunerkit-foo 1\.0 and the program"):
            plugins.get_method("foo")
        assert [info.status for info in plugins.installed()] == ["conflict", "conflict"]

    def test_the_module_of_the_installed_package_is_no_conflict(self, environment):
        module = environment.install("tunerkit-foo")
        plugins.register("foo", importlib.import_module(module))
        assert plugins.get_method("foo").distribution == "tunerkit-foo"
        assert [info.package for info in plugins.installed()] == ["tunerkit-foo"]

    def test_takes_the_place_of_one_that_is_not_allowed(self, environment, plugin, monkeypatch):
        environment.install("tunerkit-foo", "raise ValueError")
        with pytest.raises(PluginError, match="ValueError"):
            plugins.get_method("foo")
        monkeypatch.setenv("TUNERKIT_PLUGINS", "")
        plugins.register("foo", plugin)
        assert plugins.get_method("foo").plugin is plugin
        assert sorted(info.status for info in plugins.installed()) == ["loaded", "not allowed"]

    def test_what_is_no_plugin_is_refused_at_once(self, plugin):
        msg = "The plugin for the method 'bar' cannot be registered: it is offered as 'bar', and the field `peft_type`"
        with pytest.raises(PluginError, match=msg):
            plugins.register("bar", plugin)
        assert plugins.installed() == []
        with pytest.raises(UnknownMethodError):
            plugins.get_method("bar")

    def test_taken_back(self, plugin):
        plugins.register("foo", plugin)
        plugins.get_method("foo")
        plugins.unregister("tunerkit-foo")
        with pytest.raises(UnknownMethodError, match="No installed package offers the method 'foo'"):
            plugins.get_method("foo")
        plugins.register("foo", type("Other", (), {"method": plugin.method})())
        with pytest.raises(
            UnknownMethodError, match="No plugin is registered for the method 'bar'; registered are: 'foo'"
        ):
            plugins.unregister("bar")

    def test_a_failure_while_it_is_made_ready(self, plugin, monkeypatch):
        def fail(method, declared):
            raise ZeroDivisionError

        plugins.register("foo", plugin)
        monkeypatch.setattr(loader, "_default_hooks", fail)
        msg = r"'foo' of the program \(tunerkit.register\) cannot be used: loading it raised ZeroDivisionError\.$"
        with pytest.raises(PluginError, match=msg):
            plugins.get_method("foo")
        assert plugins.installed()[0].status == "broken"


class TestThreadsAndProcesses:
    def test_eight_threads_load_once(self, environment, loads):
        environment.install("tunerkit-foo", before=COUNTED)
        environment.install("tunerkit-bad", COUNTED + "raise ValueError")
        together = threading.Barrier(8)

        def ask(name):
            together.wait()
            try:
                return plugins.get_method(name)
            except PluginError as error:
                return error.__cause__

        with ThreadPoolExecutor(8) as pool:
            assert len({id(found) for found in pool.map(ask, ["foo"] * 8)}) == 1
            assert len({id(found) for found in pool.map(ask, ["bad"] * 8)}) == 1
        assert loads() == 2

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_a_fork_in_the_middle_of_a_load(self, environment, monkeypatch):
        # The child is made while another thread loads: it must neither hang nor find half a plugin.
        started, go_on = threading.Event(), threading.Event()

        def pause():
            started.set()
            assert go_on.wait(30)

        monkeypatch.setattr(builtins, "tunerkit_pause", pause, raising=False)
        environment.install("tunerkit-foo", before="import builtins\nbuiltins.tunerkit_pause()\n")
        environment.install("tunerkit-bar")
        thread = threading.Thread(target=plugins.get_method, args=("foo",))
        thread.start()
        assert started.wait(30)
        os.register_at_fork(before=go_on.set)  # Runs before the loader's, which was registered earlier.
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=lambda: answers.put([plugins.get_method(name).id for name in ("foo", "bar")]))
        child.start()
        child.join(30)
        thread.join(30)
        assert child.exitcode == 0
        assert answers.get() == ["foo", "bar"]
        assert plugins.get_method("bar").id == "bar"

    def test_a_fresh_process(self, environment):
        environment.install("tunerkit-foo")
        script = (
            "import sys\n"
            "from tunerkit import plugins\n"
            "assert 'tunerkit_foo' not in sys.modules\n"
            "assert 'importlib_metadata' not in sys.modules\n"
            "assert 'foo' in plugins.method_ids()\n"
            "assert 'tunerkit_foo' not in sys.modules\n"
            "assert 'click' not in sys.modules and 'rich' not in sys.modules\n"
            "assert {i.method: i.package for i in plugins.installed()}['foo'] == 'tunerkit-foo'\n"
            "found = plugins.get_method('foo')\n"
            "import pickle; assert pickle.loads(pickle.dumps(found)) is found\n"
            "print(found.id, found.plugin.__name__)\n"
        )
        paths = os.pathsep.join(filter(None, [str(environment.folder), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
        assert done.stderr == ""
        assert done.stdout == "foo tunerkit_foo\n"


def test_load_all(environment):
    environment.install("tunerkit-foo")
    environment.install("tunerkit-bad", "1 / 0")
    environment.install("tunerkit-twin")
    environment.install("acme-twin", name="twin")
    environment.install("timer", WRAPPER, entries="[tunerkit.extensions]\ntimer = timer\n")
    rows = plugins.load_all()
    assert [(row.method, row.package, row.status) for row in rows] == [
        ("bad", "tunerkit-bad", "broken"),
        ("foo", "tunerkit-foo", "loaded"),
        ("twin", "acme-twin", "conflict"),
        ("twin", "tunerkit-twin", "conflict"),
        ("timer", "timer", "loaded"),
    ]
    assert rows[0].reason == "importing tunerkit_bad raised ZeroDivisionError: division by zero."
    assert rows[0].path == str(environment.folder)
