from __future__ import annotations

import re
import types
import warnings

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit import Method, get_peft_model, hookimpl, inject_adapter_in_model, plugins, register
from tunerkit.adapter import Adapter
from tunerkit.errors import (
    ConfigError,
    ConfigWarning,
    NoMatchingPeftModuleError,
    PluginError,
    TargetError,
    TargetWarning,
    UnsupportedSiteError,
)
from tunerkit.testing.bench import Snapshot
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)


@pytest.fixture
def model():
    return Model()


def lora(*targets, **others):
    return LoraConfig(target_modules=list(targets) or None, **others)


class TestPlan:
    def test_says_what_and_why_for_every_module(self, model):
        found = tunerkit.plan(model, lora("q_proj", "layers.1.v_proj", "head", exclude_modules=r"layers\.1\.q.*"))
        said = {item.name: (item.module_type, item.verdict, item.reason) for item in found.decisions}
        assert list(said) == [name for name, _ in model.named_modules() if name]
        assert said["layers"] == ("ModuleList", "not matched", "")
        assert said["layers.0.q_proj"] == ("Linear", "adapted", "'q_proj'")
        assert said["layers.1.v_proj"] == ("Linear", "adapted", "'layers.1.v_proj'")
        assert said["layers.1.q_proj"] == ("Linear", "excluded", repr(r"layers\.1\.q.*"))
        assert said["layers.0.norm"] == ("LayerNorm", "not matched", "")
        assert found.adapted == ["layers.0.q_proj", "layers.1.v_proj", "head"]
        assert found.exclusions == {r"layers\.1\.q.*": 1}

    def test_counts_each_entry(self, model):
        found = tunerkit.plan(model, lora("q_proj", "v_proj", "head", "nothing"))
        assert found.entries == {"head": 1, "nothing": 0, "q_proj": 2, "v_proj": 2}

    def test_counts_every_entry_that_means_a_module(self, model):
        found = tunerkit.plan(model, lora("head", "layers.0.q_proj", "0.q_proj", "q_proj"))
        assert found.entries == {"head": 1, "layers.0.q_proj": 1, "0.q_proj": 1, "q_proj": 2}
        assert found.unmatched() == []

    def test_counts_a_pattern(self, model):
        assert tunerkit.plan(model, LoraConfig(target_modules=".*_proj")).entries == {".*_proj": 4}

    def test_prints_as_a_table(self, model):
        config = lora("q_proj", "v_proj", "heads", exclude_modules=["1.v_proj"])
        assert str(tunerkit.plan(model, config)).splitlines() == [
            "module           type    decision  why         count",
            "layers.*.q_proj  Linear  adapted   'q_proj'    2",
            "layers.*.v_proj  Linear  adapted   'v_proj'    1",
            "layers.*.v_proj  Linear  excluded  '1.v_proj'  1",
            "3 of 10 modules adapted, 6 not matched",
            "'heads' in target_modules matches nothing; closest: 'head'",
        ]

    def test_changes_nothing(self, model):
        before = Snapshot.of(model)
        config = lora("q_proj", "zzz")
        tunerkit.plan(model, config)
        assert before.differences(model) == []
        assert config == lora("q_proj", "zzz")

    def test_holds_the_completed_config(self, model):
        model.config = {"model_type": "llama"}
        config = LoraConfig()
        assert tunerkit.plan(model, config).config.target_modules == {"q_proj", "v_proj"}
        assert config.target_modules is None

    def test_on_models_with_adapters(self, model):
        expected = tunerkit.plan(model, lora("q_proj")).decisions
        inject_adapter_in_model(IA3Config(target_modules=["q_proj"], feedforward_modules=[]), model)
        assert tunerkit.plan(model, lora("q_proj")).decisions == expected
        wrapped = get_peft_model(Model(), lora("q_proj"))
        assert tunerkit.plan(wrapped, lora("q_proj")).decisions == expected
        assert tunerkit.plan(wrapped.base_model, lora("q_proj")).decisions == expected


class TestLayers:
    def test_says_which_modules_are_left_out(self, model):
        model.tail = nn.Sequential(nn.Linear(4, 4))
        config = lora("q_proj", "v_proj", "tail.0", "0", layers_to_transform=1, layers_pattern=["h", "layers"])
        found = tunerkit.plan(model, config)
        assert found.adapted == ["layers.1.q_proj", "layers.1.v_proj", "tail.0"]
        assert {item.name: item.reason for item in found.decisions if item.verdict == "excluded"} == dict.fromkeys(
            ["layers.0", "layers.0.q_proj", "layers.0.v_proj"], "layers_to_transform"
        )
        assert found.entries == {"0": 2, "tail.0": 1, "q_proj": 2, "v_proj": 2}
        assert found.layers == {1: 2, "h": 0, "layers": 4}
        assert found.unmatched() == ["'h' in layers_pattern matches no layer with targeted modules"]

    def test_a_number_that_no_layer_has_is_warned_about(self, model):
        with pytest.warns(TargetWarning) as caught:
            get_peft_model(model, lora("q_proj", layers_to_transform=[0, 7], exclude_modules=["layers.1.q_proj"]))
        assert [str(item.message) for item in caught] == [
            "7 in layers_to_transform matches no layer with targeted modules. The other entries were matched."
        ]
        assert not hasattr(model.layers[1].q_proj, "available_adapters")
        assert model.layers[0].q_proj.available_adapters == ["default"]

    def test_no_layer_at_all(self, model):
        before = Snapshot.of(model)
        with pytest.raises(NoMatchingPeftModuleError) as caught:
            get_peft_model(model, lora("q_proj", "v_proj", layers_to_transform=[2, 3]))
        assert str(caught.value) == (
            "target_modules=['q_proj', 'v_proj'] matches modules such as 'layers.0.q_proj', and none that is in a "
            "layer which layers_to_transform=[2, 3] means. A layer's number stands in the path after a name, which "
            "layers_pattern can give."
        )
        with pytest.raises(NoMatchingPeftModuleError, match=r"which layers_to_transform=0, layers_pattern='h' means"):
            get_peft_model(model, lora("q_proj", layers_to_transform=0, layers_pattern="h"))
        assert before.differences(model) == []

    def test_a_broken_pattern(self, model):
        with pytest.raises(TargetError) as caught:
            tunerkit.plan(model, lora("q_proj", layers_to_transform=0, layers_pattern=["layers", "("]))
        assert str(caught.value).startswith(
            "layers_pattern=['layers', '('] holds a broken regular expression for the name before a layer's number: "
        )
        assert str(caught.value).endswith("Mend it; mostly it is just that name, such as 'layers'.")

    def test_a_state_dict_says_it_all(self, model):
        config = lora("q_proj", layers_to_transform=0)
        inject_adapter_in_model(config, model, state_dict={"layers.1.v_proj.lora_A.weight": torch.zeros(8, 4)})
        assert model.layers[1].v_proj.available_adapters == ["default"]


class TestUnmatched:
    def test_one_entry_of_several_is_warned_about(self, model):
        with pytest.warns(TargetWarning) as caught:
            get_peft_model(model, lora("q_proj", "v_prj", "zzz"))
        messages = sorted(str(item.message) for item in caught)
        assert messages[0].startswith("'v_prj' in target_modules matches nothing; closest: 'v_proj'")
        assert messages[1] == "'zzz' in target_modules matches nothing. The other entries were matched."
        assert model.layers[0].q_proj.available_adapters == ["default"]

    def test_exclusion_is_warned_about(self, model):
        with pytest.warns(TargetWarning, match="'q_pro' in exclude_modules matches nothing; closest: 'q_proj'"):
            get_peft_model(model, lora("q_proj", exclude_modules=["q_pro"]))

    def test_warning_made_an_error_leaves_the_model(self, model):
        before = Snapshot.of(model)
        warnings.simplefilter("error")
        with pytest.raises(TargetWarning):
            get_peft_model(model, lora("q_proj", "zzz"))
        assert before.differences(model) == []

    def test_entry_with_several_parts_is_compared_with_as_many(self, model):
        (sentence,) = tunerkit.plan(model, lora("0.q_prj", "head")).unmatched()
        assert sentence.startswith("'0.q_prj' in target_modules matches nothing; closest: '0.q_proj', '")


def refusal(model, config):
    before = Snapshot.of(model)
    with pytest.raises(TargetError) as caught:
        get_peft_model(model, config)
    assert isinstance(caught.value, ValueError)
    assert before.differences(model) == []
    return caught.value


class TestNothingMatched:
    def test_names_the_closest(self, model):
        error = refusal(model, lora("q_prj", "v"))
        assert isinstance(error, NoMatchingPeftModuleError)
        message = str(error)
        assert message.startswith("target_modules=['q_prj', 'v'] matches nothing in the model. Closest names: 'q_proj'")
        assert "An entry is a whole path or its end after a dot" in message

    def test_names_what_is_there_if_nothing_is_close(self, model):
        message = str(refusal(model, LoraConfig(target_modules="zzz")))
        assert message.startswith(
            "target_modules='zzz' matches nothing in the model. The names of its linear layers end in 'q_proj', "
            "'v_proj', 'head'. An entry is a whole path or its end after a dot;"
        )
        message = str(refusal(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), LoraConfig(target_modules=["zzz"])))
        assert message.startswith("target_modules=['zzz'] matches nothing in the model. The model has '0', '1'. An")

    def test_name_that_is_not_in_a_list(self, model):
        assert str(refusal(model, LoraConfig(target_modules="q_proj"))) == (
            "target_modules='q_proj' matches nothing in the model. 'q_proj' is text, so it is a pattern for whole "
            "paths. For modules of that name pass a list: target_modules=['q_proj']."
        )

    @pytest.mark.parametrize("spelling", ["all_linear", "All Linear", "alllinear"])
    def test_all_linear_misspelt(self, model, spelling):
        assert str(refusal(model, LoraConfig(target_modules=spelling))) == (
            f"target_modules={spelling!r} matches nothing in the model. Did you mean 'all-linear'?"
        )

    def test_all_linear_in_a_list(self, model):
        assert str(refusal(model, lora("all-linear"))) == (
            "target_modules=['all-linear'] matches nothing in the model. For all linear layers pass the text, "
            "'all-linear'."
        )

    def test_all_excluded(self, model):
        message = str(refusal(model, lora("q_proj", exclude_modules=["q_proj"])))
        assert message == (
            "target_modules=['q_proj'] matches 2 modules, and all of them are excluded by exclude_modules=['q_proj']. "
            "Exclude fewer, or target others."
        )

    def test_empty_targets(self, model):
        assert str(refusal(model, lora().__class__(target_modules=[]))) == (
            "The config targets nothing: set target_modules to names of modules, a pattern, or 'all-linear'."
        )

    @pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
    def test_broken_pattern(self, model, setting):
        config = LoraConfig(**{"target_modules": ["head"], setting: "q_(proj"})
        message = str(refusal(model, config))
        assert message.startswith(
            f"{setting}='q_(proj' is text, so it is a regular expression for whole paths, and a broken"
        )
        assert "missing ), unterminated subpattern" in message
        assert message.endswith("for the name of a module pass a list, ['q_(proj'].")


class TestPatterns:
    def test_counts_the_adapted_modules_that_each_fits(self, model):
        patterns = {"q_proj": 4, r"^layers\.0": 2, "layers.0.v_proj": 3, "head": 5}
        found = tunerkit.plan(model, lora("q_proj", "v_proj", rank_pattern=patterns, alpha_pattern={".*0.*": 1}))
        assert found.patterns == {
            "rank_pattern": {"q_proj": 2, r"^layers\.0": 0, "layers.0.v_proj": 1, "head": 0},
            "alpha_pattern": {".*0.*": 2},
        }
        assert found.unmatched() == [
            (
                r"'^layers\\.0' in rank_pattern fits no adapted module; closest: 'layers.0.v_proj', 'layers.0.q_proj', "
                "'layers.1.v_proj'"
            ),
            "'head' in rank_pattern fits no adapted module",
        ]
        assert str(found).endswith("'head' in rank_pattern fits no adapted module")

    def test_one_that_fits_nothing_is_warned_about(self, model):
        with pytest.warns(TargetWarning) as caught:
            get_peft_model(model, lora("q_proj", "v_proj", rank_pattern={"q_prj": 4, "v_proj": 2}))
        assert [str(item.message) for item in caught] == [
            (
                "'q_prj' in rank_pattern fits no adapted module; closest: 'q_proj', 'v_proj', 'layers.1.q_proj'. The "
                "other entries were matched."
            )
        ]
        ranks = {name: layer.r["default"] for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
        assert set(ranks.values()) == {8, 2}

    def test_a_method_without_such_settings(self, model):
        assert tunerkit.plan(model, IA3Config(target_modules=["q_proj"])).patterns == {}

    @pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            ("v_(", "missing ), unterminated subpattern at position 2"),
            ("(?i)v", "global flags not at the start of the expression at position 8"),
        ],
    )
    def test_a_broken_one_is_refused(self, model, setting, entry, reason):
        error = refusal(model, lora("q_proj", **{setting: {"q_proj": 4, entry: 2}}))
        assert type(error) is TargetError
        assert str(error) == (
            f"{setting} holds {entry!r}, which must be a regular expression for a module's path or the end of it, and "
            f"is a broken one: {reason}. Mend it; for text that is meant as it is use re.escape."
        )


class Stored(nn.Module):
    """As transformers calls the layer that stores its weight in x out."""

    __module__ = "transformers.pytorch_utils"
    __qualname__ = "Conv1D"

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2))


class TestOrientation:
    @pytest.mark.parametrize("config", [lora, lambda *targets, **others: IA3Config(target_modules=targets, **others)])
    @pytest.mark.parametrize(
        ("says", "targets", "corrected"),
        [
            (
                False,
                ["stored"],
                "fan_in_fan_out=False does not hold for the targeted Stored, which stores its weight in x out",
            ),
            (
                True,
                ["plain"],
                "fan_in_fan_out=True does not hold for the targeted Linear, which stores its weight out x in",
            ),
            (True, ["stored"], None),
            (False, ["plain"], None),
            (True, ["plain", "stored"], None),
            (True, ["table"], None),
        ],
    )
    def test_is_corrected_in_the_completed_config(self, config, says, targets, corrected):
        model = nn.ModuleDict({"plain": nn.Linear(4, 2), "stored": Stored(), "table": nn.Embedding(4, 2)})
        given = config(*targets, fan_in_fan_out=says)
        found = tunerkit.plan(model, given)
        assert given.fan_in_fan_out is says
        assert found.config.fan_in_fan_out is (says if corrected is None else not says)
        assert found.corrections == (() if corrected is None else (corrected,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = get_peft_model(model, given)
        assert adapted.peft_config["default"].fan_in_fan_out is found.config.fan_in_fan_out
        expected = (
            [] if corrected is None else [(ConfigWarning, f"{corrected}; it was corrected in the completed config.")]
        )
        assert [(item.category, str(item.message)) for item in caught] == expected

    def test_the_correction_may_be_an_error_and_then_nothing_is_changed(self):
        model = nn.Sequential(nn.Linear(4, 2))
        before = Snapshot.of(model)
        with pytest.raises(ConfigWarning):
            get_peft_model(model, lora("0", fan_in_fan_out=True))
        assert before.differences(model) == []


class TestUnsupported:
    def test_children_that_can_be_adapted_are_named(self, model):
        error = refusal(model, lora("layers.0", "head"))
        assert isinstance(error, UnsupportedSiteError)
        assert isinstance(error, TypeError)
        assert str(error) == (
            "The module 'layers.0' is a Block, and 'lora' adapts linear layers, embeddings, attention layers "
            "and convolutions (1d, 2d, 3d) only. It contains 'layers.0.q_proj', 'layers.0.v_proj': target those."
        )

    def test_without_such_children(self, model):
        assert str(refusal(model, lora("q_proj", "norm"))).endswith("Remove it from target_modules, or exclude it.")

    def test_default_target(self):
        class Conv1D(nn.Module):
            pass

        model = nn.ModuleDict({"c_attn": Conv1D(), "head": nn.Linear(4, 2)})
        model.config = {"model_type": "gpt2"}
        assert str(refusal(model, LoraConfig())) == (
            "The module 'c_attn' is a Conv1D, and 'lora' adapts linear layers, embeddings, attention layers "
            "and convolutions (1d, 2d, 3d) only. It is one of the default targets of 'lora' for models of this type, "
            "which this version cannot "
            "adapt yet. Set target_modules to other modules, if the model has any that can be adapted."
        )

    def test_kind_that_is_never_called(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
        message = str(refusal(model, lora("out_proj")))
        assert "The module 'attention.out_proj' (NonDynamicallyQuantizableLinear) cannot be adapted: torch's" in message


class TestStateDict:
    def test_goes_where_the_keys_say(self, model):
        keys = ["base_model.model.layers.1.v_proj.lora_A.weight", "base_model.model.layers.1.v_proj.lora_B.weight"]
        state = dict.fromkeys(keys, torch.zeros(1))
        tuner = tunerkit.BaseTuner(model, lora("q_proj", "zzz", exclude_modules=["yyy"]), state_dict=state)
        assert tuner.targeted_module_names == ["layers.1.v_proj"]
        assert model.layers[0].q_proj.__class__ is nn.Linear

    def test_keys_of_another_model(self, model):
        with pytest.raises(
            NoMatchingPeftModuleError, match="No key of the state dict belongs to a module of the model, which"
        ):
            tunerkit.BaseTuner(model, lora("q_proj"), state_dict={"elsewhere.lora_A.weight": torch.zeros(1)})
        assert model.layers[0].q_proj.__class__ is nn.Linear


class Odd(Adapter):
    entries = ("odd",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.odd = nn.Parameter(site.zeros(1))

    def merged(self, below):
        return below.weight + self.odd, below.bias


@pytest.fixture
def offer():
    """Registers a method with hooks of its own."""

    def offer(adapter=Odd, config=None, **hooks):
        from dataclasses import make_dataclass

        fields = [("peft_type", str, "PLAN_ODD"), ("target_modules", list[str] | None, None)]
        fields += [("target_parameters", list[str] | None, None)]
        kind = make_dataclass("OddConfig", fields, bases=(tunerkit.PeftConfig,))
        method = Method(config=kind, adapter=adapter)
        register("plan-odd", types.SimpleNamespace(method=method, **{n: hookimpl(f) for n, f in hooks.items()}))
        return kind

    yield offer
    plugins.unregister("plan-odd")


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("r", 0, "LoraConfig.r must be above 0; it is 0."),
            ("use_qalora", True, "LoraConfig.use_qalora=True is not supported by this version"),
            ("init_lora_weights", "corda", "LoraConfig.init_lora_weights='corda' is not supported: CorDA"),
        ],
    )
    def test_set_after_the_config_was_made(self, model, name, value, words):
        config = lora("q_proj")
        setattr(config, name, value)
        before = Snapshot.of(model)
        for call in (tunerkit.plan, get_peft_model):
            with pytest.raises(ConfigError) as caught:
                call(model, config)
            assert str(caught.value).startswith(words)
        assert before.differences(model) == []

    def test_list_that_was_set_is_taken_as_a_set(self, model):
        config = lora("head")
        config.target_modules = ["q_proj"]
        assert tunerkit.plan(model, config).adapted == ["layers.0.q_proj", "layers.1.q_proj"]
        assert config.target_modules == ["q_proj"]

    def test_checks_of_a_methods_own(self, model):
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        config.feedforward_modules = ["head"]
        with pytest.raises(ConfigError, match=r"IA3Config.feedforward_modules holds 'head', which can mean none"):
            tunerkit.plan(model, config)


class TestHooks:
    def test_prepare_that_completes_the_config(self, model, offer):
        def complete(peft_config, model_config):
            peft_config.target_modules = {"custom": ["head"]}[model_config["model_type"]]
            return peft_config

        config = offer(_prepare_adapter_config=complete)()
        found = tunerkit.plan(model, config)
        assert found.adapted == ["head"]
        assert found.config.target_modules == ["head"]
        assert config.target_modules is None

    def test_prepare_that_returns_something_else(self, model, offer):
        config = offer(_prepare_adapter_config=lambda peft_config, model_config: ["x"])(target_modules=["head"])
        with pytest.raises(
            PluginError, match=r"_prepare_adapter_config of 'PLAN_ODD' returned \['x'\] for its OddConfig"
        ):
            tunerkit.plan(model, config)

    def test_check_that_only_says_yes(self, model, offer):
        config = offer(_check_target_module_exists=lambda peft_config, key: key.endswith("q_proj"))(
            target_modules=["x"]
        )
        found = tunerkit.plan(model, config)
        assert found.adapted == ["layers.0.q_proj", "layers.1.q_proj"]
        assert found.entries == {}
        assert {item.reason for item in found.decisions if item.verdict == "adapted"} == {"matched"}

    def test_check_that_finds_an_entry_of_its_own(self, model, offer):
        config = offer(_check_target_module_exists=lambda peft_config, key: re.search("v_", key))(
            target_modules=["head"]
        )
        found = tunerkit.plan(model, config)
        assert found.adapted == ["layers.0.v_proj", "layers.1.v_proj"]
        assert found.entries == {"head": 0, "v_": 2}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        return sum(x @ up @ down for up, down in zip(self.up, self.down, strict=True))


class OddOnParameters(Odd):
    kinds = frozenset({"linear", "parameter"})


class TestParameters:
    @pytest.fixture
    def experts(self):
        return nn.ModuleDict({"mlp": Experts(), "lin": nn.Linear(4, 4)})

    def test_are_found_by_name(self, experts, offer):
        kind = offer(OddOnParameters)
        found = tunerkit.plan(experts, kind(target_parameters=["mlp.up", "down", "left"]))
        assert found.adapted == ["mlp.up", "mlp.down"]
        assert found.entries == {"down": 1, "left": 0, "mlp.up": 1}
        assert "'left' in target_parameters matches nothing" in found.unmatched()
        assert [(target.name, target.parameter_name) for target in found.targets] == [("mlp", "up"), ("mlp", "down")]

    def test_second_adapter_finds_the_layer_of_its_parameter(self, experts, offer):
        kind = offer(OddOnParameters)
        model = get_peft_model(experts, kind(target_parameters=["up", "down"]))
        model.add_adapter("b", kind(target_parameters=["up"]))
        outer = experts["mlp"]
        assert (outer.parameter_name, outer.available_adapters) == ("down", ["default"])
        assert (outer.base_layer.parameter_name, outer.base_layer.available_adapters) == ("up", ["b", "default"])
        model.unload()
        assert type(experts["mlp"]) is Experts

    def test_layers_below_are_still_found(self, experts, offer):
        experts["mlp"].inner = nn.Linear(4, 4)
        kind = offer(OddOnParameters)
        model = get_peft_model(experts, kind(target_parameters=["up"]))
        assert "mlp.inner" in [item.name for item in tunerkit.plan(model, lora("inner")).decisions]
        model.add_adapter("b", lora("mlp.inner"))
        assert experts["mlp"].get_base_layer().inner.available_adapters == ["b"]
        model.unload()
        assert type(experts["mlp"].inner) is nn.Linear

    def test_layer_and_one_of_its_parameters(self, experts, offer):
        kind = offer(OddOnParameters)
        model = get_peft_model(experts, kind(target_parameters=["lin.weight"]))
        before = Snapshot.of(model)
        with pytest.raises(
            UnsupportedSiteError, match=r"'lin' \(Linear\) cannot be adapted: its parameter 'weight' is adapted"
        ):
            model.add_adapter("b", lora("lin"))
        assert before.differences(model) == []

    def test_nothing_matched(self, experts, offer):
        with pytest.raises(
            NoMatchingPeftModuleError, match=r"target_parameters=\['upp'\] matches nothing in the model"
        ):
            get_peft_model(experts, offer(OddOnParameters)(target_parameters=["upp"]))

    def test_not_from_a_state_dict(self, experts, offer):
        config = offer(OddOnParameters)(target_parameters=["up"])
        with pytest.raises(
            TargetError, match="target_parameters cannot be found from the keys of a state dict; attach"
        ):
            tunerkit.BaseTuner(experts, config, state_dict={})
