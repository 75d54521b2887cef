"""Adds to the bias, and makes one where there was none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import Adapter


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_BIAS"


class BiasAdapter(Adapter):
    entries = ("toy_bias",)
    commutes = True

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_bias = nn.Parameter(site.zeros(site.out_features))

    def merged(self, below):
        return below.weight, self.toy_bias if below.bias is None else below.bias + self.toy_bias


method = Method(config=Config, adapter=BiasAdapter)
