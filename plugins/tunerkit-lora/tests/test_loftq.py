"""The start "loftq": what it is, that the base stays as it is, and that files are PEFT's both ways."""

import copy

import pytest
import torch
from on_the_cpu import OnTheCpu
from safetensors.torch import load_file
from torch import nn

import tunerkit
from tunerkit.errors import CheckpointError, CombinationError, ConfigError, ConfigWarning, UnsupportedSiteError
from tunerkit.testing.parity import assert_close, check_parity, run
from tunerkit_lora import LoftQConfig, LoftqDora, LoftqLora, LoraConfig
from tunerkit_lora.inits.quantising import loftq, normal_floats, rounded

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
transformers = pytest.importorskip("transformers", reason="PEFT's models to compare on are those of transformers")

SETTINGS = [(4, 1), (4, 5), (8, 1), (8, 5)]


class Mlp(nn.Module):
    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.wide, self.square, self.narrow = kind(24, 40), kind(40, 40, bias=False), kind(40, 9)

    def forward(self, x):
        return self.narrow(torch.tanh(self.square(torch.tanh(self.wide(x)))))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Mlp().eval()


@pytest.fixture
def x():
    return {"x": torch.randn(5, 24, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def weight():
    return 0.1 * torch.randn(48, 50, generator=torch.Generator().manual_seed(0))


def lora(bits=4, rounds=1, **settings):
    return LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["wide", "square", "narrow"],
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": bits, "loftq_iter": rounds},
            **settings,
        }
    )


def move(model, name="default"):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.base_model.layers():
            for tensor in layer.trainable_tensors(name):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def bits_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- The functions.


def test_the_numbers_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="comparing with bitsandbytes needs it")
    torch.testing.assert_close(normal_floats(), functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "rounds"), SETTINGS)
def test_as_in_peft(weight, bits, rounds, dtype):
    utils = pytest.importorskip("peft.utils.loftq_utils", reason="PEFT's LoftQ needs transformers")
    pytest.importorskip("bitsandbytes", reason="PEFT's LoftQ quantises with bitsandbytes")
    weight = weight.to(dtype)
    first, second, quantised = loftq(weight.float(), 6, 1.0, bits, rounds)
    with OnTheCpu():
        base, lora_a, lora_b = utils.loftq_init(weight, bits, 6, rounds)
    torch.testing.assert_close(quantised.to(dtype), base, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6)
    assert_close(second @ first, lora_b @ lora_a)
    assert (second @ first).abs().max() > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_zeros_stay_zeros(bits):
    weight = torch.zeros(3, 70)
    weight[1] = torch.linspace(-2, 3, 70)
    found = rounded(weight, bits)
    assert found.shape == weight.shape
    assert found[[0, 2]].abs().max() == 0
    assert 0 < (found - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_twice_is_quantising_once(weight, bits):
    once = rounded(weight, bits)
    torch.testing.assert_close(rounded(once, bits), once, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_each_round_comes_closer(weight, bits):
    errors = []
    for rounds in (1, 2, 4):
        first, second, quantised = loftq(weight, 6, 3.0, bits, rounds)
        errors.append((quantised + 3.0 * second @ first - weight).norm())
    assert (rounded(weight, bits) - weight).norm() > errors[0] > errors[1] > errors[2]


# --- The adapters.


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"r": 16, "lora_alpha": 4, "use_rslora": True}])
@pytest.mark.parametrize(("bits", "rounds"), SETTINGS)
def test_everything_is_as_in_peft(base, x, bits, rounds, settings, tmp_path):
    pytest.importorskip("bitsandbytes", reason="PEFT's LoftQ quantises with bitsandbytes")
    with OnTheCpu():
        check_parity(base, lora(bits, rounds, **settings), x, tmp_path)


@pytest.mark.parametrize(("bits", "rounds"), SETTINGS)
def test_the_first_output_is_pefts(base, x, bits, rounds):
    pytest.importorskip("bitsandbytes", reason="PEFT's LoftQ quantises with bitsandbytes")
    ours = tunerkit.get_peft_model(copy.deepcopy(base), lora(bits, rounds)).eval()
    with OnTheCpu():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(lora(bits, rounds).to_dict())).eval()
    assert_close(run(ours, x), run(theirs, x))
    for name in ("wide", "square", "narrow"):
        layer, other = getattr(ours.get_base_model(), name), getattr(theirs.get_base_model(), name)
        assert_close(layer.lora_start_weight["default"], other.base_layer.weight)
        assert_close(
            layer.get_delta_weight("default") + layer.weight,
            other.base_layer.weight + other.get_delta_weight("default"),
        )


@pytest.mark.parametrize(("scale", "compared"), [(1, "closer"), (2, "as far"), (16, "farther")])
def test_the_start_is_close_to_the_base_whatever_the_scale(base, scale, compared):
    pytest.importorskip("bitsandbytes", reason="PEFT's LoftQ quantises with bitsandbytes")
    config = lora(lora_alpha=4 * scale)
    ours = tunerkit.get_peft_model(copy.deepcopy(base), config).eval()
    with OnTheCpu():
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(config.to_dict())).eval()
    layer, other = ours.get_base_model().square, theirs.get_base_model().square
    plain = (layer.lora_start_weight["default"] - base.square.weight).norm()
    assert layer.get_delta_weight("default").norm() < 0.9 * plain
    with torch.no_grad():
        far = float((other.base_layer.weight + other.get_delta_weight("default") - base.square.weight).norm() / plain)
    assert far == pytest.approx(1, rel=1e-4) if compared == "as far" else (far < 0.9) == (compared == "closer")


@pytest.mark.parametrize(("dora", "kind"), [(False, LoftqLora), (True, LoftqDora)])
def test_the_base_stays_as_it_is(base, x, dora, kind):
    before, expected = bits_of(base), run(base, x)
    objects = {name: id(value) for name, value in base.named_parameters()}
    model = tunerkit.get_peft_model(base, lora(use_dora=dora)).eval()
    layer = model.get_base_model().wide
    assert type(layer.adapters["default"]) is kind
    start = run(model, x)
    assert 1e-3 < (start - expected).norm() / expected.norm() < 0.2
    with model.disable_adapter():
        assert torch.equal(run(model, x), expected)
    move(model)
    assert (run(model, x) - start).abs().max() > 1e-3
    again = model.unload()
    assert {name: id(value) for name, value in again.named_parameters()} == objects
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("dora", [False, True])
def test_merging(base, x, dora):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(use_dora=dora)).eval()
    move(model)
    before = run(model, x)
    model.merge_adapter()
    assert_close(run(model, x), before)
    model.unmerge_adapter()
    assert torch.equal(run(model, x), before)
    assert_close(run(model.merge_and_unload(), x), before)


def test_with_dropout_the_quantised_weight_sees_the_whole_input(base, x):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(lora_dropout=0.5)).train()
    assert (run(model, x) - run(model, x)).abs().max() > 1e-5
    for layer in model.base_model.layers():
        layer.set_scale("default", 0)
    assert torch.equal(run(model, x), run(model, x))


def test_the_quantised_weight_is_neither_saved_nor_trained(base, tmp_path):
    model = tunerkit.get_peft_model(base, lora())
    assert not any("start" in name for name, _ in model.named_parameters())
    assert not any("start" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert {key.rpartition("lora_")[2] for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        "A.weight",
        "B.weight",
    }


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"strict": False}])
def test_loading_what_was_saved(base, x, options, dora, tmp_path):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(4, 3, use_dora=dora)).eval()
    move(model)
    expected = run(model, x)
    model.save_pretrained(tmp_path)
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
    assert_close(run(loaded, x), expected)
    assert loaded.peft_config["default"].loftq_config == {"loftq_bits": 4, "loftq_iter": 3}


def test_loading_onto_the_meta_device_needs_the_weight(base, tmp_path):
    tunerkit.get_peft_model(base, lora()).save_pretrained(tmp_path)
    with torch.device("meta"):
        other = Mlp()
    with pytest.raises(CheckpointError, match="derives 'lora_start_weight' from the layer's weight"):
        tunerkit.PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=True)
    with pytest.raises(UnsupportedSiteError, match="init_lora_weights='loftq' is derived from the weight"):
        tunerkit.get_peft_model(other, lora())


def test_the_quantised_base_as_a_model_of_its_own(base, x, tmp_path):
    """As in PEFT's script for LoftQ: the adapter and the quantised base are saved, and go together."""
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(4, 3)).eval()
    move(model)
    expected = run(model, x)
    weights = {name: getattr(model.get_base_model(), name).lora_start_weight["default"] for name in ("wide", "square")}
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    for layer in model.base_model.layers():
        layer.set_scale("default", 0)
    quantised = model.merge_and_unload()
    for name, weight in weights.items():
        assert torch.equal(getattr(quantised, name).weight, weight)
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(quantised), tmp_path)
    assert type(loaded.get_base_model().wide.adapters["default"]) is not LoftqLora
    assert_close(run(loaded, x), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_beside_another_adapter(base, x, dora):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(use_dora=dora)).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["wide", "square"], init_lora_weights=False))
    move(model)
    alone = run(model, x)
    for order in (["default", "other"], ["other", "default"]):
        model.set_adapter(order)
        both = run(model, x)
        assert (both - alone).abs().max() > 1e-3
        model.merge_adapter()
        assert_close(run(model, x), both)
        model.unmerge_adapter()
        assert_close(run(model, x), both)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(model, x), alone)


def test_swapping_another_in_takes_its_weight_too(base, x, tmp_path):
    other = tunerkit.get_peft_model(copy.deepcopy(base), lora(8, 2)).eval()
    move(other)
    other.save_pretrained(tmp_path)
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora()).eval()
    tunerkit.hotswap_adapter(model, tmp_path, "default")
    assert_close(run(model, x), run(other, x))


def test_transposed_layers(x):
    # PEFT decomposes the weight as it is stored, and its factors then have the wrong shapes.
    def conv1d(inputs, outputs, **_settings):
        return transformers.pytorch_utils.Conv1D(outputs, inputs)

    torch.manual_seed(0)
    base = Mlp(conv1d).eval()
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(fan_in_fan_out=True)).eval()
    move(model)
    before = run(model, x)
    assert (before - run(base, x)).abs().max() > 1e-3
    model.merge_adapter()
    assert_close(run(model, x), before)


def test_an_embedding_beside_them_starts_as_ever():
    base = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 3))
    model = tunerkit.get_peft_model(base, lora(target_modules=["0", "1"], r=2))
    assert model.get_base_model()[0].lora_embedding_A["default"].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(base, x, dtype):
    base = base.to(dtype)
    inputs = {"x": x["x"].to(dtype)}
    model = tunerkit.get_peft_model(base, lora(r=8, lora_alpha=8)).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().wide.lora_start_weight["default"].dtype == dtype
    move(model)
    before = run(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(run(model, inputs), before, atol=5e-2, rtol=5e-2)


# --- What does not go.


def test_convolutions_have_no_such_start():
    layer = nn.Conv2d(4, 4, 3)
    base = nn.Sequential(layer)
    with pytest.raises(UnsupportedSiteError) as error:
        tunerkit.get_peft_model(base, lora(target_modules=["0"]))
    assert str(error.value) == (
        "The module '0' is a Conv2d, and init_lora_weights='loftq' is for linear layers. Use True, or do not target it."
    )
    assert base[0] is layer


def test_attention_has_no_such_start():
    with pytest.raises(UnsupportedSiteError, match="cannot be adapted with init_lora_weights='loftq'"):
        tunerkit.get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), lora(target_modules=["0"]))


def test_a_dtype_that_is_not_decomposed(base):
    with pytest.raises(UnsupportedSiteError, match=r"that of 'wide' is torch\.float64; it must be float32"):
        tunerkit.get_peft_model(base.double(), lora())


@pytest.mark.parametrize("given", [{}, None])
def test_the_settings_are_needed(given):
    with pytest.raises(ConfigError) as error:
        LoraConfig(init_lora_weights="loftq", loftq_config=given)
    assert str(error.value) == (
        "LoraConfig.init_lora_weights='loftq' needs loftq_config, for example LoftQConfig(loftq_bits=4, loftq_iter=1)."
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"loftq_bits": 2}, r"LoftQConfig.loftq_bits must be 4 \(NF4\) or 8 \(whole numbers\); it is 2\."),
        ({"loftq_bits": "4"}, "loftq_bits must be 4"),
        ({"loftq_iter": 0}, r"LoftQConfig.loftq_iter must be a whole number of at least 1; it is 0\."),
        ({"loftq_iter": 1.5}, "loftq_iter must be a whole number"),
        ({"loftq_iter": True}, "loftq_iter must be a whole number"),
        ({"bits": 4}, "LoraConfig.loftq_config is not what LoftQConfig takes: .*'bits'"),
    ],
)
def test_settings_that_are_wrong(given, reason):
    with pytest.raises(ConfigError, match=reason):
        LoraConfig(init_lora_weights="loftq", loftq_config=given)


def test_settings_as_a_dict_or_an_object():
    config = LoraConfig(init_lora_weights="LoftQ", loftq_config=LoftQConfig(loftq_bits=8))
    assert (config.init_lora_weights, config.loftq_config) == ("loftq", {"loftq_bits": 8, "loftq_iter": 1})
    assert LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 8}) == config
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert LoftQConfig() == LoftQConfig(4, 1)
    assert vars(LoftQConfig()) == vars(peft.LoftQConfig())


def test_settings_of_another_start_have_no_effect():
    with pytest.warns(ConfigWarning, match="LoraConfig.loftq_config has no effect with init_lora_weights=True") as seen:
        assert LoraConfig(loftq_config=LoftQConfig()).loftq_config == {}
    assert seen[0].filename == __file__


def test_of_a_file_they_say_nothing():
    """PEFT's script saves an adapter that LoftQ started with another start, and leaves the settings."""
    values = {**lora().to_dict(), "init_lora_weights": True}
    assert values["loftq_config"]
    assert LoraConfig.from_dict(values).loftq_config == {}


def test_lora_bias_is_refused():
    with pytest.raises(ConfigError, match="lora_bias=True needs init_lora_weights=True or False; it is 'loftq'"):
        lora(lora_bias=True)


def test_there_is_no_plain_form(base, tmp_path):
    model = tunerkit.get_peft_model(base, lora())
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(CheckpointError) as error:
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert str(error.value) == (
        "The adapter was started by LoftQ and stands on a quantised weight, which no plain adapter makes of the "
        "base's. Save it as it is, or merge it and save the model."
    )


def test_combining_is_refused(base):
    model = tunerkit.get_peft_model(base, lora())
    model.add_adapter("other", lora(init_lora_weights=True, loftq_config={}))
    with pytest.raises(CombinationError) as error:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="svd")
    assert str(error.value) == (
        "'default' stands on a quantised weight in place of the base's (init_lora_weights='loftq'), which factors "
        "cannot say. Merge it instead."
    )
