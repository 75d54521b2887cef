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


NO_SLOPE = {"test_gradients": "the norm counts as constant in the gradient, as in the paper and in PEFT"}


class TestDora(MethodConformance):
    kinds = ("linear", "embedding", "conv1d", "conv2d", "conv3d")
    absent = NO_SLOPE

    def config(self):
        return LoraConfig(r=3, lora_alpha=6, use_dora=True)


class TestPissa(MethodConformance):
    kinds = ("linear",)

    def config(self):
        return LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa")


class TestPissaWithDora(MethodConformance):
    kinds = ("linear",)
    absent = NO_SLOPE

    def config(self):
        return LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", use_dora=True)


class TestOlora(MethodConformance):
    kinds = ("linear",)

    def config(self):
        return LoraConfig(r=3, lora_alpha=6, init_lora_weights="olora")


QUANTISED = {"test_identity_at_start": "training starts close to the base, on a weight that is quantised"}


class TestLoftq(MethodConformance):
    kinds = ("linear",)
    absent = QUANTISED

    def config(self):
        return LoraConfig(r=3, lora_alpha=6, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


class TestLoftqWithDora(MethodConformance):
    kinds = ("linear",)
    absent = QUANTISED | NO_SLOPE

    def config(self):
        return LoraConfig(r=3, lora_alpha=6, init_lora_weights="loftq", loftq_config={"loftq_bits": 8}, use_dora=True)


class TestOrthogonal(MethodConformance):
    kinds = ("linear",)

    def config(self):
        return LoraConfig(r=4, lora_alpha=6, init_lora_weights="orthogonal")


class TestMica(MethodConformance):
    kinds = ("linear", "embedding")

    def config(self):
        return LoraConfig(r=3, lora_alpha=6, init_lora_weights="mica")
