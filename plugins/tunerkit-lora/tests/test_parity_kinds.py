"""LoRA on every kind of layer, here and in PEFT, and where PEFT fails."""

import copy
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tunerkit
from tunerkit.errors import ConfigWarning, MergeError, TargetWarning
from tunerkit.testing.parity import Pair, assert_close, check_parity, peft_config, run
from tunerkit_lora import LoraConfig

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")
Conv1D = transformers.pytorch_utils.Conv1D

# PEFT takes the bias of the second factor for a broken tensor, and says so each time it is saved.
pytestmark = pytest.mark.filterwarnings("ignore:.*have invalid shape", "ignore:Using padding='same' with even kernel")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Around(nn.Module):
    """One layer with something after it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(x))


class Scaled(nn.Embedding):
    """As transformers scales embeddings, by a number or by a buffer."""

    def __init__(self, *args, scale, **settings):
        super().__init__(*args, **settings)
        if isinstance(scale, float):
            self.embed_scale = scale
        else:
            self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, tokens):
        return super().forward(tokens) * self.embed_scale


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@st.composite
def convolutions(draw, *, grouped=False):
    """Draw a convolution that PEFT adapts rightly, and the shape of its input."""
    dimensions = draw(st.sampled_from([1, 2, 3]))
    several = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(dimensions))
    divisor = draw(st.sampled_from([2, 3])) if grouped else 1
    kernel = several(1, 3)
    same = draw(st.booleans())
    layer = CONVOLUTIONS[dimensions](
        divisor * draw(st.integers(1, 3)),
        divisor * draw(st.integers(1, 3)),
        kernel,
        stride=1 if same else several(1, 2),
        padding="same" if same else several(0, 2),
        groups=divisor,
        bias=draw(st.booleans()),
    )
    return layer, (2, layer.in_channels, *several(3, 5))


class TestConvolutions:
    @given(
        case=convolutions(),
        r=st.integers(1, 5),
        use_rslora=st.booleans(),
        init=st.sampled_from([True, False, "gaussian"]),
    )
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_of_any_shape(self, tmp_path_factory, case, r, use_rslora, init):
        torch.manual_seed(0)
        layer, shape = case
        config = LoraConfig(r=r, lora_alpha=5, use_rslora=use_rslora, init_lora_weights=init, target_modules=["layer"])
        check_parity(Around(layer), config, {"x": torch.randn(shape)}, tmp_path_factory.mktemp("parity"))

    @given(case=convolutions(grouped=True), multiple=st.integers(1, 2))
    @settings(max_examples=8, deadline=None, derandomize=True)
    def test_with_groups(self, tmp_path_factory, case, multiple):
        torch.manual_seed(0)
        layer, shape = case
        config = LoraConfig(r=multiple * layer.groups, target_modules=["layer"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
            pair = Pair(Around(layer), config, {"x": torch.randn(shape)})
            pair.check_files(tmp_path_factory.mktemp("parity"))
        pair.check_parameters()
        pair.check_outputs()
        pair.check_disabled()
        pair.check_gradients()
        pair.check_steps()
        with pytest.raises(NotImplementedError, match="groups > 1"):
            pair.theirs.merge_adapter()
        with pytest.raises(MergeError, match="mixes all channels"):
            pair.ours.merge_adapter()
        # The layer that asks PEFT for the update gets something that is none: of another shape, or not what is added.
        with pytest.raises(MergeError, match="mixes all channels"):
            pair.ours.base_model.model.layer.get_delta_weight("default")

    def test_dilated_which_peft_cannot_run(self):
        base, x = Around(nn.Conv2d(3, 4, 3, dilation=2)), torch.randn(2, 3, 8, 8)
        config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config))
        with pytest.raises(RuntimeError, match="size of tensor"):
            theirs(x)
        ours = tunerkit.get_peft_model(copy.deepcopy(base), config).eval()
        peft.set_peft_model_state_dict(theirs, tunerkit.get_peft_model_state_dict(ours))
        found = ours(x)
        assert (found - base(x)).abs().max() > 1e-3
        # Merged, PEFT's is right too.
        assert_close(run(theirs.merge_and_unload(), {"x": x}), found.detach())
        assert_close(run(ours.merge_and_unload(), {"x": x}), found.detach())

    def test_around_the_edges_where_peft_is_wrong(self):
        base, x = Around(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")), torch.randn(2, 3, 8)
        config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
        ours = tunerkit.get_peft_model(copy.deepcopy(base), config).eval()
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config)).eval()
        peft.set_peft_model_state_dict(theirs, tunerkit.get_peft_model_state_dict(ours))
        ours_before, theirs_before = run(ours, {"x": x}), run(theirs, {"x": x})
        ours_after, theirs_after = (run(model.merge_and_unload(), {"x": x}) for model in (ours, theirs))
        assert_close(ours_after, theirs_after)
        assert_close(ours_before, ours_after)
        assert (theirs_before - theirs_after).abs().max() > 1e-3


class TestEmbeddings:
    @given(
        tokens=st.integers(2, 9),
        width=st.integers(1, 6),
        r=st.integers(1, 5),
        padding=st.booleans(),
        by_frequency=st.booleans(),
        scale=st.sampled_from([None, 2.5, torch.tensor(1.5)]),
        init=st.sampled_from([True, False, "gaussian"]),
    )
    @settings(max_examples=12, deadline=None, derandomize=True)
    def test_of_any_shape(self, tmp_path_factory, tokens, width, r, padding, by_frequency, scale, init):
        torch.manual_seed(0)
        chosen = {"padding_idx": 1 if padding else None, "scale_grad_by_freq": by_frequency}
        layer = nn.Embedding(tokens, width, **chosen)
        if scale is not None:
            layer = Scaled(tokens, width, scale=scale, **chosen)
        config = LoraConfig(r=r, lora_alpha=3, lora_dropout=0.5, init_lora_weights=init, target_modules=["layer"])
        check_parity(Around(layer), config, {"x": torch.randint(tokens, (3, 4))}, tmp_path_factory.mktemp("parity"))

    def test_sparse_gradients_which_peft_cannot_run(self):
        base, x = Around(nn.Embedding(7, 5, sparse=True)), torch.tensor([[1, 2], [6, 1]])
        config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config))
        with pytest.raises(RuntimeError, match="transpositions between sparse and dense"):
            theirs(x).sum().backward()
        ours = tunerkit.get_peft_model(copy.deepcopy(base), config)
        dense = tunerkit.get_peft_model(Around(nn.Embedding(7, 5)), config)
        dense.load_state_dict(ours.state_dict())
        gradients = []
        for model in (ours, dense):
            model(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(float(gradient.abs().max()) > 1e-3 for gradient in gradients[0])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    def test_vectors_of_limited_length_which_peft_shortens_in_the_factor(self):
        base, x = Around(nn.Embedding(7, 5, max_norm=0.5)), torch.tensor([[1, 2], [6, 1]])
        config = LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config)).eval()
        ours = tunerkit.get_peft_model(copy.deepcopy(base), config).eval()
        tensors = {key: 2 + value for key, value in tunerkit.get_peft_model_state_dict(ours).items()}
        for library, model in ((tunerkit, ours), (peft, theirs)):
            library.set_peft_model_state_dict(model, dict(tensors))
        run(theirs, {"x": x})
        after = peft.get_peft_model_state_dict(theirs)
        assert any((after[key] - value).abs().max() > 1e-3 for key, value in tensors.items())

        found = run(ours, {"x": x})
        after = tunerkit.get_peft_model_state_dict(ours)
        assert all(torch.equal(after[key], value) for key, value in tensors.items())
        assert (found - run(base, {"x": x})).abs().max() > 1e-3
        ours(x).sum().backward()
        layer = ours.base_model.model.layer
        assert layer.lora_embedding_A["default"].grad.abs().max() > 1e-3
        ours.merge_adapter()
        assert_close(run(ours, {"x": x}), found)


class TestTransposedLinear:
    @given(
        inputs=st.integers(1, 6),
        outputs=st.integers(1, 6),
        r=st.integers(1, 5),
        lora_bias=st.booleans(),
        init=st.booleans(),
    )
    @settings(max_examples=8, deadline=None, derandomize=True)
    def test_of_any_shape(self, tmp_path_factory, inputs, outputs, r, lora_bias, init):
        torch.manual_seed(0)
        config = LoraConfig(
            r=r,
            lora_alpha=3,
            fan_in_fan_out=True,
            lora_bias=lora_bias,
            init_lora_weights=init,
            target_modules=["layer"],
        )
        layer = Around(Conv1D(outputs, inputs))
        check_parity(layer, config, {"x": torch.randn(2, 3, inputs)}, tmp_path_factory.mktemp("parity"))

    def test_layers_of_both_orientations_for_each_of_which_peft_corrects_it(self):
        model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4), nn.Linear(4, 4))
        config = LoraConfig(r=2, fan_in_fan_out=True, target_modules=["0", "1", "2"])
        said = []
        for library, same in ((tunerkit, config), (peft, peft_config(config))):
            with pytest.warns(UserWarning, match="fan_in_fan_out") as seen:
                adapted = library.get_peft_model(copy.deepcopy(model), same)
            said.append([str(warning.message) for warning in seen])
            assert adapted.peft_config["default"].fan_in_fan_out is False
        assert len(said[0]) == 1
        assert [re.search("etting .* to (True|False)", text)[1] for text in said[1]] == ["False", "True", "False"]

    @pytest.mark.parametrize(
        ("layer", "says", "ours", "theirs"),
        [
            (Conv1D(4, 3), False, "fan_in_fan_out=False does not hold for the targeted Conv1D", "setting .* to True"),
            (nn.Linear(3, 4), True, "fan_in_fan_out=True does not hold for the targeted Linear", "setting .* to False"),
        ],
    )
    def test_a_wrong_orientation_is_corrected(self, layer, says, ours, theirs, tmp_path):
        config = LoraConfig(r=2, fan_in_fan_out=says, target_modules=["layer"])
        with (
            pytest.warns(ConfigWarning, match=ours),
            pytest.warns(UserWarning, match=f"(?i){theirs}"),
        ):
            pair = Pair(Around(layer), config, {"x": torch.randn(2, 3)})
        assert config.fan_in_fan_out is says
        for model in (pair.ours, pair.theirs):
            assert model.peft_config["default"].fan_in_fan_out is not says
        assert pair.ours.base_model.model.layer.fan_in_fan_out is not says
        pair.check_outputs()
        pair.check_files(tmp_path)

    @pytest.mark.parametrize("targets", [None, "all-linear", ["wte", "c_fc", "lm_head"]])
    def test_gpt2(self, targets):
        tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40, "initializer_range": 0.3}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny, tie_word_embeddings=False))
        config = LoraConfig(target_modules=targets, fan_in_fan_out=targets != ["wte", "c_fc", "lm_head"])
        with warnings.catch_warnings():
            # PEFT corrects the setting for each layer in turn where the model has both kinds.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            pair = Pair(model, config, {"input_ids": torch.arange(10).reshape(2, 5)})
            pair.check_parameters()
            pair.check_outputs()
            pair.check_disabled()
            pair.check_gradients()
            pair.check_steps()
            pair.check_merged()


class Several(nn.Module):
    """A layer of each kind that takes a bias, and one without it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.plain = nn.Linear(4, 5)
        self.stored = nn.ModuleList([Conv1D(6, 5)])

    def forward(self, x):
        return self.stored[0](torch.tanh(self.plain(torch.tanh(self.conv(x)))))


@pytest.fixture
def several():
    return Several(), {"x": torch.randn(2, 2, 4, 5)}


TARGETS = ["conv", "plain", "stored.0"]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
class TestFields:
    @pytest.mark.parametrize("init", [True, False])
    def test_bias_of_the_second_factor(self, several, init, tmp_path):
        base, inputs = several
        config = LoraConfig(r=2, lora_alpha=6, lora_bias=True, init_lora_weights=init, target_modules=TARGETS)
        check_parity(base, config, inputs, tmp_path)

    def test_bias_without_one_in_the_layer_which_peft_cannot_merge(self):
        base = Around(nn.Linear(4, 3, bias=False))
        config = LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["layer"])
        with pytest.warns(UserWarning, match="has no bias"):
            pair = Pair(base, config, {"x": torch.randn(2, 4)})
        pair.check_outputs()
        pair.check_gradients()
        with pytest.raises(RuntimeError, match="Impossible to merge"):
            pair.theirs.merge_and_unload()
        before = run(pair.ours, pair.inputs)
        merged = pair.ours.merge_and_unload()
        assert merged.layer.bias is not None
        assert_close(run(merged, pair.inputs), before)

    def test_patterns(self, several, tmp_path):
        base, inputs = several
        config = LoraConfig(
            r=2,
            lora_alpha=6,
            use_rslora=True,
            rank_pattern={"plain|conv": 3, "^stored.0$": 1},
            alpha_pattern={"stored": 100, r"stored\.\d": 5, "conv": 2.5},
            target_modules=TARGETS,
        )
        with (
            pytest.warns(TargetWarning, match="'stored' in alpha_pattern fits no adapted module"),
            pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"),
        ):
            pair = Pair(base, config, inputs)
        ranks = {name: layer.r["default"] for name, layer in layers_of(pair.ours)}
        assert ranks == {name: layer.r["default"] for name, layer in layers_of(pair.theirs)}
        assert ranks == {"conv": 3, "plain": 3, "stored.0": 1}
        for (_, ours), (_, theirs) in zip(layers_of(pair.ours), layers_of(pair.theirs), strict=True):
            assert ours.lora_alpha["default"] == theirs.lora_alpha["default"]
            assert ours.scaling["default"] == pytest.approx(theirs.scaling["default"])
        pair.check_parameters()
        pair.check_outputs()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*alpha_pattern")
            pair.check_files(tmp_path)
        pair.check_gradients()
        pair.check_merged()

    def test_two_adapters(self, several, tmp_path):
        base, inputs = several
        first = LoraConfig(r=2, lora_bias=True, target_modules=["conv", "plain"])
        second = LoraConfig(r=3, lora_alpha=5, rank_pattern={"conv": 1}, target_modules=TARGETS)
        pair = Pair(base, first, inputs)
        pair.add("other", second)
        pair.check_parameters()
        pair.check_tensors()
        pair.check_outputs()
        pair.set_adapter("other")
        pair.check_outputs()
        pair.check_disabled()
        pair.check_gradients()
        pair.check_files(tmp_path)
        pair.set_adapter("other")
        pair.check_merged()

    def test_dropout_of_the_input_of_a_convolution(self):
        base = Around(nn.Conv2d(2, 3, 2))
        config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["layer"])
        pair = Pair(base, config, {"x": torch.randn(2, 2, 4, 5)})
        outputs = []
        for model in (pair.ours.train(), pair.theirs.train()):
            torch.manual_seed(3)
            outputs.append(run(model, pair.inputs))
        assert (outputs[1] - run(pair.theirs.eval(), pair.inputs)).abs().max() > 1e-3
        assert_close(*outputs)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
class TestStart:
    """The same distributions: those of large factors agree in spread and in their greatest number."""

    @pytest.mark.parametrize("init", [True, False, "gaussian"])
    @pytest.mark.parametrize(
        ("layer", "lora_bias"),
        [
            (lambda: nn.Conv2d(40, 60, (3, 2)), False),
            (lambda: nn.Conv1d(40, 60, 4, groups=4), False),
            (lambda: nn.Embedding(300, 80), False),
            (lambda: Conv1D(300, 200), True),
            (lambda: nn.Linear(200, 300), True),
        ],
    )
    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
    def test_distributions(self, layer, lora_bias, init):
        lora_bias = lora_bias and init != "gaussian"
        config = LoraConfig(r=40, init_lora_weights=init, lora_bias=lora_bias, target_modules=["layer"])
        base = Around(layer())
        ours = tunerkit.get_peft_model(copy.deepcopy(base), config)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(config))
        mine = tunerkit.get_peft_model_state_dict(ours)
        for key, expected in peft.get_peft_model_state_dict(theirs).items():
            assert mine[key].shape == expected.shape
            slack = 6 / math.sqrt(expected.numel())
            assert mine[key].std().item() == pytest.approx(expected.std().item(), rel=slack)
            assert mine[key].abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.35)


def layers_of(model):
    return [(name, module) for name, module in model.base_model.model.named_modules() if hasattr(module, "base_layer")]
