"""What a layer with a LoRA adapter shows and answers: names, shapes, scales, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import tunerkit
import tunerkit_lora as lora
from tunerkit import get_peft_model
from tunerkit.errors import AdapterStateError, ArgumentError, MergeError, UnsupportedSiteError
from tunerkit.testing.parity import peft_config
from tunerkit_lora import LoraConfig, rescale_adapter_scale

NO_PEFT = "comparing with PEFT needs it: pip install peft"

LAYERS = {
    "linear": lambda: nn.Linear(4, 3),
    "embedding": lambda: nn.Embedding(7, 3),
    "conv1d": lambda: nn.Conv1d(4, 6, 2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "conv3d": lambda: nn.Conv3d(4, 6, (1, 3, 2)),
}
CLASSES = {
    "linear": lora.Linear,
    "embedding": lora.Embedding,
    "conv1d": lora.Conv1d,
    "conv2d": lora.Conv2d,
    "conv3d": lora.Conv3d,
}


def base():
    torch.manual_seed(0)
    return nn.ModuleDict({name: make() for name, make in LAYERS.items()})


@pytest.fixture
def model():
    """A model with an adapter on a layer of each kind, one more on some, and all factors moved from their start."""
    model = get_peft_model(base(), LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=[*LAYERS]))
    model.add_adapter("other", LoraConfig(r=4, use_rslora=True, lora_dropout=0.5, target_modules=["linear", "conv2d"]))
    return model


@pytest.fixture
def layers(model):
    return model.get_base_model()


@pytest.fixture
def theirs():
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    theirs = peft.get_peft_model(base(), peft_config(LoraConfig(r=2, lora_alpha=6, target_modules=[*LAYERS])))
    other = LoraConfig(r=4, use_rslora=True, lora_dropout=0.5, target_modules=["linear", "conv2d"])
    theirs.add_adapter("other", peft_config(other))
    return theirs.get_base_model()


class TestNames:
    @pytest.mark.parametrize("kind", LAYERS)
    def test_classes_of_kinds(self, kind, model, layers):
        assert [name for name, known in CLASSES.items() if isinstance(layers[kind], known)] == [kind]
        assert isinstance(layers[kind], lora.LoraLayer)
        plain = model.unload()[kind]
        assert not any(isinstance(plain, known) for known in CLASSES.values())

    @pytest.mark.parametrize("kind", LAYERS)
    def test_attributes_are_those_of_peft(self, kind, layers, theirs):
        ours, peft_layer = layers[kind], theirs[kind]
        for name in ("r", "lora_alpha", "scaling", "use_rslora", "lora_bias", "use_dora"):
            assert dict(getattr(ours, name)) == dict(getattr(peft_layer, name))
        for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            assert list(getattr(ours, name).keys()) == list(getattr(peft_layer, name).keys())
        for name in ("in_features", "out_features"):
            assert getattr(ours, name) == getattr(peft_layer, name)
        assert set(ours.lora_dropout) == set(peft_layer.lora_dropout.keys())
        if kind in {"linear", "embedding"}:
            assert ours.fan_in_fan_out is peft_layer.fan_in_fan_out is False
        else:
            assert ours.kernel_size == peft_layer.base_layer.kernel_size

    @pytest.mark.parametrize("kind", LAYERS)
    def test_what_is_added_has_the_shape_of_the_weight(self, kind, model, layers, theirs):
        layer = layers[kind]
        delta = layer.get_delta_weight("default")
        before = layer.weight.detach().clone()
        assert delta.shape == before.shape == theirs[kind].get_delta_weight("default").shape
        model.merge_adapter()
        assert (delta.abs().max() > 1e-3).item()
        torch.testing.assert_close(layer.weight.detach(), before + delta.detach())
        assert torch.equal(layer.get_delta_weight("default"), delta)

    def test_what_is_added_to_a_weight_that_is_stored_in_x_out(self):
        utils = pytest.importorskip("transformers.pytorch_utils", reason="the layer is one of transformers")
        config = LoraConfig(r=2, init_lora_weights=False, fan_in_fan_out=True, target_modules=["0"])
        layer = get_peft_model(nn.Sequential(utils.Conv1D(3, 4)), config).get_base_model()[0]
        assert isinstance(layer, lora.Linear)
        assert (layer.in_features, layer.out_features, layer.fan_in_fan_out) == (4, 3, True)
        expected = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]).T
        assert torch.allclose(layer.get_delta_weight("default"), expected)


def scales(model):
    return {
        (path, name): scaling
        for path, layer in model.named_modules()
        if isinstance(layer, lora.LoraLayer)
        for name, scaling in layer.scaling.items()
    }


class TestScale:
    @pytest.mark.parametrize("kind", ["linear", "conv2d"])
    def test_calls_do_what_those_of_peft_do(self, kind, layers, theirs):
        ours, peft_layer = layers[kind], theirs[kind]
        for call, arguments in (
            ("set_scale", ("default", 0.5)),
            ("set_scale", ("other", 3)),
            ("set_scale", ("nobody", 3)),
            ("scale_layer", (0.25,)),
            ("scale_layer", (1,)),
            ("unscale_layer", (2.0,)),
            ("unscale_layer", ()),
        ):
            for layer in (ours, peft_layer):
                getattr(layer, call)(*arguments)
            assert dict(ours.scaling) == pytest.approx(dict(peft_layer.scaling))
        assert ours.scaling["default"] == 3.0

    def test_of_an_embedding_which_peft_passes_over(self, layers, theirs):
        for layer, expected in ((layers["embedding"], 6), (theirs["embedding"], 3)):
            layer.scale_layer(2)
            assert layer.scaling["default"] == expected

    def test_without_a_number_the_scale_is_that_of_rank_and_alpha_now(self, layers):
        layer = layers["linear"]
        layer.r["default"], layer.lora_alpha["default"] = 4, 10
        layer.unscale_layer()
        assert layer.scaling["default"] == 2.5

    def test_shows_in_the_output(self, layers):
        layer, x = layers["linear"], torch.randn(5, 4)
        plain = layer.base_layer(x)
        added = layer(x) - plain
        layer.scale_layer(0.5)
        assert torch.allclose(layer(x) - plain, added / 2, atol=1e-6)

    def test_is_refused_while_merged(self, model, layers):
        model.set_adapter("other")
        model.merge_adapter()
        layer, before = layers["linear"], scales(model)
        for change in (
            lambda: layer.set_scale("other", 2),
            lambda: layer.scale_layer(2),
            lambda: layer.unscale_layer(2),
            layer.unscale_layer,
            lambda: layer.scaling.update(other=2),
            lambda: layer.r.update(other=2),
            lambda: layer.scaling.pop("other"),
            lambda: rescale_adapter_scale(model, 2).__enter__(),
        ):
            with pytest.raises(AdapterStateError) as error:
                change()
            assert str(error.value) == (
                "The adapter 'other' is merged into 'linear', so changing it would have no effect there. Call "
                "unmerge_adapter() first."
            )
            assert scales(model) == before
        layer.set_scale("default", 2)
        assert layer.scaling["default"] == 6

    def test_while_merged_spoils_the_base_in_peft(self, layers, theirs):
        """The output stays, and unmerging takes off the update of the new scale, which was never added."""
        x = torch.randn(5, 4)
        ours, peft_layer = layers["linear"], theirs["linear"]
        nn.init.normal_(peft_layer.lora_B["default"].weight)
        weight = peft_layer.weight.detach().clone()
        for layer in (ours, peft_layer):
            layer.merge()
        before = peft_layer(x)
        peft_layer.set_scale("default", 2)
        assert torch.equal(peft_layer(x), before)
        peft_layer.unmerge()
        assert (peft_layer.weight - weight).abs().max() > 1e-3
        with pytest.raises(AdapterStateError, match=r"Call unmerge_adapter\(\) first"):
            ours.set_scale("default", 2)

    def test_all_or_none_of_the_active_ones(self, model, layers):
        layer = layers["linear"]
        model.base_model.set_adapter(["default", "other"])
        model.merge_adapter(["other"])
        before = scales(model)
        with pytest.raises(AdapterStateError):
            layer.scale_layer(2)
        assert scales(model) == before

    def test_the_whole_dict_can_be_assigned(self, layers):
        layer, x = layers["linear"], torch.randn(5, 4)
        plain = layer.base_layer(x)
        added = layer(x) - plain
        layer.scaling = {name: scale / 2 for name, scale in layer.scaling.items()}
        assert dict(layer.scaling) == {"default": 1.5, "other": 2.0}
        assert torch.allclose(layer(x) - plain, added / 2, atol=1e-6)
        layer.set_scale("default", 1)
        assert layer.scaling["default"] == 3.0
        layer.note = "a name of nobody's"
        assert layer.note == "a name of nobody's"

    @pytest.mark.parametrize("given", [2.0, {"default": 1.0}, {"default": 1.0, "other": 1.0, "nobody": 1.0}], ids=str)
    def test_an_assigned_dict_has_a_value_for_each_adapter(self, model, layers, given):
        before = scales(model)
        with pytest.raises(ArgumentError) as error:
            layers["linear"].scaling = given
        assert str(error.value) == (
            "'scaling' is an attribute of each adapter, so it takes a dict with a value for each of 'default', "
            f"'other'; it was given {given!r}. To change one alone set scaling[name]."
        )
        assert scales(model) == before

    def test_a_whole_dict_is_refused_while_one_is_merged(self, model, layers):
        model.set_adapter("other")
        model.merge_adapter()
        before = scales(model)
        with pytest.raises(AdapterStateError, match="The adapter 'other' is merged into 'linear', so changing it"):
            layers["linear"].scaling = {"default": 1.0, "other": 1.0}
        assert scales(model) == before

    def test_of_a_layer_that_holds_no_adapter_of_it(self, model, layers):
        plain = model.unload()["linear"]
        assert not hasattr(plain, "set_scale")


class TestRescaling:
    def test_only_within_the_block(self, model, layers):
        before, x = scales(model), torch.randn(5, 4)
        layer = layers["linear"]
        added = layer(x) - layer.base_layer(x)
        with rescale_adapter_scale(model, 0.3):
            assert scales(model) == {key: 0.3 * scale for key, scale in before.items()}
            assert torch.allclose(layer(x) - layer.base_layer(x), 0.3 * added, atol=1e-6)
        assert scales(model) == before

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_ends_it_too(self, model, error):
        before = scales(model)
        with pytest.raises(error), rescale_adapter_scale(model, 0.3):
            raise error
        assert scales(model) == before

    def test_a_scale_set_before_comes_back(self, model, layers):
        layers["linear"].set_scale("default", 0.1)
        before = scales(model)
        with rescale_adapter_scale(model.get_base_model(), 0):
            assert set(scales(model).values()) == {0}
            model.delete_adapter("other")
        assert scales(model) == {key: scale for key, scale in before.items() if key[1] == "default"}

    def test_as_in_peft(self, model, theirs):
        helpers = pytest.importorskip("peft.helpers", reason=NO_PEFT)
        with rescale_adapter_scale(model, 0.7), helpers.rescale_adapter_scale(theirs, 0.7):
            for kind, layer in model.get_base_model().items():
                assert dict(layer.scaling) == pytest.approx(theirs[kind].scaling)

    def test_bad_arguments(self, model):
        with pytest.raises(TypeError) as error, rescale_adapter_scale(model, "2"):
            pass
        assert type(error.value) is ArgumentError
        assert str(error.value) == "multiplier must be a number; it is '2' of type str."
        with pytest.raises(ValueError, match=r"The model \(Linear\) holds no LoRA adapter") as error:
            rescale_adapter_scale(nn.Linear(2, 2), 2).__enter__()
        assert type(error.value) is ArgumentError


class TestRefusals:
    def refusal(self, layer, error=UnsupportedSiteError, **settings):
        base = nn.ModuleDict({"layer": layer})
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(error) as caught:
            get_peft_model(base, LoraConfig(target_modules=["layer"], **settings))
        assert base["layer"] is layer
        assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
        return str(caught.value)

    @pytest.mark.parametrize(("r", "near"), [(8, 9), (1, 3), (4, 3)])
    def test_rank_and_groups(self, r, near):
        assert self.refusal(nn.Conv1d(3, 6, 2, groups=3), r=r) == (
            f"The convolution 'layer' has groups=3, and the rank there, {r}, is not a multiple of that. Set another, "
            f"with rank_pattern={{'layer': {near}}} for this layer alone, or do not target it."
        )
        config = LoraConfig(r=r, rank_pattern={"layer": near}, target_modules=["layer"])
        get_peft_model(nn.ModuleDict({"layer": nn.Conv1d(3, 6, 2, groups=3)}), config)

    def test_bias_at_an_embedding(self):
        assert self.refusal(nn.Embedding(5, 4), lora_bias=True) == (
            "The module 'layer' is an embedding, and lora_bias=True is for linear layers and convolutions. Leave "
            "lora_bias out, or do not target it."
        )

    @pytest.mark.parametrize(
        ("layer", "name"),
        [(nn.ConvTranspose2d(2, 3, 2), "ConvTranspose2d"), (nn.EmbeddingBag(4, 3), "EmbeddingBag")],
    )
    def test_other_kinds(self, layer, name):
        assert self.refusal(layer) == (
            f"The module 'layer' is a {name}, and 'lora' adapts linear layers, embeddings, attention layers "
            f"and convolutions (1d, 2d, 3d) only. Remove it from target_modules, or exclude it."
        )

    @pytest.mark.parametrize("layer", [nn.LazyConv2d, nn.LazyLinear])
    def test_layers_without_a_shape(self, layer):
        base = nn.ModuleDict({"layer": layer(4, kernel_size=1) if layer is nn.LazyConv2d else layer(4)})
        with pytest.raises(UnsupportedSiteError) as error:
            get_peft_model(base, LoraConfig(target_modules=["layer"]))
        assert str(error.value) == (
            f"The module 'layer' ({layer.__name__}) cannot be adapted: its weight has no shape before the layer is "
            "first run; run the model once first."
        )

    def test_merging_groups(self):
        config = LoraConfig(r=2, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Conv1d(2, 4, 2, groups=2)), config)
        with pytest.raises(MergeError) as error:
            model.merge_and_unload()
        assert str(error.value) == (
            "The adapter 'default' on '0' cannot be merged: it stands on a convolution with groups, and its first "
            "factor mixes all channels, which kernels with groups cannot. Keep it as an adapter."
        )
        with pytest.raises(MergeError, match=r"^The adapter 'default' on '0' does not change its weight: it stands on"):
            model.get_base_model()[0].get_delta_weight("default")


class Powers(nn.Embedding):
    """An embedding whose result is no multiple of what it looks up."""

    def forward(self, tokens):
        return super().forward(tokens) ** 2


class TestEmbeddingsThatDoMore:
    def test_forward_of_its_own(self):
        tokens = torch.tensor([1, 6])
        model = get_peft_model(
            nn.Sequential(Powers(7, 3)), LoraConfig(r=2, init_lora_weights=False, target_modules=["0"])
        )
        layer = model.get_base_model()[0]
        expected = (layer.weight + layer.get_delta_weight("default"))[tokens] ** 2
        assert torch.allclose(model(tokens), expected, atol=1e-5)
        model(tokens).sum().backward()
        assert layer.lora_embedding_A["default"].grad.abs().max() > 1e-3
        model.merge_adapter()
        assert torch.allclose(model(tokens), expected, atol=1e-5)

    def test_a_hook_sees_what_the_base_layer_returns(self):
        tokens, seen, layer = torch.tensor([1, 6]), [], nn.Embedding(7, 3)
        layer.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
        model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, init_lora_weights=False, target_modules=["0"]))
        assert (model(tokens) - layer.weight[tokens]).abs().max() > 1e-3
        assert len(seen) == 1
        assert torch.equal(seen[0], layer.weight[tokens])


def test_half_precision_with_a_bias():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16)
    config = LoraConfig(r=2, lora_bias=True, init_lora_weights=False, target_modules=["0"])
    model = get_peft_model(base, config)
    assert base[0].lora_B["default"].bias.dtype is torch.float32
    assert model(torch.randn(5, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_saved_names():
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=[*LAYERS]))
    prefix = "base_model.model."
    expected = {f"{prefix}{kind}.lora_{f}.weight" for kind in LAYERS if kind != "embedding" for f in "AB"}
    expected |= {f"{prefix}embedding.lora_embedding_{f}" for f in "AB"}
    assert set(tunerkit.get_peft_model_state_dict(model)) == expected
