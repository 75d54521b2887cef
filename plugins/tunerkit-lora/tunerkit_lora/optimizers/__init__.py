"""Optimisers made for LoRA, under PEFT's names: LoRA+ and LoRA-FA."""

from tunerkit_lora.optimizers.lorafa import LoraFAOptimizer, create_lorafa_optimizer
from tunerkit_lora.optimizers.loraplus import create_loraplus_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"]
