"""Weighted combinations of IA3 adapters."""

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import CombinationError
from tunerkit.testing.bench import Snapshot
from tunerkit.testing.parity import Pair, assert_close, run
from tunerkit_ia3 import IA3Config


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


X = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}


def base():
    torch.manual_seed(0)
    return Net().eval()


def config(*targets, feedforward=()):
    return IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward))


def moved(model, *names):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in names:
            for layer in model.base_model.layers():
                if name in layer.available_adapters:
                    layer.ia3_l[name].copy_(torch.rand(layer.ia3_l[name].shape, generator=generator) + 0.5)
    return model


def test_the_outcome_is_that_of_peft():
    pair = Pair(base(), config("first", "last", feedforward=["last"]), X, "one")
    pair.add("two", config("first", "last", feedforward=["last"]))
    single = run(pair.ours, X)
    for model in (pair.ours, pair.theirs):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.6], "new")
    pair.set_adapter("new")
    assert (run(pair.ours, X) - single).abs().max() > 1e-3
    assert_close(run(pair.ours, X), run(pair.theirs, X))


def test_a_layer_that_one_leaves_alone_counts_with_ones():
    """PEFT counts it with zeros: half of one adapter then halves the layer's output."""
    pair = Pair(base(), config("first"), X, "one")
    pair.add("two", config("first", "last"))
    for model in (pair.ours, pair.theirs):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "new")
    ours, theirs = (model.base_model.model.last.ia3_l for model in (pair.ours, pair.theirs))
    torch.testing.assert_close(ours["new"], 0.5 + 0.5 * ours["two"])
    torch.testing.assert_close(theirs["new"], 0.5 * theirs["two"])


def test_one_adapter_with_weight_one_is_taken_over():
    model = moved(tunerkit.get_peft_model(base(), config("first", "last", feedforward=["last"]), "one").eval(), "one")
    expected = run(model, X)
    model.add_weighted_adapter(["one"], [1.0], "new")
    assert torch.equal(run(model, X), expected)
    model.set_adapter("new")
    assert torch.equal(run(model, X), expected)
    assert model.peft_config["new"].feedforward_modules == {"last"}


def test_inputs_and_outputs_do_not_mix():
    model = tunerkit.get_peft_model(base(), config("first", "last", feedforward=["last"]), "one")
    model.add_adapter("two", config("first", "last"))
    before = Snapshot.of(model)
    with pytest.raises(CombinationError, match="On 'last' one of the adapters rescales the inputs and another"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "new")
    assert before.differences(model) == []


def test_patterns_of_feed_forward_modules_are_not_combined():
    settings = IA3Config(target_modules=["first", "last"], feedforward_modules="la.*")
    model = tunerkit.get_peft_model(base(), settings, "one")
    with pytest.raises(CombinationError, match=r"feedforward_modules of 'one' is a pattern, 'la\.\*'"):
        model.add_weighted_adapter(["one"], [1], "new")
