"""Weighted combinations of LoRA adapters: PEFT's results where PEFT is right, and identities everywhere."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tunerkit
from tunerkit.errors import AdapterNameError, CombinationError, UnknownAdapterError
from tunerkit.testing.bench import Snapshot
from tunerkit.testing.parity import Pair, assert_close, run
from tunerkit.weighted import add_combined
from tunerkit_lora import LoraConfig
from tunerkit_lora.combination import COMBINATIONS

OF_FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.mix = nn.Conv1d(6, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, tokens):
        return self.last(torch.tanh(self.mix(self.words(tokens).mT).mT))


TOKENS = {"tokens": torch.arange(24).reshape(2, 12) % 12}
TARGETS = ["words", "mix", "last"]


def base():
    torch.manual_seed(0)
    return Net().eval()


def pair_of(*configs, names=("one", "two", "three")):
    first, *others = configs
    pair = Pair(base(), first, TOKENS, names[0])
    for name, config in zip(names[1:], others, strict=False):
        pair.add(name, config)
    return pair


def config(r=4, alpha=None, targets=("last", "words"), **values):
    return LoraConfig(r=r, lora_alpha=r if alpha is None else alpha, target_modules=list(targets), **values)


def update(model, name, path):
    return model.get_base_model().get_submodule(path).get_delta_weight(name)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.0, -0.5)], ids=str)
def test_combinations_are_those_of_peft(combination, weights, monkeypatch):
    # Of an embedding's update PEFT prunes the transposed matrix, so that the same draws leave out other numbers.
    targets = ["last"] if combination.startswith("dare") and combination.endswith("svd") else ["last", "words"]
    pair = pair_of(config(4, 6, targets), config(4, 3, targets))
    rest = {} if combination in ("svd", "linear", "cat") else {"density": 0.6}
    bernoulli = torch.bernoulli
    for model in (pair.ours, pair.theirs):
        # Not the generator that the new adapter's start is drawn with, of which PEFT asks more.
        generator = torch.Generator().manual_seed(3)
        draw = functools.partial(bernoulli, generator=generator)
        monkeypatch.setattr(torch, "bernoulli", draw)
        model.add_weighted_adapter(["one", "two"], list(weights), "new", combination, **rest)
    assert pair.ours.peft_config["new"].r == pair.theirs.peft_config["new"].r
    alone = run(pair.ours, TOKENS)
    pair.set_adapter("new")
    assert (run(pair.ours, TOKENS) - alone).abs().max() > 1e-3
    assert_close(run(pair.ours, TOKENS), run(pair.theirs, TOKENS))


def test_clamping_is_that_of_peft():
    pair = pair_of(config(), config(), names=("one", "two"))
    for model in (pair.ours, pair.theirs):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", svd_rank=3, svd_clamp=0.8)
    pair.set_adapter("new")
    assert_close(run(pair.ours, TOKENS), run(pair.theirs, TOKENS))


def test_convolutions_are_those_of_peft():
    pair = pair_of(config(targets=["mix"]), config(targets=["mix"]))
    for combination in ("cat", "linear", "ties"):
        for model in (pair.ours, pair.theirs):
            rest = {"density": 0.5} if combination == "ties" else {}
            model.add_weighted_adapter(["one", "two"], [0.7, 0.4], combination, combination, **rest)
        pair.set_adapter(combination)
        assert_close(run(pair.ours, TOKENS), run(pair.theirs, TOKENS))


@given(
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    alphas=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    use_rslora=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_exact_combinations_sum_the_updates(ranks, alphas, weights, use_rslora):
    model = tunerkit.get_peft_model(base(), config(ranks[0], alphas[0], TARGETS, use_rslora=use_rslora), "one")
    model.add_adapter("two", config(ranks[1], alphas[1], TARGETS[1:], rank_pattern={"last": ranks[1] + 1}))
    fill(model)
    for name, rest in (("cat", {}), ("svd", {"svd_rank": 12})):
        model.add_weighted_adapter(["one", "two"], list(weights), name, name, **rest)
        for path in TARGETS:
            expected = weights[0] * update(model, "one", path)
            if path != "words":
                expected = expected + weights[1] * update(model, "two", path)
            torch.testing.assert_close(update(model, name, path), expected, atol=1e-4, rtol=1e-4)


def fill(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"alpha": 9, "use_rslora": True},
        {"rank_pattern": {"last": 2}, "alpha_pattern": {"words": 7}},
        {"lora_bias": True, "targets": ["last", "mix"]},
    ],
    ids=str,
)
def test_one_adapter_with_weight_one_is_taken_over(combination, values):
    model = tunerkit.get_peft_model(base(), config(**values), "one").eval()
    fill(model)
    expected = run(model, TOKENS)
    model.add_weighted_adapter(["one"], [1.0], "new", combination, density=0.5)
    model.set_adapter("new")
    assert_close(run(model, TOKENS), expected)


def test_biases_of_the_second_factor_are_summed():
    model = tunerkit.get_peft_model(base(), config(4, 6, ["last"], lora_bias=True), "one").eval()
    model.add_adapter("two", config(2, 3, ["last"], lora_bias=True))
    fill(model)
    one, two = (model.get_base_model().last.adapters[name] for name in ("one", "two"))
    model.add_weighted_adapter(["one", "two"], [0.5, -2], "new", "cat")
    new = model.get_base_model().last.adapters["new"]
    expected = 0.5 * one.scaling * one.lora_B.bias - 2 * two.scaling * two.lora_B.bias
    torch.testing.assert_close(new.lora_B.bias, expected)


def test_svd_takes_the_closest_factors_of_the_rank():
    model = tunerkit.get_peft_model(base(), config(4, targets=["last"]), "one")
    model.add_adapter("two", config(3, targets=["last"]))
    fill(model)
    whole = update(model, "one", "last") + update(model, "two", "last")
    model.add_weighted_adapter(["one", "two"], [1, 1], "new", svd_rank=2)
    rest = torch.linalg.svdvals(whole)[2:].norm()
    torch.testing.assert_close((whole - update(model, "new", "last")).norm(), rest)
    assert model.peft_config["new"].r == 2


def test_svd_does_not_build_the_sum(monkeypatch):
    model = tunerkit.get_peft_model(nn.Sequential(nn.Linear(300, 400)), LoraConfig(r=2, target_modules=["0"]), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["0"]))
    fill(model)
    seen = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **rest: seen.append(matrix.shape) or svd(matrix, **rest))
    model.add_weighted_adapter(["one", "two"], [1, 1], "new")
    assert seen == [(5, 5)]


def test_the_combination_is_saved_and_loaded_by_both(tmp_path):
    pair = pair_of(config(4, 6), config(3, 3, ["last", "mix"]))
    pair.ours.add_weighted_adapter(["one", "two"], [0.5, 0.5], "new")
    pair.ours.set_adapter("new")
    expected = run(pair.ours, TOKENS)
    pair.ours.save_pretrained(tmp_path, selected_adapters=["new"], save_embedding_layers=False)
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
    for library in (tunerkit, peft):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(pair.base), tmp_path / "new")
        assert_close(run(loaded, TOKENS), expected)


def test_the_new_adapter_is_frozen_and_not_active_until_it_is_set():
    model = tunerkit.get_peft_model(base(), config(), "one").eval()
    fill(model)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    output = run(model, TOKENS)
    model.add_weighted_adapter(["one", "one"], [1, 1], "new")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: flags[name] for name in before} == before
    assert not any(trains for name, trains in flags.items() if ".new" in name)
    assert torch.equal(run(model, TOKENS), output)


def test_targets_that_no_list_can_join_become_paths():
    model = tunerkit.get_peft_model(base(), LoraConfig(r=2, target_modules="la.t"), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["words", "mix"], exclude_modules=["mix"]))
    model.add_weighted_adapter(["one", "two"], [1, 1], "new", "linear")
    made = model.peft_config["new"]
    assert (made.target_modules, made.exclude_modules) == ({"last", "words"}, None)
    model.add_adapter("three", LoraConfig(r=2, target_modules="w.*"))
    model.add_weighted_adapter(["one", "three"], [1, 1], "newer", "linear")
    assert model.peft_config["newer"].target_modules == "(la.t)|(w.*)"


GROUPED = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"adapters": ["one", "none"]}, UnknownAdapterError, "no adapter 'none'"),
        ({"adapters": []}, CombinationError, "adapters is a list of at least one name; it is []."),
        ({"adapters": "one"}, CombinationError, "it is 'one'."),
        ({"adapter_name": "two"}, AdapterNameError, "There is an adapter 'two' already"),
        ({"adapter_name": "a.b"}, AdapterNameError, "'a.b'"),
        ({"weights": [1]}, CombinationError, "weights must be one number for each of 'one', 'two'; it is [1]."),
        ({"weights": [1, "2"]}, CombinationError, "weights must be finite numbers; one of them is '2'."),
        ({"weights": [1, float("nan")]}, CombinationError, "one of them is nan."),
        ({"combination_type": "sum"}, CombinationError, "combination_type='sum' is not known; possible are 'svd',"),
        ({"combination_type": "ties"}, CombinationError, "above 0 and at most 1; it is None."),
        ({"combination_type": "linear"}, CombinationError, "those of 'one', 'two' are [4, 2]. Use 'svd'"),
        ({"svd_rank": 0}, CombinationError, "svd_rank must be a whole number above 0; it is 0."),
        ({"svd_clamp": 2}, CombinationError, "svd_clamp is a quantile, from 0 to 1; it is 2."),
        ({"majority_sign_method": "all"}, CombinationError, "majority_sign_method='all' is not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused_and_nothing_changes(change, kind, message):
    model = tunerkit.get_peft_model(base(), config(4), "one")
    model.add_adapter("two", config(2))
    before = Snapshot.of(model)
    call = {"adapters": ["one", "two"], "weights": [1, 1], "adapter_name": "new", **change}
    with pytest.raises(kind) as error:
        model.add_weighted_adapter(**call)
    assert message in str(error.value)
    assert before.differences(model) == []
    assert list(model.peft_config) == ["one", "two"]


def test_ranks_that_differ_on_a_layer_are_found_there_and_all_is_undone():
    model = tunerkit.get_peft_model(base(), config(4), "one")
    model.add_adapter("two", config(4, rank_pattern={"words": 2}))
    before = Snapshot.of(model)
    with pytest.raises(CombinationError, match=r"on 'words' they have \[4, 2\]\. Use 'svd'"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "new", "linear")
    assert before.differences(model) == []
    assert list(model.peft_config) == ["one", "two"]


def test_grouped_convolutions_have_no_product_to_combine():
    model = tunerkit.get_peft_model(copy.deepcopy(GROUPED), LoraConfig(r=2, target_modules=["0"]), "one").eval()
    model.add_adapter("two", LoraConfig(r=2, target_modules=["0"]))
    fill(model)
    with pytest.raises(CombinationError, match=r"'svd' works on the product of the factors, and on '0'"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "new")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "new", "linear")
    assert list(model.peft_config) == ["one", "two", "new"]


def test_dora_is_refused():
    model = tunerkit.get_peft_model(base(), config(use_dora=True), "one")
    before = Snapshot.of(model)
    with pytest.raises(CombinationError, match=r"'one' learns magnitudes \(use_dora=True\).*Merge it instead"):
        model.add_weighted_adapter(["one"], [1], "new")
    assert before.differences(model) == []


def test_adapters_of_another_kind_are_named():
    ia3 = pytest.importorskip("tunerkit_ia3", reason="a second method to mix with: tunerkit-ia3")
    model = tunerkit.get_peft_model(base(), config(targets=["last"]), "one")
    model.add_adapter("other", ia3.IA3Config(target_modules=["last"], feedforward_modules=[]))
    with pytest.raises(CombinationError, match="'one' is of the type LORA and 'other' of IA3"):
        add_combined(model.base_model, ["one", "other"], [1, 1], "new", None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bias": "all"}, "'two' trains the base model's biases (bias='all'), which cannot be combined."),
        (
            {"use_dora": True},
            "'two' learns magnitudes (use_dora=True), which cannot be combined into factors. Merge it instead.",
        ),
        (
            {"target_modules": None, "target_parameters": ["last.weight"]},
            "'two' adapts bare parameters (target_parameters), which cannot be combined.",
        ),
    ],
)
def test_adapters_that_are_more_than_factors_are_refused(values, message):
    model = tunerkit.get_peft_model(base(), config(targets=["mix"]), "one")
    model.add_adapter("two", LoraConfig(r=4, **{"target_modules": ["last"], **values}))
    before = Snapshot.of(model)
    with pytest.raises(CombinationError) as error:
        model.add_weighted_adapter(["one", "two"], [1, 1], "new")
    assert str(error.value) == message
    assert before.differences(model) == []


def test_a_module_that_one_of_them_trains_whole_goes_along():
    model = tunerkit.get_peft_model(base(), config(targets=["mix"]), "one").eval()
    model.add_adapter("two", config(targets=["mix"], modules_to_save=["last"]))
    with torch.no_grad():
        model.get_base_model().last.modules_to_save["two"].bias += 1
    model.add_weighted_adapter(["one", "two"], [0, 1], "new", "cat")
    model.set_adapter("two")
    expected = run(model, TOKENS)
    model.set_adapter("new")
    assert model.peft_config["new"].modules_to_save == ["last"]
    assert_close(run(model, TOKENS), expected)


def test_modules_that_two_of_them_train_whole_are_not_combined():
    model = tunerkit.get_peft_model(base(), config(targets=["mix"], modules_to_save=["last"]), "one")
    model.add_adapter("two", config(targets=["mix"], modules_to_save=["last"]))
    before = Snapshot.of(model)
    with pytest.raises(CombinationError, match="'one', 'two' each hold a ModulesToSaveWrapper of their own at 'last'"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "new")
    assert before.differences(model) == []


def test_the_output_projection_of_an_attention_layer_is_combined_with_its_own_scale():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True).eval()
    model = tunerkit.get_peft_model(layer, LoraConfig(r=2, target_modules=["self_attn"]), "one").eval()
    fill(model)
    x = {"src": torch.randn(2, 3, 8)}
    expected = run(model, x)
    for kind in ("linear", "cat"):
        model.add_weighted_adapter(["one", "one"], [0.25, 0.75], kind, "cat")
        model.set_adapter(kind)
        assert_close(run(model, x), expected)
