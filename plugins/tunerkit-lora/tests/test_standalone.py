"""Adapters as plain ones of twice the rank, for the base model as it was."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunerkit
from tunerkit.errors import AdapterNameError, CheckpointError, CheckpointNotFoundError
from tunerkit.testing.parity import assert_close, plain_settings, run
from tunerkit_lora import LoraConfig, initialize_lora_eva_weights

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Mlp().eval()


X = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}
ROWS = {"x": torch.randn(20, 6, generator=torch.Generator().manual_seed(2))}


def lora(init="pissa", **settings):
    targets = ["wide", "narrow"]
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": init, **settings})


def move(model, name="default"):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, tensor in sorted(model.named_parameters()):
            if f".{name}" in key and tensor.requires_grad:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


def saved_twice(model, folder, **options):
    """Save an adapter before and after training, and return what the trained one gives."""
    model.eval()
    model.save_pretrained(folder / "initial")
    move(model)
    model.save_pretrained(folder / "final", path_initial_model_for_weight_conversion=str(folder / "initial"), **options)
    return run(model, X)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")  # PEFT's
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"wide": 3}}, {"alpha_pattern": {"wide": 2}}]
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_files_are_pefts(base, init, settings, tmp_path):
    ours = tunerkit.get_peft_model(copy.deepcopy(base), lora(init, **settings))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.get_peft_config(lora(init, **settings).to_dict()))
    expected = saved_twice(ours, tmp_path / "ours")
    assert (expected - run(base, X)).abs().max() > 1e-3
    assert_close(saved_twice(theirs, tmp_path / "theirs"), expected)
    name = "adapter_model.safetensors"
    found, wanted = (load_file(tmp_path / side / "final" / name) for side in ("ours", "theirs"))
    assert set(found) == set(wanted)
    for key in found:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5, rtol=1e-5)
    assert plain_settings(tmp_path / "ours" / "final") == plain_settings(tmp_path / "theirs" / "final")
    for folder in (tmp_path / "ours" / "final", tmp_path / "theirs" / "final"):
        assert_close(run(tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), folder), X), expected)
        assert_close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder), X), expected)


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")  # PEFT's advice
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"wide": 4}}])
@pytest.mark.parametrize(
    "init", [True, "gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal", "eva", "eva, looked at data", "mica"]
)
def test_what_a_script_of_pefts_saves_loads_there_whatever_the_start(base, init, settings, tmp_path):
    name = init.partition(",")[0] if isinstance(init, str) else init
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(name, **settings))
    if name != init:
        initialize_lora_eva_weights(model, [ROWS], prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)
    expected = saved_twice(model, tmp_path)
    assert (expected - run(base, X)).abs().max() > 1e-3
    assert tunerkit.PeftConfig.from_pretrained(tmp_path / "final").init_lora_weights is True
    assert_close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final"), X), expected)
    assert_close(run(tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final"), X), expected)


@pytest.mark.parametrize("init", ["pissa_niter_2", "pissa"])
def test_its_files_are_not_put_back_into_the_adapter_itself(base, init, tmp_path):
    model = tunerkit.get_peft_model(base, lora(init))
    expected = saved_twice(model, tmp_path)
    with pytest.raises(AdapterNameError) as error:
        model.load_adapter(tmp_path / "final", "default")
    assert str(error.value) == (
        f"There is an adapter 'default' already, and the checkpoint in {str(tmp_path / 'final')!r} has the config of "
        "its standalone form, a plain adapter that holds the start too (r: 4 there, 2 here; lora_alpha: 12 there, 6 "
        f"here; init_lora_weights: True there, {init!r} here). Choose another name, or delete that adapter first."
    )
    assert torch.equal(run(model, X), expected)
    model.load_adapter(tmp_path / "final", "other")
    model.set_adapter("other")
    assert_close(run(model, X), expected)
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "final", "default")
    model.set_adapter("default")
    assert_close(run(model, X), expected)


def test_the_initial_folder_and_the_model_stay_as_they_are(base, tmp_path):
    # PEFT writes init_lora_weights=True into the initial folder.
    model = tunerkit.get_peft_model(base, lora())
    expected = saved_twice(model, tmp_path)
    assert json.loads((tmp_path / "initial" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    assert model.peft_config["default"].init_lora_weights == "pissa"
    assert model.peft_config["default"].r == 2
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model, X), expected)


def test_a_start_that_the_adapter_does_not_know(base, tmp_path):
    # What LoRA-GA leaves: a plain adapter that began away from zero, on a base from which that was taken off. Here the
    # original base is what it is converted for.
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init=False)).eval()
    start = run(model, X)
    saved_twice(model, tmp_path)
    converted = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    layer, plain = converted.get_base_model().wide, model.get_base_model().wide
    first = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    begun = first["base_model.model.wide.lora_B.weight"] @ first["base_model.model.wide.lora_A.weight"]
    expected = plain.adapters["default"].delta(plain.site) - 3 * begun
    assert_close(layer.adapters["default"].delta(layer.site), expected)
    assert (start - run(base, X)).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["pissa", True])
def test_dora_keeps_its_magnitude(base, init, tmp_path):
    # PEFT leaves it out, and its file cannot be loaded by itself.
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora(init, use_dora=True))
    expected = saved_twice(model, tmp_path)
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    assert_close(run(loaded, X), expected)
    assert_close(run(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final"), X), expected)


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}])
def test_other_layers(settings, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4)).eval()
    x = torch.randn(3, 2, 3, 3)
    config = LoraConfig(r=2, target_modules=["0", "2"], **settings)
    model = tunerkit.get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path / "initial")
    move(model)
    model.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    assert loaded.peft_config["default"].r == 4
    assert (model(x) - base(x)).abs().max() > 1e-3
    assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:(Using Rank-Stabilized LoRA with|PiSSA changes the base weights)")  # PEFT's
@pytest.mark.parametrize("pattern", [{"alpha_pattern": {"wide": 3}}, {"rank_pattern": {"wide": 3}}])
def test_patterns_with_rank_stabilised_scaling(base, pattern, tmp_path):
    # PEFT refuses it when the adapter has been trained already, since it doubles alphas that the root of two is for.
    expected = saved_twice(tunerkit.get_peft_model(copy.deepcopy(base), lora(use_rslora=True, **pattern)), tmp_path)
    assert (expected - run(base, X)).abs().max() > 1e-3
    for library in (tunerkit, peft):
        assert_close(run(library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final"), X), expected)
    theirs = peft.get_peft_model(base, peft.get_peft_config(lora(use_rslora=True, **pattern).to_dict()))
    with pytest.raises(ValueError, match="use_rslora=True"):
        saved_twice(theirs, tmp_path / "theirs")


def test_an_embedding(tmp_path):
    # PEFT leaves its tensors out.
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Embedding(6, 4)).eval(), torch.arange(6)
    model = tunerkit.get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0"])).eval()
    model.save_pretrained(tmp_path / "initial")
    move(model)
    model.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    assert (model(x) - base(x)).abs().max() > 1e-3
    assert_close(loaded(x), model(x))


def test_a_state_gathered_elsewhere(base, tmp_path):
    model = tunerkit.get_peft_model(copy.deepcopy(base), lora()).eval()
    model.save_pretrained(tmp_path / "initial")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    move(model)
    model.save_pretrained(
        tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "initial"), state_dict=state
    )
    loaded = tunerkit.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    assert_close(run(loaded, X), run(base, X))  # the state is that of the start


# --- Bad input: nothing is written.


def refused(model, tmp_path, initial, kind):
    with pytest.raises(kind) as error:
        model.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=initial)
    assert not (tmp_path / "final").exists()
    return str(error.value)


def test_no_such_folder(base, tmp_path):
    model = tunerkit.get_peft_model(base, lora())
    assert "nowhere" in refused(model, tmp_path, tmp_path / "nowhere", CheckpointNotFoundError)


def test_an_adapter_that_began_elsewhere(base, tmp_path):
    other = tunerkit.get_peft_model(copy.deepcopy(base), lora())
    move(other)
    other.save_pretrained(tmp_path / "initial")
    model = tunerkit.get_peft_model(base, lora())
    assert refused(model, tmp_path, tmp_path / "initial", CheckpointError) == (
        "The initial adapter is not what this adapter started from. Give the folder of this very adapter as it was "
        "saved before training."
    )


def test_an_adapter_of_another_rank(base, tmp_path):
    tunerkit.get_peft_model(copy.deepcopy(base), lora(r=3)).save_pretrained(tmp_path / "initial")
    model = tunerkit.get_peft_model(base, lora())
    assert refused(model, tmp_path, tmp_path / "initial", CheckpointError) == (
        "The adapter's base_model.model.wide.lora_A.weight is (2, 6), and the initial adapter has it as (3, 6). Give "
        "the folder of this very adapter as it was saved before training."
    )


def test_an_adapter_of_other_layers(base, tmp_path):
    tunerkit.get_peft_model(copy.deepcopy(base), lora(target_modules=["narrow"])).save_pretrained(tmp_path / "initial")
    model = tunerkit.get_peft_model(base, lora())
    assert "lora_A.weight is (2, 6), and the initial adapter lacks it." in refused(
        model, tmp_path, tmp_path / "initial", CheckpointError
    )


def test_a_convolution_with_groups(tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2))
    model = tunerkit.get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "initial")
    message = refused(model, tmp_path, tmp_path / "initial", CheckpointError)
    assert message.startswith("The adapter cannot be joined with its start: it stands on a convolution with groups")
    assert message.endswith("Save it as it is.")
