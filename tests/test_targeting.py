from __future__ import annotations

import re
import types
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tunerkit import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model, plan
from tunerkit.config import PeftConfig
from tunerkit.errors import NoMatchingPeftModuleError
from tunerkit.layer import tuner_layers
from tunerkit.targeting import (
    LayerChoice,
    adapted_places,
    all_linear,
    endings,
    exact_targets,
    keys_in_state,
    match_name,
    match_pattern,
    match_target,
    pattern_value,
    places,
    wants_all_linear,
)
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig
from tunerkit_lora.targets import DEFAULT_TARGETS


@dataclass
class Config(PeftConfig):
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


parts = st.sampled_from(["q", "qq", "q_proj", "lin", "0", "1", "layers", "lora_A", "base_model", ""])
paths = st.lists(parts, min_size=1, max_size=5).map(".".join)
entries = st.lists(paths, max_size=4)
patterns = st.lists(
    st.sampled_from(["q", "lin", r"\.", ".*", "[01]", "(q|lin)", "layers", "q?", r"\d+"]), min_size=1, max_size=4
).map("".join)
targets = st.none() | entries | patterns


def naive(wanted, path: str) -> bool:
    """PEFT's rule, word by word: text fits the whole path; of a list, an entry is the path or its end after a dot."""
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return path in wanted or any(path.endswith(f".{entry}") for entry in wanted)


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="comparing with PEFT needs it")


class TestMatching:
    @given(targets, targets, paths)
    def test_is_the_naive_rule(self, wanted, excluded, path):
        config = Config(target_modules=wanted, exclude_modules=excluded)
        found = match_target(config, path)
        assert (found is not None) == (naive(wanted, path) and not naive(excluded, path))
        if isinstance(found, str):
            assert found in wanted
            assert naive([found], path)
        elif found is not None:
            assert found.re.pattern == wanted

    @given(entries | patterns, targets, paths)
    def test_is_what_peft_does(self, peft, wanted, excluded, path):
        theirs = peft.LoraConfig(target_modules=wanted, exclude_modules=excluded)
        found = peft.tuners.tuners_utils.check_target_module_exists(theirs, path)
        # What is excluded is an object of its own there, which is true.
        matched = bool(found) and type(found).__name__ != "_ExcludedModule"
        ours = match_target(Config(target_modules=wanted, exclude_modules=excluded), path)
        assert (ours is not None) == matched

    def test_longest_entry_is_found(self):
        assert match_name({"lin", "a.lin", "x"}, "b.a.lin") == "a.lin"
        assert match_name({"in"}, "lin") is None
        assert match_name([], "lin") is None
        assert match_name(None, "lin") is None

    def test_a_config_without_targets_matches_nothing(self):
        assert match_target(PeftConfig(), "lin") is None

    def test_endings(self):
        assert list(endings("a.b.c")) == ["a.b.c", "b.c", "c"]
        assert list(endings("a")) == ["a"]


names = st.sampled_from(["0", "1", "12", "layers", "h", "experts", "q", "x.y", "layers2"])
layer_paths = st.lists(names, min_size=1, max_size=6).map(".".join)
numbers = st.none() | st.integers(-1, 2) | st.lists(st.sampled_from([0, 1, 2, 12]), max_size=3)
layer_patterns = st.none() | st.sampled_from(["", "layers", "h", "lay.*", "(layers|h)", "0"])
layer_patterns |= st.lists(st.sampled_from(["layers", "h", "x", "experts", r"\w+"]), max_size=3)


class TestLayers:
    @given(st.lists(names | layer_paths, min_size=1, max_size=4), numbers, layer_patterns, layer_paths)
    def test_is_what_peft_does(self, peft, wanted, numbers, patterns, path):
        if numbers is None:
            patterns = None
        settings = {"target_modules": wanted, "layers_to_transform": numbers, "layers_pattern": patterns}
        # Without a pattern PEFT passes over the first name of a path, and takes an expert's number for the layer's.
        theirs = path if patterns or path in wanted else f"model.{path}"
        matched = bool(peft.tuners.tuners_utils.check_target_module_exists(peft.LoraConfig(**settings), theirs))
        assert (match_target(Config(**settings), path) is not None) == matched

    @pytest.mark.parametrize(
        ("path", "number"),
        [
            ("layers.1.experts.3.up", 1),
            ("model.layers.1.experts.3.up", 1),
            ("h.2.attn.c_attn", 2),
            ("model.layers.12.self_attn.q", 12),
            ("layers.3", None),  # the layer itself is not in it
            ("0.q", None),
            ("lm_head", None),
        ],
    )
    def test_the_first_number_after_a_name_is_the_layers(self, path, number):
        assert LayerChoice((), ()).find(path) == (None if number is None else (number, "[^.]*"))

    def test_the_first_pattern_that_fits_decides(self):
        choice = LayerChoice((3,), ("experts", "layers"))
        assert choice.find("layers.1.experts.3.up") == (3, "experts")
        assert choice.find("layers.1.up") == (1, "layers")
        assert choice.has("layers.1.experts.3.up")
        assert not choice.has("layers.1.up")
        assert not choice.has("up")

    def test_a_whole_path_needs_no_number(self):
        config = Config(target_modules=["layers.1.q", "k"], layers_to_transform=0)
        assert match_target(config, "layers.1.q") == "layers.1.q"
        assert match_target(config, "layers.0.k") == "k"
        assert match_target(config, "layers.1.k") is None
        assert match_target(config, "a.layers.1.q") is None

    @pytest.mark.parametrize(
        "off", [{}, {"layers_to_transform": []}, {"layers_to_transform": [], "layers_pattern": "h"}]
    )
    def test_all_layers(self, off):
        assert LayerChoice.of(Config(target_modules=["q"], **off)) is None
        assert match_target(Config(target_modules=["q"], **off), "layers.1.q") == "q"

    def test_a_default_pattern_means_what_it_says(self):
        config = Config(layers_to_transform=0)
        config.target_modules = r".*\.q"  # as a method's defaults may set it
        assert match_target(config, "layers.1.q") is not None


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "path", "fits"),
        [
            ("q", "layers.0.q", True),
            ("q", "layers.0.seq", False),
            ("q", "q", True),
            ("q", "q.base", False),
            (r"layers\.\d+", "model.layers.12", True),
            ("^layers.0", "layers.0", True),
            ("^layers.0", "model.layers.0", False),
            ("q|v", "layers.0.v", True),
            ("0.q", "layers.10.q", False),
        ],
    )
    def test_fit_a_path_or_its_end(self, pattern, path, fits):
        assert match_pattern(pattern, path) is fits
        assert pattern_value({pattern: 1}, path, 2) == (1 if fits else 2)

    def test_the_first_that_fits_counts(self):
        assert pattern_value({"v": 1, ".*": 2, "q": 3}, "layers.q", 4) == 2
        assert pattern_value({}, "q", 4) == 4
        assert pattern_value(None, "q", 4) == 4


class Head(nn.Module):
    """Shaped like a transformers model: it says which layer gives its outputs."""

    def __init__(self, output: str | None = "lm_head") -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 9)
        self.score = nn.Linear(4, 2)
        self.output = output

    def get_output_embeddings(self):
        return None if self.output is None else self._modules[self.output]


class TestAllLinear:
    @pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR", "All-Linear"])
    def test_any_case(self, spelling):
        assert wants_all_linear(Config(target_modules=spelling))
        found = plan(Head(), LoraConfig(target_modules=spelling))
        assert found.adapted == ["body.0", "body.1", "score"]
        assert found.config.target_modules == {"body.0", "body.1", "score"}

    @pytest.mark.parametrize("other", [None, ["all-linear"], ".*", "all_linear"])
    def test_nothing_else(self, other):
        assert not wants_all_linear(Config(target_modules=other))

    def test_output_layer_is_left_out(self):
        assert all_linear(Head(), Config()) == {"body.0", "body.1", "score"}
        assert all_linear(Head(output=None), Config()) == {"body.0", "body.1", "lm_head", "score"}
        assert all_linear(nn.Sequential(nn.Linear(2, 2)), Config()) == {"0"}

    def test_heads_of_classifiers_are_left_out(self):
        config = Config(task_type="SEQ_CLS")
        assert all_linear(Head(output=None), config) == {"body.0", "body.1", "lm_head"}
        # As in PEFT, only where the model names no output layer.
        assert all_linear(Head(), config) == {"body.0", "body.1", "score"}

    def test_sequence_classifier_of_transformers(self):
        transformers = pytest.importorskip("transformers", reason="needs a real classifier")
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=9, **shape))
        names = all_linear(model, Config(task_type="SEQ_CLS"))
        assert "classifier" not in names
        assert {name.rpartition(".")[2] for name in names} == {"query", "key", "value", "dense"}
        assert "classifier" in all_linear(model, Config())

    def test_attention_that_never_calls_its_layer_is_left_out(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "lin": nn.Linear(4, 4)})
        assert all_linear(model, Config()) == {"lin"}

    def test_on_a_model_with_adapters(self):
        model = get_peft_model(Head(), LoraConfig(target_modules=["body.0", "lm_head"]))
        assert all_linear(model.get_base_model(), Config()) == {"body.0", "body.1", "score"}

    def test_nothing_linear(self):
        with pytest.raises(NoMatchingPeftModuleError) as caught:
            plan(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), LoraConfig(target_modules="all-linear"))
        message = str(caught.value)
        assert message.startswith(
            "target_modules='all-linear' finds no linear layer that can be adapted (the output layer"
        )
        assert "the model (Sequential) holds modules of the types 'ReLU', 'LayerNorm'. Name " in message


class TestDefaults:
    def test_by_the_models_type(self):
        model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2)})
        model.config = {"model_type": "llama"}
        config = LoraConfig()
        assert plan(model, config).adapted == ["q_proj", "v_proj"]
        assert config.target_modules is None
        assert plan(model, IA3Config(feedforward_modules=[])).adapted == ["v_proj", "k_proj"]

    def test_pattern_by_the_models_type(self):
        assert isinstance(DEFAULT_TARGETS["gemma4"], str)
        tower = {"x": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})}
        model = nn.ModuleDict(
            {"m": nn.ModuleDict({"language_model": nn.ModuleDict(tower), "vision": nn.ModuleDict(tower)})}
        )
        model.config = types.SimpleNamespace(to_dict=lambda: {"model_type": "gemma4"})
        assert plan(model, LoraConfig()).adapted == ["m.language_model.x.q_proj"]

    def test_type_without_default(self):
        with pytest.raises(
            ValueError, match="target_modules is not set, and 'lora' has no default for models of the type"
        ):
            plan(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


class Tied(nn.Module):
    """One layer at three places, and two of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.blocks = nn.ModuleList([self.first, nn.Linear(3, 3)])

    def forward(self, x):
        return self.blocks[1](self.again(self.first(x)) + self.blocks[0](x))


class TestSharedModules:
    def test_places(self):
        model = Tied()
        found = [(key, name) for key, _, _, name in places(model)]
        assert found == [
            ("first", "first"),
            ("again", "again"),
            ("blocks", "blocks"),
            ("blocks.0", "0"),
            ("blocks.1", "1"),
        ]

    def test_one_adapter_at_all_its_places(self):
        model = Tied()
        linear = model.first
        peft = get_peft_model(model, LoraConfig(target_modules=["first", "again", "0"]))
        assert model.first is model.again is model.blocks[0]
        assert model.first.base_layer is linear
        assert len(list(tuner_layers(model))) == 1
        assert peft.unload() is model
        assert model.first is model.again is model.blocks[0] is linear

    def test_only_at_the_places_that_are_meant(self):
        model = Tied()
        linear = model.first
        peft = get_peft_model(model, LoraConfig(target_modules=["again"]))
        assert model.again.base_layer is linear
        assert model.first is linear
        assert model.blocks[0] is linear
        peft.delete_adapter("default")
        assert model.again is linear

    def test_second_adapter_joins_the_first(self):
        model = Tied()
        peft = get_peft_model(model, LoraConfig(target_modules=["first", "again", "0"]))
        peft.add_adapter("b", IA3Config(target_modules=["again", "blocks.0"], feedforward_modules=[]))
        assert model.first is model.again is model.blocks[0]
        assert model.first.available_adapters == ["b", "default"]

    def test_module_that_is_not_there(self):
        model = nn.Sequential(nn.Linear(2, 2))
        model.register_module("gone", None)
        assert [key for key, *_ in places(model)] == ["0"]


class Hostile(nn.Module):
    """Modules called as adapters' entries and PEFT's wrappers are."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Linear(4, 4)
        self.lora_B = nn.ModuleDict({"lora_A": nn.Linear(4, 4), "default": nn.Linear(4, 4), "weight": nn.Linear(4, 4)})
        self.base_model = nn.ModuleDict({"model": nn.ModuleDict({"x": nn.Linear(4, 4)})})
        self.left = nn.Linear(4, 4)

    def forward(self, x):
        for module in (self.lora_A, *self.lora_B.values(), self.base_model["model"]["x"], self.left):
            x = torch.tanh(module(x))
        return x


HOSTILE = ["lora_A", "lora_B.lora_A", "lora_B.default", "lora_B.weight", "base_model.model.x"]


class TestKeysInState:
    @pytest.mark.parametrize("chosen", [HOSTILE, *([name] for name in HOSTILE), ["left"]])
    def test_sites_from_keys_alone(self, chosen):
        chosen = [name for name in HOSTILE if naive(chosen, name)] or chosen
        pattern = "|".join(re.escape(name) for name in chosen)
        model = get_peft_model(Hostile(), LoraConfig(target_modules=pattern, r=2))
        state = get_peft_model_state_dict(model)
        assert keys_in_state(Hostile(), list(state), ("lora_A", "lora_B"), "") == set(chosen)
        # The names of the entries unknown: their prefix does, where no module is called like that.
        assert keys_in_state(Hostile(), list(state), (), "lora_") == set(chosen)

    @pytest.mark.parametrize("name", HOSTILE)
    def test_injected_models_have_keys_without_a_wrapper(self, name):
        model = inject_adapter_in_model(LoraConfig(target_modules=re.escape(name), r=2), Hostile())
        state = get_peft_model_state_dict(model)
        assert keys_in_state(Hostile(), list(state), ("lora_A", "lora_B"), "") == {name}

    def test_keys_of_nothing(self):
        keys = ["base_model.model.left.weight", "lora_A", "left.lora_C.weight", "nowhere.lora_A.weight", ""]
        assert keys_in_state(Hostile(), keys, ("lora_A", "lora_B"), "") == set()

    def test_compiled_parts_have_the_same_keys(self):
        model = nn.ModuleDict(
            {"_orig_mod": nn.ModuleDict({"x": nn.Linear(2, 2)}), "y": nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})}
        )
        keys = ["base_model.model.x.lora_A.weight", "y._orig_mod.lora_B.weight"]
        assert keys_in_state(model, keys, ("lora_A", "lora_B"), "") == {"_orig_mod.x", "y._orig_mod"}

    def test_beside_an_adapter(self):
        model = get_peft_model(Hostile(), IA3Config(target_modules=["left"], feedforward_modules=[]))
        keys = ["base_model.model.left.lora_A.weight"]
        assert keys_in_state(model.get_base_model(), keys, ("lora_A",), "") == {"left"}

    def test_a_module_that_is_called_as_a_compiled_one_holds_it(self):
        model = nn.ModuleDict({"my_orig_mod": nn.ModuleDict({"x": nn.Linear(2, 2)}), "my_x": nn.Linear(2, 2)})
        for path in ("my_orig_mod.x", "my_x"):
            assert keys_in_state(model, [f"base_model.model.{path}.lora_A.weight"], ("lora_A",), "") == {path}

    @pytest.mark.parametrize(
        ("key", "path"),
        [
            ("experts.base_layer.lora_A", "experts"),
            ("experts.base_layer.base_layer.gate.lora_A", "experts.gate"),
            ("block.base_layer.lora_A", "block.base_layer"),
            ("block.base_layer.base_layer.lora_A", "block.base_layer"),
            ("block.base_layer.base_layer.inner.lora_A", "block.base_layer.inner"),
            ("block.base_layer.inner.lora_A", "block.base_layer.inner"),
            ("base_layer.lora_A", "base_layer"),
        ],
    )
    def test_layers_that_stand_on_others(self, key, path):
        model = nn.ModuleDict(
            {
                "experts": nn.ModuleDict({"gate": nn.Linear(2, 2)}),
                "block": nn.ModuleDict({"base_layer": nn.ModuleDict({"inner": nn.Linear(2, 2)})}),
                "base_layer": nn.Linear(2, 2),
            }
        )
        assert keys_in_state(model, [f"base_model.model.{key}.weight"], ("lora_A",), "") == {path}


class Parent(nn.Module):
    """Holds a parameter, and a child of a name that layers with adapters use."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 2))
        self.down = nn.Parameter(torch.randn(2, 2))
        self.base_layer = nn.Linear(2, 2)


class TestAdaptedPlaces:
    def test_paths_are_those_without_adapters(self):
        base = nn.ModuleDict({"one": Parent(), "two": Parent()})
        base["three"] = base["one"]
        config = LoraConfig(r=2, target_modules=["one.base_layer"], target_parameters=["one.up", "one.down", "two.up"])
        model = get_peft_model(base, config).get_base_model()
        found = [(path, layer.parameter_name) for path, layer in adapted_places(model)]
        assert found == [("one", "down"), ("one", "up"), ("one.base_layer", None), ("two", "up")]
        assert [layer for _, layer in adapted_places(model)] == [layer for _, layer in tuner_layers(model)]


class TestExactTargets:
    def test_names_where_they_mean_nothing_else(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"c": nn.Linear(2, 2)})})
        assert exact_targets(model, ["a", "b.c"]) == {"a", "b.c"}
        assert exact_targets(model, []) == set()

    def test_a_pattern_where_another_path_ends_in_a_name(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2), "+": nn.Linear(2, 2)})})
        assert exact_targets(model, ["a", "b.a"]) == {"a", "b.a"}
        pattern = exact_targets(model, ["a", "b.+"])
        assert [path for path in ("a", "b", "b.a", "b.+", "b.b") if match_name(pattern, path)] == ["a", "b.+"]
