"""Quantised layers here and in PEFT: equal names, outputs, gradients, steps, files and merged weights."""

import pytest
import torch
from quantised import FORMATS, Mlp, quantised

import tunerkit
from tunerkit.sites import make_site
from tunerkit.testing.parity import Pair, peft_config, quiet, run
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["first", "second"]),
    "rslora": LoraConfig(r=4, target_modules=["first", "second"], use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=["first", "second"], use_dora=True),
    "ia3": IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
}


@pytest.fixture(params=FORMATS)
def form(request):
    return request.param


@pytest.fixture(params=CONFIGS)
def pair(request, form):
    if (request.param, form) == ("dora", "int8"):
        pytest.skip("PEFT's DoRA loses the scales of eight bits")
    return Pair(quantised(Mlp(), form), CONFIGS[request.param], {"x": torch.randn(4, 64)})


class TestParity:
    def test_names(self, pair):
        pair.check_parameters()
        pair.check_tensors()

    def test_numbers(self, pair):
        pair.move("default")
        pair.check_outputs()
        pair.check_disabled()
        pair.check_gradients()
        pair.check_steps()

    def test_files(self, pair, tmp_path):
        pair.move("default")
        pair.check_files(tmp_path)


@pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning", "ignore:Merge lora module:UserWarning")
def test_merged_weight(form):
    pair = Pair(quantised(Mlp(), form), CONFIGS["lora"], {"x": torch.randn(4, 64)})  # PEFT merges no (IA)³ here
    pair.move("default")
    pair.ours.merge_adapter()
    pair.theirs.merge_adapter()
    layers = [model.base_model.model.first.base_layer for model in (pair.ours, pair.theirs)]
    ours, theirs = (make_site(layer).weight for layer in layers)
    assert (ours - theirs).norm() < 5e-3 * theirs.norm()


@pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
def test_what_peft_does_not_merge(form):
    pair = Pair(quantised(Mlp(), form), CONFIGS["ia3"], {"x": torch.randn(4, 64)})
    with pytest.raises(NotImplementedError):
        pair.theirs.merge_adapter()
    before = run(pair.ours, pair.inputs)
    pair.ours.merge_adapter()
    assert (run(pair.ours, pair.inputs) - before).norm() < 0.16 * before.norm()


def test_dora_of_peft_on_eight_bits():
    """Its forward reads the scales of the rows from where the layer has taken them away."""
    x = torch.randn(4, 64)
    with quiet():
        theirs = peft.get_peft_model(quantised(Mlp(), "int8"), peft_config(CONFIGS["dora"]))
    theirs(x)
    with pytest.raises(AttributeError):
        theirs(x)
    ours = tunerkit.get_peft_model(quantised(Mlp(), "int8"), CONFIGS["dora"])
    assert torch.equal(ours(x), ours(x))
