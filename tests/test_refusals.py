from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import PeftModel, TunerkitError, get_peft_model, plugins
from tunerkit.adapter import Part
from tunerkit.errors import AdapterStateError, CheckpointError, ConfigError
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

X = torch.ones(2, 3)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.seen = []

    def forward(self, x, **others):
        self.seen.append(others)
        return self.lin(x)

    def generate(self, x, **others):
        return self(x, **others)

    def push_to_hub(self, name):
        self.seen.append(name)


def lora():
    return LoraConfig(target_modules=["lin"], r=2)


@pytest.fixture
def model():
    return get_peft_model(Base(), lora())


def refusal(call, *arguments, error=ConfigError, **others):
    with pytest.raises(error) as caught:
        call(*arguments, **others)
    return str(caught.value)


class TestKeywordsOfPeft:
    @pytest.mark.parametrize("call", ["forward", "__call__", "generate"])
    def test_are_refused(self, model, call):
        assert refusal(getattr(model, call), X, alora_offsets=[1, 2]) == (
            "alora_offsets=[1, 2] is not supported by this version; leave it out."
        )
        assert model.get_base_model().seen == []

    @pytest.mark.parametrize("call", ["__call__", "generate"])
    def test_none_says_nothing_and_other_keywords_arrive(self, model, call):
        getattr(model, call)(X, adapter_names=None, alora_offsets=None, mask=None, length=3)
        assert model.get_base_model().seen == [{"mask": None, "length": 3}]


def test_the_base_is_not_uploaded(model):
    message = refusal(model.push_to_hub, "someone/model", private=True, error=CheckpointError)
    assert message.startswith("Nothing was uploaded to 'someone/model'")
    assert model.get_base_model().seen == []


def test_type_of_the_first_active_adapter(model):
    assert model.peft_type == "LORA"
    model.add_adapter("scale", IA3Config(target_modules=["lin"], feedforward_modules=[]))
    assert model.peft_type == "LORA"
    model.set_adapter(["scale", "default"])
    assert model.peft_type == "IA3"


class TestAttributesThatAreMissing:
    def test_closest_names(self, model):
        assert refusal(lambda: model.merge, error=AttributeError) == (
            "Neither PeftModel nor the base Base has 'merge'. Closest: 'merge_adapter', 'merge_and_unload'."
        )
        assert refusal(lambda: model.save_pretraind, error=AttributeError) == (
            "Neither PeftModel nor the base Base has 'save_pretraind'. Closest: 'save_pretrained'."
        )
        assert refusal(lambda: model.qqqq, error=AttributeError) == ("Neither PeftModel nor the base Base has 'qqqq'.")

    def test_are_asked_for_as_always(self, model):
        assert not hasattr(model, "merge")
        assert getattr(model, "merge", 3) == 3
        assert hasattr(model, "merge_and_unload")
        assert not hasattr(PeftModel.__new__(PeftModel), "base_model")

    def test_attribute_that_is_there_and_fails_says_so_itself(self):
        class Late(Base):
            def __getattr__(self, name):
                return self.not_there if name == "late" else super().__getattr__(name)

        model = get_peft_model(Late(), lora())
        assert refusal(lambda: model.late, error=AttributeError) == "'Late' object has no attribute 'not_there'"


class TestFirstArgument:
    CALL = "get_peft_model(model, peft_config) takes the base model first, a torch.nn.Module; it is "

    def test_swapped(self, model, tmp_path):
        message = refusal(get_peft_model, lora(), Base())
        assert message == f"{self.CALL}a LoraConfig. The arguments are swapped."
        model.save_pretrained(tmp_path)
        assert refusal(PeftModel.from_pretrained, tmp_path, Base()).endswith("Path. The arguments are swapped.")

    def test_class(self):
        message = f"{self.CALL}the class Base itself. Make a model of it, and pass that."
        assert refusal(get_peft_model, Base, lora()) == message

    @pytest.mark.parametrize("name", ["some/model", None, {}])
    def test_something_else(self, name, tmp_path):
        rest = f"a {type(name).__name__}. Make or load the base model first, and pass that."
        assert refusal(get_peft_model, name, lora()) == self.CALL + rest
        assert refusal(PeftModel, name, lora()).endswith(f"torch.nn.Module; it is {rest}")
        assert refusal(PeftModel.from_pretrained, name, tmp_path) == (
            f"PeftModel.from_pretrained(model, model_id) takes the base model first, a torch.nn.Module; it is {rest}"
        )

    def test_config_that_is_none(self):
        message = refusal(get_peft_model, Base(), LoraConfig)
        assert message == "peft_config is the class LoraConfig itself: make a config of it, LoraConfig(...)."
        assert issubclass(ConfigError, TunerkitError)


class TestNamesOfThePackage:
    MODULES = ", ".join(f"tunerkit_{name.replace('-', '_')}" for name in plugins.method_ids())

    def test_config(self):
        words = (
            "tunerkit has no 'LoraConfig'. A method's config comes from its package, `from tunerkit_<method> import "
            f"...` (installed: {self.MODULES}). docs/differences.md lists what PEFT has and this version has not."
        )
        assert "tunerkit_lora" in words
        assert refusal(lambda: tunerkit.LoraConfig, error=AttributeError) == words
        with pytest.raises(ImportError) as caught:
            from tunerkit import LoraConfig as Wanted  # noqa: F401
        assert str(caught.value) == words
        assert not hasattr(tunerkit, "LoraConfig")

    def test_config_where_no_method_is_installed(self, monkeypatch):
        monkeypatch.setattr(plugins, "method_ids", list)
        assert refusal(lambda: tunerkit.LoraConfig, error=AttributeError) == (
            "tunerkit has no 'LoraConfig'. A method's config comes from its package, `from tunerkit_<method> import "
            "...` (installed: none). docs/differences.md lists what PEFT has and this version has not."
        )

    def test_a_methods_model_class(self):
        words = "tunerkit has no 'LoraModel'. A method's model class comes from its package, `from tunerkit_<method> im"
        assert refusal(lambda: tunerkit.LoraModel, error=AttributeError).startswith(words)

    def test_others(self):
        message = "tunerkit has no 'get_peft_modle'. Closest: 'get_peft_model'"
        assert refusal(lambda: tunerkit.get_peft_modle, error=AttributeError).startswith(message)
        assert refusal(lambda: tunerkit.qqqq, error=AttributeError) == (
            "tunerkit has no 'qqqq'. docs/differences.md lists what PEFT has and this version has not."
        )

    def test_modules_are_still_found(self):
        code = "from tunerkit import folding, plan, sites; from tunerkit import demo; print(sites.__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "tunerkit.sites\n"), done.stderr

    def test_version(self):
        from importlib.metadata import version

        assert tunerkit.__version__ == version("tunerkit")


class TestGenerate:
    def test_what_happens_around_a_call_would_be_left_out(self, monkeypatch):
        class Doubled(Part):
            def around(self, call, *args, **kwargs):
                return 2 * call(*args, **kwargs)

        class Base(nn.Sequential):
            def generate(self, x):
                return self(x)

        model = get_peft_model(Base(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        x = torch.ones(1, 4)
        y = model.generate(x)
        model.base_model.parts["default"] = Doubled([], model.peft_config["default"])
        assert torch.equal(model(x), 2 * y)
        message = "generate calls the base model itself, and Doubled does something around a call of the whole model"
        with pytest.raises(AdapterStateError, match=message):
            model.generate(x)
