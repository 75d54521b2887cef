"""The starts of LoRA's factors: what they are, that the base stays as it is, and that files are PEFT's both ways."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunerkit
from tunerkit.errors import (
    AdapterStateError,
    CheckpointError,
    CombinationError,
    ConfigError,
    ConfigWarning,
    LoadWarning,
    UnsupportedSiteError,
)
from tunerkit.testing.parity import assert_close, check_parity, run
from tunerkit_lora import AnchoredLora, EvaConfig, LoraConfig
from tunerkit_lora.inits.orthogonal import orthogonal
from tunerkit_lora.inits.spectral import minor_directions, olora, pissa, pissa_lowrank
from tunerkit_lora.inits.svd import lowrank_svd

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")

# PEFT's advice at each call with "eva".
pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")

ANCHORED = ["pissa", "olora"]
ALL = ["pissa", "pissa_niter_4", "olora", "orthogonal", "eva", "mica"]


class Mlp(nn.Module):
    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.wide, self.square, self.narrow = kind(6, 8), kind(8, 8, bias=False), kind(8, 5)

    def forward(self, x):
        return self.narrow(torch.tanh(self.square(torch.tanh(self.wide(x)))))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Mlp().eval()


@pytest.fixture
def x():
    return {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}


def lora(init, **settings):
    return LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["wide", "square", "narrow"],
            "init_lora_weights": init,
            **settings,
        }
    )


def move(model, name="default"):
    """Move the tensors that train, and assert nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.base_model.layers():
            for tensor in layer.trainable_tensors(name):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- The functions.


@pytest.fixture
def weight():
    return torch.randn(9, 7, generator=torch.Generator().manual_seed(0))


def test_pissa_is_the_best_approximation(weight):
    first, second = pissa(weight, 3, 2.0)
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(2.0 * second @ first, (u[:, :3] * s[:3]) @ vh[:3])
    torch.testing.assert_close(first @ first.T, torch.diag(s[:3] / 2.0))
    assert [tuple(factor.shape) for factor in pissa(weight, 20, 2.0)] == [(7, 7), (9, 7)]


def test_pissa_lowrank_comes_close_and_is_the_same_every_time(weight):
    best = torch.linalg.norm(weight - 2.0 * torch.linalg.multi_dot(list(pissa(weight, 3, 2.0))[::-1]))
    first, second = pissa_lowrank(weight, 3, 2.0, 16)
    assert torch.linalg.norm(weight - 2.0 * second @ first) < 1.001 * best
    rough = pissa_lowrank(weight, 3, 2.0, 0)
    assert torch.linalg.norm(weight - 2.0 * rough[1] @ rough[0]) > 1.001 * best
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    again = pissa_lowrank(weight, 3, 2.0, 16)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    torch.random.set_rng_state(state)
    pissa_lowrank(weight, 3, 2.0, 16)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_lowrank_svd_of_all_values_is_exact(weight):
    u, s, vh = lowrank_svd(weight, 50, 1)
    torch.testing.assert_close(s, torch.linalg.svdvals(weight))
    torch.testing.assert_close((u * s) @ vh, weight)


def test_olora_takes_rows_and_columns_of_qr(weight):
    first, second = olora(weight, 3, 2.0)
    q, r = torch.linalg.qr(weight)
    assert torch.equal(first, r[:3])
    assert torch.equal(second, q[:, :3])


def test_minor_directions_are_those_of_the_smallest_values(weight):
    second = minor_directions(weight, 2)
    torch.testing.assert_close(second.T @ second, torch.eye(2))
    torch.testing.assert_close((second.T @ weight).norm(dim=1), torch.linalg.svdvals(weight)[-2:])


def test_orthogonal_factors_have_no_product():
    first, second = orthogonal(9, 7, 4)
    assert first.shape == (4, 7)
    assert second.shape == (9, 4)
    assert first.abs().max() > 1e-2
    assert second.abs().max() > 1e-2
    torch.testing.assert_close(second @ first, torch.zeros(9, 7), atol=1e-6, rtol=0)


# --- The adapters.


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva", "mica"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 4}, {"rank_pattern": {"wide": 4}}])
def test_everything_is_as_in_peft(base, x, init, settings, tmp_path):
    check_parity(base, lora(init, **settings), x, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "orthogonal", "eva", "mica"])
def test_on_transposed_layers_as_in_peft(x, init, tmp_path):
    def conv1d(inputs, outputs, **_settings):
        return transformers.pytorch_utils.Conv1D(outputs, inputs)

    torch.manual_seed(0)
    check_parity(Mlp(conv1d), lora(init, fan_in_fan_out=True), x, tmp_path)


def test_olora_on_transposed_layers(x):
    # PEFT decomposes the weight as it is stored, and its factors then have the wrong shapes.
    def conv1d(inputs, outputs, **_settings):
        return transformers.pytorch_utils.Conv1D(outputs, inputs)

    torch.manual_seed(0)
    base = Mlp(conv1d).eval()
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora("olora", fan_in_fan_out=True)).eval()
    assert_close(run(model, x), run(base, x))
    move(model)
    before = run(model, x)
    assert (before - run(base, x)).abs().max() > 1e-3
    model.merge_adapter()
    assert_close(run(model, x), before)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_an_embedding_beside_them_starts_as_ever(init, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 3))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=init)
    model = tunerkit.get_peft_model(copy.deepcopy(base), config)
    assert model.get_base_model()[0].lora_embedding_A["default"].abs().max() == 0
    check_parity(base, config, {"input": torch.arange(12).reshape(3, 4)}, tmp_path)


def test_mica_on_an_embedding_as_in_peft(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 3))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica")
    check_parity(base, config, {"input": torch.arange(12).reshape(3, 4)}, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_the_first_tensors_are_pefts(base, init):
    ours = tunerkit.get_peft_model(copy.deepcopy(base), lora(init))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(lora(init).to_dict()))
    found = tunerkit.get_peft_model_state_dict(ours)
    expected = peft.get_peft_model_state_dict(theirs)
    assert set(found) == set(expected)
    for key in found:
        torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("init", ALL)
def test_the_base_stays_as_it_is(base, x, init):
    before, expected = bits(base), run(base, x)
    objects = {name: id(value) for name, value in base.named_parameters()}
    model = tunerkit.get_peft_model(base, lora(init)).eval()
    assert_close(run(model, x), expected)
    move(model)
    assert (run(model, x) - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(run(model, x), expected)
    again = model.unload()
    assert {name: id(value) for name, value in again.named_parameters()} == objects
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("init", ANCHORED)
def test_with_dropout_too_it_starts_from_the_base(base, x, init):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init, lora_dropout=0.5)).train()
    assert_close(run(model, x), run(base, x))
    move(model)
    assert (run(model, x) - run(model, x)).abs().max() > 1e-3


@pytest.mark.parametrize("init", ANCHORED)
def test_the_start_is_neither_saved_nor_trained(base, init):
    model = tunerkit.get_peft_model(base, lora(init))
    layer = model.get_base_model().wide
    assert type(layer.adapters["default"]) is AnchoredLora
    assert not any("start" in name for name, _ in model.named_parameters())
    assert not any("start" in name for name in model.state_dict())
    assert sorted(name.rpartition("wide.")[2] for name, _ in model.named_buffers() if "wide" in name) == [
        "lora_start_A.default",
        "lora_start_B.default",
    ]


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "mica", "eva"])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"strict": False}])
def test_loading_what_was_saved(base, x, init, options, tmp_path):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init)).eval()
    move(model)
    expected = run(model, x)
    model.save_pretrained(tmp_path)
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
    assert_close(run(loaded, x), expected)


@pytest.mark.parametrize("init", ANCHORED)
def test_the_start_comes_from_the_bare_weight_also_when_something_is_merged(base, x, init, tmp_path):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init)).eval()
    move(model)
    expected = run(model, x)
    model.save_pretrained(tmp_path)
    other = tunerkit.get_peft_model(copy.deepcopy(base), lora(init=False), adapter_name="plain").eval()
    other.merge_adapter()
    other.load_adapter(tmp_path, "default")
    other.add_adapter("fresh", lora(init))
    other.unmerge_adapter()
    other.set_adapter("default")
    assert_close(run(other, x), expected)
    other.set_adapter("fresh")
    assert_close(run(other, x), run(base, x))


@pytest.mark.parametrize("init", ANCHORED)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_is_the_same_and_its_own(base, x, init, copied):
    model = tunerkit.get_peft_model(base, lora(init)).eval()
    move(model)
    expected = run(model, x)
    other = copied(model)
    assert torch.equal(run(other, x), expected)
    move(model)
    assert torch.equal(run(other, x), expected)


@pytest.mark.parametrize("init", ANCHORED)
def test_a_whole_models_state_brings_it_back(base, x, init):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init)).eval()
    move(model)
    other = tunerkit.get_peft_model(copy.deepcopy(base), lora(init)).eval()
    assert (run(other, x) - run(model, x)).abs().max() > 1e-3
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, x), run(model, x))


def test_two_such_adapters_at_once(base, x):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora("pissa")).eval()
    model.add_adapter("other", lora("olora", r=3))
    assert_close(run(model, x), run(base, x))
    move(model)
    first = run(model, x)
    model.set_adapter("other")
    move(model, "other")
    assert (run(model, x) - first).abs().max() > 1e-3
    model.set_adapter(["default", "other"])
    both = run(model, x)
    model.merge_adapter()
    assert_close(run(model, x), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(model, x), first)


@pytest.mark.parametrize("init", ANCHORED)
def test_an_update_of_rank_zero_is_scaled_as_a_whole(base, x, init):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init)).eval()
    move(model)
    assert (run(model, x) - run(base, x)).abs().max() > 1e-3
    for layer in model.base_model.layers():
        layer.set_scale("default", 0)
    assert_close(run(model, x), run(base, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ALL)
def test_half_precision(base, x, init, dtype):
    base = base.to(dtype)
    inputs = {"x": x["x"].to(dtype)}
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init)).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(run(model, inputs), run(base, inputs), atol=2e-2, rtol=2e-2)
    if init in ANCHORED:
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(lora(init).to_dict())).eval()
        move(model)
        peft.set_peft_model_state_dict(theirs, tunerkit.get_peft_model_state_dict(model))
        torch.testing.assert_close(run(model, inputs), run(theirs, inputs), atol=5e-2, rtol=5e-2)
    before = run(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(run(model, inputs), before, atol=2e-2, rtol=2e-2)


def test_a_rank_above_the_weights_gives_what_there_is(base, x, tmp_path):
    check_parity(base, lora("pissa", r=7), x, tmp_path)


# --- pissa_niter_N: a random start, so it is saved as a plain adapter of twice the rank.


def test_pissa_niter_is_saved_as_a_plain_adapter(base, x, tmp_path):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora("pissa_niter_2", rank_pattern={"wide": 4})).eval()
    move(model)
    expected = run(model, x)
    model.save_pretrained(tmp_path)
    config = tunerkit.PeftConfig.from_pretrained(tmp_path)
    assert (config.init_lora_weights, config.r, config.lora_alpha, config.rank_pattern) == (True, 4, 12, {"wide": 8})
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.wide.lora_A.weight"].shape == (8, 6)
    assert_close(run(tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), x), expected)
    assert_close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), x), expected)
    assert model.peft_config["default"].init_lora_weights == "pissa_niter_2"
    assert model.peft_config["default"].r == 2


def test_pissa_niter_from_peft_is_as_close_as_peft(base, x, tmp_path):
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(lora("pissa_niter_30").to_dict())).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(LoadWarning, match="relative to a start that was drawn at random and is not in the file") as seen:
        ours = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert len({str(warning.message) for warning in seen}) == 1
    torch.testing.assert_close(run(ours, x), run(theirs, x), atol=1e-2, rtol=1e-2)


def test_pissa_niter_state_dict_goes_back_into_the_same_model(base, x):
    model = tunerkit.get_peft_model(base, lora("pissa_niter_2")).eval()
    move(model)
    expected, state = run(model, x), tunerkit.get_peft_model_state_dict(model)
    state = {key: value.clone() for key, value in state.items()}
    move(model)
    tunerkit.set_peft_model_state_dict(model, state)
    assert torch.equal(run(model, x), expected)


# --- With what is done to adapters that are in.


@pytest.mark.parametrize("settings", [{}, {"r": 3}, {"lora_alpha": 9}])
def test_swapping_another_in_takes_its_start_too(base, x, settings, tmp_path):
    other = tunerkit.get_peft_model(copy.deepcopy(base), lora("pissa", **settings)).eval()
    move(other)
    expected = run(other, x)
    other.save_pretrained(tmp_path)
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora("pissa")).eval()
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert_close(run(model, x), expected)
    model.save_pretrained(tmp_path / "again")
    state, saved = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert all(torch.equal(state[key], saved[key]) for key in saved)


@pytest.mark.parametrize("inits", [("pissa", True), (True, "pissa")])
def test_swapping_in_one_of_another_class_is_refused(base, inits, tmp_path):
    there, here = inits
    tunerkit.get_peft_model(copy.deepcopy(base), lora(there)).save_pretrained(tmp_path)
    model = tunerkit.get_peft_model(base, lora(here))
    before = bits(model)
    with pytest.raises(AdapterStateError, match=r"so it cannot be swapped in place\. Load it as another adapter\."):
        tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_combining_is_refused(base, init):
    model = tunerkit.get_peft_model(base, lora(init))
    model.add_adapter("other", lora(init=True))
    with pytest.raises(CombinationError) as error:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="svd")
    assert str(error.value) == (
        f"'default' leans on factors of the base's weight (init_lora_weights={init!r}). Save it with "
        "path_initial_model_for_weight_conversion, and combine what that gives."
    )


# --- What does not go.


@pytest.mark.parametrize("init", ["Pissa", "OLoRA", "MICA", "Orthogonal", "PiSSA_niter_3", "Gaussian"])
def test_any_case_of_a_name(init):
    assert LoraConfig(init_lora_weights=init).init_lora_weights == init.lower()


@pytest.mark.parametrize("init", ["pissa_niter_", "pissa_niter_x", "pissa_2", "zeros", "", "pissaolora"])
def test_an_unknown_start(init):
    with pytest.raises(ConfigError) as error:
        LoraConfig(init_lora_weights=init)
    assert str(error.value) == (
        f"LoraConfig.init_lora_weights={init!r} is not known; possible are True, False, 'gaussian', 'pissa', "
        "'pissa_niter_<number>', 'olora', 'orthogonal', 'eva', 'mica' and 'loftq'."
    )


@pytest.mark.parametrize("init", [None, 1, 0.5, ["pissa"]])
def test_a_start_of_the_wrong_type(init):
    with pytest.raises(ConfigError, match="init_lora_weights must be True or False or text"):
        LoraConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("corda", "CorDA takes its start off the base weight, and only the data it was computed from give it again."),
        ("lora_ga", "LoRA-GA takes its start off the base weight, and only the gradients it was computed from give"),
    ],
)
def test_starts_that_change_the_base_are_refused(init, reason):
    with pytest.raises(ConfigError) as error:
        LoraConfig(init_lora_weights=init)
    assert str(error.value).startswith(f"LoraConfig.init_lora_weights={init!r} is not supported: {reason}")
    assert str(error.value).endswith("On a base that is the changed one already, set init_lora_weights to True.")


def test_a_checkpoint_of_lora_ga_is_loaded_as_in_peft(base, x, tmp_path):
    # PEFT derives nothing when it loads one: the tensors are an update of whatever base there is.
    config = peft.get_peft_config({**lora(init=True).to_dict(), "init_lora_weights": "lora_ga"})
    config.lora_ga_config = peft.LoraGAConfig()
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(LoadWarning, match="started by LoRA-GA, which changed the base model"):
        ours = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(run(ours, x), run(theirs, x))
    assert (run(ours, x) - run(base, x)).abs().max() > 1e-3
    assert ours.peft_config["default"].init_lora_weights is True
    assert ours.peft_config["default"].lora_ga_config is None


def test_other_checkpoints_that_rest_on_another_base_are_refused(base, tmp_path):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init=False))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"init_lora_weights": false', '"init_lora_weights": "corda"'))
    with pytest.raises(ConfigError, match="init_lora_weights='corda' is not supported"):
        tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", "eva", "mica"])
def test_convolutions_have_no_such_start(init):
    layer = nn.Conv2d(4, 4, 3)
    base = nn.Sequential(layer)
    with pytest.raises(UnsupportedSiteError) as error:
        tunerkit.get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    assert str(error.value) == (
        f"The module '0' is a Conv2d, and init_lora_weights={init!r} is for linear layers. Use True, or do not target "
        "it."
    )
    assert base[0] is layer


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "mica"])
def test_a_dtype_that_is_not_decomposed(base, init):
    with pytest.raises(UnsupportedSiteError) as error:
        tunerkit.get_peft_model(base.double(), lora(init))
    assert str(error.value) == (
        f"init_lora_weights={init!r} decomposes the weight, and that of 'wide' is torch.float64; it must be float32, "
        "float16 or bfloat16. Convert the model, or use another start."
    )
    assert isinstance(error.value, TypeError)  # as in PEFT


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "mica"])
def test_a_base_on_the_meta_device(init):
    with torch.device("meta"):
        base = Mlp()
    if init == "mica":
        tunerkit.get_peft_model(base, lora(init))
        return
    with pytest.raises(UnsupportedSiteError) as error:
        tunerkit.get_peft_model(base, lora(init))
    assert str(error.value) == (
        f"init_lora_weights={init!r} is derived from the weight, and that of 'wide' is on the meta device. Load the "
        "base model's weights first."
    )
    assert type(base.wide) is nn.Linear


@pytest.mark.parametrize("init", ANCHORED)
def test_loading_onto_the_meta_device_needs_the_weight(base, init, tmp_path):
    tunerkit.get_peft_model(base, lora(init)).save_pretrained(tmp_path)
    with torch.device("meta"):
        other = Mlp()
    with pytest.raises(
        CheckpointError, match=r"derives 'lora_start_A' from the layer's weight, and the base model is on"
    ):
        tunerkit.PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=True)


def test_an_odd_rank_is_not_orthogonal(base):
    with pytest.raises(ConfigError) as error:
        tunerkit.get_peft_model(base, lora("orthogonal", r=3))
    assert str(error.value) == ("init_lora_weights='orthogonal' needs an even rank; it is 3 on 'wide'. Set another.")


def test_mica_has_no_more_directions_than_the_weight(base):
    with pytest.raises(ConfigError) as error:
        tunerkit.get_peft_model(base, lora("mica", r=7))
    assert str(error.value) == (
        "init_lora_weights='mica' takes singular vectors of the weight, of which 'wide' has 6; the rank is 7. Set a "
        "lower one."
    )


def test_mica_trains_a_alone(base):
    model = tunerkit.get_peft_model(base, lora("mica"))
    model.set_adapter("default")
    assert {name.rpartition(".lora_")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "A.default.weight"
    }


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"eva_config": EvaConfig()}, "eva_config"),
        ({"corda_config": {"corda_method": "kpm"}}, "corda_config"),
    ],
)
def test_settings_of_another_start_have_no_effect(settings, name):
    with pytest.warns(ConfigWarning, match=f"LoraConfig.{name} has no effect with init_lora_weights=True"):
        LoraConfig(**settings)


def test_peft_refuses_or_makes_the_same(base):
    # What is refused here is refused there, so that no script of PEFT's stops working.
    for init, settings in (("orthogonal", {"r": 3}), ("mica", {"r": 7})):
        with pytest.raises(ValueError, match=r"rank to be even|MiCA requires"):
            peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(lora(init, **settings).to_dict()))
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.get_peft_model(
            nn.Sequential(nn.Conv2d(4, 4, 3)), peft.LoraConfig(target_modules=["0"], init_lora_weights="pissa")
        )
