"""Trains rows of an embedding, which start at the values they have there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from toys.config import ToyConfig
from tunerkit import Method
from tunerkit.adapter import Adapter


@dataclass
class Config(ToyConfig):
    peft_type: str | None = "TOY_ROWS"
    rows: list[int] = field(default_factory=lambda: [0, 2])


class RowsAdapter(Adapter):
    entries = ("toy_rows",)
    kinds = frozenset({"embedding"})

    def __init__(self, site, config):
        super().__init__(site, config)
        self.rows = config.rows
        start = site.empty(len(self.rows), site.in_features)
        self.toy_rows = nn.Parameter(start.copy_(site.weight.detach()[self.rows]))

    def merged(self, below):
        rows = torch.tensor(self.rows, device=self.toy_rows.device)
        return below.weight.to(self.toy_rows.dtype).index_copy(0, rows, self.toy_rows), below.bias

    def together(self, others):
        taken = {row for other in others if isinstance(other, RowsAdapter) for row in other.rows}
        return "both replace the same rows" if taken.intersection(self.rows) else None


method = Method(config=Config, adapter=RowsAdapter)
