"""Adds a low-rank product to a bare parameter: a matrix, or each matrix of a stack."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import AdditiveAdapter


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_PARAMETERS"
    target_parameters: list[str] | None = None


class ParametersAdapter(AdditiveAdapter):
    entries = ("toy_left", "toy_right")
    kinds = frozenset({"parameter"})

    def __init__(self, site, config):
        super().__init__(site, config)
        *stack, rows, columns = site.weight.shape
        self.toy_left = nn.Parameter(site.zeros(*stack, rows, config.rank))
        self.toy_right = nn.Parameter(site.normal(*stack, config.rank, columns))

    def delta(self, base):
        return self.toy_left @ self.toy_right


method = Method(config=Config, adapter=ParametersAdapter)
