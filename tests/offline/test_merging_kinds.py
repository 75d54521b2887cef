"""LoRA's kinds of layers and options, merged into files."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from merged_folders import check_equal, move, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tunerkit import get_peft_model
from tunerkit.errors import CheckpointError, LoadWarning, MergeError
from tunerkit.offline.merging import merge_folder
from tunerkit.sites import LinearSite
from tunerkit_lora import LoraConfig


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def start(init):
    """Return the settings of a start."""
    return {"init_lora_weights": init, **({"loftq_config": {"loftq_iter": 2}} if init == "loftq" else {})}


def gpt2(*, tied=True):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied)
    return GPT2LMHeadModel(config).eval()


SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def gpt_oss():
    """A mixture whose experts are stacked in the files too, in x out."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(num_experts_per_tok=2, **SIZES, **sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["wte", "wpe"], ["wte", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_transposed_layers_and_embeddings(saved, adapted, out, ids, targets, tied):
    base = saved(gpt2(tied=tied))
    fan = {"fan_in_fan_out": True} if targets[0] == "c_attn" else {}
    adapter, peft = adapted(gpt2(tied=tied), LoraConfig(r=2, target_modules=targets, **fan))
    report = merge_folder(base, adapter, out)
    assert report.untied == (["lm_head.weight"] if tied and "wte" in targets else [])
    with pytest.warns(UserWarning, match="tie_word_embeddings=False") if report.untied else contextlib.nullcontext():
        check_equal(AutoModelForCausalLM, out, ids, peft)


def test_convolutions(saved, tmp_path, out):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config).eval()
    base = saved(model)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels).logits
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["convolution"])).eval()
        move(peft)
        peft.save_pretrained(tmp_path / "adapter")
        report = merge_folder(base, tmp_path / "adapter", out)
        after = peft.merge_and_unload()(pixels).logits
        assert (before - after).abs().max() > 1e-3
        found = ResNetForImageClassification.from_pretrained(out).eval()(pixels).logits
        torch.testing.assert_close(found, after, atol=1e-5, rtol=1e-5)
    assert len(report.merged) == sum(isinstance(module, nn.Conv2d) for module in model.modules())


def test_a_convolution_that_cannot_be_merged(saved, tmp_path, out):
    model = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=8))
    base = saved(model)
    target = next(name for name, module in model.named_modules() if getattr(module, "groups", 1) > 1)
    rank = model.get_submodule(target).groups
    get_peft_model(model, LoraConfig(r=rank, target_modules=[target])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match="it stands on a convolution with groups"):
        merge_folder(base, tmp_path / "adapter", out)
    assert not out.exists()


def test_an_attention_layer_of_torch(saved, tmp_path, out):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **sizes)).eval()
    base = saved(model)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["head.attention", "patch_embedding"])).eval()
    move(peft)
    peft.save_pretrained(tmp_path / "adapter")
    report = merge_folder(base, tmp_path / "adapter", out)
    assert [key.rpartition("head.")[2] for key in report.merged if "head" in key] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    pixels = torch.randn(2, 3, 8, 8)
    loaded = SiglipVisionModel.from_pretrained(out).eval()
    with torch.no_grad():
        before = SiglipVisionModel.from_pretrained(base).eval()(pixels).pooler_output
        expected = peft.merge_and_unload()(pixels).pooler_output
        assert (before - expected).abs().max() > 1e-3
        torch.testing.assert_close(loaded(pixels).pooler_output, expected, atol=1e-5, rtol=1e-5)


class TestExperts:
    @pytest.mark.parametrize("modules", [[], ["q_proj", "o_proj"]])
    def test_stacked_in_the_files(self, saved, adapted, out, ids, modules):
        base = saved(gpt_oss())
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapter, peft = adapted(gpt_oss(), LoraConfig(r=2, target_modules=modules, target_parameters=parameters))
        report = merge_folder(base, adapter, out)
        assert len(report.merged) == 2 + len(modules)
        check_equal(AutoModelForCausalLM, out, ids, peft)

    def test_stacked_when_they_are_loaded(self, saved, adapted, out):
        torch.manual_seed(0)
        config = MixtralConfig(hidden_size=16, intermediate_size=16, num_local_experts=2, **SIZES)
        model = MixtralForCausalLM(config).eval()
        base = saved(model)
        adapter, _ = adapted(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
        with pytest.raises(
            CheckpointError,
            match=r"transformers makes the parameter '.*down_proj' out of '.*' when it loads .*merge_and_unload\(\)",
        ):
            merge_folder(base, adapter, out)
        assert not out.exists()


def test_a_weight_that_is_no_parameter(llama, saved, adapted, out, monkeypatch):
    base = saved(llama())
    adapter, _ = adapted(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setattr(LinearSite, "weight_name", property(lambda _: "kernel"))
    with pytest.raises(CheckpointError, match=r"q_proj' \(Linear\) has no parameter 'kernel' of its own"):
        merge_folder(base, adapter, out)
    assert not out.exists()


class TestOptions:
    def test_ranks_and_scales_by_pattern(self, llama, saved, adapted, out, ids):
        base = saved(llama())
        settings = {"rank_pattern": {"0.self_attn.q_proj": 5}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True}
        adapter, peft = adapted(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **settings))
        merge_folder(base, adapter, out)
        check_equal(AutoModelForCausalLM, out, ids, peft)

    def test_a_bias(self, saved, adapted, out, ids, bert_config):
        torch.manual_seed(0)
        base = saved(BertModel(bert_config))
        model = BertModel.from_pretrained(base).eval()
        adapter, peft = adapted(model, LoraConfig(r=2, target_modules=["value"], lora_bias=True))
        report = merge_folder(base, adapter, out)
        assert [key.rpartition(".")[2] for key in report.merged] == ["bias", "weight"] * 2
        check_equal(BertModel, out, ids, peft)

    def test_a_bias_that_the_base_does_not_have(self, llama, saved, adapted, out):
        adapter, _ = adapted(llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
        with pytest.raises(MergeError, match=r"q_proj.bias' of shape .*has no such tensor"):
            merge_folder(saved(llama()), adapter, out)

    @pytest.mark.parametrize("init", [True, "pissa", "olora", "loftq"])
    def test_dora(self, llama, saved, adapted, out, ids, init):
        base = saved(llama())
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True, **start(init))
        adapter, peft = adapted(llama(), config)
        merge_folder(base, adapter, out)
        check_equal(AutoModelForCausalLM, out, ids, peft)

    @pytest.mark.parametrize("targets", [["wte"], ["c_attn"]])
    def test_dora_on_other_kinds(self, saved, adapted, out, ids, targets):
        base = saved(gpt2(tied=False))
        config = LoraConfig(r=2, target_modules=targets, use_dora=True, fan_in_fan_out=targets == ["c_attn"])
        adapter, peft = adapted(gpt2(tied=False), config)
        merge_folder(base, adapter, out)
        check_equal(AutoModelForCausalLM, out, ids, peft)

    @pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "mica", "loftq"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_starts(self, llama, saved, adapted, out, ids, init, dtype):
        """What was taken off the start is derived again from the base's own weight."""
        base = saved(llama(dtype=dtype))
        config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], **start(init))
        adapter, peft = adapted(llama(dtype=dtype), config)
        merge_folder(base, adapter, out)
        if dtype is torch.float32:
            check_equal(AutoModelForCausalLM, out, ids, peft)
            return
        merged, found = peft.merge_and_unload().state_dict(), tensors_of(out)
        assert all(torch.allclose(merged[key], tensor, atol=1e-6, rtol=8e-3) for key, tensor in found.items())

    def test_a_start_that_is_drawn_at_random(self, llama, saved, adapted, out, ids):
        """Saved by us it needs no start; a file of PEFT's does, and then it is said that it comes close."""
        base = saved(llama())
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
        adapter, peft = adapted(llama(), config)
        merge_folder(base, adapter, out)
        check_equal(AutoModelForCausalLM, out, ids, peft)
        values = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        values.update(init_lora_weights="pissa_niter_4")
        (adapter / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
        with pytest.warns(LoadWarning, match="relative to a start that was drawn at random"):
            merge_folder(base, adapter, out, overwrite=True)


class TestWhatIsCut:
    def cut(self, adapter, what):
        path = adapter / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if what not in key}, path)

    def test_a_module_that_the_config_means(self, llama, saved, adapted, out):
        base = saved(llama())
        adapter, _ = adapted(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        self.cut(adapter, "1.self_attn.v_proj")
        with pytest.warns(
            LoadWarning, match=r"means 1 more modules .*holds nothing: 'model.layers.1.self_attn.v_proj'"
        ):
            report = merge_folder(base, adapter, out)
        assert report.lacking == ["model.layers.1.self_attn.v_proj"]
        assert len(report.merged) == 3

    def test_one_of_two_parameters(self, saved, adapted, out):
        base = saved(gpt_oss())
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapter, _ = adapted(gpt_oss(), LoraConfig(r=2, target_modules=[], target_parameters=parameters))
        self.cut(adapter, "base_layer")
        with pytest.raises(CheckpointError, match=r"experts: incomplete. The checkpoint lacks"):
            merge_folder(base, adapter, out)
