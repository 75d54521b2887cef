"""(IA)³ here and in PEFT: equal names, outputs, gradients, steps, files and merged models."""

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
    quiet,
    run,
)
from tunerkit_ia3 import IA3Config

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
    feedforward=st.sampled_from([[], "head", r"layers\.\d", r".*0", r".*"]),
    init=st.booleans(),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_linear_layers_of_any_shape(tmp_path_factory, sizes, rows, bias, feedforward, init):
    torch.manual_seed(0)
    config = IA3Config(target_modules="all-linear", feedforward_modules=feedforward, init_ia3_weights=init)
    inputs = {"x": torch.randn(rows, sizes[0])}
    check_parity(Mlp(sizes, bias=bias), config, inputs, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize(
    ("base", "selection"),
    [
        ("bert", {}),
        ("bert", {"task_type": "FEATURE_EXTRACTION"}),
        ("bert", {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]}),
        ("bert", {"target_modules": ["query", "intermediate.dense"], "feedforward_modules": []}),
        ("bert", {"target_modules": ["query", "output.dense"]}),
        ("bert", {"target_modules": r".*layer\.1\..*(query|dense)", "feedforward_modules": r".*\.output\.dense"}),
        ("bert", {"target_modules": "all-linear", "feedforward_modules": r".*output\.dense"}),
        ("bert", {"exclude_modules": ["attention.output.dense", "key"]}),
        ("llama", {}),
        ("llama", {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("llama", {"target_modules": "all-linear", "feedforward_modules": r".*mlp.*"}),
        ("llama", {"target_modules": r".*(k|v|down)_proj", "exclude_modules": r".*layers\.0\..*"}),
    ],
    indirect=["base"],
)
def test_selections_on_transformers(base, selection, embeds, tmp_path):
    check_parity(base, IA3Config(**selection), embeds, tmp_path)


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["layers.0", "head"], "feedforward_modules": ["head"]},
        {"target_modules": ["0"], "feedforward_modules": []},
        {"target_modules": r"layers\.\d", "feedforward_modules": r"layers\.1"},
        {"target_modules": "all-linear", "feedforward_modules": r".*1", "exclude_modules": ["head"]},
    ],
)
def test_selections_on_a_plain_model(mlp, selection, x, tmp_path):
    check_parity(mlp, IA3Config(**selection), x, tmp_path)


def test_default_feedforward_modules_are_saved_so_that_peft_can_read_them(llama, embeds, tmp_path):
    # PEFT writes `down_proj` here, which is not targeted, and then refuses its own file.
    pair = Pair(llama, IA3Config(target_modules=["k_proj", "v_proj"]), embeds)
    pair.check_parameters()
    pair.check_outputs()
    pair.ours.save_pretrained(tmp_path / "ours")
    pair.theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="subset"):
        peft.PeftConfig.from_pretrained(tmp_path / "theirs")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours")
    assert_close(run(theirs, embeds), run(pair.theirs, embeds))
    for folder in ("ours", "theirs"):
        ours = tunerkit.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / folder)
        assert_close(run(ours, embeds), run(pair.theirs, embeds))


def test_all_linear_layers_with_a_list_of_feedforward_modules(mlp, x, tmp_path):
    # The names of the layers are saved in place of "all-linear"; PEFT then misses the list's entries among them.
    pair = Pair(mlp, IA3Config(target_modules="all-linear", feedforward_modules=["1", "head"]), x)
    pair.check_parameters()
    pair.check_outputs()
    pair.ours.save_pretrained(tmp_path / "ours")
    pair.theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        ours = tunerkit.PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path / folder)
        assert_close(run(ours, x), run(pair.theirs, x))


def test_token_ids(llama):
    ids = torch.arange(10).reshape(2, 5)
    pair = Pair(llama, IA3Config(task_type="CAUSAL_LM"), {"input_ids": ids, "labels": ids})
    assert pair.ours(**pair.inputs).loss.item() == pytest.approx(pair.theirs(**pair.inputs).loss.item(), abs=1e-5)


def test_printed_counts(llama, embeds, capsys):
    pair = Pair(llama, IA3Config(), embeds)
    pair.ours.print_trainable_parameters()
    ours = capsys.readouterr().out
    pair.theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert ours.startswith("trainable params: 112 || all params: ")


@pytest.mark.parametrize(("base", "inputs"), [("bert", "embeds"), ("mlp", "x")], indirect=["base"])
def test_two_adapters(base, inputs, request, tmp_path):
    first, second = (["query"], ["query", "output.dense"]) if inputs == "embeds" else (["head"], ["head", "layers.0"])
    pair = Pair(base, IA3Config(target_modules=first, feedforward_modules=[]), request.getfixturevalue(inputs))
    single = run(pair.ours, pair.inputs)
    pair.add("other", IA3Config(target_modules=second, feedforward_modules=second[1:]))
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


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_adapters_put_in_without_a_wrapper(mlp, x, adapter_name):
    config = IA3Config(target_modules=["layers.0", "head"], feedforward_modules=["head"])
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
    config = IA3Config(target_modules=["layers.0", "head"], feedforward_modules=["head"])
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


def test_weights_of_a_file(mlp, x, tmp_path):
    pair = Pair(mlp, IA3Config(target_modules=["head"], feedforward_modules=["head"]), x)
    pair.ours.save_pretrained(tmp_path)
    assert_same_tensors(tunerkit.load_peft_weights(tmp_path), peft.load_peft_weights(tmp_path))
