from __future__ import annotations

import dataclasses
import errno
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import safetensors
import torch
from merged_folders import check_equal, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn
from toys import bias, bottleneck, hooks_by_hand, parameters, registered, rotation, shared, tuner_by_hand
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tunerkit.demo.encoder import find_model
from tunerkit.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    LoadWarning,
    MergeError,
    TunerkitError,
    UnknownMethodError,
)
from tunerkit.offline import merging, skeleton, writing
from tunerkit.offline.merging import merge_folder
from tunerkit.offline.tensor_file import DTYPES, Entry
from tunerkit_lora import LoraConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


class TestWhatIsWritten:
    def test_minilm(self, adapted, out, ids):
        base = find_model()
        model = AutoModel.from_pretrained(base, add_pooling_layer=False).eval()
        # Without the pooler that the base has, so a plan by the config alone would want more than the checkpoint has.
        adapter, peft = adapted(model, LoraConfig(r=4, target_modules=["query", "dense"]))
        with pytest.warns(LoadWarning, match=r"means 1 more modules of this model, .* nothing: 'pooler.dense'"):
            report = merge_folder(base, adapter, out)
        assert report.lacking == ["pooler.dense"]
        merged = check_equal(AutoModel, out, ids, peft)
        assert type(merged) is BertModel
        before, after = tensors_of(base), tensors_of(out)
        assert report.merged == sorted(key for key in before if not torch.equal(before[key], after[key]))
        assert len(report.merged) == 24
        assert all("query.weight" in key or "dense.weight" in key for key in report.merged)
        assert report.untouched == len(before) - 24
        assert names_of(out) == names_of(base)
        assert names_of(out / "1_Pooling") == ["config.json"]
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
        old, new = (safetensors.safe_open(folder / "model.safetensors", "pt") for folder in (base, out))
        assert new.metadata() == old.metadata()
        assert new.keys() == old.keys()

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's calls of transformers
    def test_an_adapter_that_peft_saved(self, tmp_path, out, ids):
        peft = pytest.importorskip("peft")
        base = find_model()
        model = AutoModel.from_pretrained(base).eval()
        live = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"])).eval()
        with torch.no_grad():
            before = live(input_ids=ids)[0]
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            assert (live(input_ids=ids)[0] - before).abs().max() > 1e-3
        live.save_pretrained(tmp_path / "adapter")
        merge_folder(base, tmp_path / "adapter", out)
        check_equal(AutoModel, out, ids, live)

    def test_sharded(self, llama, saved, adapted, out, ids):
        base = saved(llama(), max_shard_size="20KB")
        adapter, peft = adapted(llama(), LoraConfig(r=2, target_modules=ALL))
        assert len(list(base.glob("*.safetensors"))) > 2
        report = merge_folder(base, adapter, out)
        check_equal(AutoModelForCausalLM, out, ids, peft)
        assert names_of(out) == names_of(base)
        assert (out / "model.safetensors.index.json").read_bytes() == (
            base / "model.safetensors.index.json"
        ).read_bytes()
        assert report.bytes == sum(tensor.nbytes for tensor in tensors_of(base).values())

    def test_half_precision_is_folded_in_float32_and_rounded_once(self, llama, saved, adapted, out, ids):
        base = saved(llama(dtype=torch.bfloat16))
        adapter, peft = adapted(llama(dtype=torch.bfloat16), LoraConfig(r=2, target_modules=ALL))
        merge_folder(base, adapter, out)
        merged = peft.merge_and_unload().state_dict()
        found = tensors_of(out)
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
        assert all(torch.equal(merged[key], tensor) for key, tensor in found.items())
        assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"

    @pytest.mark.parametrize("toy", [rotation, shared])
    def test_other_kinds_of_method(self, llama, saved, adapted, out, ids, toy):
        with registered(toy):
            base = saved(llama())
            adapter, peft = adapted(llama(), toy.Config(target_modules=["q_proj", "down_proj"]))
            merge_folder(base, adapter, out)
            check_equal(AutoModelForCausalLM, out, ids, peft)

    def test_a_bias_that_the_layer_has(self, saved, adapted, out, ids, bert_config):
        torch.manual_seed(0)
        base = saved(BertModel(bert_config))
        with registered(bias):
            adapter, peft = adapted(BertModel.from_pretrained(base).eval(), bias.Config(target_modules=["value"]))
            report = merge_folder(base, adapter, out)
            check_equal(AutoModel, out, ids, peft)
        assert [key.rpartition(".")[2] for key in report.merged] == ["bias", "bias"]

    def test_a_bias_that_the_files_leave_out_and_the_adapter_leaves_alone(self, saved, adapted, out, bert_config):
        base = saved(BertModel(bert_config))
        lacking = "encoder.layer.0.attention.self.value.bias"
        tensors = tensors_of(base)
        del tensors[lacking]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        adapter, _ = adapted(BertModel(bert_config).eval(), LoraConfig(r=2, target_modules=["value"]))
        assert len(merge_folder(base, adapter, out).merged) == 2
        assert tensors_of(out).keys() == tensors.keys()

    def test_parameters_of_one_module(self, saved, out, ids, tmp_path):
        """Transformers fuses Mixtral's experts when it loads them, so what is adapted is not in the files."""
        config = MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2,
        )  # fmt: skip
        base = saved(MixtralForCausalLM(config))
        assert any("experts.0" in key for key in tensors_of(base))
        with registered(parameters):
            from tunerkit import get_peft_model

            peft = get_peft_model(
                MixtralForCausalLM(config),
                parameters.Config(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
            )
            peft.save_pretrained(tmp_path / "adapter")
            with pytest.raises(CheckpointError, match=r"transformers makes the parameter .* when it loads"):
                merge_folder(base, tmp_path / "adapter", out)
        assert not out.exists()

    def test_other_files(self, llama, saved, adapted, out):
        base = saved(llama())
        (base / "pytorch_model.bin").write_bytes(b"old")
        (base / "onnx").mkdir()
        (base / "onnx" / "model.onnx").write_bytes(b"old")
        (base / "2_Dense").mkdir()
        (base / "2_Dense" / "model.safetensors").write_bytes(b"belongs to the model")
        adapter, _ = adapted(llama(), LoraConfig(target_modules=["q_proj"]))
        report = merge_folder(base, adapter, out)
        assert report.left_out == ["onnx", "pytorch_model.bin"]
        assert names_of(out) == sorted({*names_of(base)} - {"onnx", "pytorch_model.bin"})
        assert (out / "2_Dense" / "model.safetensors").read_bytes() == b"belongs to the model"

    def test_progress(self, llama, saved, adapted, out):
        base = saved(llama())
        adapter, _ = adapted(llama(), LoraConfig(target_modules=["q_proj"]))
        seen = []
        report = merge_folder(base, adapter, out, on_bytes=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen)
        assert seen[-1] == (report.bytes, report.bytes)


class TestNames:
    def test_a_bare_model_s_files_and_an_adapter_with_a_head(self, saved, out, ids, adapted, bert_config):
        torch.manual_seed(0)
        base = saved(BertModel(bert_config))
        model = BertForSequenceClassification.from_pretrained(base).eval()
        adapter, peft = adapted(model, LoraConfig(r=2, target_modules=["query", "value"]))
        report = merge_folder(base, adapter, out)
        assert report.model == "BertForSequenceClassification"
        assert all(key.startswith("encoder.") for key in report.merged)
        check_equal(AutoModel, out, ids, SimpleNamespace(merge_and_unload=lambda: peft.merge_and_unload().bert))

    def test_a_head_s_files_and_an_adapter_of_the_bare_model(self, llama, saved, out, adapted, ids):
        base = saved(llama())
        model = LlamaModel.from_pretrained(base).eval()
        adapter, peft = adapted(model, LoraConfig(r=2, target_modules=["q_proj"]))
        assert merge_folder(base, adapter, out).model == "LlamaModel"
        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            merged = peft.merge_and_unload()(input_ids=ids)[0]
            torch.testing.assert_close(loaded.model(input_ids=ids)[0], merged, atol=1e-5, rtol=1e-5)
        assert torch.equal(loaded.lm_head.weight, llama().lm_head.weight)

    def test_the_task_says_the_class(self, saved, out, adapted, bert_config):
        torch.manual_seed(0)
        model = BertForSequenceClassification(bert_config)
        base = saved(model)
        values = json.loads((base / "config.json").read_text(encoding="utf-8"))
        del values["architectures"]
        (base / "config.json").write_text(json.dumps(values), encoding="utf-8")
        adapter, _ = adapted(model.eval(), LoraConfig(r=2, target_modules=["classifier"]))
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        config.update(auto_mapping=None, task_type="SEQ_CLS")
        (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        report = merge_folder(base, adapter, out)
        assert (report.model, report.merged) == ("BertForSequenceClassification", ["classifier.weight"])
        AutoModelForSequenceClassification.from_pretrained(out)

    def test_a_head_that_the_files_lack(self, saved, out, adapted, bert_config):
        base = saved(BertModel(bert_config))
        model = BertForSequenceClassification(bert_config).eval()
        adapter, _ = adapted(model, LoraConfig(r=2, target_modules=["classifier"]))
        with pytest.raises(CheckpointError, match=r"hold no tensor for 'classifier.weight'"):
            merge_folder(base, adapter, out)
        assert not out.exists()


@pytest.mark.filterwarnings("ignore::tunerkit.errors.TyingWarning")
class TestTies:
    @pytest.mark.parametrize("shards", [None, "20KB"])
    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    def test_merging_into_one_side_unties(self, llama, saved, out, ids, tmp_path, target, shards):
        base = saved(llama(tied=True), **({"max_shard_size": shards} if shards else {}))
        assert "lm_head.weight" not in tensors_of(base)
        toy = embedding_toy()
        from tunerkit import get_peft_model

        with registered(toy):
            peft = get_peft_model(llama(tied=True), toy.Config(target_modules=[target])).eval()
            with torch.no_grad():
                before = peft(input_ids=ids)[0]
                for parameter in peft.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
                assert (peft(input_ids=ids)[0] - before).abs().max() > 1e-3
            peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
            report = merge_folder(base, tmp_path / "adapter", out)
            with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
                loaded = check_equal(AutoModelForCausalLM, out, ids, peft)
        assert report.untied == ["lm_head.weight"]
        assert report.merged == [f"{'model.' if target == 'embed_tokens' else ''}{target}.weight"]
        assert loaded.config.tie_word_embeddings is False
        assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
        if shards:
            old, new = (
                json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
                for folder in (base, out)
            )
            assert new["weight_map"]["lm_head.weight"] == old["weight_map"]["model.embed_tokens.weight"]
            assert new["metadata"]["total_size"] - old["metadata"]["total_size"] == 64 * 32 * 4
            assert new["metadata"]["total_parameters"] - old["metadata"]["total_parameters"] == 64 * 32

    def test_other_targets_leave_the_tie(self, llama, saved, adapted, out, ids):
        base = saved(llama(tied=True))
        adapter, peft = adapted(llama(tied=True), LoraConfig(r=2, target_modules=["q_proj"]))
        assert merge_folder(base, adapter, out).untied == []
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
        assert "lm_head.weight" not in tensors_of(out)
        check_equal(AutoModelForCausalLM, out, ids, peft)

    def test_all_that_was_tied_is_written(self, saved, adapted, out, ids, bert_config):
        """A masked language model ties the head's bias too."""
        torch.manual_seed(0)
        model = BertForMaskedLM(bert_config)
        base = saved(model)
        adapter, peft = adapted(model.eval(), LoraConfig(r=2, target_modules=["decoder"]))
        report = merge_folder(base, adapter, out)
        assert report.merged == ["cls.predictions.decoder.weight"]
        assert set(report.untied) >= {"cls.predictions.decoder.weight"}
        with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
            check_equal(BertForMaskedLM, out, ids, peft)

    def test_files_without_the_prefix(self, saved, adapted, out, ids):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
        model = GPT2LMHeadModel(config)
        base = saved(model)
        tensors = {key.removeprefix("transformer."): value for key, value in tensors_of(base).items()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        adapter, peft = adapted(model.eval(), LoraConfig(r=2, target_modules=["lm_head"]))
        merge_folder(base, adapter, out)
        assert {*tensors_of(out)} == {*tensors, "lm_head.weight"}
        with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
            check_equal(GPT2LMHeadModel, out, ids, peft)

    def test_a_model_whose_config_cannot_untie(self, saved, out, tmp_path):
        """T5 is tied whatever its config says."""
        from tunerkit import get_peft_model

        config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        model = T5ForConditionalGeneration(config)
        base = saved(model)
        get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=False
        )
        with pytest.raises(CheckpointError, match="config cannot say that they differ"):
            merge_folder(base, tmp_path / "adapter", out)
        assert not out.exists()


def embedding_toy():
    """A method that adds a full matrix, to embeddings too."""
    from tunerkit import Method
    from tunerkit.adapter import AdditiveAdapter

    class FullAdapter(AdditiveAdapter):
        entries = ("toy_rotation",)
        kinds = frozenset({"linear", "embedding"})

        def __init__(self, site, config):
            super().__init__(site, config)
            self.toy_rotation = nn.Parameter(site.zeros(*site.weight.shape))

        def delta(self, base):
            return self.toy_rotation

        def forward(self, x, below):
            return below.run(x, *self.merged(below))

    return SimpleNamespace(Config=rotation.Config, method=Method(config=rotation.Config, adapter=FullAdapter))


class TestRefusals:
    @pytest.fixture
    def pair(self, llama, saved, adapted):
        return saved(llama()), adapted(llama(), LoraConfig(r=2, target_modules=["q_proj"]))[0]

    def refuse(self, base, adapter, out, error, match, **options):
        before = sorted(str(path) for path in out.parent.rglob("*"))
        with pytest.raises(error, match=match):
            merge_folder(base, adapter, out, **options)
        assert sorted(str(path) for path in out.parent.rglob("*")) == before

    def test_another_model(self, pair, saved, out, bert_config):
        base = saved(BertModel(bert_config), name="other")
        self.refuse(
            base, pair[1], out, CheckpointError,
            r"does not fit the model in .* 2 of its 2 targets do not:\n  model.layers.0.self_attn.q_proj: missing.",
        )  # fmt: skip

    def test_another_size(self, pair, out):
        values = json.loads((pair[0] / "config.json").read_text(encoding="utf-8"))
        values.update(hidden_size=64, head_dim=8)
        (pair[0] / "config.json").write_text(json.dumps(values), encoding="utf-8")
        self.refuse(*pair, out, CheckpointError, r"q_proj: shape mismatch. .*lora_A.weight is \(2, 32\)")

    def test_a_config_that_the_files_are_not_of(self, pair, out, saved):
        values = json.loads((pair[0] / "config.json").read_text(encoding="utf-8"))
        values.update(hidden_size=64, head_dim=8)
        tensors = load_file(pair[1] / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            tensors[key] = torch.cat([tensor, tensor], 1) if "lora_A" in key else tensor
        save_file(tensors, pair[1] / "adapter_model.safetensors")
        (pair[0] / "config.json").write_text(json.dumps(values), encoding="utf-8")
        self.refuse(
            *pair, out, CheckpointError, r"q_proj.weight' as F32 of shape \(32, 32\); by its config .* \(32, 64\)"
        )

    def test_half_an_adapter(self, pair, out):
        path = pair[1] / "adapter_model.safetensors"
        save_file(
            {key: value for key, value in load_file(path).items() if "1.self_attn.q_proj.lora_B" not in key}, path
        )
        self.refuse(*pair, out, CheckpointError, "q_proj: incomplete. The checkpoint lacks .*lora_B.weight'")

    def test_more_than_the_adapter_has(self, pair, out):
        path = pair[1] / "adapter_model.safetensors"
        key = "base_model.model.model.layers.0.self_attn.k_proj.weight"
        save_file({**load_file(path), key: torch.zeros(3)}, path)
        self.refuse(*pair, out, CheckpointError, "k_proj: no place. The adapter has no place for .*k_proj.weight'")

    def test_unknown_method(self, pair, out):
        config = {"peft_type": "NO_SUCH", "target_modules": ["q_proj"]}
        (pair[1] / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        self.refuse(*pair, out, UnknownMethodError, "by convention tunerkit-no-such")

    def test_a_module_trained_as_a_whole_that_is_not_in_the_file(self, pair, out):
        config = json.loads((pair[1] / "adapter_config.json").read_text(encoding="utf-8"))
        config["modules_to_save"] = ["lm_head"]
        (pair[1] / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        self.refuse(*pair, out, CheckpointError, "lm_head: incomplete. The checkpoint lacks 'lm_head.weight'")

    def test_an_adapter_with_no_merged_form(self, llama, saved, adapted, out):
        with registered(bottleneck):
            adapter, _ = adapted(llama(), bottleneck.Config(target_modules=["q_proj"]))
            self.refuse(saved(llama()), adapter, out, MergeError, "cannot be merged")

    @pytest.mark.parametrize("toy", [hooks_by_hand, tuner_by_hand])
    def test_a_layer_that_a_method_made(self, llama, saved, adapted, out, toy):
        with registered(toy):
            adapter, _ = adapted(llama(), toy.Config(target_modules=["q_proj"]))
            self.refuse(saved(llama()), adapter, out, MergeError, "a layer that its method puts in place itself")

    def test_a_bias_that_the_base_does_not_have(self, llama, saved, adapted, out):
        with registered(bias):
            adapter, _ = adapted(llama(), bias.Config(target_modules=["q_proj"]))
            self.refuse(saved(llama()), adapter, out, MergeError, "q_proj.bias' of shape .*has no such tensor")

    def test_numbers_that_are_none(self, pair, out):
        path = pair[1] / "adapter_model.safetensors"
        save_file({key: value * float("inf") for key, value in load_file(path).items()}, path)
        self.refuse(*pair, out, MergeError, "NaN or infinities into 'model.layers.0.self_attn.q_proj.weight'")

    def test_truncated(self, pair, out):
        path = pair[0] / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refuse(*pair, out, CheckpointError, "is not a whole safetensors file")

    def test_something_is_there(self, pair, out):
        out.mkdir()
        (out / "notes.txt").write_text("mine", encoding="utf-8")
        self.refuse(*pair, out, CheckpointError, "is there and not empty.*--overwrite")
        merge_folder(*pair, out, overwrite=True)
        assert "notes.txt" not in names_of(out)
        assert names_of(out.parent) == ["adapter", "base", "out"]

    def test_an_empty_folder_is_filled(self, pair, out):
        out.mkdir()
        merge_folder(*pair, out)
        assert "model.safetensors" in names_of(out)

    def test_a_file_is_there(self, pair, out):
        out.write_text("mine", encoding="utf-8")
        self.refuse(*pair, out, CheckpointError, "is a file, and a model is a folder", overwrite=True)

    @pytest.mark.parametrize("where", ["base", "base/merged", "adapter", "."])
    def test_out_is_not_what_is_read(self, pair, tmp_path, where):
        with pytest.raises(CheckpointError, match="are one folder, or one lies in the other"):
            merge_folder(*pair, tmp_path / where, overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_the_disk_is_full(self, pair, out, monkeypatch, overwrite):
        if overwrite:
            merge_folder(*pair, out)
        before = {path.name: path.read_bytes() for path in out.iterdir()} if overwrite else None

        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writing.TensorWriter, "finish", fail)
        self.refuse(*pair, out, CheckpointError, "No space left on device.*unchanged", overwrite=overwrite)
        assert (before is None) == (not out.exists())
        if before is not None:
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    def test_interrupted(self, pair, tmp_path):
        """Whatever ends it, at whatever byte, nothing is left, not even the parents that were made."""
        out = tmp_path / "new" / "deep" / "out"

        def stop(done, total):
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_folder(*pair, out, on_bytes=stop)
        assert names_of(tmp_path) == ["adapter", "base"]

    def test_transformers_is_missing(self, pair, out, monkeypatch):
        monkeypatch.setattr(skeleton, "find_spec", lambda _: None)
        self.refuse(*pair, out, TunerkitError, r"needs transformers, .* pip install 'tunerkit\[merge\]'")

    def test_transformers_is_old(self, pair, out, monkeypatch):
        monkeypatch.setattr(skeleton, "find_spec", lambda name: None if "." in name else True)
        self.refuse(*pair, out, TunerkitError, r"transformers 5 or newer.*pip install 'tunerkit\[merge\]'")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"model_type": "nosuch"}, "transformers cannot read .*config.json'"),
            ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
            ({"hidden_act": "nosuch"}, "transformers cannot make a LlamaForCausalLM .*KeyError"),
            ({"quantization_config": {"bits": 4}}, "is quantised"),
        ],
    )
    def test_a_model_that_transformers_cannot_make(self, pair, out, change, match):
        path = pair[0] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
        self.refuse(*pair, out, CheckpointError, match)

    def test_no_model_at_all(self, pair, tmp_path, out):
        with pytest.raises(CheckpointNotFoundError, match="There is no folder"):
            merge_folder(tmp_path / "nowhere", pair[1], out)


MEMORY = """
import os, resource, sys
from pathlib import Path
os.fsync = lambda _: None  # a slow disk takes time and no memory
from tunerkit.offline.merging import merge_folder
base, adapter, out = map(Path, sys.argv[1:])
merge_folder(base, adapter, out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class TestMemory:
    def model(self, folder, dtype, rows, width):
        """Four matrices of rows x width, or the reverse, all of them holes in the file, and an adapter for each."""
        base, adapter = folder / "base", folder / "adapter"
        base.mkdir(parents=True)
        adapter.mkdir()
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": width,
            "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
            "head_dim": rows // 8, "tie_word_embeddings": True,
        }  # fmt: skip
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        layer = "model.layers.0."
        attention = {f"{layer}self_attn.{name}": (rows, width) for name in ALL[:3]}
        attention[f"{layer}self_attn.{ALL[3]}"] = (width, rows)
        shapes = {"model.embed_tokens": (64, width), "model.norm": (width,), **attention}
        shapes.update({f"{layer}{name}": (width,) for name in ("input_layernorm", "post_attention_layernorm")})
        for name in ALL[4:]:
            shapes[f"{layer}mlp.{name}"] = (width, 64) if name == "down_proj" else (64, width)
        entries = {
            f"{path}.weight": Entry(dtype, shape, 0, math.prod(shape) * DTYPES[dtype].itemsize)
            for path, shape in shapes.items()
        }
        writing.TensorWriter(base / "model.safetensors", entries, {"format": "pt"})
        tensors = {}
        for path, shape in attention.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(2, shape[1])
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(shape[0], 2)
        save_file(tensors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ALL[:4]}), encoding="utf-8"
        )
        return base, adapter, folder / "out"

    def peak(self, folder, *form):
        arguments = [str(path) for path in self.model(folder, *form)]
        done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1]) * 1024

    @pytest.mark.skipif(sys.platform != "linux", reason="what ru_maxrss counts differs")
    def test_stays_under_three_tensors(self, tmp_path):
        """Also where what is added has twice the size of what it is added to."""
        nothing = self.peak(tmp_path / "small", "F32", 64, 64)
        for dtype, rows in (("F32", 2048), ("BF16", 4096)):
            assert self.peak(tmp_path / dtype, dtype, rows, 4096) - nothing < 3 * 32 * 2**20
            first = load_first(tmp_path / dtype / "out")
            assert torch.equal(first, torch.full_like(first, 2 * 8 / 2))


def load_first(folder):
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return file.get_slice("model.layers.0.self_attn.q_proj.weight")[:2]


def test_the_report_is_plain_data(llama, saved, adapted, out):
    base = saved(llama())
    adapter, _ = adapted(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    report = json.loads(json.dumps(dataclasses.asdict(merging.merge_folder(base, adapter, out))))
    assert report.pop("seconds") > 0
    assert report.pop("bytes") == sum(tensor.nbytes for tensor in tensors_of(base).values())
    assert report == {
        "base": str(base),
        "adapter": str(adapter),
        "out": str(out),
        "method": "lora",
        "model": "LlamaForCausalLM",
        "merged": ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"],
        "untouched": len(tensors_of(base)) - 2,
        "untied": [],
        "replaced": [],
        "lacking": [],
        "left_out": [],
    }
