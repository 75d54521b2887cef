"""The sides of a comparison under the same verbs, so that a job is described once."""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from suite.models import ALPHA, RANK, numbers, targets

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

Side = Literal["ours", "peft", "floor"]
SIDES: tuple[Side, ...] = ("ours", "peft", "floor")
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<factor>[AB])\.(?P<name>[^.]+)\.weight")


class Library(ABC):
    """What a job asks of a side. The models it returns have the verbs of a `PeftModel`."""

    @abstractmethod
    def attach(self, model: nn.Module, name: str = "default") -> Any:
        """Attach a first adapter to all linear layers of a model."""

    @abstractmethod
    def add(self, model: Any, name: str) -> None:
        """Attach another adapter."""

    @abstractmethod
    def from_pretrained(self, model: nn.Module, folder: Path) -> Any:
        """Attach a first adapter that was saved."""

    @abstractmethod
    def fill(self, model: Any, *names: str) -> None:
        """Put the numbers by which outputs are compared into adapters."""


@dataclass(frozen=True)
class Framework(Library):
    """tunerkit or PEFT, whose calls are the same.

    Args:
        core: The module with `get_peft_model`.
        method: The module with `LoraConfig`.
    """

    core: Any
    method: Any

    def config(self, model: nn.Module) -> Any:
        """Return the config of every adapter of these jobs."""
        return self.method.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets(model))

    def attach(self, model: nn.Module, name: str = "default") -> Any:
        """Attach a first adapter to all linear layers of a model."""
        return self.core.get_peft_model(model, self.config(model), adapter_name=name)

    def add(self, model: Any, name: str) -> None:
        """Attach another adapter."""
        first = next(iter(model.peft_config.values()))
        config = self.method.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(first.target_modules))
        model.add_adapter(name, config)

    def from_pretrained(self, model: nn.Module, folder: Path) -> Any:
        """Attach a first adapter that was saved."""
        return self.core.PeftModel.from_pretrained(model, folder)

    def fill(self, model: Any, *names: str) -> None:
        """Put the numbers by which outputs are compared into adapters."""
        with torch.no_grad():
            for key, tensor in model.base_model.model.named_parameters():
                found = _FACTOR.fullmatch(key)
                if found is not None and found["name"] in names:
                    tensor.copy_(numbers(found["path"], found["factor"], found["name"], tensor))


class ByHand(Library):
    """The floor."""

    def __init__(self) -> None:
        self.module = importlib.import_module("suite.by_hand")

    def attach(self, model: nn.Module, name: str = "default") -> Any:
        """Attach a first adapter to all linear layers of a model."""
        return self.module.HandModel(model, name)

    def add(self, model: Any, name: str) -> None:
        """Attach another adapter."""
        model.add_adapter(name)

    def from_pretrained(self, model: nn.Module, folder: Path) -> Any:
        """Attach a first adapter that was saved."""
        return self.module.HandModel(model, "default", folder)

    def fill(self, model: Any, *names: str) -> None:
        """Put the numbers by which outputs are compared into adapters."""
        for name in names:
            model.fill(name)


@cache
def library(side: Side) -> Library:
    """Return a side; only what it needs is imported, so that a process can hold one alone."""
    if side == "ours":
        return Framework(importlib.import_module("tunerkit"), importlib.import_module("tunerkit_lora"))
    if side == "peft":
        peft = importlib.import_module("peft")
        return Framework(peft, peft)
    return ByHand()
