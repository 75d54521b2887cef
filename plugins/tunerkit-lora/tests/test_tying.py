"""Adapters of layers that share a weight, beside the living PEFT's and by themselves."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tunerkit
from tunerkit.errors import AdapterStateError, CheckpointError, ConfigError, SaveWarning, TyingWarning
from tunerkit.testing.parity import Pair, quiet
from tunerkit_lora import LoraConfig
from tunerkit_lora.tying import Transposed

IDS = {"input_ids": torch.arange(10).reshape(2, 5)}
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
NO_PEFT = "comparing with PEFT needs it: pip install peft"


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 6)
        self.proj = nn.Linear(6, 6)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Inner()
        self.lm_head = nn.Linear(6, 10, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids):
        hidden = self.model.embed_tokens(input_ids)
        return self.lm_head(hidden + self.model.proj(hidden).tanh())


def make_base():
    torch.manual_seed(0)
    return Tied()


def make_config(**settings):
    return LoraConfig(**{"r": 2, "target_modules": ["embed_tokens", "proj"], "ensure_weight_tying": True, **settings})


def make_model(base=None, **settings):
    """Return a model whose adapter is moved at random."""
    model = tunerkit.get_peft_model(make_base() if base is None else base, make_config(**settings)).eval()
    before = model(**IDS)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.normal_()
    assert (model(**IDS) - before).abs().max() > 1e-3
    return model


def factors(model):
    """Return the factors of the embedding and, turned round, those of the output layer."""
    core = model.get_base_model()
    embedding, head = core.model.embed_tokens, core.lm_head
    return (
        (embedding.lora_embedding_A["default"], head.lora_B["default"]._parameters["weight"]),
        (embedding.lora_embedding_B["default"], head.lora_A["default"]._parameters["weight"]),
    )


def assert_tied(model):
    for ours, theirs in factors(model):
        assert ours is theirs


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaveWarning)
        model.save_pretrained(folder)


def saved_by_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# Beside PEFT


@pytest.fixture
def llama():
    pytest.importorskip("peft", reason=NO_PEFT)
    transformers = pytest.importorskip("transformers", reason="the model that is compared on")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


class TiedPair(Pair):
    """A pair in which PEFT's two parameters on one memory get their values, and gradients, as the one that they are."""

    def move(self, adapter_name):
        theirs = dict(self.theirs.named_parameters())
        with torch.no_grad():
            for name, tensor in self.ours.named_parameters():
                if tensor.requires_grad:
                    tensor.normal_(std=0.5)
                    theirs[name].copy_(tensor)


@pytest.mark.parametrize(
    "targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], r".*embed_tokens", r".*\.q_proj|lm_head"]
)
def test_outputs_gradients_and_steps_are_those_of_peft(llama, targets):
    pair = TiedPair(llama, make_config(target_modules=targets), IDS)
    plain = llama(**IDS).logits
    assert (pair.theirs(**IDS).logits - plain).abs().max() > 1e-3
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (pair.ours, pair.theirs))
    assert {name for name in ours if "lora" in name} == {name for name in theirs if "lora" in name}
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (pair.ours, pair.theirs)
    ]
    for _ in range(2):
        outputs = [model(**IDS).logits for model in (pair.ours, pair.theirs)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        for entry, twin in (("lora_embedding_A", "lora_B"), ("lora_embedding_B", "lora_A")):
            whole = ours[f"{EMBEDDING}.{entry}.default"].grad
            parts = theirs[f"{EMBEDDING}.{entry}.default"].grad, theirs[f"{HEAD}.{twin}.default.weight"].grad
            assert whole.abs().max() > 1e-4
            torch.testing.assert_close(whole, parts[0] + parts[1].t(), atol=1e-5, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(pair.ours(**IDS).logits, pair.theirs(**IDS).logits, atol=1e-5, rtol=1e-4)
    assert (outputs[0] - pair.ours(**IDS).logits).abs().max() > 1e-4


@pytest.mark.parametrize("low", [False, True])
def test_checkpoints_go_both_ways(llama, tmp_path, low):
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    pair = TiedPair(copy.deepcopy(llama), make_config(target_modules=["lm_head", "q_proj"]), IDS)
    expected = pair.theirs(**IDS).logits
    pair.ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    pair.theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert f"{HEAD}.lora_A.weight" in ours
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], atol=0, rtol=0)
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "theirs", low_cpu_mem_usage=low).eval()
    torch.testing.assert_close(loaded(**IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert_tied(loaded)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(**IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_merged_they_are_still_one_weight(llama):
    pair = TiedPair(llama, make_config(target_modules=["embed_tokens"]), IDS)
    expected = pair.theirs(**IDS).logits
    merged = pair.ours.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(**IDS).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_both_start_as_the_output_layer_does(init):
    model = tunerkit.get_peft_model(make_base(), make_config(init_lora_weights=init))
    first = model.get_base_model().lm_head.lora_A["default"].weight
    assert first.shape == (2, 6)
    if init != "gaussian":
        assert first.abs().max() <= 6**-0.5
    core = model.get_base_model()
    assert torch.equal(core.model.embed_tokens.lora_embedding_B["default"], first.t())
    assert bool(core.model.embed_tokens.lora_embedding_A["default"].any()) == (init is False)
    assert torch.equal(model(**IDS), make_base()(**IDS)) == (init is not False)


# By themselves


def test_the_parameters_are_counted_once():
    model = make_model()
    assert model.get_nb_trainable_parameters()[0] == (2 * 10 + 2 * 6) + (2 * 6 + 2 * 6)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_by_torch],  # noqa: S301
)
def test_copies_are_tied_as_well(duplicate):
    model = make_model()
    expected = model(**IDS)
    copied = duplicate(model)
    assert_tied(copied)
    torch.testing.assert_close(copied(**IDS), expected)
    with torch.no_grad():
        factors(copied)[0][0].normal_()
    assert (copied(**IDS) - expected).abs().max() > 1e-3
    assert torch.equal(model(**IDS), expected)


def test_moved_they_stay_tied():
    model = make_model()
    assert_tied(model.double())
    assert model(**IDS).dtype == torch.float64
    assert_tied(model.to(torch.bfloat16))


def test_merging_and_unmerging():
    model = make_model()
    expected, core = model(**IDS), model.get_base_model()
    before = core.lm_head.weight
    model.merge_adapter()
    assert torch.equal(core.lm_head.weight, core.model.embed_tokens.weight)
    torch.testing.assert_close(model(**IDS), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert core.lm_head.weight is core.model.embed_tokens.weight is before


def test_a_second_adapter_is_tied_by_itself_and_deleting_leaves_the_other():
    model = make_model()
    expected = model(**IDS)
    model.add_adapter("other", make_config(r=3))
    core = model.get_base_model()
    assert core.lm_head.lora_A["other"].weight.shape == (3, 6)
    model.delete_adapter("other")
    assert torch.equal(model(**IDS), expected)
    assert_tied(model)
    base = model.unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert type(base.lm_head) is nn.Linear


def test_a_combined_adapter_is_tied():
    model = make_model()
    expected = model(**IDS)
    for kind in ("linear", "svd", "cat"):
        model.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        model.set_adapter(kind)
        torch.testing.assert_close(model(**IDS), expected, atol=1e-4, rtol=1e-4)
        head = model.get_base_model().lm_head.lora_A[kind]
        assert head._parameters["weight"] is model.get_base_model().model.embed_tokens.lora_embedding_B[kind]


@pytest.mark.parametrize("low", [False, True])
def test_checkpoints(tmp_path, low):
    model = make_model()
    expected = model(**IDS)
    save(model, tmp_path)
    loaded = tunerkit.PeftModel.from_pretrained(make_base(), tmp_path, low_cpu_mem_usage=low).eval()
    assert_tied(loaded)
    assert torch.equal(loaded(**IDS), expected)


def test_a_checkpoint_whose_tied_tensors_differ_is_refused(tmp_path):
    save(make_model(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{HEAD}.lora_A.weight"] += 1
    save_file(tensors, file)
    base = make_base()
    with pytest.raises(CheckpointError) as error:
        tunerkit.PeftModel.from_pretrained(base, tmp_path)
    assert str(error.value) == (
        f"{EMBEDDING}.lora_embedding_B and {HEAD}.lora_A.weight are one tensor of the model "
        "(ensure_weight_tying=True), and the checkpoint holds two that differ: they were not tied in training. Load it "
        "with a config that says ensure_weight_tying=False and whose target_modules name all the layers."
    )


def test_swapping_in_place(tmp_path):
    other = make_model()
    expected = other(**IDS)
    save(other, tmp_path)
    model = make_model()
    with torch.no_grad():
        factors(model)[0][0].add_(1)
    assert (model(**IDS) - expected).abs().max() > 1e-3
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(**IDS), expected)
    assert_tied(model)


def test_swapping_in_tensors_that_were_not_tied_is_refused(tmp_path):
    model, other = make_model(), make_model()
    save(other, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"{HEAD}.lora_A.weight"] += 1
    before = model(**IDS)
    with pytest.raises(CheckpointError) as error:
        tunerkit.hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert f"{HEAD}.lora_A.weight" in str(error.value)
    assert f"{EMBEDDING}.lora_embedding_B" in str(error.value)
    assert "are one tensor of the model (ensure_weight_tying=True), and the checkpoint holds two" in str(error.value)
    assert torch.equal(model(**IDS), before)
    assert_tied(model)


def test_room_for_another_rank_is_refused():
    model = make_model()
    expected = model(**IDS)
    with pytest.raises(AdapterStateError) as error:
        tunerkit.prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert str(error.value) == (
        "The factors of an adapter are tied to an embedding's (ensure_weight_tying=True), so their rank stays 2 and "
        "cannot become 4. Load the other as another adapter."
    )
    assert torch.equal(model(**IDS), expected)
    assert_tied(model)


def test_rows_of_a_batch():
    model = make_model()
    model.add_adapter("other", make_config(r=3, init_lora_weights=False))
    single = []
    for name, row in (("default", 0), ("other", 1)):
        model.set_adapter(name)
        single.append(model(input_ids=IDS["input_ids"][row : row + 1]))
    mixed = model(**IDS, adapter_names=["default", "other"])
    torch.testing.assert_close(mixed, torch.cat(single), atol=1e-5, rtol=1e-4)


def test_with_dora(tmp_path):
    model = make_model(use_dora=True)
    expected = model(**IDS)
    save(model, tmp_path)
    loaded = tunerkit.PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert_tied(loaded)
    torch.testing.assert_close(loaded(**IDS), expected)


class TwoTables(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(10, 6)
        self.decoder = nn.Embedding(10, 6)
        self.decoder.weight = self.shared.weight
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.shared.weight

    def forward(self, input_ids):
        return self.head(self.shared(input_ids) * self.decoder(input_ids))


def test_two_embeddings_and_an_output_layer(tmp_path):
    model = make_model(TwoTables(), target_modules=["head"])
    core = model.get_base_model()
    own = core.shared.lora_embedding_A["default"]
    assert core.decoder.lora_embedding_A["default"] is own is core.head.lora_B["default"]._parameters["weight"]
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 6


@pytest.mark.parametrize("start", ["pissa", "mica", "orthogonal"])
def test_a_start_of_one_layer_is_refused(start):
    base = make_base()
    with pytest.raises(ConfigError) as error:
        tunerkit.get_peft_model(base, make_config(init_lora_weights=start))
    assert str(error.value) == (
        "ensure_weight_tying=True needs factors that start the same on both of two tied layers: set init_lora_weights "
        "to True, False or 'gaussian'."
    )
    assert type(base.model.embed_tokens) is nn.Embedding


def test_another_rank_is_refused():
    with pytest.raises(ConfigError) as error:
        tunerkit.get_peft_model(make_base(), make_config(rank_pattern={"lm_head": 4}))
    assert str(error.value) == (
        "rank_pattern or alpha_pattern give two tied layers other ranks or scales: (2, 4.0) and (4, 2.0) "
        "(ensure_weight_tying=True). Give both the same."
    )


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.table, self.out = nn.Embedding(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.second(self.first(x)))


def test_what_cannot_be_tied_is_refused():
    base = TwoLinears()
    with pytest.raises(tunerkit.errors.UnsupportedSiteError) as error:
        tunerkit.get_peft_model(base, make_config(target_modules=["second"]))
    assert str(error.value) == (
        "Two modules share a weight, and a LoraAdapter cannot share its tensors with a LoraAdapter "
        "(ensure_weight_tying=True). Leave ensure_weight_tying out, or target neither."
    )
    assert type(base.first) is nn.Linear


def test_nothing_to_tie_is_said():
    with pytest.warns(TyingWarning) as caught:
        tunerkit.get_peft_model(make_base(), make_config(target_modules=["proj"]))
    assert [str(one.message) for one in caught] == [
        "ensure_weight_tying=True ties nothing: nothing that is adapted or saved shares a weight."
    ]


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["proj"], "modules_to_save": ["lm_head"]}])
def test_without_the_option_it_is_said_what_comes_apart(settings):
    with pytest.warns(TyingWarning) as caught:
        model = tunerkit.get_peft_model(make_base(), make_config(ensure_weight_tying=False, **settings))
    expected = (
        "'model.embed_tokens', 'lm_head' share a weight, which training only one of them, or each by itself, makes "
        "differ. Set ensure_weight_tying=True to tie what is trained too."
    )
    assert [str(one.message) for one in caught] == [expected]
    assert torch.equal(model(**IDS), make_base()(**IDS))


def test_a_printed_layer_says_what_is_tied():
    layer = Transposed(nn.Parameter(torch.ones(3, 2)))
    assert repr(layer) == "Transposed(in_features=3, out_features=2, tied)"
