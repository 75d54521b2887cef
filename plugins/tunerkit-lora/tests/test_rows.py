"""Rows with adapters of their own, beside PEFT."""

import copy

import pytest
import torch

from tunerkit import get_peft_model
from tunerkit.errors import RouteError, UnknownAdapterError
from tunerkit.testing.bench import move
from tunerkit.testing.parity import MOVED, Pair, assert_close
from tunerkit_lora import LoraConfig

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")
ia3 = pytest.importorskip("tunerkit_ia3", reason="a second method to compare: tunerkit-ia3")

ROWS = ["one", "two", "__base__", "two"]
IDS = torch.randint(2, 50, (4, 5), generator=torch.Generator().manual_seed(0))
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "min_new_tokens": 8}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval(), ["q_proj", "v_proj", "embed_tokens"], {"input_ids": IDS}


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    return transformers.T5ForConditionalGeneration(config).eval(), ["q", "v", "wi"], inputs


@pytest.fixture(params=[llama, t5])
def pair(request):
    base, targets, inputs = request.param()
    pair = Pair(base, LoraConfig(r=2, target_modules=targets), inputs, "one")
    pair.add("two", LoraConfig(r=3, lora_alpha=4, target_modules=targets[:1]))
    return pair


def test_outputs(pair):
    with torch.no_grad():
        ours, theirs = (model(**pair.inputs, adapter_names=ROWS).logits for model in (pair.ours, pair.theirs))
        plain = pair.ours(**pair.inputs).logits
    assert_close(ours, theirs)
    assert (ours - plain).abs().amax(dim=(1, 2))[1:].min() > MOVED


def test_factors_of_embeddings_are_not_stacked(monkeypatch):
    base, _, inputs = llama()
    pair = Pair(base, LoraConfig(r=2, target_modules=["embed_tokens"]), inputs, "one")
    pair.add("two", LoraConfig(r=2, target_modules=["embed_tokens"]))
    monkeypatch.setattr(torch, "stack", None)
    with torch.no_grad():
        assert_close(*(model(**inputs, adapter_names=ROWS).logits for model in (pair.ours, pair.theirs)))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("start", [True, "pissa"])
def test_variants(use_dora, start):
    base, targets, inputs = llama()
    config = LoraConfig(r=2, target_modules=targets[:2], use_dora=use_dora, init_lora_weights=start)
    model = get_peft_model(base, config, "one").eval()
    model.add_adapter("two", config)
    for number, name in enumerate(("one", "two")):
        move(model, name, seed=number)
    outputs = {}
    for name in ("one", "two", "__base__"):
        with torch.no_grad(), model.use_adapter([] if name == "__base__" else name):
            outputs[name] = model(**inputs).logits
    with torch.no_grad():
        found = model(**inputs, adapter_names=ROWS).logits
    assert_close(found, torch.stack([outputs[name][row] for row, name in enumerate(ROWS)]))
    assert (outputs["one"] - outputs["two"]).abs().max() > MOVED


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generate(pair, how):
    ours, theirs = (model.generate(**CALL, **how, adapter_names=ROWS) for model in (pair.ours, pair.theirs))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, pair.ours.generate(**CALL, **how))


def test_generate_several_sequences_without_beams(pair):
    how = {"num_return_sequences": 2, "do_sample": True}
    with pytest.raises(ValueError, match="but got 4 and 8"):
        pair.theirs.generate(**CALL, **how, adapter_names=ROWS)
    torch.manual_seed(0)
    ours = pair.ours.generate(**CALL, **how, adapter_names=["two"] * 4)
    torch.manual_seed(0)
    with pair.ours.use_adapter("two"):
        assert torch.equal(ours, pair.ours.generate(**CALL, **how))


@pytest.mark.parametrize("where", ["position", "name", "model", "block"])
def test_generate_finds_the_number_of_beams(pair, where):
    expected = pair.ours.generate(**CALL, num_beams=3, adapter_names=ROWS)
    config = copy.deepcopy(pair.ours.generation_config)
    config.num_beams = 3
    call = {name: value for name, value in CALL.items() if name != "input_ids"}
    if where == "position":
        found = pair.ours.generate(IDS, config, **call, adapter_names=ROWS)
    elif where == "name":
        found = pair.ours.generate(IDS, generation_config=config, **call, adapter_names=ROWS)
    elif where == "model":
        pair.ours.get_base_model().generation_config = config
        found = pair.ours.generate(IDS, **call, adapter_names=ROWS)
    else:
        with pair.ours.use_rows(ROWS, repeats=3):
            found = pair.ours.get_base_model().generate(IDS, config, **call)
    assert torch.equal(found, expected)


def test_number_of_names(pair):
    with pytest.raises(RouteError, match="adapter_names has 2 names"):
        pair.ours.generate(**CALL, adapter_names=["one", "two"])


def test_training(pair):
    with pytest.raises(ValueError, match="in training mode"):
        pair.theirs.train()(**pair.inputs, adapter_names=ROWS)
    ours = pair.ours.train()
    ours.set_requires_grad(["one", "two"])
    ours(**pair.inputs, adapter_names=ROWS).logits.square().sum().backward()
    trained = {name.split(".")[-2] for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained >= {"one", "two"}


def test_disabled(pair):
    with torch.no_grad(), pair.theirs.disable_adapter():
        theirs = pair.theirs(**pair.inputs, adapter_names=ROWS).logits
        assert torch.equal(theirs, pair.theirs(**pair.inputs).logits)  # the names count for nothing
    with pair.ours.disable_adapter(), pytest.raises(RouteError, match="switched off"):
        pair.ours(**pair.inputs, adapter_names=ROWS)


def test_other_methods_follow_the_names_too():
    base, _, inputs = llama()
    config = ia3.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    pair = Pair(base, config, inputs, "one")
    pair.add("two", config)
    with torch.no_grad():
        theirs = pair.theirs(**inputs).logits
        # PEFT's IA3 does not look at the names, whatever they are.
        assert torch.equal(pair.theirs(**inputs, adapter_names=["no", "such", "names", "!"]).logits, theirs)
        ours = pair.ours(**inputs, adapter_names=ROWS).logits
        with pair.ours.use_adapter("two"):
            assert_close(ours[1], pair.ours(**inputs).logits[1])
        assert_close(ours[2], base(**inputs).logits[2])
        assert_close(ours[0], theirs[0])
    with pytest.raises(UnknownAdapterError, match="no adapter 'no'"):
        pair.ours(**inputs, adapter_names=["no", "such", "names", "!"])


def test_nothing_is_left_after_an_error(pair):
    wrong = {name: value[:3] for name, value in pair.inputs.items()}
    for model in (pair.ours, pair.theirs):
        with torch.no_grad():
            before = model(**wrong).logits
            with pytest.raises(ValueError, match="4"):
                model(**wrong, adapter_names=ROWS)
        if model is pair.ours:
            assert torch.equal(model(**wrong).logits, before)
        else:  # PEFT's hooks stay on the layers, so that the next call is given the names of the last
            with pytest.raises(ValueError, match="but got 4 and 3"):
                model(**wrong)
