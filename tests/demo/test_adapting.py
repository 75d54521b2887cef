from __future__ import annotations

import types
from dataclasses import dataclass

import pytest
from torch import nn

import tunerkit
from tunerkit import plugins
from tunerkit.adapter import Adapter
from tunerkit.config import PeftConfig, unbuilt
from tunerkit.demo import adapting
from tunerkit.demo.errors import DemoError
from tunerkit.errors import ConfigError, TunerkitError, UnknownMethodError


@dataclass
class ToyConfig(PeftConfig):
    peft_type: str | None = "DEMO_TOY"
    target_modules: list[str] | set[str] | str | None = None
    size: int = 1
    resize: bool = unbuilt(default=False)


class ToyAdapter(Adapter):
    entries = ("toy_scale",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_scale = nn.Parameter(site.ones(site.out_features, 1))

    def merged(self, below):
        return below.weight * self.toy_scale, below.bias


@pytest.fixture
def toy():
    """A method with no default targets for any model."""
    tunerkit.register("demo-toy", types.SimpleNamespace(method=tunerkit.Method(config=ToyConfig, adapter=ToyAdapter)))
    yield "demo-toy"
    plugins.unregister("demo-toy")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def make_model():
    model = nn.Module()
    model.layer = nn.ModuleList([Block(), Block()])
    return model


class TestChooseMethod:
    def test_by_name(self, toy):
        assert adapting.choose_method("DEMO_TOY") == toy

    def test_the_only_one(self, toy, monkeypatch):
        monkeypatch.setattr(adapting, "method_ids", lambda: [toy])
        assert adapting.choose_method(None) == toy

    def test_none(self, monkeypatch):
        monkeypatch.setattr(adapting, "method_ids", list)
        with pytest.raises(DemoError) as caught:
            adapting.choose_method(None)
        assert str(caught.value) == (
            "No method is installed, so there is nothing to train. From a checkout: pip install ./plugins/<package>"
        )

    def test_several(self, monkeypatch):
        monkeypatch.setattr(adapting, "method_ids", lambda: ["one", "two"])
        with pytest.raises(DemoError) as caught:
            adapting.choose_method(None)
        assert str(caught.value) == (
            "Several methods are installed. Say which one:\n  tunerkit demo --method one\n  tunerkit demo --method two"
        )

    def test_unknown(self):
        with pytest.raises(UnknownMethodError, match="'nosuch'"):
            adapting.choose_method("nosuch")


class TestParseSettings:
    def test_json_or_text(self):
        items = ["r=8", "a=true", 'b=["x", "y"]', "c=all-linear", "d=", "e=x=1", " f =null", 'g="8"']
        assert adapting.parse_settings(items) == {
            "r": 8,
            "a": True,
            "b": ["x", "y"],
            "c": "all-linear",
            "d": "",
            "e": "x=1",
            "f": None,
            "g": "8",
        }

    @pytest.mark.parametrize("item", ["r", "=8", ""])
    def test_not_of_the_form(self, item):
        with pytest.raises(DemoError) as caught:
            adapting.parse_settings([item])
        assert str(caught.value) == (
            f"--set takes KEY=VALUE, such as --set 'target_modules=[\"query\"]'; {item!r} is not of that form."
        )

    def test_twice(self):
        with pytest.raises(DemoError) as caught:
            adapting.parse_settings(["r=8", "r=9"])
        assert str(caught.value) == "--set gives 'r' twice: 8 and 9. Give it once."


class TestMakeConfig:
    def test_settings_are_taken(self, toy):
        assert adapting.make_config(toy, {"size": 3}) == ToyConfig(size=3)

    def test_an_unknown_setting_names_those_that_are_built(self, toy):
        with pytest.raises(DemoError) as caught:
            adapting.make_config(toy, {"sise": 3})
        assert str(caught.value) == (
            "The method 'demo-toy' has no setting 'sise'. Did you mean 'size'? Its settings are: target_modules, size."
        )

    def test_an_unknown_setting_that_resembles_none(self, toy):
        with pytest.raises(DemoError, match=r"has no setting 'qqqq'\. Its settings are: "):
            adapting.make_config(toy, {"qqqq": 3})

    def test_a_wrong_value_names_the_field(self, toy):
        with pytest.raises(ConfigError, match=r"ToyConfig\.size"):
            adapting.make_config(toy, {"size": "large"})


class TestAttach:
    HINT = (
        '\nSay what to adapt, for example: --set \'target_modules=["query", "value"]\'\n'
        "The names of this model's linear layers end in: query, value."
    )

    def test_what_was_adapted(self, toy):
        model = adapting.attach(make_model(), adapting.make_config(toy, {"target_modules": ["value"]}))
        assert adapting.adapted_modules(model) == ["layer.0.value", "layer.1.value"]
        assert adapting.summarise(adapting.adapted_modules(model)) == [("layer.*.value", 2)]
        assert adapting.count_parameters(model) == (8, 8 + 2 * (2 * 20 + 8))

    @pytest.mark.parametrize("settings", [{}, {"target_modules": ["qery"]}, {"target_modules": ["norm"]}])
    def test_targets_that_are_missing_or_wrong(self, toy, settings):
        with pytest.raises(DemoError) as caught:
            adapting.attach(make_model(), adapting.make_config(toy, settings))
        assert str(caught.value) == str(caught.value.__cause__) + self.HINT
        assert isinstance(caught.value.__cause__, TunerkitError)

    @pytest.mark.parametrize("targets", [None, ["value"]])
    def test_other_errors_are_left_alone(self, toy, monkeypatch, targets):
        def fail(*_):
            raise error

        monkeypatch.setattr(adapting, "get_peft_model", fail)
        error = TunerkitError("something else")
        config = ToyConfig(target_modules=targets) if targets else PeftConfig()
        with pytest.raises(TunerkitError) as caught:
            adapting.attach(make_model(), config)
        assert caught.value is error


def test_summarise_puts_numbers_together():
    assert adapting.summarise(["a.0.b", "a.11.b", "c", "a.0.d2", "0.a"]) == [
        ("a.*.b", 2),
        ("c", 1),
        ("a.*.d2", 1),
        ("0.a", 1),
    ]
