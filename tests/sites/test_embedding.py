from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunerkit.sites import EmbeddingSite, make_site


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 3


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 2}, {"max_norm": 0.5}])
def test_run(kind, settings):
    torch.manual_seed(0)
    layer, x = kind(7, 5, **settings), torch.tensor([[1, 2], [6, 0]])
    before = layer.weight.detach().clone()
    site = make_site(layer, "tokens")
    assert type(site) is EmbeddingSite
    assert (site.kind, site.in_features, site.out_features, site.bias) == ("embedding", 5, 7, None)
    weight = torch.randn(7, 5)
    wanted = F.embedding(x, weight.clone(), **settings) * (3 if kind is Scaled else 1)
    assert torch.equal(site.run(x, weight, None), wanted)
    assert torch.equal(layer.weight, before)
