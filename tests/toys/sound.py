"""Adds a scaled low-rank product and a bias, with a forward of its own: what most mistakes can be made in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import Adapter, linear


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_SOUND"
    scale: float = 2.0


class SoundAdapter(Adapter):
    entries = ("toy_down", "toy_up", "toy_bias")
    settings = ("scale",)
    commutes = True

    def __init__(self, site, config):
        super().__init__(site, config)
        self.scale = config.scale
        self.toy_down = linear(site.normal(config.rank, site.in_features))
        self.toy_up = linear(site.zeros(site.out_features, config.rank))
        self.toy_bias = nn.Parameter(site.zeros(site.out_features))

    def delta(self):
        return self.scale * (self.toy_up.weight @ self.toy_down.weight)

    def merged(self, below):
        return below.weight + self.delta(), self.toy_bias + (0 if below.bias is None else below.bias)

    def addition(self, x):
        return self.scale * self.toy_up(self.toy_down(x.to(self.toy_down.weight.dtype))) + self.toy_bias

    def forward(self, x, below):
        y = below(x)
        return y + self.addition(x).to(y.dtype)


method = Method(config=Config, adapter=SoundAdapter)
