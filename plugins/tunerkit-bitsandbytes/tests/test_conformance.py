"""Methods that know nothing of quantised layers pass the conformance kit on them."""

from typing import ClassVar

import pytest
import torch
from quantised import Mlp, quantised

from tunerkit.testing import MethodConformance
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")

ROUNDED = "merging quantises the weight again; how far that moves it is tested in test_merging.py"
COARSE = "bitsandbytes computes in half or single precision; gradients are tested in test_sites.py"
ABSENT = {
    "test_merge_keeps_the_output": ROUNDED,
    "test_merge_and_unload": ROUNDED,
    "test_modules_to_save": ROUNDED,
    "test_two_adapters_merge": ROUNDED,
    "test_two_adapters_merge_one_by_one": ROUNDED,
    "test_half_precision_base": ROUNDED,
    "test_double_precision": COARSE,
    "test_gradients": COARSE,
    "test_mixes_with_another_method": ROUNDED,
    "test_exports": "torch.export does not trace the parameters of bitsandbytes' layers",
}


class OnQuantised(MethodConformance):
    def make_model(self, kind):
        return quantised(Mlp(), kind)

    def make_inputs(self, kind):
        return (torch.randn(4, 64),)


class OnFourBits(OnQuantised):
    kinds: ClassVar = ("nf4", "fp4")
    absent: ClassVar = {**ABSENT, "test_state_dict": "bitsandbytes does not load the state of a layer of four bits"}


class OnEightBits(OnQuantised):
    kinds: ClassVar = ("int8",)
    tolerance = 2e-2  # without gradients bitsandbytes rounds the inputs too
    absent: ClassVar = ABSENT


class Lora:
    def config(self):
        return LoraConfig(r=4, target_modules=["first", "second"])


class Dora:
    def config(self):
        return LoraConfig(r=4, target_modules=["first", "second"], use_dora=True)


class IA3:
    def config(self):
        return IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])


class TestLoraOnFourBits(Lora, OnFourBits): ...


class TestLoraOnEightBits(Lora, OnEightBits): ...


class TestDoraOnFourBits(Dora, OnFourBits): ...


class TestIA3OnFourBits(IA3, OnFourBits): ...


class TestIA3OnEightBits(IA3, OnEightBits): ...
