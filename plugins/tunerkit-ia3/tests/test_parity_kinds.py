"""(IA)³ on every kind of layer, here and in PEFT, and on those that PEFT does not adapt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tunerkit import get_peft_model
from tunerkit.errors import ConfigWarning, UnsupportedSiteError
from tunerkit.testing.parity import Pair, assert_close, check_parity, peft_config, run
from tunerkit_ia3 import IA3Config

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")
Conv1D = transformers.pytorch_utils.Conv1D


class Around(nn.Module):
    """One layer with something after it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(x))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ia3(*, feedforward, **others):
    return IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [], **others)


@st.composite
def convolutions(draw):
    dimensions = draw(st.sampled_from([2, 3]))
    several = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(dimensions))
    groups = draw(st.sampled_from([1, 2, 3]))
    layer = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions](
        groups * draw(st.integers(2, 3)),
        groups * draw(st.integers(2, 3)),
        several(1, 2),
        stride=several(1, 2),
        padding=several(0, 1),
        dilation=several(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
    )
    return layer, (2, layer.in_channels, *several(3, 5))


@given(case=convolutions(), feedforward=st.booleans(), init=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_convolutions_of_any_shape(tmp_path_factory, case, feedforward, init):
    torch.manual_seed(0)
    layer, shape = case
    config = ia3(feedforward=feedforward, init_ia3_weights=init)
    with torch.no_grad():
        layer.weight.normal_(std=0.5)
    check_parity(Around(layer), config, {"x": torch.randn(shape)}, tmp_path_factory.mktemp("parity"))


@given(inputs=st.integers(2, 6), outputs=st.integers(2, 6), feedforward=st.booleans(), init=st.booleans())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_weights_stored_in_x_out(tmp_path_factory, inputs, outputs, feedforward, init):
    torch.manual_seed(0)
    config = ia3(feedforward=feedforward, init_ia3_weights=init, fan_in_fan_out=True)
    model = Around(Conv1D(outputs, inputs))
    with torch.no_grad():
        model.layer.weight.normal_()
        model.layer.bias.normal_()
    check_parity(model, config, {"x": torch.randn(2, 3, inputs)}, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("layer", [Conv1D(4, 3), nn.Linear(3, 4)])
def test_a_wrong_orientation_is_corrected(layer, tmp_path):
    says = isinstance(layer, nn.Linear)
    config = ia3(feedforward=False, fan_in_fan_out=says)
    with (
        pytest.warns(ConfigWarning, match=f"fan_in_fan_out={says} does not hold"),
        pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {says}"),
    ):
        pair = Pair(Around(layer), config, {"x": torch.randn(2, 3)})
    assert config.fan_in_fan_out is says
    for model in (pair.ours, pair.theirs):
        assert model.peft_config["default"].fan_in_fan_out is not says
    pair.check_outputs()
    pair.check_files(tmp_path)


def test_gpt2():
    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40, "initializer_range": 0.3}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny))
    pair = Pair(model, IA3Config(fan_in_fan_out=True), {"input_ids": torch.arange(10).reshape(2, 5)})
    pair.check_parameters()
    pair.check_outputs()
    pair.check_gradients()
    pair.check_merged()


@pytest.mark.parametrize(
    ("layer", "x", "width"),
    [
        (lambda: nn.Conv1d(4, 6, 2, groups=2), torch.randn(2, 4, 5), 6),
        (lambda: nn.Embedding(7, 5, padding_idx=1), torch.tensor([[1, 2], [6, 1]]), 5),
        (lambda: nn.Embedding(7, 5, max_norm=0.5), torch.tensor([[1, 2], [6, 1]]), 5),
    ],
)
def test_layers_that_peft_does_not_adapt(layer, x, width):
    base = Around(layer())
    config = ia3(feedforward=False, init_ia3_weights=False)
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(Around(layer()), peft_config(config))
    plain = run(base, {"x": x})
    model = get_peft_model(base, config).eval()
    scale = base.layer.ia3_l["default"]
    assert scale.numel() == width
    found = run(model, {"x": x})
    assert (found - plain).abs().max() > 1e-3
    if getattr(base.layer, "max_norm", None) is None:
        scale = scale.reshape(-1, 1) if x.is_floating_point() else scale.flatten()
        assert_close(found, torch.tanh(torch.atanh(plain) * scale.detach()))
    model.merge_adapter()
    assert_close(run(model, {"x": x}), found)


def test_the_tokens_of_an_embedding_are_not_rescaled():
    with pytest.raises(UnsupportedSiteError) as error:
        get_peft_model(Around(nn.Embedding(7, 5)), ia3(feedforward=True))
    assert str(error.value) == (
        "The module 'layer' is an embedding, whose inputs are token numbers and cannot be rescaled. Leave it out of "
        "feedforward_modules, so that its outputs are."
    )
