"""What a script that was written for PEFT reads and calls, on both libraries."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import tunerkit
import tunerkit_ia3
import tunerkit_lora
from tunerkit import PeftMixedModel, PeftModel, PeftType, get_peft_model
from tunerkit.errors import UnknownMethodError
from tunerkit.testing.bench import difference, move, same_bits

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")

X = torch.linspace(-1, 1, 15).reshape(5, 3)


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def run(model):
    with torch.no_grad():
        return model(X)


# --- The tables of methods.


def test_tables_of_methods():
    configs, tuners = tunerkit.PEFT_TYPE_TO_CONFIG_MAPPING, tunerkit.PEFT_TYPE_TO_TUNER_MAPPING
    assert configs["LORA"] is configs[PeftType.LORA] is tunerkit_lora.LoraConfig
    assert tuners["IA3"] is tunerkit_ia3.IA3Model
    assert "LORA" in configs
    assert "NEVER_HEARD" not in configs
    assert 7 not in configs
    assert {"LORA", "IA3"} <= set(configs) <= {str(kind) for kind in PeftType}
    assert len(tuners) == len(list(tuners)) == len(configs)
    for error in (KeyError, UnknownMethodError):
        with pytest.raises(error, match="No installed package offers the method 'never-heard'"):
            configs["NEVER_HEARD"]
    assert configs.get("NEVER_HEARD") is None


# --- What scripts read of a live model.

PAIRS = {
    "lora": (
        lambda: peft.LoraConfig(target_modules=["0", "2"], r=2),
        lambda: tunerkit_lora.LoraConfig(target_modules=["0", "2"], r=2),
    ),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
        lambda: tunerkit_ia3.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    ),
}

BOTH = """
model.active_adapter
model.active_adapters
model.active_peft_config.peft_type.value
model.active_peft_config.task_type
model.peft_type == model.active_peft_config.peft_type
model.peft_type.value
model.has_active_enabled_adapter
model.base_model_torch_dtype
model.base_model.active_adapter
model.base_model.active_adapters
model.base_model.prefix
model.base_model.targeted_module_names
model.base_model.targeted_parameter_names
list(model.base_model.peft_config)
list(model.base_model.model.peft_config)
model.base_model.get_model_config(model)
model.base_model.supports_lora_conversion()
model.supports_lora_conversion()
type(model.base_model).__name__
type(model.get_base_model()).__name__
model.base_model.model is model.get_base_model()
model.base_model.tuner_layer_cls.__name__
isinstance(layer, model.base_model.tuner_layer_cls)
model.peft_config["default"].inference_mode
model.peft_config["default"].is_prompt_learning
model.peft_config["default"].is_adaption_prompt
model.peft_config["default"].target_modules
model.get_nb_trainable_parameters()
sorted(name for name, p in model.named_parameters())
sorted(name for name, p in model.named_parameters() if p.requires_grad)
sorted(model.state_dict())
layer.active_adapter
layer.active_adapters
layer._active_adapter
layer.merged_adapters
layer.merged
layer.disable_adapters
layer.supports_lora_conversion()
layer.in_features
layer.out_features
layer.weight.shape
layer.bias.shape
repr(layer.get_base_layer())
repr(layer.base_layer)
layer.training
""".strip().splitlines()

OWN = {
    "lora": """
dict(layer.r)
layer.r["default"]
dict(layer.lora_alpha)
dict(layer.scaling)
layer.scaling["default"]
list(layer.lora_A)
list(layer.lora_A.keys())
"default" in layer.lora_A
len(layer.lora_A)
repr(layer.lora_A["default"])
repr(layer.lora_B.default)
layer.lora_A["default"].weight.shape
layer.lora_B.default.weight.shape
layer.lora_B["default"].bias
layer.lora_A.default.weight.requires_grad
layer.get_delta_weight("default").shape
layer.get_delta_weight("default").dtype
repr(layer).partition("(")[0]
""".strip().splitlines(),
    "ia3": """
list(layer.ia3_l)
list(layer.ia3_l.keys())
layer.ia3_l["default"].shape
layer.ia3_l.default.shape
layer.adapter_layer_names
layer.other_param_names
""".strip().splitlines(),
}

STATES = {
    "fresh": lambda model: None,
    "two": lambda model: model.add_adapter("b", model.peft_config["default"]),
    "other active": lambda model: model.set_adapter("b"),
    "merged": lambda model: model.merge_adapter(),
    "unmerged": lambda model: model.unmerge_adapter(),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "on again": lambda model: model.base_model.enable_adapter_layers(),
    "deleted": lambda model: model.delete_adapter("b"),
}
KNOWN = {
    # PEFT's answer does not see what `base_model.disable_adapter_layers()` did.
    ("switched off", "model.has_active_enabled_adapter"),
}


def read(expression, model):
    return eval(expression, {"model": model, "layer": model.base_model.model[0]})  # noqa: S307 - the lists above


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_live_names(method):
    theirs, mine = PAIRS[method]
    theirs, mine = peft.get_peft_model(make_base(), theirs()), get_peft_model(make_base(), mine())
    for state, change in STATES.items():
        change(theirs)
        change(mine)
        for expression in (*BOTH, *OWN[method]):
            own, other = read(expression, mine), read(expression, theirs)
            if (state, expression) in KNOWN:
                assert own != other
                continue
            assert (own, type(own)) == (other, type(other)), f"{state}: {expression}"


def test_delta_weight_is_pefts():
    mine = get_peft_model(make_base().bfloat16(), PAIRS["lora"][1]())
    theirs = peft.get_peft_model(make_base().bfloat16(), PAIRS["lora"][0]())
    move(mine, "default")
    theirs.load_state_dict(mine.state_dict())
    own, other = (model.base_model.model[0].get_delta_weight("default") for model in (mine, theirs))
    assert own.dtype is other.dtype is torch.float32
    assert own.abs().max() > 1e-3
    torch.testing.assert_close(own, other)
    assert own.requires_grad


# --- Calls that differ on purpose.


class TestMixed:
    def test_is_one_class(self):
        assert PeftMixedModel is PeftModel
        model = get_peft_model(make_base(), PAIRS["lora"][1](), mixed=True)
        assert isinstance(model, PeftMixedModel)

    def test_any_method(self, tmp_path):
        """PEFT refuses IA3 there, which its own table of mixable methods names, and cannot save what it does mix."""
        assert "IA3" in {str(kind.value) for kind in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING}
        with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
            peft.get_peft_model(make_base(), PAIRS["ia3"][0](), mixed=True)
        theirs = peft.get_peft_model(make_base(), PAIRS["lora"][0](), mixed=True)
        with pytest.raises((AttributeError, NotImplementedError)):
            theirs.save_pretrained(tmp_path / "theirs")

        mine = get_peft_model(make_base(), PAIRS["ia3"][1](), "scale", mixed=True)
        mine.add_adapter("low", PAIRS["lora"][1]())
        for name in ("scale", "low"):
            move(mine, name)
        mine.set_adapter(["scale", "low"])
        assert difference(run(mine), run(make_base())) > 1e-3
        mine.save_pretrained(tmp_path)
        loaded = PeftMixedModel.from_pretrained(make_base(), tmp_path / "scale", "scale")
        loaded.load_adapter(tmp_path / "low", "low")
        loaded.set_adapter(["scale", "low"])
        assert same_bits(run(loaded), run(mine))


def test_leaving_disable_adapter_lets_nothing_train_that_did_not(tmp_path):
    """In PEFT an adapter that was loaded for inference trains after the block."""
    source = get_peft_model(make_base(), PAIRS["lora"][1]())
    source.save_pretrained(tmp_path)
    trains = []
    for library in (tunerkit, peft):
        model = library.PeftModel.from_pretrained(make_base(), tmp_path)
        assert not any(p.requires_grad for p in model.parameters())
        with model.disable_adapter():
            pass
        trains.append(any(p.requires_grad for p in model.parameters()))
    assert trains == [False, True]


def test_inference_mode():
    for (theirs, mine), inference in ((pair, flag) for pair in PAIRS.values() for flag in (True, False)):
        flags = []
        for library, config in ((peft, theirs()), (tunerkit, mine())):
            config.inference_mode = inference
            model = library.get_peft_model(make_base(), config)
            flags.append([p.requires_grad for p in model.parameters()])
        assert flags[0] == flags[1]
        assert any(flags[0]) is not inference


def test_has_active_enabled_adapter():
    model = get_peft_model(make_base(), PAIRS["lora"][1]())
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    model.delete_adapter("default")
    assert not model.has_active_enabled_adapter


def test_dtype_of_the_base():
    base = make_base()
    base.dtype = torch.float16
    assert get_peft_model(base, PAIRS["lora"][1]()).base_model_torch_dtype is torch.float16


def test_errors_and_warnings_have_pefts_names():
    with pytest.raises(tunerkit.PeftError):
        get_peft_model(make_base(), tunerkit_lora.LoraConfig(target_modules=["nothing"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.PeftWarning)
        get_peft_model(make_base(), tunerkit_lora.LoraConfig(target_modules=["0", "nothing"]))


# --- The model card.


def read_head(folder):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


class TestCard:
    def make(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        model = transformers.LlamaForCausalLM(config)
        model.name_or_path = model.config._name_or_path = "org/tiny"
        return model

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks
    @pytest.mark.filterwarnings("ignore:Could not find a config file in org/tiny")  # PEFT asks the hub
    def test_head_is_pefts(self, tmp_path):
        given = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        get_peft_model(self.make(), tunerkit_lora.LoraConfig(**given)).save_pretrained(tmp_path / "mine")
        peft.get_peft_model(self.make(), peft.LoraConfig(**given)).save_pretrained(tmp_path / "theirs")
        head = read_head(tmp_path / "mine")
        assert head == {
            "library_name": "peft",
            "base_model": "org/tiny",
            "pipeline_tag": "text-generation",
            "tags": ["base_model:adapter:org/tiny", "lora", "transformers"],
        }
        assert head == read_head(tmp_path / "theirs")
        text = (tmp_path / "theirs" / "README.md").read_text(encoding="utf-8")
        get_peft_model(self.make(), tunerkit_lora.LoraConfig(**given)).save_pretrained(tmp_path / "theirs")
        # Of a card by PEFT only the versions change.
        both = (tmp_path / "theirs" / "README.md").read_text(encoding="utf-8")
        assert [line for line in both.splitlines() if not line.startswith("- tunerkit")] == text.splitlines()
        assert "- tunerkit 0" in both

    def test_of_an_author_stays(self, tmp_path):
        """PEFT writes the head anew: the author's comments and tags are gone."""
        card = "---\n# chosen with care\ntags:\n- mine\n---\nText.\n"
        for place, library, config in (("mine", tunerkit, PAIRS["lora"][1]), ("theirs", peft, PAIRS["lora"][0])):
            (tmp_path / place).mkdir()
            (tmp_path / place / "README.md").write_text(card, encoding="utf-8")
            library.get_peft_model(make_base(), config()).save_pretrained(tmp_path / place)
        mine, theirs = ((tmp_path / place / "README.md").read_text(encoding="utf-8") for place in ("mine", "theirs"))
        assert mine.startswith("---\n# chosen with care\ntags:\n- mine\n- lora\nlibrary_name: peft\n---\nText.\n")
        assert "chosen with care" not in theirs
        assert read_head(tmp_path / "theirs")["tags"] == ["lora"]

    def test_plain_model(self, tmp_path):
        model = get_peft_model(make_base(), PAIRS["ia3"][1]())
        model.add_adapter("b", PAIRS["lora"][1]())
        model.save_pretrained(tmp_path)
        assert read_head(tmp_path) == {"library_name": "peft", "tags": ["lora"]}
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "- `default`: IA3, in this folder\n- `b`: LORA, in `b/`\n" in text
        assert not (tmp_path / "b" / "README.md").exists()

    def test_a_folder_of_this_machine_is_no_name(self, tmp_path, monkeypatch):
        (tmp_path / "tests").mkdir()
        monkeypatch.chdir(tmp_path)
        for name in (str(tmp_path), "./here", "C:\\models\\x", "tests"):
            base = make_base()
            base.name_or_path = name
            base.model_tags = ["mine"]
            get_peft_model(base, PAIRS["ia3"][1]()).create_or_update_model_card(tmp_path)
            assert read_head(tmp_path) == {"library_name": "peft", "tags": ["mine"]}

    def test_a_folder_of_this_machine_which_peft_names(self, tmp_path):
        heads = []
        for place, library, config in (("mine", tunerkit, PAIRS["lora"][1]), ("theirs", peft, PAIRS["lora"][0])):
            base = make_base()
            base.name_or_path = str(tmp_path)
            library.get_peft_model(base, config()).create_or_update_model_card(tmp_path / place)
            heads.append(read_head(tmp_path / place))
        assert heads[0] == {"library_name": "peft", "tags": ["lora"]}
        assert heads[1] == {"library_name": "peft", "tags": [f"base_model:adapter:{tmp_path}", "lora"]}

    def test_a_card_that_cannot_be_written_loses_no_checkpoint(self, tmp_path):
        (tmp_path / "README.md").mkdir()
        model = get_peft_model(make_base(), PAIRS["lora"][1]())
        with pytest.warns(tunerkit.errors.CardWarning, match=r"The model card '.*README.md' could not be written"):
            model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(make_base(), tmp_path)
        (tmp_path / "README.md").rmdir()
        (tmp_path / "README.md").write_bytes(b"\xff")
        with pytest.warns(
            tunerkit.errors.CardWarning, match=r"The checkpoint beside it is whole; mend or move that file"
        ):
            model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == b"\xff"

    def test_other_processes_write_none(self, tmp_path):
        get_peft_model(make_base(), PAIRS["lora"][1]()).save_pretrained(tmp_path, is_main_process=False)
        assert list(tmp_path.iterdir()) == []
