"""A loaded adapter that changes nothing is refused where that is asked for."""

from __future__ import annotations

import pytest
import torch
from toys import bottleneck, hooks_by_hand, registered, shared

import tunerkit
from tunerkit.errors import CheckpointError, NoEffectError
from tunerkit.testing.bench import Snapshot, difference, move
from tunerkit.testing.models import Linears

lora = pytest.importorskip("tunerkit_lora", reason="these adapters are LoRA's: pip install tunerkit-lora")
ia3 = pytest.importorskip("tunerkit_ia3", reason="these adapters are (IA)3's: pip install tunerkit-ia3")

WHOLE = {"target_modules": ["wide", "square", "narrow"]}


def make_base():
    torch.manual_seed(0)
    return Linears().eval()


def saved(folder, config, *, moved=False, change=None):
    model = tunerkit.get_peft_model(make_base(), config)
    if moved:
        move(model, "default")
    if change is not None:
        with torch.no_grad():
            change(model.get_base_model())
    model.save_pretrained(folder)
    return folder


def refusal(folder):
    """Load and return why it was refused; both calls must say the same and leave no trace."""
    base = make_base()
    before = Snapshot.of(base)
    with pytest.raises(NoEffectError) as error:
        tunerkit.PeftModel.from_pretrained(base, folder, verify=True)
    assert before.differences(base) == []
    model = tunerkit.get_peft_model(make_base(), lora.LoraConfig(r=2, **WHOLE), "first")
    before = Snapshot.of(model)
    with pytest.raises(NoEffectError) as again:
        model.load_adapter(folder, "default", verify=True)
    assert before.differences(model) == []
    assert str(again.value) == str(error.value)
    return str(error.value)


CONFIGS = {
    "lora": (lambda **more: lora.LoraConfig(r=2, **WHOLE, **more), "lora_B.weight is 0 everywhere"),
    "dora": (lambda **more: lora.LoraConfig(r=2, use_dora=True, **WHOLE, **more), "lora_B.weight is 0 everywhere"),
    "ia3": (
        lambda **more: ia3.IA3Config(feedforward_modules=["square"], **WHOLE, **more),
        "ia3_l is 1 everywhere",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
class TestUntrained:
    def test_is_refused(self, kind, tmp_path):
        config, why = CONFIGS[kind]
        assert refusal(saved(tmp_path, config())) == (
            f"The checkpoint in '{tmp_path}' has no effect: none of the 3 layers with the adapter 'default' computes "
            f"anything else with it (verify=True). {why}, as before any training: save the adapter after training, and "
            "from the process that holds what was trained. Leave verify out to load it all the same."
        )

    def test_is_loaded_without(self, kind, tmp_path):
        folder = saved(tmp_path, CONFIGS[kind][0]())
        x = torch.ones(2, 6)
        with torch.no_grad():
            loaded = tunerkit.PeftModel.from_pretrained(make_base(), folder)(x)
            assert difference(loaded, make_base()(x)) < 1e-6

    def test_one_layer_that_is_changed_is_enough(self, kind, tmp_path):
        def change(base):
            for tensor in base.narrow.adapter_tensors("default").values():
                tensor.add_(0.01)

        folder = saved(tmp_path, CONFIGS[kind][0](), change=change)
        model = tunerkit.PeftModel.from_pretrained(make_base(), folder, verify=True)
        assert model.load_adapter(folder, "second", verify=True).complete

    def test_nan_is_an_effect(self, kind, tmp_path):
        def change(base):
            for tensor in base.narrow.adapter_tensors("default").values():
                tensor.fill_(float("nan"))

        tunerkit.PeftModel.from_pretrained(make_base(), saved(tmp_path, CONFIGS[kind][0](), change=change), verify=True)

    def test_a_whole_module(self, kind, tmp_path):
        config = CONFIGS[kind][0](modules_to_save=["head"])
        assert "none of the 4 layers" in refusal(saved(tmp_path / "start", config))

        def change(base):
            base.head.modules_to_save["default"].bias.add_(0.01)

        folder = saved(tmp_path / "trained", config, change=change)
        tunerkit.PeftModel.from_pretrained(make_base(), folder, verify=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", CONFIGS)
def test_in_other_dtypes(kind, dtype, tmp_path):
    saved(tmp_path / "start", CONFIGS[kind][0]())
    saved(tmp_path / "moved", CONFIGS[kind][0](), moved=True)
    tunerkit.PeftModel.from_pretrained(make_base().to(dtype), tmp_path / "moved", verify=True)
    with pytest.raises(NoEffectError):
        tunerkit.PeftModel.from_pretrained(make_base().to(dtype), tmp_path / "start", verify=True)


def test_scaled_by_nothing(tmp_path):
    folder = saved(tmp_path, lora.LoraConfig(r=2, lora_alpha=0, **WHOLE), moved=True)
    assert "Its tensors are not at a start, so look at what the config scales them by ('scaling=0.0')." in refusal(
        folder
    )


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_trained_biases(which, tmp_path):
    config = lora.LoraConfig(r=2, bias=which, **WHOLE)
    assert "has no effect" in refusal(saved(tmp_path / "start", config))

    def change(base):
        base.wide.base_layer.bias.add_(0.01)

    folder = saved(tmp_path / "trained", config, change=change)
    tunerkit.PeftModel.from_pretrained(make_base(), folder, verify=True)
    model = tunerkit.get_peft_model(make_base(), lora.LoraConfig(r=2, **WHOLE), "first")
    model.load_adapter(folder, "default", verify=True)


def test_a_name_that_is_taken(tmp_path):
    config = lora.LoraConfig(r=2, **WHOLE)
    folder = saved(tmp_path, config)
    model = tunerkit.get_peft_model(make_base(), config)
    move(model, "default")
    before = Snapshot.of(model)
    with pytest.raises(NoEffectError):
        model.load_adapter(folder, "default", verify=True)
    assert before.differences(model) == []


@pytest.mark.parametrize("toy", [bottleneck, hooks_by_hand])
def test_what_cannot_be_seen_counts(toy, tmp_path):
    with registered(toy):
        folder = saved(tmp_path, toy.Config(**WHOLE))
        tunerkit.PeftModel.from_pretrained(make_base(), folder, verify=True)


def test_what_all_layers_share(tmp_path):
    with registered(shared):
        folder = saved(tmp_path, shared.Config(target_modules=["wide", "narrow"], train_shared=True), moved=True)
        tunerkit.PeftModel.from_pretrained(make_base(), folder, verify=True)


def test_on_the_meta_device(tmp_path):
    folder = saved(tmp_path, lora.LoraConfig(r=2, **WHOLE), moved=True)
    with pytest.raises(CheckpointError) as error:
        tunerkit.PeftModel.from_pretrained(make_base().to("meta"), folder, verify=True)
    assert str(error.value) == (
        f"The checkpoint in '{tmp_path}' cannot be verified: the base model is on the meta device, so there is nothing "
        "that the adapter could change. Load the base model's weights first, or leave verify out."
    )
