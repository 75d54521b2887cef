from __future__ import annotations

import inspect
import re
import types
from dataclasses import dataclass, field

import pluggy
import pytest

from tunerkit.adapter import Adapter, Part
from tunerkit.config import PeftConfig
from tunerkit.errors import PluginError
from tunerkit.plugins import checks, hooks
from tunerkit.plugins.checks import check_hooks, check_method, hook_arguments
from tunerkit.plugins.hooks import hookimpl
from tunerkit.plugins.method import Method


@dataclass
class FooConfig(PeftConfig):
    peft_type: str | None = "FOO"


class Undecorated(PeftConfig):
    peft_type = "FOO"


def plugin(**attributes):
    return types.SimpleNamespace(**attributes)


def method(**settings):
    return plugin(method=Method(**{"config": FooConfig, "adapter": Adapter, **settings}))


def reason(check, *args, **kwargs):
    with pytest.raises(PluginError) as caught:
        check(*args, **kwargs)
    return str(caught.value)


class TestMethod:
    def test_a_good_one(self):
        good = method()
        assert check_method("foo", good) is good.method

    def test_missing(self):
        assert reason(check_method, "foo", plugin()) == (
            "its attribute `method` is missing. Declare `method = tunerkit.Method(config=...)` in the plugin."
        )

    @pytest.mark.parametrize("wrong", [None, Method, {"config": FooConfig}])
    def test_something_else(self, wrong):
        assert f"its attribute `method` is of type {type(wrong).__name__}." in reason(
            check_method, "foo", plugin(method=wrong)
        )

    def test_a_class_instead_of_an_instance(self):
        class Plugin:
            method = Method(config=FooConfig, adapter=Adapter)

        assert reason(check_method, "foo", Plugin) == (
            f"the plugin is the class {Plugin.__qualname__}. Give an instance of it, or a module."
        )
        assert check_method("foo", Plugin()) is Plugin.method

    @pytest.mark.parametrize("config", [None, dict, FooConfig(), "FooConfig"])
    def test_config_is_no_config_class(self, config):
        assert reason(check_method, "foo", method(config=config)) == (
            f"its `Method.config` is {config!r}. Give a subclass of tunerkit.PeftConfig."
        )

    def test_peft_type_of_another_method(self):
        assert reason(check_method, "ln-bar", method()) == (
            "it is offered as 'ln-bar', and the field `peft_type` of FooConfig has the default 'FOO'. Write "
            "`peft_type: str | None = 'LN_BAR'` in the class, under the decorator @dataclass, or offer the method "
            "under its own name."
        )

    def test_peft_type_without_the_decorator(self):
        assert "`peft_type` of Undecorated has the default None" in reason(
            check_method, "foo", method(config=Undecorated)
        )

    def test_peft_type_without_a_default(self):
        @dataclass
        class Config(PeftConfig):
            peft_type: str = field(default_factory=str)

        assert "has no default. Write" in reason(check_method, "foo", method(config=Config))

    def test_nothing_that_makes_an_adapter(self):
        assert reason(check_method, "foo", method(adapter=None)) == (
            "nothing in it makes an adapter. Give `Method` an `adapter` (or a `part` or a `tuner`), or implement "
            "`_create_and_replace`."
        )

    @pytest.mark.parametrize(("what", "given"), [("adapter", Adapter), ("part", Part), ("tuner", object)])
    def test_anything_that_makes_an_adapter(self, what, given):
        check_method("foo", method(**{"adapter": None, what: given}))

    @pytest.mark.parametrize("wrong", [Part, "Adapter", (Adapter, Part)])
    def test_adapter_of_another_class(self, wrong):
        assert re.fullmatch(
            r"its `Method\.adapter` is or holds .*(Part|Adapter).*\. Give a subclass of tunerkit\.adapter\.Adapter\.",
            reason(check_method, "foo", method(adapter=wrong)),
        )

    def test_part_of_another_class(self):
        assert "its `Method.part` is or holds <class 'tunerkit.adapter.Adapter'>. Give a subclass of" in reason(
            check_method, "foo", method(part=Adapter)
        )

    def test_a_hook_that_makes_an_adapter(self):
        @hookimpl
        def _create_and_replace(target):
            return target

        found = method(adapter=None)
        found._create_and_replace = _create_and_replace
        assert check_method("foo", found) is found.method

    @pytest.mark.parametrize(
        ("core", "api", "msg"),
        [
            (1, 2, "it was written for version 2 of the plugin API and tunerkit has 1. Upgrade tunerkit."),
            (1, 0, "it was written for version 0 of the plugin API and tunerkit has 1. Upgrade the plugin."),
            (3, 1, "it was written for version 1 of the plugin API and tunerkit has 2 and 3. Upgrade the plugin."),
            (3, 4, "it was written for version 4 of the plugin API and tunerkit has 2 and 3. Upgrade tunerkit."),
            (1, "1", "its `Method.api` is '1'. Give the version it was written for, an integer; now it is 1."),
            (1, True, "its `Method.api` is True. Give the version it was written for, an integer; now it is 1."),
        ],
    )
    def test_versions_refused(self, monkeypatch, core, api, msg):
        monkeypatch.setattr(checks, "API_VERSION", core)
        assert reason(check_method, "foo", method(api=api)) == msg

    @pytest.mark.parametrize(("core", "api"), [(1, 1), (2, 1), (2, 2), (3, 2)])
    def test_versions_accepted(self, monkeypatch, core, api):
        monkeypatch.setattr(checks, "API_VERSION", core)
        assert check_method("foo", method(api=api)).api == api


class TestHooks:
    def test_the_three_as_declared(self):
        # An author copies the signatures; each must be taken as it stands.
        for name in hook_arguments():
            spec = getattr(hooks, name)
            namespace = {"hookimpl": hookimpl}
            names = ", ".join(str(p.replace(annotation=p.empty)) for p in inspect.signature(spec).parameters.values())
            exec(f"@hookimpl\ndef {name}({names}): ...", namespace)  # noqa: S102 - the spec's own signature
            check_hooks(plugin(**{name: namespace[name]}))
        assert list(hook_arguments()) == [
            "_check_target_module_exists",
            "_create_and_replace",
            "_prepare_adapter_config",
        ]

    def test_fewer_arguments_are_fine(self):
        @hookimpl
        def _check_target_module_exists(key):
            return key

        check_hooks(plugin(_check_target_module_exists=_check_target_module_exists))

    def test_misspelt(self):
        @hookimpl
        def _create_and_replce(target):
            return target

        assert reason(check_hooks, plugin(_create_and_replce=_create_and_replce)) == (
            "there is no hook `_create_and_replce`, which `_create_and_replce` implements. Did you mean "
            "`_create_and_replace`?"
        )

    def test_misspelt_in_specname(self):
        @hookimpl(specname="zzz")
        def make(target):
            return target

        assert reason(check_hooks, plugin(make=make)) == (
            "there is no hook `zzz`, which `make` implements. The hooks are '_check_target_module_exists', "
            "'_create_and_replace', '_prepare_adapter_config'."
        )

    def test_specname(self):
        @hookimpl(specname="_create_and_replace")
        def make(target):
            return target

        check_hooks(plugin(make=make))

    def test_one_of_a_later_version_may_be_optional(self):
        @hookimpl(optionalhook=True)
        def _of_a_later_version(whatever):
            return whatever

        check_hooks(plugin(_of_a_later_version=_of_a_later_version))

    @pytest.mark.parametrize(
        "unmarked",
        [lambda target: target, pluggy.HookimplMarker("other")(lambda target: target), hooks._create_and_replace, 3],
    )
    def test_unmarked(self, unmarked):
        assert reason(check_hooks, plugin(_create_and_replace=unmarked)) == (
            "its `_create_and_replace` is named like a hook but is not marked as one. Put "
            "`@tunerkit.hookimpl` above it."
        )

    def test_unmarked_override_in_a_subclass(self):
        class Base:
            @hookimpl
            def _create_and_replace(self, target):
                return target

        class Override(Base):
            def _create_and_replace(self, target):
                return target

        check_hooks(Base())
        assert "named like a hook but is not marked as one" in reason(check_hooks, Override())

    def test_an_argument_that_is_none_of_the_hooks(self):
        @hookimpl
        def _check_target_module_exists(peft_config, keys):
            return keys

        assert reason(check_hooks, plugin(_check_target_module_exists=_check_target_module_exists)) == (
            "its hook `_check_target_module_exists` has the argument 'keys'. Did you mean 'key'? Possible are: "
            "peft_config, key."
        )

    def test_an_argument_far_from_all(self):
        @hookimpl
        def _check_target_module_exists(zzz=None):
            return zzz

        found = reason(check_hooks, plugin(_check_target_module_exists=_check_target_module_exists))
        assert "has the argument 'zzz'. Possible are: peft_config, key." in found

    @pytest.mark.parametrize(
        ("function", "parameter"),
        [
            (lambda key, *args: key, "*args"),
            (lambda key, **kwargs: key, "**kwargs"),
            (lambda key, *, peft_config=None: key, "peft_config=None"),
        ],
    )
    def test_arguments_that_would_stay_empty(self, function, parameter):
        assert reason(check_hooks, plugin(_check_target_module_exists=hookimpl(function))) == (
            f"its hook `<lambda>` takes `{parameter}` by keyword only or as a rest, which hooks are not given. Name "
            "the arguments it wants, without `*`: peft_config, key."
        )

    def test_a_generator_and_a_coroutine(self):
        @hookimpl
        def _create_and_replace(target):
            yield target

        @hookimpl
        async def _prepare_adapter_config(peft_config):
            return peft_config

        for function in (_create_and_replace, _prepare_adapter_config):
            found = reason(check_hooks, plugin(**{function.__name__: function}))
            assert found == (
                f"its hook `{function.__name__}` gives a generator or coroutine. Return the result, or mark it as a "
                "wrapper."
            )

    def test_what_pluggy_refuses_is_translated(self):
        @hookimpl(wrapper=True)
        def _create_and_replace(target):
            return target

        with pytest.raises(PluginError, match=r"one of its hooks cannot be used: .*not a generator function") as caught:
            check_hooks(plugin(_create_and_replace=_create_and_replace))
        assert isinstance(caught.value.__cause__, pluggy.PluginValidationError)
        assert "\n" not in str(caught.value)

    def test_lazy_names_of_a_module_are_not_touched(self):
        lazy = types.ModuleType("lazy")
        lazy.__dir__ = lambda: ["Config", "_helper"]
        touched = []
        lazy.__getattr__ = touched.append
        # `hasattr` for the hooks' own names is the only question asked.
        with pytest.raises(PluginError, match="named like a hook"):
            check_hooks(lazy)
        assert "Config" not in touched

    def test_an_extension_has_only_wrappers(self):
        @hookimpl
        def _create_and_replace(target):
            return target

        @hookimpl(wrapper=True)
        def _prepare_adapter_config():
            return (yield)

        check_hooks(plugin(_prepare_adapter_config=_prepare_adapter_config), only_wrappers=True)
        assert reason(check_hooks, plugin(_create_and_replace=_create_and_replace), only_wrappers=True) == (
            "its hook `_create_and_replace` would answer in place of every method. Mark it with "
            "`@hookimpl(wrapper=True)`."
        )
