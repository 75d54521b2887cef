"""LoRA here and in PEFT: equal names, outputs, gradients, steps, files and merged models."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tunerkit
from tunerkit.testing.parity import (
    Pair,
    assert_close,
    assert_same_tensors,
    check_parity,
    describe_parameters,
    moved_tensors,
    peft_config,
    run,
)
from tunerkit_lora import LoraConfig

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")


class Mlp(nn.Module):
    def __init__(self, sizes=(6, 8, 4), *, bias=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair, bias=bias) for pair in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], 3, bias=bias)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,  # weights as large as a trained model's, so that attention does something
}


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**TINY))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))


@pytest.fixture
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def x():
    return {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def embeds():
    return {"inputs_embeds": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))}


@given(
    sizes=st.lists(st.integers(2, 9), min_size=2, max_size=4),
    rows=st.integers(2, 6),
    bias=st.booleans(),
    r=st.integers(1, 10),
    lora_alpha=st.integers(2, 20),
    use_rslora=st.booleans(),
    init=st.sampled_from([True, False, "gaussian"]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_linear_layers_of_any_shape(tmp_path_factory, sizes, rows, bias, r, lora_alpha, use_rslora, init):
    torch.manual_seed(0)
    config = LoraConfig(
        r=r, lora_alpha=lora_alpha, use_rslora=use_rslora, init_lora_weights=init, target_modules="all-linear"
    )
    inputs = {"x": torch.randn(rows, sizes[0])}
    check_parity(Mlp(sizes, bias=bias), config, inputs, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(
    ("base", "selection"),
    [
        ("bert", {}),
        ("bert", {"task_type": "FEATURE_EXTRACTION"}),
        ("bert", {"target_modules": ["query", "output.dense"]}),
        ("bert", {"target_modules": ["attention.output.dense"]}),
        ("bert", {"target_modules": ["encoder.layer.0.attention.self.key", "pooler.dense"]}),
        ("bert", {"target_modules": r".*layer\.1\..*(query|key)"}),
        ("bert", {"target_modules": "all-linear"}),
        ("bert", {"target_modules": "all-linear", "exclude_modules": ["dense"]}),
        ("llama", {}),
        ("llama", {"target_modules": ["up_proj", "down_proj"]}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}),
        ("bert", {"target_modules": ["key", "pooler.dense"], "layers_to_transform": [0], "layers_pattern": ["layer"]}),
        ("llama", {"target_modules": ["self_attn.o_proj", "k_proj"], "r": 5, "lora_alpha": 7, "use_rslora": True}),
    ],
    indirect=["base"],
)
def test_selections_on_transformers(base, selection, embeds, tmp_path):
    check_parity(base, LoraConfig(**selection), embeds, tmp_path)


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["layers.0", "head"]},
        {"target_modules": ["0"]},
        {"target_modules": r"layers\.\d"},
        {"target_modules": "all-linear", "exclude_modules": ["head"]},
    ],
)
def test_selections_on_a_plain_model(mlp, selection, x, tmp_path):
    check_parity(mlp, LoraConfig(**selection), x, tmp_path)


def test_output_layer(llama, embeds):
    # Without files: PEFT puts the embeddings of the base into them when the output layer is targeted.
    pair = Pair(llama, LoraConfig(target_modules=["lm_head"]), embeds)
    pair.check_parameters()
    pair.check_outputs()
    pair.check_disabled()
    pair.check_gradients()
    pair.check_steps()
    pair.check_merged()


def test_token_ids(llama):
    ids = torch.arange(10).reshape(2, 5)
    pair = Pair(llama, LoraConfig(task_type="CAUSAL_LM"), {"input_ids": ids, "labels": ids})
    assert pair.ours(**pair.inputs).loss.item() == pytest.approx(pair.theirs(**pair.inputs).loss.item(), abs=1e-5)


def test_generation(llama):
    pair = Pair(llama, LoraConfig(r=4, task_type="CAUSAL_LM"), {"input_ids": torch.arange(10).reshape(2, 5)})
    ours, theirs = (
        model.generate(**pair.inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for model in (pair.ours, pair.theirs)
    )
    assert torch.equal(ours, theirs)


def test_dropout_of_the_input(mlp, x):
    pair = Pair(mlp, LoraConfig(r=4, lora_dropout=0.5, target_modules=["head"]), x)
    pair.check_outputs()
    outputs = []
    for model in (pair.ours.train(), pair.theirs.train()):
        torch.manual_seed(3)
        outputs.append(run(model, x))
    assert (outputs[1] - run(pair.theirs.eval(), x)).abs().max() > 1e-3
    assert_close(*outputs)


def test_printed_counts(bert, embeds, capsys):
    pair = Pair(bert, LoraConfig(), embeds)
    pair.ours.print_trainable_parameters()
    ours = capsys.readouterr().out
    pair.theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert ours.startswith("trainable params: 1,024 || all params: ")


@pytest.mark.parametrize(("base", "inputs"), [("bert", "embeds"), ("mlp", "x")], indirect=["base"])
def test_two_adapters(base, inputs, request, tmp_path):
    first, second = (["query"], ["query", "key"]) if inputs == "embeds" else (["head"], ["head", "layers.0"])
    pair = Pair(base, LoraConfig(r=4, target_modules=first), request.getfixturevalue(inputs))
    single = run(pair.ours, pair.inputs)
    pair.add("other", LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=second))
    pair.check_parameters()
    pair.check_tensors()
    assert torch.equal(run(pair.ours, pair.inputs), single)
    pair.check_outputs()

    pair.set_adapter("other")
    assert (run(pair.ours, pair.inputs) - single).abs().max() > 1e-3
    pair.check_parameters()
    pair.check_outputs()
    pair.check_disabled()
    pair.check_files(tmp_path)

    pair.set_adapter("other")
    pair.check_gradients()
    pair.check_steps()
    pair.check_merged()


def test_adapters_saved_together_are_loaded_together(mlp, x, tmp_path):
    pair = Pair(mlp, LoraConfig(r=4, target_modules=["head"]), x)
    pair.add("other", LoraConfig(r=3, target_modules=["layers.1"]))
    pair.check_files(tmp_path)
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        models = []
        for library in (tunerkit, peft):
            model = library.PeftModel.from_pretrained(copy.deepcopy(mlp), folder)
            result = model.load_adapter(folder / "other", adapter_name="other")
            assert not result.unexpected_keys
            model.set_adapter("other")
            models.append(model)
        assert describe_parameters(models[0]) == describe_parameters(models[1])
        pair.set_adapter("other")
        assert_close(run(models[0], x), run(pair.theirs, x))


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_adapters_put_in_without_a_wrapper(mlp, x, adapter_name):
    config = LoraConfig(r=4, target_modules=["layers.0", "head"])
    ours = tunerkit.inject_adapter_in_model(config, copy.deepcopy(mlp), adapter_name=adapter_name)
    theirs = peft.inject_adapter_in_model(peft_config(config), copy.deepcopy(mlp), adapter_name=adapter_name)
    assert type(ours) is Mlp
    assert describe_parameters(ours) == describe_parameters(theirs)

    tensors = moved_tensors(theirs, adapter_name, torch.Generator().manual_seed(0))
    peft.set_peft_model_state_dict(theirs, dict(tensors), adapter_name=adapter_name)
    result = tunerkit.set_peft_model_state_dict(ours, dict(tensors), adapter_name=adapter_name)
    assert not result.unexpected_keys
    assert_same_tensors(tunerkit.get_peft_model_state_dict(ours, adapter_name=adapter_name), tensors)
    assert (run(theirs, x) - run(mlp, x)).abs().max() > 1e-3
    assert_close(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("kept", [("layers.0", "head"), ("head",)])
def test_adapters_put_where_tensors_are(mlp, kept):
    config = LoraConfig(r=4, target_modules=["layers.0", "head"])
    source = peft.inject_adapter_in_model(peft_config(config), copy.deepcopy(mlp))
    tensors = {
        key: tensor for key, tensor in peft.get_peft_model_state_dict(source).items() if key.startswith(tuple(kept))
    }
    with warnings.catch_warnings():
        # Both may say that the tensors and the config name different modules.
        warnings.simplefilter("ignore")
        ours = tunerkit.inject_adapter_in_model(config, copy.deepcopy(mlp), state_dict=tensors)
        theirs = peft.inject_adapter_in_model(peft_config(config), copy.deepcopy(mlp), state_dict=tensors)
    assert set(tunerkit.get_peft_model_state_dict(ours)) == set(tensors)
    assert describe_parameters(ours) == describe_parameters(theirs)


def test_empty_weights_are_filled_at_load(mlp, x, tmp_path):
    pair = Pair(mlp, LoraConfig(r=4, target_modules=["head"]), x)
    pair.theirs.save_pretrained(tmp_path)
    config = tunerkit.PeftConfig.from_pretrained(tmp_path)
    model = tunerkit.get_peft_model(copy.deepcopy(mlp), config, low_cpu_mem_usage=True)
    assert {name for name, value in model.named_parameters() if value.is_meta} == {
        "base_model.model.head.lora_A.default.weight",
        "base_model.model.head.lora_B.default.weight",
    }
    tunerkit.set_peft_model_state_dict(model, tunerkit.load_peft_weights(tmp_path), low_cpu_mem_usage=True)
    assert not any(value.is_meta for value in model.parameters())
    assert_close(run(model.eval(), x), run(pair.theirs, x))


def test_weights_of_a_file(mlp, x, tmp_path):
    pair = Pair(mlp, LoraConfig(r=4, target_modules=["head"]), x)
    pair.ours.save_pretrained(tmp_path)
    assert_same_tensors(tunerkit.load_peft_weights(tmp_path), peft.load_peft_weights(tmp_path))
