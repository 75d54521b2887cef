from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import tunerkit
from tunerkit import BaseTuner, BaseTunerLayer, PeftConfig, PeftModel, get_peft_model
from tunerkit.config import PEFT_FORMAT_VERSION
from tunerkit.errors import (
    AdapterNameError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    LoadWarning,
    PluginError,
    UnknownAdapterError,
)
from tunerkit.journal import Journal
from tunerkit.testing.bench import Snapshot, difference, move, same_bits
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

X = torch.linspace(-1, 1, 15).reshape(5, 3)


class Kept(nn.ModuleDict):
    """Keeps one of its layers in training mode, as some do with dropout."""

    def __init__(self):
        super().__init__({"other": nn.Dropout(), "kept": nn.Dropout()})
        self.modes = []

    def train(self, mode=True):
        self.modes.append(mode)
        self["other"].train(mode)
        self.training = mode
        return self


def make_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))


def lora(*targets, **others):
    return LoraConfig(target_modules=list(targets or ("0", "2")), r=2, **others)


def ia3(*targets, **others):
    return IA3Config(target_modules=list(targets or ("0", "3")), feedforward_modules=[], **others)


def run(model):
    with torch.no_grad():
        return model(X)


def trains(model):
    return {part for name, p in model.named_parameters() if p.requires_grad for part in name.split(".")}


@pytest.fixture
def model():
    """Three adapters of two methods, all moved, of which the first is active."""
    model = get_peft_model(make_base(), lora())
    model.add_adapter("scale", ia3())
    model.add_adapter("other", lora("3"))
    for name in model.peft_config:
        move(model, name)
    assert difference(run(model), run(make_base())) > 1e-3
    return model


class TestWhatIsThere:
    def test_attributes(self, model):
        assert isinstance(model.base_model, BaseTuner)
        assert model.base_model.model is model.get_base_model() is model.model
        assert list(model.peft_config) == ["default", "scale", "other"]
        assert model.active_adapters == ["default"]
        assert model.active_adapter == "default"
        assert model.active_peft_config is model.peft_config["default"]
        model.set_adapter(["other", "scale"])
        assert model.active_adapter == ["other", "scale"]
        assert model.active_peft_config is model.peft_config["other"]

    def test_names_in_the_model_are_pefts(self):
        model = get_peft_model(make_base(), lora("0"))
        model.add_adapter("b", ia3("0"))
        assert [name for name, _ in model.named_parameters()] == [
            f"base_model.model.{name}"
            for name in (
                "0.base_layer.weight",
                "0.base_layer.bias",
                "0.lora_A.default.weight",
                "0.lora_B.default.weight",
                "0.ia3_l.b",
                "2.weight",
                "3.weight",
                "3.bias",
            )
        ]

    def test_print_trainable_parameters(self, capsys):
        model = get_peft_model(nn.Sequential(nn.Linear(100, 200)), LoraConfig(target_modules=["0"], r=8))
        assert model.get_nb_trainable_parameters() == (2400, 22600)
        model.print_trainable_parameters()
        assert capsys.readouterr().out == "trainable params: 2,400 || all params: 22,600 || trainable%: 10.6195\n"

    def test_text_is_pefts(self, capsys):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        get_peft_model(make_base(), lora()).print_trainable_parameters()
        peft.get_peft_model(make_base(), peft.LoraConfig(target_modules=["0", "2"], r=2)).print_trainable_parameters()
        mine, theirs = capsys.readouterr().out.splitlines()
        assert mine == theirs

    def test_attributes_are_forwarded(self, model):
        model.get_base_model().answer = 42
        assert model.answer == 42
        assert model.prefix == "lora_"
        with pytest.raises(AttributeError, match="Neither PeftModel nor the base Sequential has 'nothing'"):
            model.nothing  # noqa: B018 - the look-up is what fails
        with pytest.raises(AttributeError):
            PeftModel.__new__(PeftModel).base_model  # noqa: B018 - as copy and pickle do it

    def test_caller_keeps_his_config(self):
        base, config = make_base(), lora()
        base.name_or_path = "here"
        before = copy.deepcopy(config)
        model = get_peft_model(base, config, revision="r1")
        model.add_adapter("b", config)
        assert config == before
        assert model.peft_config["default"].base_model_name_or_path == "here"
        assert model.peft_config["default"].revision == "r1"
        assert model.peft_config["b"] is not config

    def test_mixed_and_options(self):
        model = get_peft_model(make_base().bfloat16(), lora(), "x", mixed=True, autocast_adapter_dtype=False)
        assert model.get_base_model()[0].lora_A["x"].weight.dtype == torch.bfloat16
        assert (
            get_peft_model(make_base(), lora(), low_cpu_mem_usage=True)
            .get_base_model()[0]
            .lora_A["default"]
            .weight.is_meta
        )

    def test_keeps_the_mode(self):
        assert not get_peft_model(make_base().eval(), lora()).training
        assert get_peft_model(make_base(), lora()).training

    def test_not_twice(self, model):
        before = Snapshot.of(model)
        for wrap in (lambda: get_peft_model(model, lora()), lambda: PeftModel(model, lora())):
            with pytest.raises(
                AdapterNameError, match="The model is a PeftModel already, with the adapters 'default', 'scale'"
            ):
                wrap()
        with pytest.raises(AdapterNameError, match=r"The model is a PeftModel already. Call load_adapter\(model_id"):
            PeftModel.from_pretrained(model, "x")
        assert before.differences(model) == []


class TestActive:
    def test_together(self, model):
        model.set_adapter(["default", "scale", "other"])
        together = run(model)
        assert trains(model) >= {"default", "scale", "other"}
        model.set_adapter("scale")
        assert difference(run(model), together) > 1e-3
        with model.use_adapter(["default", "scale", "other"]):
            assert same_bits(run(model), together)

    def test_disable(self, model):
        before = run(model)
        with model.disable_adapter():
            assert same_bits(run(model), run(make_base()))
            assert trains(model) == set()
            with model.disable_adapter():
                pass
            assert same_bits(run(model), run(make_base()))
        assert same_bits(run(model), before)
        assert "default" in trains(model)

    def test_enabled_again_after_an_error(self, model):
        before = run(model)
        with pytest.raises(ValueError, match="stop"), model.disable_adapter():
            raise ValueError("stop")
        assert same_bits(run(model), before)

    def test_frozen_stays_frozen_through_disable(self, model):
        model.set_adapter("default", inference_mode=True)
        with model.disable_adapter():
            pass
        assert trains(model) == set()


class TestSave:
    def test_layout(self, model, tmp_path):
        model.save_pretrained(tmp_path / "out")
        found = sorted(
            str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
        )
        files = ["adapter_config.json", "adapter_model.safetensors"]
        assert found == sorted(
            ["README.md", *files, *(f"{name}/{file}" for name in ("other", "scale") for file in files)]
        )

    def test_selected(self, model, tmp_path):
        model.save_pretrained(tmp_path, selected_adapters=["scale"])
        assert {path.name for path in tmp_path.iterdir()} == {"README.md", "scale"}
        with pytest.raises(
            UnknownAdapterError, match=r"The model has no adapter 'scle'; it has 'default', 'scale', 'other'. Closest"
        ):
            model.save_pretrained(tmp_path / "new", selected_adapters=["scale", "scle"])
        assert not (tmp_path / "new").exists()

    def test_config_file(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        values = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        assert values["peft_type"] == "LORA"
        assert values["peft_version"] == PEFT_FORMAT_VERSION
        assert values["inference_mode"] is True
        assert not model.peft_config["default"].inference_mode
        assert values["target_modules"] == ["0", "2"]
        assert values["auto_mapping"] == {
            "base_model_class": "Sequential",
            "parent_library": "torch.nn.modules.container",
        }
        assert not any("tunerkit" in key for key in values)

    def test_task_type_leaves_auto_mapping_out(self, tmp_path):
        get_peft_model(make_base(), lora(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["auto_mapping"] is None

    def test_name_of_the_base_model(self, tmp_path):
        base = make_base()
        base.name_or_path = "somewhere/base"
        PeftModel(base, lora()).save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "somewhere/base"

    def test_config_keys_are_pefts(self, model, tmp_path):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        model.save_pretrained(tmp_path / "mine")
        theirs = peft.get_peft_model(make_base(), peft.LoraConfig(target_modules=["0", "2"], r=2))
        theirs.save_pretrained(tmp_path / "theirs")
        mine, other = (
            json.loads((tmp_path / side / "adapter_config.json").read_text(encoding="utf-8"))
            for side in ("mine", "theirs")
        )
        assert sorted(mine) == sorted(other)
        different = {key for key in mine if mine[key] != other[key] and key not in {"target_modules", "lora_alpha"}}
        assert different <= {"peft_version"}

    def test_metadata_say_who_wrote_it(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "scale" / "adapter_model.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["tunerkit_format"] == "1"
        assert metadata["tunerkit_plugin"] == "tunerkit-ia3"
        assert metadata["tunerkit_plugin_version"]
        assert metadata["tunerkit_version"]
        assert len(metadata["tunerkit_save_id"]) == 32

    def test_gathered_state(self, model, tmp_path):
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=state, selected_adapters=["default"])
        saved = tunerkit.load_peft_weights(tmp_path)
        weight = model.get_base_model()[0].lora_A["default"].weight
        assert torch.equal(saved["base_model.model.0.lora_A.weight"], weight + 1)

    def test_only_the_main_process_writes(self, model, tmp_path):
        model.save_pretrained(tmp_path / "out", is_main_process=False)
        assert not (tmp_path / "out").exists()

    def test_refused(self, model, tmp_path):
        with pytest.raises(
            CheckpointError, match="safe_serialization=False would write a pickle, which can run code when"
        ):
            model.save_pretrained(tmp_path / "out", safe_serialization=False)
        with pytest.raises(CheckpointNotFoundError, match="x"):
            model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "x")
        with pytest.raises(ConfigError, match="save_embedding_layers must be 'auto', True or False; it is 'no'"):
            model.save_pretrained(tmp_path / "out", save_embedding_layers="no")
        assert not (tmp_path / "out").exists()

    def test_meta_tensors_are_not_saved(self, tmp_path):
        model = get_peft_model(make_base(), lora(), low_cpu_mem_usage=True)
        with pytest.raises(CheckpointError, match="These tensors are on the meta device and hold no data"):
            model.save_pretrained(tmp_path / "out")


class TestLoad:
    @pytest.fixture
    def saved(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        return tmp_path

    def test_all_of_several_methods(self, model, saved):
        loaded = PeftModel.from_pretrained(make_base(), saved)
        report = loaded.load_adapter(saved / "scale", "scale")
        loaded.load_adapter(saved, "third", subfolder="other")
        assert report.complete
        assert report.loaded_keys == ["base_model.model.0.ia3_l", "base_model.model.3.ia3_l"]
        for mine, theirs in (("default", "default"), ("scale", "scale"), ("third", "other")):
            loaded.set_adapter(mine)
            model.set_adapter(theirs)
            assert same_bits(run(loaded), run(model))
        loaded.set_adapter(["default", "scale", "third"])
        model.set_adapter(["default", "scale", "other"])
        assert same_bits(run(loaded), run(model))

    def test_is_frozen_and_in_evaluation(self, saved):
        loaded = PeftModel.from_pretrained(make_base(), saved)
        assert trains(loaded) == set()
        assert not any(module.training for module in loaded.modules())
        assert loaded.peft_config["default"].inference_mode

    def test_trainable(self, saved):
        loaded = PeftModel.from_pretrained(make_base(), saved, "x", is_trainable=True)
        assert "x" in trains(loaded)
        assert loaded.training
        assert loaded.load_adapter(saved / "scale", "y", is_trainable=True).complete
        assert loaded.training
        assert "y" not in trains(loaded)
        loaded.set_adapter("y")
        assert "y" in trains(loaded)
        loaded.load_adapter(saved / "scale", "z")
        assert not loaded.training

    def test_evaluation_is_left_to_modules_that_set_it_in_a_way_of_their_own(self, saved):
        base, modes = make_base(), []
        base.own, base.bound = Kept(), nn.ModuleDict({"drop": nn.Dropout()})
        base.bound.train = modes.append
        model = get_peft_model(base, lora(), "x")

        def load():
            with Journal():
                model.load_adapter(saved / "scale", "y")
                set_to_evaluation.update(name for name, module in base.named_modules() if not module.training)
                raise ValueError("stop")

        set_to_evaluation = set()
        with pytest.raises(ValueError, match="stop"):
            load()
        assert {"", "0", "1", "2", "3", "0.base_layer", "own", "own.other"} <= set_to_evaluation
        assert not {"own.kept", "bound", "bound.drop"} & set_to_evaluation
        assert (base.own.modes, modes) == ([False], [False])
        assert all(module.training for module in model.modules())

    def test_a_module_in_evaluation_is_not_set_again(self, saved):
        base = make_base()
        base.own = Kept()
        model = get_peft_model(base.eval(), lora(), "x")
        base.own["kept"].training = False
        base.own.modes.clear()
        model.load_adapter(saved / "scale", "y")
        assert base.own.modes == []

    def test_loading_frozen_leaves_the_active_one(self, model, saved):
        model.load_adapter(saved / "scale", "new")
        assert "default" in trains(model)
        assert model.active_adapters == ["default"]

    @pytest.mark.parametrize("meta", [True, False])
    @pytest.mark.parametrize("strict", [True, False])
    def test_no_tensor_is_left_on_meta(self, model, saved, meta, strict):
        loaded = PeftModel.from_pretrained(make_base(), saved, low_cpu_mem_usage=meta, strict=strict)
        loaded.load_adapter(saved / "scale", "scale", low_cpu_mem_usage=meta, strict=strict)
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert same_bits(run(loaded), run(model))

    def test_other_config(self, model, saved):
        config = lora(lora_alpha=0.5)
        loaded = PeftModel.from_pretrained(make_base(), saved, config=config)
        assert loaded.peft_config["default"].lora_alpha == 0.5
        assert not config.inference_mode
        assert difference(run(loaded), run(model)) > 1e-3
        with pytest.raises(ConfigError, match="must be the config of a method, a PeftConfig; it is a dict"):
            PeftModel.from_pretrained(make_base(), saved, config={"r": 2})

    def test_keys_may_be_mapped(self, model, saved):
        base = nn.Sequential(nn.Identity(), *make_base())
        config = lora("1", "3")
        mapping = {r"^0\.": "1.", r"^2\.": "3."}
        loaded = PeftModel.from_pretrained(base, saved, config=config, key_mapping=mapping)
        assert same_bits(run(loaded), run(model))

    def test_dtypes(self, saved):
        loaded = PeftModel.from_pretrained(make_base().bfloat16(), saved)
        assert loaded.get_base_model()[0].lora_A["default"].weight.dtype == torch.float32
        loaded = PeftModel.from_pretrained(make_base().bfloat16(), saved, autocast_adapter_dtype=False)
        assert loaded.get_base_model()[0].lora_A["default"].weight.dtype == torch.bfloat16

    def test_into_an_adapter_that_is_there(self, model, saved):
        expected = run(model)
        move(model, "default", seed=5)
        report = model.load_adapter(saved, "default")
        assert report.complete
        assert same_bits(run(model), expected)

    def test_offload_is_refused(self, model, saved):
        for load in (
            lambda: PeftModel.from_pretrained(make_base(), saved, ephemeral_gpu_offload=True),
            lambda: model.load_adapter(saved, "new", ephemeral_gpu_offload=True),
        ):
            with pytest.raises(
                ConfigError, match=r"ephemeral_gpu_offload=True is not supported by this version; leave it out."
            ):
                load()

    def test_not_strict_warns_and_loads_what_fits(self, model, saved):
        base = nn.Sequential(*make_base(), nn.Linear(2, 2))
        with pytest.warns(
            LoadWarning, match=r"tensors of the adapter that it lacks: 'base_model.model.4.lora_A.weight'"
        ):
            loaded = PeftModel.from_pretrained(base, saved, config=lora("0", "2", "4"), strict=False)
        layer = model.get_base_model()[0]
        assert same_bits(loaded.get_base_model()[0].lora_A["default"].weight, layer.lora_A["default"].weight)
        assert loaded.get_base_model()[4].lora_B["default"].weight.abs().sum() == 0
        with pytest.warns(LoadWarning, match="tensors that have no place in the adapter"):
            report = loaded.load_adapter(saved, "part", config=lora("0"), strict=False)
        assert report.unexpected_keys == ["base_model.model.2.lora_A.weight", "base_model.model.2.lora_B.weight"]

    def test_of_a_peft_checkpoint(self, tmp_path):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        theirs = peft.get_peft_model(
            make_base(), peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
        )
        theirs.save_pretrained(tmp_path)
        mine = PeftModel.from_pretrained(make_base(), tmp_path)
        assert difference(run(mine), run(make_base())) > 1e-3
        torch.testing.assert_close(run(mine), run(theirs))
        mine.save_pretrained(tmp_path / "back")
        torch.testing.assert_close(run(peft.PeftModel.from_pretrained(make_base(), tmp_path / "back")), run(mine))


def test_tensor_that_no_checkpoint_holds_must_not_be_made_on_meta(tmp_path, monkeypatch):
    get_peft_model(make_base(), lora()).save_pretrained(tmp_path)
    from tunerkit_lora import LoraAdapter

    made = LoraAdapter.__init__

    def with_a_buffer(adapter, site, config):
        made(adapter, site, config)
        adapter.register_buffer("lora_seen", site.zeros(1), persistent=False)

    monkeypatch.setattr(LoraAdapter, "entries", (*LoraAdapter.entries, "lora_seen"))
    monkeypatch.setattr(LoraAdapter, "__init__", with_a_buffer)
    base = make_base()
    before = Snapshot.of(base)
    with pytest.raises(PluginError, match="LoraAdapter made 'lora_seen' with the site's words for new tensors, and no"):
        PeftModel.from_pretrained(base, tmp_path)
    assert before.differences(base) == []


class TestTransformers:
    @pytest.fixture
    def llama(self):
        transformers = pytest.importorskip("transformers", reason="needs a model that generates")
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **shape)).eval()

    def test_generate(self, llama):
        tokens = torch.tensor([[1, 2, 3]])
        plain = llama.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        model = get_peft_model(llama, LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
        assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
        generate = lambda: model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(generate(), plain)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_()
        assert not torch.equal(generate(), plain)
        with model.disable_adapter():
            assert torch.equal(generate(), plain)
        with model.use_adapter([]):
            assert torch.equal(generate(), plain)
        assert model.config is llama.config
        assert model.device == llama.device

    def test_all_linear_leaves_the_output_layer(self, llama):
        model = get_peft_model(llama, LoraConfig(target_modules="all-linear"))
        assert not isinstance(llama.lm_head, BaseTunerLayer)
        assert len(list(model.base_model.layers())) == 2 * 7


MEMBERS = {
    PeftModel: """
        __init__ save_pretrained from_pretrained load_adapter add_adapter delete_adapter set_adapter disable_adapter
        get_base_model get_nb_trainable_parameters print_trainable_parameters generate
    """,
    BaseTuner: """
        __init__ inject_adapter delete_adapter disable_adapter_layers enable_adapter_layers merge_adapter
        merge_and_unload unmerge_adapter unload set_adapter set_requires_grad supports_lora_conversion get_model_config
        _prepare_adapter_config _check_target_module_exists _create_and_replace
    """,
    BaseTunerLayer: """
        delete_adapter enable_adapters get_base_layer set_adapter set_requires_grad supports_lora_conversion merge
        unmerge
    """,
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in MEMBERS.items() for name in names.split()])
def test_signatures_are_pefts(kind, name):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
    from peft.tuners.tuners_utils import BaseTuner as TheirTuner
    from peft.tuners.tuners_utils import BaseTunerLayer as TheirLayer

    other = {PeftModel: peft.PeftModel, BaseTuner: TheirTuner, BaseTunerLayer: TheirLayer}[kind]
    mine, theirs = (named(getattr(side, name)) for side in (kind, other))
    extra = (
        {"subfolder", "torch_device", "strict", "verify", "config", "state_dict"}
        if "load" in name or "pretrained" in name
        else set()
    )
    if name == "generate":
        extra = {"adapter_names"}  # which PEFT takes out of the keywords
    if name == "merge_adapter":
        extra = {"keep_base"}  # PEFT keeps none
    if name == "merge_and_unload":
        extra = {"dequantize"}  # PEFT rounds
    if name == "get_model_config":
        extra = {"default"}  # PEFT documents it and lacks it
    if (kind, name) == (BaseTuner, "__init__"):
        theirs["adapter_name"] = "adapter"  # which has no default there
        extra = {"autocast_adapter_dtype"}  # PEFT casts in a walk of its own
    missing = [parameter for parameter in theirs if parameter not in mine]
    assert missing == []
    assert {key: mine[key] for key in theirs} == theirs
    assert list(mine)[: len(theirs)] == list(theirs)
    assert set(mine) - set(theirs) <= extra


def named(function):
    """Return a function's named parameters and their defaults, in order."""
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default for p in parameters if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
