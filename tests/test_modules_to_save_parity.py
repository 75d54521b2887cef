"""Modules that are trained and saved as a whole, and the classes for tasks, beside the living PEFT's."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunerkit
from tunerkit.errors import MergeWarning
from tunerkit.testing.parity import Pair, check_parity, moved_tensors, peft_config, quiet, run
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

peft = pytest.importorskip("peft", reason="what is compared with")
transformers = pytest.importorskip("transformers", reason="the models that are compared")

IDS = torch.arange(10).reshape(2, 5)
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SHAPE, "vocab_size": 30, "max_position_embeddings": 20}


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.dense(x).tanh())


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = Head()

    def forward(self, x):
        return self.head(self.norm(self.lin(x)))


CONFIGS = [
    LoraConfig(target_modules=["lin"], r=2, modules_to_save=["head", "norm"]),
    LoraConfig(target_modules="all-linear", r=2, modules_to_save=["head"]),
    LoraConfig(target_modules=["lin", "out", "dense"], r=2, modules_to_save=["head.out"]),
    IA3Config(target_modules=["lin"], feedforward_modules=["lin"], modules_to_save=["head.out"]),
]


def make_base():
    torch.manual_seed(0)
    return Base()


def inputs():
    return {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_one_adapter(config, tmp_path):
    check_parity(make_base(), config, inputs(), tmp_path)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], CONFIGS[3]], ids=range(3))
def test_two_adapters(config, tmp_path):
    pair = Pair(make_base(), config, inputs())
    pair.add("other", config)
    pair.check_parameters()
    pair.check_tensors()
    pair.check_files(tmp_path)
    pair.set_adapter("other")
    pair.check_parameters()
    pair.check_gradients()
    pair.check_steps()
    pair.check_disabled()
    pair.check_parameters()
    pair.check_merged()


def test_second_adapter_without_copies():
    pair = Pair(make_base(), CONFIGS[0], inputs())
    pair.add("plain", LoraConfig(target_modules=["lin"], r=2))
    pair.set_adapter("plain")
    pair.check_parameters()
    pair.check_outputs()
    pair.check_gradients()
    pair.check_merged()


def test_rows_of_a_batch():
    # PEFT can do it for plain layers only, and not for the whole head.
    config = LoraConfig(target_modules=["lin"], r=2, modules_to_save=["head.out"])
    pair = Pair(make_base(), config, inputs())
    pair.add("other", config)
    names = ["other", "default", "__base__", "other", "default"]
    with torch.no_grad():
        ours = pair.ours(**pair.inputs, adapter_names=names)
        theirs = pair.theirs(**pair.inputs, adapter_names=names)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_unloading():
    pair = Pair(make_base(), CONFIGS[0], inputs())
    assert torch.equal(run(pair.ours.unload(), pair.inputs), run(pair.base, pair.inputs))


# Tasks


def make(kind, settings, **others):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, settings)(**BERT, **others)).eval()


TASKS = {
    "SEQ_CLS": functools.partial(make, "BertForSequenceClassification", "BertConfig", num_labels=3),
    "SEQ_CLS score": functools.partial(
        make, "LlamaForSequenceClassification", "LlamaConfig", num_labels=3, pad_token_id=0
    ),
    "TOKEN_CLS": functools.partial(make, "BertForTokenClassification", "BertConfig", num_labels=3),
    "QUESTION_ANS": functools.partial(make, "BertForQuestionAnswering", "BertConfig"),
    "FEATURE_EXTRACTION": functools.partial(make, "BertModel", "BertConfig"),
    "CAUSAL_LM": functools.partial(make, "LlamaForCausalLM", "LlamaConfig"),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task, tmp_path):
    config = LoraConfig(task_type=task.split()[0], r=4)
    base = TASKS[task]()
    check_parity(base, config, {"input_ids": IDS}, tmp_path)
    ours = tunerkit.get_peft_model(copy.deepcopy(base), config)
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config))
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.modules_to_save == theirs.modules_to_save


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_adapters_added_later_have_heads_too(task, tmp_path):
    pair = Pair(TASKS[task](), IA3Config(task_type=task), {"input_ids": IDS})
    pair.add("other", IA3Config())
    pair.check_tensors()
    pair.check_files(tmp_path)
    pair.set_adapter("other")
    pair.check_parameters()
    pair.check_gradients()


def test_classifier_that_is_also_targeted():
    # PEFT adapts the classifiers of this task and then refuses to copy them.
    base = TASKS["TOKEN_CLS"]()
    config = LoraConfig(task_type="TOKEN_CLS", target_modules="all-linear")
    with quiet(), pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        peft.get_peft_model(copy.deepcopy(base), peft_config(config))
    model = tunerkit.get_peft_model(base, config)
    assert type(base.classifier) is tunerkit.ModulesToSaveWrapper
    assert len(model.base_model.targeted_module_names) == 2 * 6


@pytest.mark.parametrize("task", [None, "SEQ_2_SEQ_LM"])
def test_encoder_and_decoder(task, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    settings = transformers.T5Config(**shape, decoder_start_token_id=0, pad_token_id=0)
    base = transformers.T5ForConditionalGeneration(settings).eval()
    config = LoraConfig(task_type=task, r=4)
    check_parity(base, config, {"input_ids": IDS, "labels": IDS}, tmp_path)
    model = tunerkit.get_peft_model(base, config)
    assert model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3).shape == (2, 4)


# Tied embeddings


@pytest.mark.filterwarnings("ignore::tunerkit.errors.TyingWarning")
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_tied_embeddings(saved, tmp_path):
    base = make("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        pair = Pair(base, config, {"input_ids": IDS})
        pair.check_parameters()
        pair.check_tensors()
        pair.check_outputs()
        pair.check_disabled()
        pair.check_gradients()
        pair.check_files(tmp_path)
        pair.check_steps()
        other = copy.deepcopy(pair.ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.simplefilter("ignore", MergeWarning)
        pair.check_merged()
    plain = other.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    assert torch.equal(run(plain, pair.inputs), run(base, pair.inputs))


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_tied_copies_of_tied_embeddings(saved):
    base = make("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=[saved], ensure_weight_tying=True)
    pair = Pair(base, config, {"input_ids": IDS})
    pair.check_parameters()
    pair.check_tensors()
    pair.check_outputs()
    pair.check_disabled()
    pair.check_gradients()
    pair.check_steps()
    ours = pair.ours.get_base_model()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    pair.ours.add_adapter("other", config)
    assert ours.lm_head.modules_to_save["other"].weight is ours.model.embed_tokens.modules_to_save["other"].weight
    assert ours.lm_head.modules_to_save["other"].weight is not ours.lm_head.weight
    pair.check_merged()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


# What is right here and is not in PEFT


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.lora_head = nn.Linear(4, 4)

    def forward(self, x):
        return self.lora_head(self.head(self.lin(x)))


def adapted(library, *names, saved=("head",)):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["lin"], r=2, modules_to_save=list(saved))
    config = config if library is tunerkit else peft_config(config)
    model = library.get_peft_model(Named(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    return model


def test_adapter_called_like_a_module_keeps_its_tensors():
    assert len(tunerkit.get_peft_model_state_dict(adapted(tunerkit, "default", "head"))) == 4
    theirs = peft.get_peft_model_state_dict(adapted(peft, "default", "lin"))
    assert not any("lora_A" in key for key in theirs)
    ours = tunerkit.get_peft_model_state_dict(adapted(tunerkit, "default", "lin"))
    assert sum("lora" in key for key in ours) == 2


def test_name_matches_after_a_dot_only():
    ours, theirs = adapted(tunerkit, "default"), adapted(peft, "default")
    assert type(ours.get_base_model().lora_head) is nn.Linear
    assert type(theirs.get_base_model().lora_head) is not nn.Linear


def test_deleted_where_the_path_holds_the_prefix():
    config = LoraConfig(target_modules=["lora_head"], r=2)
    models = [tunerkit.get_peft_model(Named(), config), peft.get_peft_model(Named(), peft_config(config))]
    for model, own in zip(models, (config, peft_config(config)), strict=True):
        model.add_adapter("b", own)
        model.delete_adapter("b")
    left = [[name for name, _ in model.named_parameters() if ".b." in name] for model in models]
    assert (len(left[0]), len(left[1])) == (0, 2)


def test_saving_again_names_each_module_once(tmp_path):
    base = TASKS["SEQ_CLS"]()
    config = LoraConfig(task_type="SEQ_CLS", r=4)
    with quiet():
        peft.get_peft_model(copy.deepcopy(base), peft_config(config)).save_pretrained(tmp_path / "theirs")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
        again.save_pretrained(tmp_path / "again")
    tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    named = {
        name: json.loads((tmp_path / name / "adapter_config.json").read_text())["modules_to_save"]
        for name in ("theirs", "again", "ours")
    }
    assert named["theirs"] == named["ours"] == ["classifier", "score"]
    assert len(named["again"]) > 2
    model = tunerkit.PeftModel.from_pretrained(base, tmp_path / "again")
    assert model.modules_to_save == {"classifier", "score"}
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() >= {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


def test_moved_tensors_hold_the_copies():
    with quiet():
        theirs = peft.get_peft_model(make_base(), peft_config(CONFIGS[0]))
    assert "base_model.model.head.out.weight" in moved_tensors(theirs, "default", torch.Generator())
