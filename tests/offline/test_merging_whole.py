"""Modules that an adapter trained as a whole, in the base's place."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from merged_folders import check_equal, move, tensors_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tunerkit import get_peft_model
from tunerkit.errors import CheckpointError, MergeError
from tunerkit.offline.merging import merge_folder
from tunerkit.offline.skeleton import Skeleton
from tunerkit_lora import LoraConfig


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def lora(*whole, targets=("q_proj",), **settings):
    return LoraConfig(r=2, target_modules=list(targets), modules_to_save=list(whole), **settings)


def test_a_head_takes_the_place_of_the_base_s(llama, saved, adapted, out, ids):
    base = saved(llama(), max_shard_size="20KB")
    adapter, peft = adapted(llama(), lora("lm_head", "norm"))
    report = merge_folder(base, adapter, out)
    # "norm" is the last one, and not those of the layers.
    assert report.replaced == ["lm_head.weight", "model.norm.weight"]
    assert len(report.merged) == 2
    assert report.untouched == len(tensors_of(base)) - 4
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before, after = tensors_of(base), tensors_of(out)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {*report.replaced, *report.merged}
    check_equal(AutoModelForCausalLM, out, ids, peft)


def test_in_the_base_s_dtype(llama, saved, adapted, out):
    base = saved(llama(dtype=torch.bfloat16))
    adapter, peft = adapted(llama(dtype=torch.bfloat16), lora("lm_head"))
    path = adapter / "adapter_model.safetensors"
    save_file({key: tensor.float() for key, tensor in load_file(path).items()}, path)
    merge_folder(base, adapter, out)
    merged = peft.merge_and_unload().state_dict()
    found = tensors_of(out)
    assert all(torch.equal(merged[key], tensor) for key, tensor in found.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("whole", "replaced"),
    [
        (["lm_head"], ["lm_head.weight"]),
        (["embed_tokens"], ["model.embed_tokens.weight"]),
        (["embed_tokens", "lm_head"], ["lm_head.weight", "model.embed_tokens.weight"]),
    ],
)
def test_tied_embeddings_differ_afterwards(llama, saved, adapted, out, ids, whole, replaced):
    base = saved(llama(tied=True))
    adapter, peft = adapted(llama(tied=True), lora(*whole))
    report = merge_folder(base, adapter, out)
    assert report.replaced == replaced
    assert report.untied == ["lm_head.weight"]
    with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
        loaded = check_equal(AutoModelForCausalLM, out, ids, peft)
    assert loaded.config.tie_word_embeddings is False


def test_what_is_tied_within_and_without(saved, adapted, out, ids, bert_config):
    """A masked language model's head is tied to the embeddings, and holds one bias under two names."""
    torch.manual_seed(0)
    base = saved(BertForMaskedLM(bert_config))
    adapter, peft = adapted(BertForMaskedLM.from_pretrained(base).eval(), lora("cls", targets=["query"]))
    report = merge_folder(base, adapter, out)
    assert "cls.predictions.transform.dense.weight" in report.replaced
    with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
        check_equal(BertForMaskedLM, out, ids, peft)


def test_a_tie_that_the_config_cannot_undo(saved, out, tmp_path):
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    base = saved(model)
    get_peft_model(model, lora("lm_head", targets=["q"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight', which the base model ties"):
        merge_folder(base, tmp_path / "adapter", out)
    assert not out.exists()


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("settings", [{"task_type": "SEQ_CLS"}, {}])
def test_a_head_that_the_base_does_not_have(saved, adapted, out, ids, bert_config, shards, settings):
    torch.manual_seed(0)
    base = saved(BertModel(bert_config).bfloat16(), **({"max_shard_size": shards} if shards else {}))
    model = BertForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16).eval()
    adapter, peft = adapted(model, lora("classifier", targets=["query"], **settings))
    report = merge_folder(base, adapter, out)
    assert report.replaced == ["classifier.bias", "classifier.weight"]
    assert (report.model, report.untied) == ("BertForSequenceClassification", [])
    assert report.untouched == len(tensors_of(base)) - 2
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"]
    found = tensors_of(out)
    assert found["classifier.weight"].dtype is torch.bfloat16
    assert {*found} == {*tensors_of(base), "classifier.weight", "classifier.bias"}
    if shards:
        index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    check_equal(AutoModelForSequenceClassification, out, ids, peft)


def test_another_number_of_labels(saved, adapted, out, bert_config):
    base = saved(BertModel(bert_config))
    model = BertForSequenceClassification.from_pretrained(base, num_labels=5).eval()
    adapter, _ = adapted(model, lora("classifier", targets=["query"], task_type="SEQ_CLS"))
    with pytest.raises(CheckpointError, match=r"classifier: shape mismatch. .* is \(5, 32\), the adapter's \(2, 32\)"):
        merge_folder(base, adapter, out)
    assert not out.exists()


def test_a_head_that_transformers_would_rename(saved, adapted, out, bert_config, monkeypatch):
    base = saved(BertModel(bert_config))
    model = BertForSequenceClassification.from_pretrained(base).eval()
    adapter, _ = adapted(model, lora("classifier", targets=["query"]))
    plain = Skeleton._renamer

    def renamer(skeleton):
        parameter = plain(skeleton)
        return lambda key: ("head.weight", False) if key == "classifier.weight" else parameter(key)

    monkeypatch.setattr(Skeleton, "_renamer", renamer)
    with pytest.raises(CheckpointError, match=r"brings 'classifier.weight' along, .* load under another name"):
        merge_folder(base, adapter, out)
    assert not out.exists()


@pytest.mark.parametrize("lacking", [False, True])
def test_buffers_too_and_whole_numbers(saved, tmp_path, out, lacking):
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(
        MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=8, num_labels=2)
    )
    base = saved(model)
    if lacking:
        kept = {key: tensor for key, tensor in tensors_of(base).items() if "conv_1x1" not in key}
        save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    peft = get_peft_model(model, lora("conv_1x1", targets=["classifier"]))
    move(peft)
    pixels = torch.randn(2, 3, 32, 32)
    peft.train()(pixels)  # moves what the normalisation counts
    peft.eval().save_pretrained(tmp_path / "adapter")
    report = merge_folder(base, tmp_path / "adapter", out)
    counted = [key for key in report.replaced if key.endswith("num_batches_tracked")]
    assert counted
    assert tensors_of(out)[counted[0]] == 1
    loaded = MobileNetV2ForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        expected = peft.merge_and_unload()
        # The other layers counted too, and that is not the adapter's.
        for name, buffer in expected.named_buffers():
            if "conv_1x1" not in name:
                buffer.copy_(dict(loaded.named_buffers())[name])
        torch.testing.assert_close(loaded(pixels).logits, expected(pixels).logits, atol=1e-5, rtol=1e-5)


def test_numbers_that_are_none(llama, saved, adapted, out):
    base = saved(llama())
    adapter, _ = adapted(llama(), lora("lm_head"))
    path = adapter / "adapter_model.safetensors"
    save_file(
        {key: tensor * (float("inf") if "lm_head" in key else 1) for key, tensor in load_file(path).items()}, path
    )
    with pytest.raises(MergeError, match=r"NaN or infinities into 'lm_head.weight'"):
        merge_folder(base, adapter, out)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's calls of transformers
def test_what_peft_saved(llama, saved, out, ids, tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(llama())
    live = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    ).eval()
    move(live)
    live.save_pretrained(tmp_path / "adapter")
    assert len(merge_folder(base, tmp_path / "adapter", out).replaced) == 2
    check_equal(AutoModelForCausalLM, out, ids, live)


def test_what_the_config_does_not_name_has_no_place(llama, saved, adapted, out):
    base = saved(llama())
    adapter, _ = adapted(llama(), lora("norm"))
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "modules_to_save": None}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"norm: no place. The adapter has no place for 'model.norm.weight'"):
        merge_folder(base, adapter, out)


class TestTheBaseS:
    """Tensors of the base model that a checkpoint holds itself."""

    @pytest.mark.parametrize("which", ["all", "lora_only"])
    @pytest.mark.parametrize("whole", [[], ["LayerNorm"]])
    def test_trained_biases(self, saved, adapted, out, ids, bert_config, which, whole):
        torch.manual_seed(0)
        base = saved(BertModel(bert_config))
        config = lora(*whole, targets=["query", "dense"], bias=which)
        adapter, peft = adapted(BertModel.from_pretrained(base).eval(), config)
        report = merge_folder(base, adapter, out)
        before, after = tensors_of(base), tensors_of(out)
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == {*report.merged, *report.replaced}
        assert "encoder.layer.0.attention.self.query.bias" in report.replaced
        assert ("encoder.layer.0.attention.self.key.bias" in report.replaced) == (which == "all")
        check_equal(BertModel, out, ids, peft)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("tied", [True, False])
    def test_all_biases_with_tied_embeddings_in_shards(self, saved, adapted, out, dtype, tied, ids):
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = LlamaConfig(
            num_attention_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied, **sizes
        )
        model = LlamaForCausalLM(config).to(dtype).eval()
        base = saved(model, max_shard_size="10KB")
        assert len(list(base.glob("*.safetensors"))) > 2
        adapter, peft = adapted(model, lora(targets=["q_proj", "down_proj", "embed_tokens"], bias="all"))
        report = merge_folder(base, adapter, out)
        assert len(report.merged) == 5
        assert len(report.replaced) == 2 * 7
        assert report.untied == (["lm_head.weight"] if tied else [])
        with pytest.warns(UserWarning, match="tie_word_embeddings=False") if tied else contextlib.nullcontext():
            # Of a live model in half precision the rotary frequencies are rounded too.
            loaded = check_equal(AutoModelForCausalLM, out, ids, peft, 1e-5 if dtype is torch.float32 else 1e-2)
        merged, found = peft.base_model.model.state_dict(), tensors_of(out)
        assert merged.keys() == found.keys() == loaded.state_dict().keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in merged.items())
        assert all(torch.equal(tensor, found[key]) for key, tensor in loaded.state_dict().items())

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
    def test_embeddings_saved_along(self, llama, saved, adapted, out, ids, tied, targets):
        """They were changed before the adapter was made, as by new tokens, and stay as the checkpoint has them."""
        base = saved(llama(tied=tied))
        model = llama(tied=tied)
        model.get_input_embeddings().weight.data.mul_(1.5)
        adapter, peft = adapted(model, lora(targets=targets), embeddings=True)
        report = merge_folder(base, adapter, out)
        embeddings = "model.embed_tokens.weight"
        assert embeddings in (report.merged if "embed_tokens" in targets else report.replaced)
        assert report.untied == (["lm_head.weight"] if tied and "embed_tokens" in targets else [])
        with (
            pytest.warns(UserWarning, match="tie_word_embeddings=False") if report.untied else contextlib.nullcontext()
        ):
            check_equal(AutoModelForCausalLM, out, ids, peft)

    def test_a_bias_that_the_files_lack(self, saved, adapted, out, bert_config):
        base = saved(BertModel(bert_config))
        tensors = tensors_of(base)
        del tensors["encoder.layer.0.attention.self.query.bias"]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        adapter, _ = adapted(BertModel(bert_config).eval(), lora(targets=["query"], bias="lora_only"))
        with pytest.raises(CheckpointError, match=r"no tensor for 'encoder.layer.0.*query.bias', which the adapter's"):
            merge_folder(base, adapter, out)


def test_repeated_layers(llama, saved, adapted, out):
    adapter, _ = adapted(llama(), lora(layer_replication=[(0, 2), (1, 2)]))
    with pytest.raises(MergeError, match=r"repeats layers of the base model \(layer_replication\)"):
        merge_folder(saved(llama()), adapter, out)
    assert not out.exists()
