"""Adds what a small network makes of the input: it is no matrix, so it has only its own forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import Adapter, linear


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_BOTTLENECK"


class BottleneckAdapter(Adapter):
    entries = ("toy_in", "toy_out")
    unfoldable = "its output is not linear in its input"

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_in = linear(site.kaiming_uniform(config.rank, site.in_features))
        self.toy_out = linear(site.zeros(site.out_features, config.rank))

    def forward(self, x, below):
        y = below(x)
        return y + self.toy_out(F.silu(self.toy_in(x.to(self.toy_in.weight.dtype)))).to(y.dtype)


method = Method(config=Config, adapter=BottleneckAdapter)
