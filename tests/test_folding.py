from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunerkit import folding, sums
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter, AdditiveAdapter
from tunerkit.errors import MergeError
from tunerkit.route import Owner
from tunerkit.sites import make_site
from tunerkit.testing.bench import difference


class Plus(AdditiveAdapter):
    entries = ("toy_plus",)

    def __init__(self, site):
        super().__init__(site, None)
        self.born_from = site.weight.detach().clone()
        self.toy_plus = nn.Parameter(site.normal(*site.weight.shape, std=0.3))

    def delta(self, base):
        return self.toy_plus


class Factors(AdditiveAdapter):
    entries = ("toy_left", "toy_right")

    def __init__(self, site):
        super().__init__(site, None)
        rows, columns = site.weight.shape
        self.scaling = 0.5
        self.toy_left = nn.Parameter(site.normal(rows, 2))
        self.toy_right = nn.Parameter(site.normal(2, columns))

    def product(self, base):
        return self.toy_left, self.toy_right, self.scaling


class OwnDelta(Factors):
    """Adds something else than the product that it inherits."""

    def delta(self, base):
        return -super().delta(base)


class NoProductHere(Factors):
    def product(self, base):
        return None

    def delta(self, base):
        return 3 * self.toy_left @ self.toy_right


class Rows(Adapter):
    entries = ("toy_rows",)

    def __init__(self, site):
        super().__init__(site, None)
        self.toy_rows = nn.Parameter(site.normal(site.out_features))

    def merged(self, below):
        return below.weight * self.toy_rows[:, None], None if below.bias is None else below.bias * self.toy_rows


class Turn(Adapter):
    """Multiplies the weight by a matrix, so that order matters."""

    entries = ("toy_turn",)

    def __init__(self, site):
        super().__init__(site, None)
        self.toy_turn = nn.Parameter(site.normal(site.out_features, site.out_features))

    def merged(self, below):
        bias = below.bias
        turn = self.toy_turn.to(below.weight.dtype)
        return turn @ below.weight, None if bias is None else turn.to(bias.dtype) @ bias


class Share(AdditiveAdapter):
    """Adds a share of the bare weight, so it depends on what the bare layer is."""

    entries = ("toy_share",)

    def __init__(self, site):
        super().__init__(site, None)
        self.toy_share = nn.Parameter(site.normal(site.out_features, 1))

    def delta(self, base):
        return self.toy_share * base.weight


class Shift(Adapter):
    """Makes a bias where there was none."""

    entries = ("toy_shift",)

    def __init__(self, site):
        super().__init__(site, None)
        self.toy_shift = nn.Parameter(site.normal(site.out_features))

    def merged(self, below):
        return below.weight, self.toy_shift if below.bias is None else below.bias + self.toy_shift


class NoBias(Adapter):
    entries = ("toy_nothing",)

    def __init__(self, site):
        super().__init__(site, None)
        self.toy_nothing = nn.Parameter(site.zeros(1))

    def merged(self, below):
        return below.weight, None


class Probing(Adapter):
    """Finds out what is below by running it."""

    entries = ("toy_probing",)

    def __init__(self, site):
        super().__init__(site, None)
        self.toy_probing = nn.Parameter(site.normal(site.out_features))

    def merged(self, below):
        columns = torch.eye(5, dtype=below.weight.dtype)
        return (below(columns) - below(0 * columns)).T * self.toy_probing[:, None], below.bias


class Loose(Adapter):
    unfoldable = "it looks at the inputs"
    entries = ("toy_loose",)

    def __init__(self, site):
        super().__init__(site, None)
        self.toy_loose = nn.Parameter(site.ones(1))

    def forward(self, x, below):
        return below(x) * self.toy_loose * x.mean()


STACK = {"plus": Plus, "rows": Rows, "turn": Turn, "share": Share}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer_on(base, **adapters):
    layer = AdaptedLayer(make_site(base, "fc"), Owner())
    for name, kind in adapters.items():
        layer.add_adapter(name, kind(layer.bare_site), "toy")
    layer.set_adapter(list(adapters))
    return layer


def bits(module):
    return {
        name: (id(parameter), parameter.detach().clone().view(torch.uint8).tolist(), parameter.requires_grad)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def close(one, other):
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}[one.dtype]
    return torch.allclose(one, other, atol=tolerance, rtol=tolerance)


class TestBits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("kind", [*STACK.values(), Shift])
    def test_there_and_back(self, dtype, bias, kind):
        layer = layer_on(nn.Linear(5, 4, bias=bias, dtype=dtype), default=kind)
        layer.base_layer.weight.requires_grad_(requires_grad=False)
        before, x = bits(layer.base_layer), torch.randn(3, 5, dtype=dtype)
        y, plain = layer(x), layer.base_layer(x)
        assert (y - plain).abs().max() > 1e-3
        layer.merge()
        assert layer.merged
        assert layer.merged_adapters == ["default"]
        merged = layer(x)
        assert merged.dtype is dtype
        assert close(merged, y)
        assert torch.equal(merged, layer.base_layer(x))
        assert not set(before) & {id(p) for p in layer.base_layer.parameters()}
        assert not layer.base_layer.weight.requires_grad
        layer.unmerge()
        assert bits(layer.base_layer) == before
        assert torch.equal(layer(x), y)
        assert not layer.merged
        layer.unmerge()
        assert bits(layer.base_layer) == before

    @pytest.mark.parametrize("order", list(itertools.permutations(STACK)))
    def test_every_order_and_subset(self, order):
        layer = layer_on(nn.Linear(5, 4), **STACK)
        layer.set_adapter(list(order))
        before, x = bits(layer.base_layer), torch.randn(3, 5)
        y = layer(x)
        additive = {"plus", "share"}
        for size in range(1, 5):
            for some in itertools.combinations(order, size):
                left = [name for name in order if name not in some]
                stuck = [
                    (name, other)
                    for name in some
                    for other in left
                    if order.index(other) < order.index(name) and not {name, other} <= additive
                ]
                if stuck:
                    with pytest.raises(MergeError) as caught:
                        layer.merge(adapter_names=list(reversed(some)))
                    name, other = stuck[0]
                    listed = ", ".join(map(repr, order))
                    assert f"stand in the order {listed}, and {name!r} does not commute with {other!r}" in str(
                        caught.value
                    )
                    assert "Merge both, or activate" in str(caught.value)
                    assert bits(layer.base_layer) == before
                    continue
                layer.merge(adapter_names=list(reversed(some)))
                assert layer.merged_adapters == list(some)
                assert close(layer(x), y)
                layer.merge()
                assert sorted(layer.merged_adapters) == sorted(order)
                assert close(layer(x), y)
                layer.unmerge()
                assert bits(layer.base_layer) == before
                assert torch.equal(layer(x), y)

    @pytest.mark.parametrize("under", [{}, {"rows": Rows}, {"plus": Plus, "turn": Turn}])
    def test_one_that_runs_what_is_below(self, under):
        layer = layer_on(nn.Linear(5, 4), **under, probing=Probing)
        before, x = bits(layer.base_layer), torch.randn(3, 5)
        y = layer(x)
        layer.merge()
        assert close(layer(x), y)
        layer.unmerge()
        assert bits(layer.base_layer) == before

    def test_half_precision_is_rounded_once(self):
        layer = layer_on(nn.Linear(64, 64, dtype=torch.bfloat16), **{f"a{i}": Plus for i in range(8)})
        wanted = layer.base_layer.weight.float() + sum(a.toy_plus.float() for a in layer.adapters.values())
        layer.merge()
        assert torch.equal(layer.base_layer.weight, wanted.to(torch.bfloat16))

    def test_what_is_not_changed_stays_the_same_object(self):
        layer = layer_on(nn.Linear(5, 4), default=Shift)
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        layer.merge()
        assert layer.base_layer.weight is weight
        assert layer.base_layer.bias is not bias
        layer.unmerge()
        assert layer.base_layer.bias is bias

    def test_embedding(self):
        layer = layer_on(nn.Embedding(7, 5), default=Plus)
        before, x = bits(layer.base_layer), torch.tensor([[1, 6], [0, 3]])
        y = layer(x)
        layer.merge()
        assert torch.allclose(layer(x), y, atol=1e-6)
        layer.unmerge()
        assert bits(layer.base_layer) == before


class TestBias:
    def test_made_where_there_was_none(self):
        layer = layer_on(nn.Linear(5, 4, bias=False), default=Shift)
        x = torch.randn(3, 5)
        y = layer(x)
        layer.merge()
        assert torch.equal(layer.base_layer.bias, layer.adapters["default"].toy_shift)
        assert layer.base_layer.bias is not layer.adapters["default"].toy_shift
        assert not layer.base_layer.bias.requires_grad
        assert torch.allclose(layer(x), y)
        layer.unmerge()
        assert layer.base_layer.bias is None

    def test_taken_away(self):
        layer = layer_on(nn.Linear(5, 4), default=NoBias)
        x, bias = torch.randn(3, 5), layer.base_layer.bias
        assert torch.allclose(layer(x), F.linear(x, layer.weight))
        layer.merge()
        assert layer.base_layer.bias is None
        assert torch.allclose(layer(x), F.linear(x, layer.weight))
        layer.unmerge()
        assert layer.base_layer.bias is bias


class TestRefusals:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(("kind", "entry", "where"), [(Plus, "toy_plus", "weight"), (Shift, "toy_shift", "bias")])
    def test_safe(self, value, kind, entry, where):
        layer = layer_on(nn.Linear(5, 4), default=kind)
        with torch.no_grad():
            layer.get_submodule(entry)["default"].view(-1)[1] = value
        before = bits(layer.base_layer)
        with pytest.raises(
            MergeError,
            match=f"Merging into 'fc' would put NaN or infinities into its {where}; nothing was changed there",
        ):
            layer.merge(safe_merge=True)
        assert bits(layer.base_layer) == before
        assert not layer.merged
        layer.merge()
        assert not torch.isfinite(layer.base_layer.get_parameter(where)).all()

    def test_safe_and_sound(self):
        layer = layer_on(nn.Linear(5, 4), default=Plus)
        layer.merge(safe_merge=True)
        assert layer.merged

    def test_what_cannot_be_folded(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, loose=Loose)
        before = bits(layer.base_layer)
        with pytest.raises(
            MergeError, match=r"'loose' on 'fc' cannot be merged: it looks at the inputs\. Keep it as an adapter"
        ):
            layer.merge()
        assert bits(layer.base_layer) == before
        layer.merge(adapter_names=["plus"])
        assert layer.merged_adapters == ["plus"]

    def test_while_disabled(self):
        layer = layer_on(nn.Linear(5, 4), default=Plus)
        layer.enable_adapters(enabled=False)
        with pytest.raises(MergeError, match="The adapters of 'fc' are disabled; enable them before merging"):
            layer.merge()

    def test_an_inactive_one_under_an_active_one(self):
        layer = layer_on(nn.Linear(5, 4), rows=Rows, plus=Plus)
        layer.set_adapter("rows")
        with pytest.raises(MergeError, match="'plus' does not commute with 'rows' below it"):
            layer.merge(adapter_names=["plus"])

    def test_a_plugin_that_fails(self):
        class Broken(Plus):
            def delta(self, base):
                raise ZeroDivisionError

        layer = layer_on(nn.Linear(5, 4), plus=Plus, broken=Broken)
        before = bits(layer.base_layer)
        with pytest.raises(ZeroDivisionError):
            layer.merge()
        assert bits(layer.base_layer) == before
        assert not layer.merged


class TestPartly:
    def test_names_that_mean_nothing_new(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, share=Share)
        layer.merge(adapter_names=["missing"])
        assert not layer.merged
        layer.merge(adapter_names=["plus", "plus"])
        weight = layer.base_layer.weight
        layer.merge(adapter_names=["plus"])
        assert layer.base_layer.weight is weight
        assert layer.merged_adapters == ["plus"]

    def test_an_inactive_one(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, share=Share)
        layer.set_adapter("share")
        x = torch.randn(3, 5)
        y = layer(x)
        layer.merge(adapter_names=["plus"])
        assert torch.allclose(layer(x), y + F.linear(x, layer.adapters["plus"].toy_plus), atol=1e-5)
        layer.unmerge()
        assert torch.equal(layer(x), y)

    def test_one_that_looks_at_the_bare_layer_on_merged_ones(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, rows=Rows, share=Share)
        x, weight = torch.randn(3, 5), layer.base_layer.weight
        y = layer(x)
        layer.merge(adapter_names=["plus", "rows"])
        assert layer.bare_site.weight is weight
        assert torch.allclose(layer(x), y, atol=1e-5)
        layer.set_adapter("share")
        layer.merge()
        layer.unmerge()
        assert layer.base_layer.weight is weight

    def test_new_ones_are_born_from_the_bare_weight(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus)
        bare = layer.base_layer.weight.detach().clone()
        layer.merge()
        layer.add_adapter("later", Plus(layer.bare_site), "toy")
        assert torch.equal(layer.adapters["later"].born_from, bare)
        assert not torch.equal(layer.base_layer.weight, bare)

    def test_merging_for_good(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, share=Share)
        original = layer.base_layer.weight
        x = torch.randn(3, 5)
        y = layer(x)
        assert layer.merge_for_good(["nobody"]) == []
        [(old, heir)] = layer.merge_for_good(["plus"])
        assert old is original
        assert heir is layer.base_layer.weight
        assert not layer.merged
        assert layer.active_adapters == ["share"]
        layer.unmerge()
        merged = F.linear(x, layer.base_layer.weight * (1 + layer.adapters["share"].toy_share), layer.bias)
        assert torch.allclose(layer(x), merged, atol=1e-5)
        assert not torch.allclose(layer.base_layer(x), y)


class TestAround:
    def test_the_other_side_of_a_tied_weight(self):
        base, other = nn.Linear(5, 4), nn.Linear(5, 4)
        other.weight = base.weight
        layer = layer_on(base, default=Plus)
        before = bits(other)
        layer.merge()
        assert bits(other) == before
        assert base.weight is not other.weight
        layer.unmerge()
        assert base.weight is other.weight

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_converted_while_merged(self, dtype):
        layer = layer_on(nn.Linear(5, 4, bias=False), default=Shift)
        original = layer.base_layer.weight
        wanted = original.detach().to(dtype)
        layer.merge()
        layer.to(dtype)
        layer.unmerge()
        assert layer.base_layer.weight is original
        assert torch.equal(layer.base_layer.weight, wanted)
        assert layer.base_layer.bias is None
        assert layer(torch.randn(3, 5, dtype=dtype)).dtype is dtype

    def test_to_meta_while_merged(self):
        layer = layer_on(nn.Linear(5, 4), default=Plus)
        layer.base_layer.weight.requires_grad_(requires_grad=False)
        layer.merge()
        layer.to("meta")
        layer.unmerge()
        assert layer.base_layer.weight.is_meta
        assert isinstance(layer.base_layer.weight, nn.Parameter)
        assert not layer.base_layer.weight.requires_grad

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])  # noqa: S301
    def test_copied_while_merged(self, duplicate):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, rows=Rows)
        before = {name: p.detach().clone() for name, p in layer.base_layer.named_parameters()}
        x = torch.randn(3, 5)
        y = layer(x)
        layer.merge(adapter_names=["plus"])
        other = duplicate(layer)
        other.unmerge()
        assert all(torch.equal(other.base_layer.get_parameter(name), value) for name, value in before.items())
        assert torch.equal(other(x), y)
        assert layer.merged_adapters == ["plus"]
        assert torch.allclose(layer(x), y, atol=1e-5)

    def test_disabled_while_merged(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, rows=Rows)
        before, x = bits(layer.base_layer), torch.randn(3, 5)
        y, plain = layer(x), layer.base_layer(x)
        layer.merge(adapter_names=["plus"])
        layer.enable_adapters(enabled=False)
        assert not layer.merged
        assert bits(layer.base_layer) == before
        assert torch.equal(layer(x), plain)
        layer.enable_adapters(enabled=True)
        assert layer.merged_adapters == ["plus"]
        assert torch.allclose(layer(x), y, atol=1e-5)

    def test_others_made_active_while_disabled(self):
        """What was merged before is not merged again under adapters that it has nothing to do with."""
        layer = layer_on(nn.Linear(5, 4), plus=Plus, share=Share)
        layer.set_adapter("share")
        x = torch.randn(3, 5)
        wanted = layer(x)
        layer.set_adapter("plus")
        layer.merge()
        layer.enable_adapters(enabled=False)
        layer.set_adapter("share")
        layer.enable_adapters(enabled=True)
        assert not layer.merged
        assert torch.equal(layer(x), wanted)

    def test_deleted_while_disabled(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, share=Share)
        layer.merge(adapter_names=["plus"])
        layer.enable_adapters(enabled=False)
        layer.delete_adapter("plus")
        layer.enable_adapters(enabled=True)
        assert not layer.merged
        assert layer.active_adapters == ["share"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6))
        self.down = nn.Parameter(torch.randn(6, 5))

    def forward(self, x, expert=0):
        return torch.relu(x @ self.up[expert]) @ self.down


class TestNestedParameters:
    @pytest.fixture
    def layers(self):
        inner = AdaptedLayer(make_site(Experts(), "moe", "up"), Owner())
        inner.add_adapter("default", Plus(inner.bare_site), "toy")
        outer = AdaptedLayer(make_site(inner, "moe", "down"), Owner())
        outer.add_adapter("default", Plus(outer.bare_site), "toy")
        for layer in (inner, outer):
            layer.set_adapter("default")
        return inner, outer

    def wanted(self, layers, x, expert):
        experts = layers[0].base_layer
        up = experts.up + layers[0].adapters["default"].toy_plus
        return torch.relu(x @ up[expert]) @ (experts.down + layers[1].adapters["default"].toy_plus)

    @pytest.mark.parametrize("which", [(0,), (1,), (0, 1), (1, 0)])
    @pytest.mark.parametrize("back", [(0, 1), (1, 0)])
    def test_merge(self, layers, which, back):
        experts, x = layers[0].base_layer, torch.randn(2, 5)
        before = bits(experts)
        y = self.wanted(layers, x, 2)
        assert torch.allclose(layers[1](x, expert=2), y, atol=1e-4)
        for index in which:
            layers[index].merge()
            assert torch.allclose(layers[1](x, expert=2), y, atol=1e-4)
        for index in back:
            layers[index].unmerge()
            assert torch.allclose(layers[1](x, expert=2), y, atol=1e-4)
        assert bits(experts) == before

    def test_convert_while_merged(self, layers):
        for layer in layers:
            layer.merge()
        up = layers[0].base_layer.up.detach()
        originals = layers[0]._merged.originals["up"]
        layers[1].double()
        for layer in layers:
            layer.unmerge()
        assert layers[0].base_layer.up is originals
        assert layers[0].base_layer.up.dtype is torch.float64
        assert not torch.equal(layers[0].base_layer.up.float(), up)

    def test_the_inner_one_is_born_bare(self, layers):
        inner, outer = layers
        bare = outer.base_layer.base_layer.down.detach().clone()
        outer.merge()
        assert torch.equal(Plus(outer.bare_site).born_from, bare)
        assert torch.equal(outer.bare_site.weight, bare)
        assert torch.equal(Plus(inner.bare_site).born_from, inner.base_layer.up)


def transposed():
    return pytest.importorskip("transformers.pytorch_utils", reason="it has the layer").Conv1D(4, 5)


class TestBlocks:
    """What is only added is added block by block, which is the same to the last bit."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("block", [1, 7, 10, 1 << 20])
    @pytest.mark.parametrize(
        "make", [lambda: nn.Linear(5, 4), lambda: nn.Conv2d(3, 4, 2), lambda: nn.Embedding(6, 5), transposed]
    )
    def test_as_at_once(self, monkeypatch, make, dtype, block):
        base = make().to(dtype)
        layer = layer_on(base, plus=Plus, share=Share)
        site, adapters = layer.bare_site, list(layer.adapters.values())
        before = base.weight.detach().clone()
        with monkeypatch.context() as patch:
            patch.setattr(folding, "changes_of", lambda *_: None)
            wanted = folding.fold(site, site, adapters, safe=False)
        monkeypatch.setattr(sums, "_BLOCK", block)
        found = folding.fold(site, site, adapters, safe=True)
        assert found.keys() == wanted.keys() == {"weight"}
        assert found["weight"].dtype is dtype
        assert (found["weight"] - before).abs().max() > 1e-3
        assert torch.equal(found["weight"], wanted["weight"])
        assert torch.equal(base.weight, before)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("block", [1, 7, 10, 1 << 20])
    @pytest.mark.parametrize("scaling", [0.5, torch.tensor(0.5)])
    @pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "make", [lambda: nn.Linear(5, 4), lambda: nn.Conv2d(3, 4, 2), lambda: nn.Embedding(6, 5), transposed]
    )
    def test_a_product_is_not_made(self, monkeypatch, make, dtype, block, scaling, factors):
        base = make().to(dtype)
        layer = layer_on(base, plus=Plus, product=Factors)
        plus, product = layer.adapters.values()
        product.to(factors).scaling = scaling
        site = layer.bare_site
        with torch.no_grad():
            added = plus.toy_plus.double() + 0.5 * (product.toy_left.double() @ product.toy_right.double())
            wanted = site.as_stored(site.weight.double() + added)
        monkeypatch.setattr(AdditiveAdapter, "delta", None)
        monkeypatch.setattr(sums, "_BLOCK", block)
        found = folding.fold(site, site, [plus, product], safe=True)["weight"]
        assert (found - base.weight).abs().max() > 1e-3
        torch.testing.assert_close(found, wanted.to(dtype))

    @pytest.mark.parametrize("kind", [OwnDelta, NoProductHere])
    def test_what_is_no_product_after_all(self, kind):
        layer = layer_on(nn.Linear(5, 4), some=kind)
        site, adapter = layer.bare_site, layer.adapters["some"]
        with torch.no_grad():
            wanted = site.weight + adapter.delta(site)
            assert difference(wanted, site.weight + 0.5 * adapter.toy_left @ adapter.toy_right) > 1e-3
        torch.testing.assert_close(folding.fold(site, site, [adapter], safe=False)["weight"], wanted)

    def test_a_change_says_whether_it_has_numbers(self):
        left, right = torch.ones(4, 2), torch.ones(2, 5)
        assert not sums.Product(left, right, 1.0, (4, 5)).is_meta
        assert sums.Product(left.to("meta"), right, 1.0, (4, 5)).is_meta

    def test_more_than_adding_to_the_weight(self):
        layer = layer_on(nn.Linear(5, 4), plus=Plus, rows=Rows)
        site, (plus, rows) = layer.bare_site, layer.adapters.values()
        assert len(folding.changes_of(site, site, [plus, plus])) == 2
        for adapters in ([], [rows], [plus, rows]):
            assert folding.changes_of(site, site, adapters) is None
        plus.delta_bias = lambda _: torch.ones(4)
        assert folding.changes_of(site, site, [plus]) is None
