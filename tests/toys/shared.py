"""Two projections that all layers share, cut to each layer's size, and two vectors of each layer's own (as VeRA)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import AdditiveAdapter, Part


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_SHARED"
    train_shared: bool = False


class Projections(Part):
    entries = ("toy_down", "toy_up")
    exposes = ("count_sites",)

    def __init__(self, sites, config):
        super().__init__(sites, config)
        width = max(site.in_features for site in sites)
        height = max(site.out_features for site in sites)
        trains = config.train_shared
        self.toy_down = nn.Parameter(sites[0].normal(config.rank, width), requires_grad=trains)
        self.toy_up = nn.Parameter(sites[0].normal(height, config.rank), requires_grad=trains)
        self.number = len(sites)
        self.calls = 0

    def around(self, call, *args, **kwargs):
        self.calls += 1
        return call(*args, **kwargs)

    def count_sites(self):
        return self.number


class SharedAdapter(AdditiveAdapter):
    entries = ("toy_inner", "toy_outer")

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_inner = nn.Parameter(site.ones(config.rank, 1))
        self.toy_outer = nn.Parameter(site.zeros(site.out_features, 1))

    def delta(self, base):
        down = self.part.toy_down[:, : base.in_features]
        up = self.part.toy_up[: base.out_features]
        return self.toy_outer * (up @ (self.toy_inner * down))


method = Method(config=Config, adapter=SharedAdapter, part=Projections)
