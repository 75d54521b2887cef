"""`AutoPeftModel` and its kin load the base model and the adapter as PEFT's do."""

import json
import sys

import peft
import pytest
import torch
import transformers

import tunerkit
from tunerkit import get_peft_model
from tunerkit.errors import ArgumentError, CheckpointError, CheckpointNotFoundError, TunerkitError
from tunerkit_lora import LoraConfig

# PEFT reads it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(12).reshape(2, 6)
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BERT = transformers.BertConfig(**SIZES)
BASES = {
    "CausalLM": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES), "CAUSAL_LM", ["q_proj"]),
    "Seq2SeqLM": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(**T5, decoder_start_token_id=0),
        "SEQ_2_SEQ_LM",
        ["q"],
    ),
    "SequenceClassification": (transformers.BertForSequenceClassification, BERT, "SEQ_CLS", ["query"]),
    "TokenClassification": (transformers.BertForTokenClassification, BERT, "TOKEN_CLS", ["query"]),
    "QuestionAnswering": (transformers.BertForQuestionAnswering, BERT, "QUESTION_ANS", ["query"]),
    "FeatureExtraction": (transformers.BertModel, BERT, "FEATURE_EXTRACTION", ["query"]),
}


def run(model, task):
    inputs = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if task == "SEQ_2_SEQ_LM" else {})
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def save(tmp_path, name, **config):
    """Save a base model and an adapter; return the model, and the adapter's folder."""
    kind, base_config, task, targets = BASES[name]
    torch.manual_seed(0)
    kind(base_config).save_pretrained(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base")
    settings = {"task_type": task, "target_modules": targets, "init_lora_weights": False, **config}
    model = get_peft_model(base, LoraConfig(**settings))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize("name", BASES)
class TestTasks:
    def test_base_and_adapter(self, tmp_path, name):
        model, folder = save(tmp_path, name)
        task = BASES[name][2]
        loaded = getattr(tunerkit, f"AutoPeftModelFor{name}").from_pretrained(folder)
        assert type(loaded) is getattr(tunerkit, f"PeftModelFor{name}")
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        torch.testing.assert_close(run(loaded, task), run(model, task))

    def test_as_in_peft(self, tmp_path, name):
        if name == "Seq2SeqLM":
            pytest.skip("PEFT 0.21.2 cannot make its class for this task with transformers 5")
        _, folder = save(tmp_path, name)
        theirs, ours = (
            getattr(module, f"AutoPeftModelFor{name}").from_pretrained(folder) for module in (peft, tunerkit)
        )
        task = BASES[name][2]
        torch.testing.assert_close(run(ours, task), run(theirs, task), rtol=0, atol=1e-5)

    def test_any_task(self, tmp_path, name):
        model, folder = save(tmp_path, name)
        loaded = tunerkit.AutoPeftModel.from_pretrained(folder)
        assert type(loaded) is type(model)


class TestArguments:
    def test_of_both(self, tmp_path):
        _, folder = save(tmp_path, "CausalLM")
        loaded = tunerkit.AutoPeftModelForCausalLM.from_pretrained(
            folder, "other", is_trainable=True, dtype=torch.bfloat16, autocast_adapter_dtype=False, token=False
        )
        assert list(loaded.peft_config) == ["other"]
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert any(parameter.requires_grad for parameter in loaded.parameters())

    def test_subfolder(self, tmp_path):
        model, folder = save(tmp_path, "CausalLM")
        model.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
        model.save_pretrained(folder)
        loaded = tunerkit.AutoPeftModelForCausalLM.from_pretrained(folder, subfolder="second")
        assert loaded.peft_config["default"].target_modules == {"v_proj"}

    def test_config(self, tmp_path):
        _, folder = save(tmp_path, "CausalLM")
        config = tunerkit.PeftConfig.from_pretrained(folder)
        config.lora_alpha = 0
        loaded = tunerkit.AutoPeftModelForCausalLM.from_pretrained(folder, config=config)
        with loaded.disable_adapter():
            expected = run(loaded, "CAUSAL_LM")
        torch.testing.assert_close(run(loaded, "CAUSAL_LM"), expected)


class TestWithoutATask:
    def test_the_class_is_in_the_config(self, tmp_path):
        model, folder = save(tmp_path, "CausalLM", task_type=None)
        for kind in (tunerkit.AutoPeftModel, tunerkit.AutoPeftModelForCausalLM):
            loaded = kind.from_pretrained(folder)
            assert type(loaded.get_base_model()) is transformers.LlamaForCausalLM
            torch.testing.assert_close(run(loaded, None), run(model, None))

    def test_neither(self, tmp_path):
        model, folder = save(tmp_path, "CausalLM", task_type=None)
        change(folder, auto_mapping=None)
        loaded = tunerkit.AutoPeftModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(run(loaded, None), run(model, None))
        with pytest.raises(CheckpointError, match=r"names no task and no class of its base model \(\{\}\)"):
            tunerkit.AutoPeftModel.from_pretrained(folder)

    def test_another_library(self, tmp_path, monkeypatch):
        _, folder = save(tmp_path, "CausalLM", task_type=None)
        change(folder, auto_mapping={"base_model_class": "Base", "parent_library": "toy_library"})
        (tmp_path / "toy_library.py").write_text(
            "from transformers import LlamaForCausalLM as Base\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(CheckpointError, match=r"pass import_allowlist=\['toy_library'\]"):
            tunerkit.AutoPeftModel.from_pretrained(folder)
        assert "toy_library" not in sys.modules
        tunerkit.AutoPeftModel.from_pretrained(folder, import_allowlist=["toy_library"])

    @pytest.mark.parametrize("library", ["transformers", "transformers.nowhere"])
    def test_a_class_that_is_not_there(self, tmp_path, library):
        _, folder = save(tmp_path, "CausalLM", task_type=None)
        change(folder, auto_mapping={"base_model_class": "Nothing", "parent_library": library})
        with pytest.raises(CheckpointError, match=rf"is of the class {library}.Nothing, which is not here"):
            tunerkit.AutoPeftModel.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore::tunerkit.errors.SaveWarning")
def test_a_larger_tokenizer(tmp_path):
    _, folder = save(tmp_path, "CausalLM")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(40)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(40)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    loaded = tunerkit.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert loaded.get_base_model().get_input_embeddings().weight.shape[0] == 40


class TestRefused:
    def test_another_task(self, tmp_path):
        _, folder = save(tmp_path, "CausalLM")
        with pytest.raises(ArgumentError, match=r"is for CAUSAL_LM\. Use AutoPeftModelForCausalLM, or AutoPeftModel"):
            tunerkit.AutoPeftModelForSeq2SeqLM.from_pretrained(folder)

    def test_no_base_model(self, tmp_path):
        _, folder = save(tmp_path, "CausalLM")
        change(folder, base_model_name_or_path=None)
        with pytest.raises(CheckpointError, match="does not say which base model the adapter is for"):
            tunerkit.AutoPeftModelForCausalLM.from_pretrained(folder)

    def test_no_adapter(self, tmp_path):
        with pytest.raises(CheckpointNotFoundError):
            tunerkit.AutoPeftModelForCausalLM.from_pretrained(tmp_path)

    def test_instances(self):
        with pytest.raises(ArgumentError, match=r"Call AutoPeftModelForCausalLM.from_pretrained\(folder\)"):
            tunerkit.AutoPeftModelForCausalLM()

    def test_without_transformers(self, tmp_path, monkeypatch):
        _, folder = save(tmp_path, "CausalLM")
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(TunerkitError, match=r"pip install 'tunerkit\[transformers\]'"):
            tunerkit.AutoPeftModelForCausalLM.from_pretrained(folder)
