"""Torch's encoders, which in evaluation may hand their layers' weights to one operation and call none of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from toys import bottleneck, registered, tuner_by_hand

import tunerkit
from tunerkit import get_peft_model, inject_adapter_in_model
from tunerkit.errors import TargetWarning
from tunerkit.testing.bench import move
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[False] * 4, [False, False, True, True], [False, True, True, True]])
FEED_FORWARD = ["linear1", "linear2"]


class Frozen(nn.TransformerEncoderLayer):
    """A class of its own that has torch's forward."""


def encoder(kind=nn.TransformerEncoderLayer, depth=2):
    torch.manual_seed(0)
    layer = kind(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, depth).requires_grad_(requires_grad=False).eval()


def lora(**settings):
    return LoraConfig(**{"target_modules": FEED_FORWARD, **settings})


CONFIGS = {
    "low rank": lora(),
    "dora": lora(use_dora=True),
    "one layer": lora(target_modules=r".*layers\.1\.linear1"),
    "with attention": lora(target_modules=["linear1", "self_attn"]),
    "rescaling": IA3Config(target_modules=FEED_FORWARD, feedforward_modules=["linear2"]),
    "no merged form": bottleneck.Config(target_modules=FEED_FORWARD),
    "a parameter": lora(target_modules=[], target_parameters=["linear1.weight"]),
    "by hand": tuner_by_hand.Config(target_modules=FEED_FORWARD),
    "copied": lora(target_modules=["linear1"], modules_to_save=["norm1", "linear2"]),
}


@pytest.fixture(autouse=True)
def toys():
    with registered(bottleneck, tuner_by_hand):
        yield


def attached(config, base=None):
    model = get_peft_model(encoder() if base is None else base, copy.deepcopy(config))
    move(model, "default")
    return model.eval()


def run(model, mask=None, *, grad=False):
    """Return the output where it means something, with gradients along the way that no parameter asks for."""
    with torch.set_grad_enabled(grad):
        y = model(X.clone().requires_grad_(grad), src_key_padding_mask=mask)
    return (y if mask is None else y[~mask]).detach()


def switches(model):
    """Return by what the encoders decide, and whatever else stands on them."""
    return [
        {name: value for name, value in vars(module).items() if name not in {"_modules", "training", "peft_config"}}
        for module in model.modules()
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
    ]


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_take_part_in_evaluation(config, mask):
    base, model = encoder(), attached(config)
    y = run(model, mask)
    torch.testing.assert_close(y, run(model, mask, grad=True))
    assert (y - run(base, mask)).abs().max() > 1e-3
    with torch.inference_mode():
        torch.testing.assert_close(run(model, mask), y)


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_switched_off_and_unloaded_it_is_the_base(mask):
    base, model = encoder(), attached(CONFIGS["low rank"])
    y, before = run(base, mask), switches(base)
    adapted = run(model, mask)
    with model.disable_adapter():
        assert torch.equal(run(model, mask), y)
    assert torch.equal(run(model, mask), adapted)
    plain = model.unload()
    assert switches(plain) == before
    assert torch.equal(run(plain, mask), y)


def test_the_fast_path_is_taken_again(monkeypatch):
    model = attached(CONFIGS["low rank"])
    y = run(model)
    monkeypatch.delattr(nn.TransformerEncoderLayer, "_ff_block")
    with pytest.raises(AttributeError, match="_ff_block"):
        run(model)
    with model.disable_adapter():
        run(model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(run(plain), y)


def test_merged():
    model = attached(CONFIGS["low rank"])
    y = run(model, MASK)
    model.merge_adapter()
    torch.testing.assert_close(run(model, MASK), y)
    model.unmerge_adapter()
    assert torch.equal(run(model, MASK), y)


def test_only_the_encoders_that_hold_an_adapter_leave_it():
    base = nn.Sequential(encoder(Frozen), encoder())
    before = switches(base)
    model = attached(lora(target_modules=r"0\.layers\.1\.linear1"), base)
    changed = [ours != theirs for ours, theirs in zip(switches(model), before, strict=True)]
    assert changed == [True, False, True, False, False, False]
    torch.testing.assert_close(run(model.base_model.model[0]), run(model.base_model.model[0], grad=True))


def test_attention_alone_keeps_it():
    before = switches(encoder())
    assert switches(attached(lora(target_modules=["self_attn"]))) == before


def test_adapters_that_come_and_go():
    before = switches(encoder())
    model = attached(lora(target_modules=["self_attn"]))
    model.add_adapter("other", lora())
    model.add_adapter("third", lora())
    model.delete_adapter("other")
    assert switches(model) != before
    with model.disable_adapter():
        assert switches(model) == before
        model.add_adapter("fourth", lora())
        assert switches(model) == before
        model.delete_adapter("fourth")
    model.delete_adapter("third")
    assert switches(model) == before


@pytest.mark.filterwarnings("error")
def test_an_adapter_that_is_refused_changes_nothing():
    base = encoder()
    before = switches(base)
    with pytest.raises(TargetWarning, match="'absent'"):
        get_peft_model(base, lora(target_modules=["linear1", "absent"]))
    assert switches(base) == before


def test_routes_and_rows():
    model = attached(CONFIGS["low rank"])
    model.add_adapter("other", lora(init_lora_weights=False))
    model.eval()
    one, base = run(model), run(encoder())
    with model.use_adapter("other"):
        two = run(model)
    assert (two - one).abs().max() > 1e-3
    rows = ["other", "default", "__base__"]
    with torch.no_grad():
        y = model(X, adapter_names=rows)
    for row, wanted in zip(y, (two[0], one[1], base[2]), strict=True):
        torch.testing.assert_close(row, wanted)
    with model.disable_adapter(), model.use_adapter("other"):
        torch.testing.assert_close(run(model), two)


def test_injected_and_copied():
    base = encoder()
    before = switches(base)
    model = inject_adapter_in_model(lora(init_lora_weights=False), base).eval()
    y = run(model)
    torch.testing.assert_close(y, run(model, grad=True))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert torch.equal(run(copied), y)
        tunerkit.functional.delete_adapter(copied, "default")
        assert switches(copied) == before
    assert model.state_dict().keys() == inject_adapter_in_model(lora(), encoder()).state_dict().keys()


def test_a_switch_that_an_old_checkpoint_lacks():
    base = encoder()
    del base.use_nested_tensor
    model = attached(CONFIGS["low rank"], base)
    torch.testing.assert_close(run(model, MASK), run(model, MASK, grad=True))
    assert not hasattr(model.unload(), "use_nested_tensor")


def test_compiled():
    model = attached(CONFIGS["low rank"])
    y = run(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), y)
