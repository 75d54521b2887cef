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


class Other(nn.Embedding):
    def forward(self, x):
        return super().forward(x) ** 2


class ByBuffer(nn.Embedding):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register_buffer("embed_scale", torch.tensor(2.5, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class ByNumber(nn.Embedding):
    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


def unused_scale():
    layer = nn.Embedding(7, 5)
    layer.embed_scale = 3.0
    return layer


class TestLookUp:
    @pytest.mark.parametrize(
        "make", [lambda: nn.Embedding(7, 5), lambda: ByBuffer(7, 5), lambda: ByNumber(7, 5), unused_scale]
    )
    def test_is_what_the_layer_does(self, make):
        layer, x = make(), torch.tensor([[1, 2], [6, 0]])
        site = make_site(layer)
        assert site.only_looks_up
        assert torch.equal(site.look_up(x, layer.weight), layer(x))
        assert site.look_up(x, torch.randn(7, 3)).shape == (2, 2, 3)
        assert site.look_up(x, layer.weight.double()).dtype is torch.float64

    @pytest.mark.parametrize("settings", [{"padding_idx": 1}, {"scale_grad_by_freq": True}, {}])
    def test_gradients(self, settings):
        layer, x = nn.Embedding(7, 5, **settings), torch.tensor([1, 1, 2])
        table = layer.weight.detach().clone().requires_grad_()
        make_site(layer).look_up(x, table).square().sum().backward()
        layer(x).square().sum().backward()
        assert torch.equal(table.grad, layer.weight.grad)
        assert table.grad[2].abs().max() > 1e-3

    def test_what_does_more(self):
        limited, hooked = nn.Embedding(7, 5, max_norm=1.0), nn.Embedding(7, 5)
        hooked.register_forward_hook(lambda *_: None)
        assert [make_site(layer).only_looks_up for layer in (Other(7, 5), limited, hooked)] == [False, False, True]
        assert [make_site(layer).renormalises for layer in (limited, hooked)] == [True, False]


def test_what_a_table_is_made_of_gets_no_sparse_gradient():
    layer, x = nn.Embedding(7, 5, sparse=True), torch.tensor([1, 1, 2])
    factor = torch.randn(5, 7, requires_grad=True)
    site = make_site(layer)
    site.run(x, layer.weight.detach() + factor.T, None).sum().backward()
    assert not factor.grad.is_sparse
    assert torch.equal(factor.grad.T, torch.tensor([0, 2, 1, 0, 0, 0, 0])[:, None].expand(7, 5))
    assert layer.sparse
    layer(x).sum().backward()
    assert layer.weight.grad.is_sparse
