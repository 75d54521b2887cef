"""LoRA passes every check of the conformance kit."""

from tunerkit.testing import MethodConformance
from tunerkit_lora import LoraConfig


class TestLora(MethodConformance):
    def config(self):
        return LoraConfig(r=2, lora_alpha=4)


class TestRankStabilisedLora(MethodConformance):
    kinds = ("linear", "embedding")

    def config(self):
        return LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights="gaussian")


class TestLoraWithBias(MethodConformance):
    kinds = ("linear", "conv2d", "grouped conv2d")

    def config(self):
        return LoraConfig(r=2, lora_alpha=4, lora_bias=True, rank_pattern={"second|square": 4})
