"""Settings of a LoRA config that have a class of their own, with PEFT's names."""

from __future__ import annotations

from dataclasses import dataclass

from tunerkit.errors import ConfigError


@dataclass
class LoftQConfig:
    """Settings of LoftQ, "LoRA-Fine-Tuning-Aware Quantization for Large Language Models" (arXiv 2310.08659).

    Attributes:
        loftq_bits: The bits of the quantised weight: 4 (NF4) or 8 (whole numbers).
        loftq_iter: How often quantising and decomposing take turns.

    Raises:
        ConfigError: One of them is out of range.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            msg = f"LoftQConfig.loftq_bits must be 4 (NF4) or 8 (whole numbers); it is {self.loftq_bits!r}."
            raise ConfigError(msg)
        given: object = self.loftq_iter
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            msg = f"LoftQConfig.loftq_iter must be a whole number of at least 1; it is {given!r}."
            raise ConfigError(msg)


@dataclass
class EvaConfig:
    """Settings of EVA, "Parameter Efficient Fine-tuning via Explained Variance Adaptation" (arXiv 2410.07170).

    Attributes:
        rho: A layer gets at most `rho` times its rank; with 1 every layer keeps the rank it has.
        tau: From which cosine between a component and the one a batch earlier it counts as found.
        use_label_mask: Whether tokens without a label are left out.
        label_mask_value: The label that says so.
        whiten: Whether the components are divided by the roots of their singular values.
        adjust_scaling_factors: Whether `lora_alpha` grows with a layer's rank, so that its scale stays.

    Raises:
        ConfigError: `rho` or `tau` is out of range.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            msg = f"EvaConfig.rho must be at least 1; it is {self.rho!r}."
            raise ConfigError(msg)
        if not 0 <= self.tau <= 1:
            msg = f"EvaConfig.tau must be from 0 to 1; it is {self.tau!r}."
            raise ConfigError(msg)
