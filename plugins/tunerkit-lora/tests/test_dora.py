"""DoRA here and in PEFT, on every kind of layer, stacked, merged, in half precision and in pieces."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tunerkit
from tunerkit.errors import ConfigError, UnsupportedSiteError
from tunerkit.testing.parity import Pair, assert_close, check_parity, run
from tunerkit_lora import AnchoredDora, DoraConvolution, DoraEmbedding, DoraLinear, LoraConfig
from tunerkit_lora.dora import norms

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = (transformers.pytorch_utils.Conv1D(*sizes) for sizes in ((8, 6), (4, 8)))

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.words(x))


class Convolutions(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.second = kind(3, 6, 3, stride=2, padding=1), kind(6, 4, 2, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).flatten(1)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
TARGETS = ["wide", "narrow", "words", "first", "second"]
MODELS = {
    "linear": (Linears, X),
    "transposed": (Transposed, X),
    "embedding": (Embeddings, torch.arange(12).reshape(3, 4)),
    "conv1d": (lambda: Convolutions(nn.Conv1d), torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))),
    "conv2d": (lambda: Convolutions(nn.Conv2d), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))),
    "conv3d": (lambda: Convolutions(nn.Conv3d), torch.randn(2, 3, 3, 3, 3, generator=torch.Generator().manual_seed(1))),
}


def dora(model, **settings):
    names = [name for name, _ in model.named_modules() if name in TARGETS]
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "use_dora": True, "target_modules": names, **settings})


def pair(kind="linear", **settings):
    torch.manual_seed(0)
    make, x = MODELS[kind]
    base = make()
    config = dora(base, fan_in_fan_out=kind == "transposed", **settings)
    return Pair(base, config, {"x": x})


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", MODELS)
def test_everything_is_as_in_peft(kind, init, tmp_path):
    torch.manual_seed(0)
    make, x = MODELS[kind]
    base = make()
    config = dora(base, init_lora_weights=init, fan_in_fan_out=kind == "transposed")
    check_parity(base, config, {"x": x}, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_with_another_start_as_in_peft(init, tmp_path):
    torch.manual_seed(0)
    base = Linears()
    check_parity(base, dora(base, init_lora_weights=init), {"x": X}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("linear", DoraLinear), ("embedding", DoraEmbedding), ("conv2d", DoraConvolution)],
)
def test_the_class_and_the_shape_of_the_magnitude(kind, adapter):
    both = pair(kind)
    layer = next(layer for layer in both.ours.base_model.layers())
    assert type(layer.adapters["default"]) is adapter
    assert layer.use_dora["default"] is True
    names = {name: tuple(value.shape) for name, value in both.ours.named_parameters() if "magnitude" in name}
    assert names == {name: tuple(value.shape) for name, value in both.theirs.named_parameters() if "magnitude" in name}
    assert all(name.endswith("lora_magnitude_vector.default.weight") for name in names)
    state = tunerkit.get_peft_model_state_dict(both.ours)
    assert sum(key.endswith("lora_magnitude_vector") for key in state) == len(names)


def test_with_an_anchored_start_it_has_a_class_of_its_own():
    both = pair(init_lora_weights="pissa")
    assert {type(layer.adapters["default"]) for layer in both.ours.base_model.layers()} == {AnchoredDora}


@pytest.mark.parametrize("kind", MODELS)
def test_at_its_start_it_is_the_base_model(kind):
    torch.manual_seed(0)
    make, x = MODELS[kind]
    base = make().eval()
    config = dora(base, fan_in_fan_out=kind == "transposed")
    model = tunerkit.get_peft_model(copy.deepcopy(base), config)
    assert_close(run(model, {"x": x}), run(base, {"x": x}))


@pytest.mark.parametrize("kind", ["linear", "transposed", "conv2d", "embedding"])
def test_dropout_while_training_as_in_peft(kind):
    both = pair(kind, lora_dropout=0.4)
    both.ours.train()
    both.theirs.train()
    torch.manual_seed(3)
    ours = run(both.ours, both.inputs)
    torch.manual_seed(3)
    theirs = run(both.theirs, both.inputs)
    assert_close(ours, theirs)
    both.ours.eval()
    assert ((ours - run(both.ours, both.inputs)).abs().max() > 1e-3) == (kind != "embedding")


@pytest.mark.parametrize("kind", MODELS)
def test_two_stand_on_one_another_as_in_peft_unmerged(kind):
    both = pair(kind)
    both.add("other", dora(both.base, r=3, fan_in_fan_out=kind == "transposed"))
    alone = run(both.ours, both.inputs)
    both.ours.set_adapter(["default", "other"])
    both.theirs.base_model.set_adapter(["default", "other"])
    ours = run(both.ours, both.inputs)
    assert (ours - alone).abs().max() > 1e-3
    assert_close(ours, run(both.theirs, both.inputs))


@pytest.mark.parametrize("kind", MODELS)
def test_two_merged_are_what_they_were_unmerged(kind):
    both = pair(kind)
    both.add("other", dora(both.base, r=3, fan_in_fan_out=kind == "transposed"))
    both.ours.set_adapter(["default", "other"])
    both.theirs.base_model.set_adapter(["default", "other"])
    unmerged = run(both.ours, both.inputs)
    assert_close(run(both.theirs, both.inputs), unmerged)
    both.ours.merge_adapter()
    assert_close(run(both.ours, both.inputs), unmerged)
    both.ours.unmerge_adapter()
    assert torch.equal(run(both.ours, both.inputs), unmerged)
    both.theirs.merge_adapter()
    assert_close(run(both.theirs, both.inputs), unmerged)


def test_on_top_of_plain_adapters_as_in_peft():
    both = pair(use_dora=False)
    both.add("other", dora(both.base))
    for order in (["default", "other"], ["other", "default"]):
        both.ours.set_adapter(order)
        both.theirs.base_model.set_adapter(order)
        unmerged = run(both.ours, both.inputs)
        assert_close(unmerged, run(both.theirs, both.inputs))
        both.ours.merge_adapter()
        assert_close(run(both.ours, both.inputs), unmerged)
        both.ours.unmerge_adapter()


def test_a_bias_from_below_grows_with_the_output():
    torch.manual_seed(0)
    base = Linears()
    lower = LoraConfig(r=2, lora_bias=True, init_lora_weights=False, target_modules=["wide", "narrow"])
    model = tunerkit.get_peft_model(base, lower, adapter_name="lower")
    model.add_adapter("upper", dora(base, init_lora_weights=False))
    with torch.no_grad():
        for layer in model.base_model.layers():
            layer.lora_magnitude_vector["upper"].weight.mul_(1.5)
    model.set_adapter(["lower", "upper"])
    model.eval()
    unmerged = run(model, {"x": X})
    model.merge_adapter()
    assert_close(run(model, {"x": X}), unmerged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_half_precision(dtype, autocast, kind):
    torch.manual_seed(0)
    make, x = MODELS[kind]
    base = make().to(dtype).eval()
    model = tunerkit.get_peft_model(copy.deepcopy(base), dora(base), autocast_adapter_dtype=autocast)
    x = x.to(dtype) if x.is_floating_point() else x
    expected = {torch.float32} if autocast else {dtype}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == expected
    assert run(model, {"x": x}).dtype is dtype
    torch.testing.assert_close(run(model, {"x": x}), run(base, {"x": x}), atol=2e-2, rtol=2e-2)
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=dora(base).target_modules),
        autocast_adapter_dtype=autocast,
    ).eval()
    noise = {k: v + 0.2 * torch.randn_like(v) for k, v in peft.get_peft_model_state_dict(theirs).items()}
    peft.set_peft_model_state_dict(theirs, dict(noise))
    tunerkit.set_peft_model_state_dict(model, noise)
    model.eval()
    ours = run(model, {"x": x})
    assert (ours - run(base, {"x": x})).abs().max() > 1e-2
    torch.testing.assert_close(ours, run(theirs, {"x": x}), atol=5e-2, rtol=5e-2)
    model.merge_adapter()
    torch.testing.assert_close(run(model, {"x": x}), ours, atol=5e-2, rtol=5e-2)


def test_the_magnitude_comes_from_the_bare_weight_also_when_something_is_merged():
    torch.manual_seed(0)
    base = Linears()
    lengths = base.wide.weight.norm(dim=1)
    model = tunerkit.get_peft_model(base, dora(base, use_dora=False, init_lora_weights=False))
    model.merge_adapter()
    assert (model.get_base_model().wide.base_layer.weight.norm(dim=1) - lengths).abs().max() > 1e-3
    model.add_adapter("dora", dora(base))
    assert_close(model.get_base_model().wide.lora_magnitude_vector["dora"].weight, lengths)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_copy_is_the_same_and_its_own(copied, init):
    both = pair(init_lora_weights=init)
    expected = run(both.ours, both.inputs)
    other = copied(both.ours)
    assert torch.equal(run(other, both.inputs), expected)
    with torch.no_grad():
        for layer in both.ours.base_model.layers():
            layer.lora_magnitude_vector["default"].weight.mul_(2)
    assert torch.equal(run(other, both.inputs), expected)


# --- The norm.


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            views = func._schema.name in {"aten::t", "aten::detach", "aten::transpose", "aten::alias", "aten::view"}
            if isinstance(tensor, torch.Tensor) and not views:
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "olora"}])
def test_a_forward_makes_no_matrix_of_the_weights_size(settings):
    base = nn.Sequential(nn.Linear(300, 200))
    model = tunerkit.get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["0"], **settings))
    x = torch.randn(3, 300)
    with LargestTensor() as seen:
        model(x).sum().backward()
    assert 0 < seen.size < 200 * 300 // 10
    with LargestTensor() as seen:
        model.merge_adapter()
    assert seen.size == 200 * 300  # it does see one where there is one


def test_norms_are_those_of_the_sum():
    generator = torch.Generator().manual_seed(0)
    weight, first, second = (torch.randn(*shape, generator=generator) for shape in ((7, 9), (3, 9), (7, 3)))
    expected = (weight + 0.7 * second @ first).norm(dim=1)
    torch.testing.assert_close(norms(weight, first, second, 0.7), expected)
    assert norms(weight.bfloat16(), first, second, 0.7).dtype is torch.float32
    assert norms(weight.double(), first, second, 0.7).dtype is torch.float64


def test_norms_of_rows_that_vanish_are_not_zero():
    weight = torch.zeros(2, 3)
    weight[1] = 1
    first, second = torch.ones(1, 3), torch.tensor([[0.0], [-1.0]])
    lengths = norms(weight, first, second, 1.0)  # the second row is taken off entirely
    assert torch.isfinite(1 / lengths).all()
    assert (lengths >= 0).all()


def test_a_row_of_zeros_gives_no_nan():
    base = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        base[0].weight[1] = 0
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    assert torch.isnan(theirs(torch.randn(2, 4))).any()
    model = tunerkit.get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    assert torch.isfinite(model(torch.randn(2, 4))).all()


def test_the_norm_gets_no_gradient():
    # The gradient of the magnitude is that of PEFT, and so is A's and B's: check_parity compares them. Here: it is not
    # the slope, because the norm counts as constant.
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3)).double()
    model = tunerkit.get_peft_model(
        base,
        LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    layer = model.get_base_model()[0]
    x = torch.randn(5, 4, dtype=torch.float64)
    first, second, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    whole = layer.base_layer.weight + scaling * second @ first
    factor = layer.lora_magnitude_vector["default"].weight / whole.norm(dim=1).detach()
    expected = torch.autograd.grad((x @ (factor[:, None] * whole).T).square().sum(), [first, second])
    found = torch.autograd.grad((model(x) - layer.base_layer.bias).square().sum(), [first, second])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- What does not go.


def test_a_bias_of_b_is_refused():
    with pytest.raises(ConfigError) as error:
        LoraConfig(use_dora=True, lora_bias=True)
    assert str(error.value) == "LoraConfig.use_dora=True does not go with lora_bias=True. Leave one of the two out."
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        peft.LoraConfig(use_dora=True, lora_bias=True)


def test_mica_is_refused():
    with pytest.raises(ConfigError, match="use_dora=True does not go with init_lora_weights='mica'"):
        LoraConfig(use_dora=True, init_lora_weights="mica")


def test_a_convolution_with_groups_is_refused():
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(UnsupportedSiteError) as error:
        tunerkit.get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    assert str(error.value).startswith(
        "use_dora=True needs the length of the merged weight's rows, and on '0' there is"
    )
    assert str(error.value).endswith("Leave use_dora out, or do not target it.")
    assert type(base[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({"use_dora": True}, "use_dora=True"), ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'")],
)
def test_an_attention_layer_is_refused(settings, asked):
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedSiteError, match=f"attention.* cannot be adapted with {asked}. Leave it out, or do"):
        tunerkit.get_peft_model(base, LoraConfig(r=2, target_modules=["attention"], **settings))
    assert type(base["attention"]) is nn.MultiheadAttention


class Doubled(nn.Embedding):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


def test_an_embedding_that_does_more_than_look_up():
    torch.manual_seed(0)
    base = nn.Sequential(Doubled(6, 4))
    model = tunerkit.get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["0"], init_lora_weights=False))
    with torch.no_grad():
        model.get_base_model()[0].lora_magnitude_vector["default"].weight.mul_(1.5)
    tokens = torch.arange(6)
    layer = model.get_base_model()[0]
    weight, _ = layer.adapters["default"].merged(layer.site)
    assert (weight - layer.base_layer.weight).abs().max() > 1e-3
    assert_close(model(tokens), 2 * weight)
