"""Adapters of different methods on one model, active together."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import bare, bias, bottleneck, hooks_by_hand, registered, rotation, shared

import tunerkit
from tunerkit.errors import MergeError
from tunerkit.testing.bench import MOVED, Snapshot, adapter_tensors, difference, loss_of, move, same_bits
from tunerkit.testing.models import Linears

lora = pytest.importorskip("tunerkit_lora", reason="mixing with LoRA needs its package: pip install tunerkit-lora")
ia3 = pytest.importorskip("tunerkit_ia3", reason="mixing with IA3 needs its package: pip install tunerkit-ia3")

CONFIGS = {
    "lora": lambda: lora.LoraConfig(r=2, target_modules=["wide", "square", "narrow"]),
    "ia3": lambda: ia3.IA3Config(target_modules=["wide", "square"], feedforward_modules=["square"]),
    "rotation": lambda: rotation.Config(target_modules=["square", "narrow"]),
    "shared": lambda: shared.Config(target_modules=["wide", "narrow"], train_shared=True),
    "bare": lambda: bare.Config(target_modules=["wide", "square"]),
    "bias": lambda: bias.Config(target_modules=["wide", "square"]),
}
ORDERS = st.permutations(sorted(CONFIGS)).flatmap(lambda names: st.integers(2, len(names)).map(lambda n: names[:n]))
INPUT = torch.linspace(-1, 1, 30).reshape(5, 6)


@pytest.fixture(autouse=True, scope="module")
def known():
    with registered(bare, bias, bottleneck, hooks_by_hand, rotation, shared):
        yield


def base_model():
    torch.manual_seed(0)
    return Linears().eval()


def adapted(names):
    first, *others = names
    model = tunerkit.get_peft_model(base_model(), CONFIGS[first](), first)
    for name in others:
        model.add_adapter(name, CONFIGS[name]())
    for number, name in enumerate(names):
        move(model, name, seed=number)
    return model.eval()


def run(model):
    with torch.no_grad():
        return model(INPUT)


def test_each_takes_part():
    model = adapted(list(CONFIGS))
    model.set_adapter(list(CONFIGS))
    together = run(model)
    for name in CONFIGS:
        model.set_adapter([other for other in CONFIGS if other != name])
        assert difference(run(model), together) > MOVED


@settings(max_examples=15, deadline=None)
@given(order=ORDERS)
def test_merged_equals_unmerged_in_any_order(order):
    model = adapted(order)
    model.set_adapter(order)
    before, together = Snapshot.of(model), run(model)
    model.merge_adapter()
    assert torch.allclose(run(model), together, atol=1e-5)
    model.unmerge_adapter()
    assert before.differences(model) == []
    assert torch.allclose(run(model.merge_and_unload()), together, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(order=ORDERS, data=st.data())
def test_the_lower_ones_can_be_merged_first(order, data):
    model = adapted(order)
    model.set_adapter(order)
    together = run(model)
    count = data.draw(st.integers(1, len(order)))
    model.merge_adapter(order[:count])
    assert torch.allclose(run(model), together, atol=1e-5)
    if count < len(order):
        with contextlib.suppress(MergeError):  # the topmost alone, if the order allows it
            model.merge_adapter(order[-1:])
    assert torch.allclose(run(model), together, atol=1e-5)


def test_the_order_counts():
    model = adapted(["lora", "rotation"])
    model.set_adapter(["lora", "rotation"])
    one = run(model)
    model.set_adapter(["rotation", "lora"])
    assert difference(run(model), one) > MOVED
    before = Snapshot.of(model)
    message = (
        r"the adapters stand in the order 'rotation', 'lora', and 'lora' does not commute with 'rotation' below it.*"
        r"activate 'lora' first"
    )
    with pytest.raises(MergeError, match=message):
        model.merge_adapter(["lora"])
    assert before.differences(model) == []


def test_saved_and_loaded_one_by_one(tmp_path):
    names = list(CONFIGS)
    model = adapted(names)
    model.set_adapter(names)
    model.save_pretrained(tmp_path)
    loaded = tunerkit.PeftModel.from_pretrained(base_model(), tmp_path / names[-1], names[-1])
    for name in reversed(names[:-1]):
        report = loaded.load_adapter(tmp_path / name, name)
        assert (report.missing_keys, report.unexpected_keys) == ([], [])
    loaded.set_adapter(names)
    assert same_bits(run(loaded), run(model))
    for name in names:
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert same_bits(run(loaded), run(model))


def test_all_train_together():
    names = list(CONFIGS)
    model = adapted(names)
    model.set_adapter(names)
    loss_of(model(INPUT)).backward()
    for name in names:
        for key, tensor in adapter_tensors(model, name).items():
            assert tensor.grad.abs().max() > 0, (name, key)


def test_deleting_them_one_by_one_gives_back_the_base():
    base = base_model()
    before = Snapshot.of(base)
    names = list(CONFIGS)
    model = tunerkit.get_peft_model(base, CONFIGS[names[0]](), names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name]())
    model.set_adapter(names)
    for name in names:
        model.delete_adapter(name)
    assert [line for line in before.differences(base) if "requires_grad" not in line] == []


def test_one_without_a_merged_form_stays_while_those_below_are_merged():
    model = adapted(["rotation", "lora"])
    model.add_adapter("bottleneck", bottleneck.Config(target_modules=["square", "narrow"]))
    move(model, "bottleneck")
    model.set_adapter(["rotation", "lora", "bottleneck"])
    together = run(model)
    with pytest.raises(MergeError, match="'bottleneck' on 'square' cannot be merged: its output is not linear"):
        model.merge_adapter()
    model.merge_adapter(["rotation", "lora"])
    assert torch.allclose(run(model), together, atol=1e-5)


def test_a_layer_by_hand_beside_layers_of_the_core():
    model = tunerkit.get_peft_model(base_model(), hooks_by_hand.Config(target_modules=["wide"]), "hand")
    model.add_adapter("lora", lora.LoraConfig(target_modules=["square", "narrow"]))
    for name in ("hand", "lora"):
        move(model, name)
    model.set_adapter(["hand", "lora"])
    together = run(model)
    model.merge_adapter()
    assert torch.allclose(run(model), together, atol=1e-5)
    model.unmerge_adapter()
    assert same_bits(run(model), together)
    with model.use_adapter(["hand"]):
        routed = run(model)
    model.set_adapter("hand")
    assert same_bits(run(model), routed)
