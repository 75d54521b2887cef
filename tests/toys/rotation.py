"""Rotates the layer's output by a Cayley transform: it multiplies, so its place in the stack matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import Adapter


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_ROTATION"


class RotationAdapter(Adapter):
    entries = ("toy_angles",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_angles = nn.Parameter(site.zeros(site.out_features, site.out_features))

    def merged(self, below):
        angles = self.toy_angles.to(torch.promote_types(self.toy_angles.dtype, torch.float32))
        skew = angles - angles.mT
        one = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
        rotation = torch.linalg.solve(one + skew, one - skew)
        return rotation @ below.weight.to(skew.dtype), below.bias


method = Method(config=Config, adapter=RotationAdapter)
