from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import registered, rotation

from tunerkit import Method, get_peft_model
from tunerkit.adapter import AdditiveAdapter
from tunerkit.errors import MergeError
from tunerkit.folding import fold
from tunerkit.offline.folding import fold_layer
from tunerkit.sites import LinearSite
from tunerkit.sums import split_rows
from tunerkit_lora import LoraConfig


def layer_of(config, *, bias=True):
    """A layer with a moved adapter, and its base layer's parameters."""
    torch.manual_seed(0)
    peft = get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=bias)), config)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    layer = peft.base_model.model[0]
    return layer, {name: tensor.detach().clone() for name, tensor in layer.base_layer.named_parameters()}


def fold_whole(layer, tensors, config):
    """What is folded, put together again, with the weight read as it is when the blocks are asked for."""
    blocks = fold_layer(layer, tensors, lambda name: split_rows(tensors[name]), config)
    return {name: torch.cat(list(parts)) for name, parts in blocks.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_block_by_block_it_is_what_the_core_folds(monkeypatch, dtype, block):
    config = LoraConfig(target_modules=["0"])
    layer, tensors = layer_of(config)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    site = layer.site.with_parameters(tensors)
    wanted = fold(site, site, [layer.adapters["default"]], safe=False)
    assert not torch.equal(wanted["weight"], tensors["weight"])
    monkeypatch.setattr("tunerkit.sums._BLOCK", block)
    folded = fold_whole(layer, tensors, config)
    assert folded.keys() == wanted.keys() == {"weight"}
    assert folded["weight"].dtype is dtype
    assert torch.equal(folded["weight"], wanted["weight"])


def test_what_is_only_added_to_is_read_when_the_blocks_are_asked_for():
    config = LoraConfig(target_modules=["0"])
    layer, tensors = layer_of(config)
    unread = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    blocks = fold_layer(layer, unread, lambda name: split_rows(tensors[name]), config)["weight"]
    torch.testing.assert_close(torch.cat(list(blocks)), fold_whole(layer, tensors, config)["weight"])


def test_another_method():
    with registered(rotation):
        config = rotation.Config(target_modules=["0"])
        layer, tensors = layer_of(config)
    before = tensors["weight"].clone()
    folded = fold_whole(layer, tensors, config)
    assert torch.equal(tensors["weight"], before)
    assert not torch.equal(folded["weight"], before)


def test_what_is_not_there(monkeypatch):
    with registered(rotation):
        config = rotation.Config(target_modules=["0"])
        layer, tensors = layer_of(config)
    monkeypatch.setattr(rotation.RotationAdapter, "merged", lambda self, below: (below.weight.to("meta"), below.bias))
    with pytest.raises(MergeError, match=r"Folding into '0.weight' needs more of the base model than this layer"):
        fold_whole(layer, tensors, config)


class Started(AdditiveAdapter):
    """A difference from a start that is the weight's sign, times what a part says."""

    entries = ("toy_rotation", "start")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_rotation = nn.Parameter(site.zeros(*site.weight.shape))
        sign = site.weight.sign()
        self.register_buffer("start", sign, persistent=False)

    def delta(self, base):
        return (self.toy_rotation - self.start) * self.part.factor


def test_what_is_derived_from_the_weight_is_derived_from_the_real_one():
    config = rotation.Config(target_modules=["0"])
    with registered(SimpleNamespace(Config=rotation.Config, method=Method(config=rotation.Config, adapter=Started))):
        layer, tensors = layer_of(config)
    adapter = layer.adapters["default"]
    adapter.join(SimpleNamespace(factor=3))
    adapter.start = adapter.start.to("meta")
    weight = tensors["weight"].clone()
    folded = fold_whole(layer, tensors, config)["weight"]
    torch.testing.assert_close(folded, weight + 3 * (adapter.toy_rotation.detach() - weight.sign()))


def test_a_weight_that_is_not_the_tensor_that_is_stored(monkeypatch):
    monkeypatch.setattr(LinearSite, "weight", property(lambda self: self.stored.clone()))
    config = LoraConfig(target_modules=["0"])
    layer, tensors = layer_of(config)
    before = tensors["weight"].clone()
    folded = fold_whole(layer, tensors, config)["weight"]
    assert torch.equal(tensors["weight"], before)
    torch.testing.assert_close(folded, before + layer.adapters["default"].delta(layer.site).detach())
