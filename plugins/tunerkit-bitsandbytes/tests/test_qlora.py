"""QLoRA as users of PEFT write it: a quantised transformers model, prepared, adapted, trained, saved and loaded."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from quantised import TINY, quantised
from safetensors.torch import load_file

from tunerkit import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tunerkit.errors import QuantisationWarning
from tunerkit.preparation import checkpoints_gradients
from tunerkit.testing.parity import quiet
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

transformers = pytest.importorskip("transformers", reason="QLoRA is shown on its models: pip install transformers")

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
NOT_REENTRANT = {"use_reentrant": False}
IA3 = IA3Config(task_type="CAUSAL_LM")


def make_plain():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).to(torch.bfloat16)


def make_llama(form):
    return quantised(make_plain(), form, **({} if form == "int8" else {"compute_dtype": torch.bfloat16}))


def make_batch():
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_qlora(form, config, tmp_path):
    base = prepare_model_for_kbit_training(make_llama(form), gradient_checkpointing_kwargs=NOT_REENTRANT)
    assert base.model.norm.weight.dtype == base.lm_head.weight.dtype == torch.float32
    assert checkpoints_gradients(base)
    model = get_peft_model(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name or "ia3_" in name for name in trained)
    before = {
        key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" not in key and "ia3" not in key
    }

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(12):
        loss = model(**make_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * (0.6 if config is LORA else 0.97), losses
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())

    model.eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in key or "ia3_" in key for key in saved)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(make_llama(form)), tmp_path).eval()
    with torch.no_grad():
        expected = model(**make_batch())
        found = loaded(**make_batch())
    assert torch.equal(found.logits, expected.logits)
    with pytest.warns(QuantisationWarning, match="quantised layers"):
        merged = loaded.merge_and_unload()
    with torch.no_grad():
        assert merged(**make_batch()).loss < losses[0]


def test_all_linear_are_the_quantised_ones():
    model = get_peft_model(make_llama("nf4"), LORA)
    adapted = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 14
    assert all(isinstance(model.base_model.model.get_submodule(name).base_layer, Linear4bit) for name in adapted)


def test_checkpoint_is_read_by_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(make_llama("nf4"), config).eval()
    model.save_pretrained(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(make_llama("nf4"), tmp_path).eval()
    batch = make_batch()
    with torch.no_grad():
        ours, other = model(**batch).logits.float(), theirs(**batch).logits.float()
        with model.disable_adapter():
            plain = model(**batch).logits.float()
    assert (ours - plain).abs().max() > 0.1
    assert (ours - other).abs().max() < 0.02 * ours.abs().max()  # bfloat16


def test_model_that_transformers_quantises(tmp_path):
    pytest.importorskip("accelerate", reason="transformers quantises with it: pip install accelerate")
    make_plain().save_pretrained(tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    model = get_peft_model(prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=NOT_REENTRANT), LORA)
    model.train()
    model(**make_batch()).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 28
    assert all(parameter.grad is not None for parameter in trained)
    merged = model.merge_and_unload(dequantize=True)
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
