"""LoRA passes every check of the conformance kit."""

from tunerkit.testing import MethodConformance
from tunerkit_lora import LoraConfig


class TestLora(MethodConformance):
    def config(self):
        return LoraConfig(r=3, lora_alpha=6)


class TestRankStabilisedLora(MethodConformance):
    def config(self):
        return LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights="gaussian")
