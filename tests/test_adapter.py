from __future__ import annotations

import pytest
import torch
from torch import nn

from tunerkit.adapter import Adapter, AdditiveAdapter, NoPart, Part, linear
from tunerkit.errors import AdapterStateError
from tunerkit.sites import LinearSite


class Plus(AdditiveAdapter):
    def __init__(self, site, config=None):
        super().__init__(site, config)
        self.toy_plus = nn.Parameter(site.normal(site.out_features * site.in_features))

    def delta(self, base):
        return self.toy_plus


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def site():
    return LinearSite(nn.Linear(5, 4), "fc")


class WithoutBias(Adapter):
    def merged(self, below):
        return below.weight, None


class TestEffect:
    @pytest.mark.parametrize("number", [0.0, 1e-9, 1e-3, float("nan"), float("inf")])
    def test_what_is_added(self, site, number):
        adapter = Plus(site)
        nn.init.constant_(adapter.toy_plus, number)
        assert adapter.has_effect(site) == (number not in (0.0, 1e-9))

    @pytest.mark.parametrize("number", [0.0, 1.0])
    def test_a_bias_that_is_taken_away(self, site, number):
        nn.init.constant_(site.module.bias, number)
        assert WithoutBias(site, None).has_effect(site) == bool(number)


class TestAdapter:
    def test_defaults(self, site):
        adapter = Adapter(site, None)
        assert adapter.entries == ()
        assert adapter.kinds == {"linear"}
        assert adapter.unfoldable is None
        assert not adapter.commutes
        assert adapter.together([adapter]) is None
        tensors = {"a": torch.ones(1)}
        assert adapter.to_checkpoint(tensors) == adapter.from_checkpoint(tensors) == tensors

    def test_what_an_author_must_define(self, site):
        with pytest.raises(
            NotImplementedError, match=r"Adapter must define merged\(below\), or forward\(x, below\) and unfo"
        ):
            Adapter(site, None).merged(site)
        with pytest.raises(NotImplementedError, match=r"AdditiveAdapter must define delta\(base\)"):
            AdditiveAdapter(site, None).merged(site)

    def test_what_an_author_may_have_meant(self, site):
        class Merge(Adapter):
            def merge(self, below):
                return below.weight, below.bias

        class Deltas(AdditiveAdapter):
            def deltas(self, base):
                return base.weight

        with pytest.raises(NotImplementedError, match=r"unfoldable. It defines `merge`: did you mean `merged`\?$"):
            Merge(site, None).merged(site)
        with pytest.raises(NotImplementedError, match=r"delta\(base\). It defines `deltas`: did you mean `delta`\?$"):
            Deltas(site, None).merged(site)

    def test_forward_runs_the_layer_with_what_is_merged(self, site):
        class Nothing(Adapter):
            def merged(self, below):
                return 0 * below.weight, torch.ones(4)

        assert torch.equal(Nothing(site, None)(torch.randn(3, 5), site), torch.ones(3, 4))

    def test_additive(self, site):
        adapter = Plus(site)
        assert adapter.commutes
        weight, bias = adapter.merged(site)
        assert torch.equal(weight, site.weight + adapter.toy_plus.view(4, 5))
        assert bias is site.bias

    @pytest.mark.parametrize("bias", [False, True])
    def test_additive_to_the_bias(self, bias):
        class More(Plus):
            def delta_bias(self, base):
                return torch.ones(base.out_features)

        site = LinearSite(nn.Linear(5, 4, bias=bias))
        expected = site.bias + 1 if bias else torch.ones(4)
        assert torch.equal(More(site).merged(site)[1], expected)

    @pytest.mark.parametrize("bias", [False, True])
    def test_additive_as_a_product(self, bias):
        class Outer(AdditiveAdapter):
            def product(self, base):
                return torch.ones(base.out_features, 1), torch.ones(1, base.in_features), 0.5

        site = LinearSite(nn.Linear(5, 4, bias=bias))
        assert torch.equal(Outer(site, None).delta(site), torch.full((4, 5), 0.5))
        assert torch.equal(Outer(site, None).merged(site)[0], site.weight + 0.5)

    def test_there_is_no_part(self, site):
        message = (
            r"This Plus has no part. Declare one, Method\(part=...\), and read self.part in `forward`, `merged` or"
        )
        with pytest.raises(AdapterStateError, match=message):
            Plus(site).part.toy_shared  # noqa: B018 - to read it is what is tested
        assert isinstance(Plus.part, NoPart)

    def test_part(self, site):
        part = Part([site], None)
        assert part.entries == part.exposes == ()
        assert part.around(lambda *args, **kwargs: (args, kwargs), 1, two=2) == ((1,), {"two": 2})
        adapter = Plus(site)
        adapter.join(part)
        assert adapter.part is part
        assert list(adapter.named_parameters()) == [("toy_plus", adapter.toy_plus)]
        assert list(adapter.children()) == []


class Scaled(Plus):
    settings = ("scale",)

    def __init__(self, site, scale):
        super().__init__(site)
        self.scale = scale


class TestTake:
    def test_the_others_numbers_in_the_same_tensors(self, site):
        mine, other = Scaled(site, 2.0), Scaled(site, 3.0)
        tensor = mine.toy_plus
        mine.take(other)
        assert mine.toy_plus is tensor
        assert torch.equal(tensor, other.toy_plus)
        assert mine.scale == 3.0

    def test_other_shapes(self, site):
        mine, other = Scaled(site, 2.0), Scaled(LinearSite(nn.Linear(3, 2)), 3.0)
        before = mine.toy_plus.detach().clone()
        with pytest.raises(AdapterStateError, match=r"'toy_plus' is \(6,\) there and \(20,\) here"):
            mine.take(other)
        assert torch.equal(mine.toy_plus, before)
        assert mine.scale == 2.0

    def test_room_for_settings(self, site):
        adapter = Scaled(site, 2.0)
        adapter.make_room(None, site.device)
        scale = adapter.scale
        assert torch.equal(scale, torch.tensor(2.0))
        adapter.take(Scaled(site, 3.0))
        assert adapter.scale is scale
        assert scale == 3.0


class TestLinear:
    def test_is_an_ordinary_one(self):
        weight = torch.randn(4, 5)
        made, ordinary = linear(weight), nn.Linear(5, 4, bias=False)
        ordinary.load_state_dict(made.state_dict(), strict=True)
        assert (made.in_features, made.out_features, made.bias) == (5, 4, None)
        assert made.weight.data_ptr() == weight.data_ptr()
        assert set(made.__dict__) < set(ordinary.__dict__)
        assert all(hasattr(made, name) for name in ordinary.__dict__)
        assert repr(made) == repr(ordinary)
        x = torch.randn(3, 5)
        assert torch.equal(made(x), ordinary(x))

    @pytest.mark.parametrize("trains", [False, True])
    def test_whether_it_trains(self, trains):
        made = linear(torch.randn(4, 5), torch.randn(4), trains=trains)
        assert made.weight.requires_grad is made.bias.requires_grad is trains

    def test_with_a_bias(self):
        weight, bias = torch.randn(4, 5), torch.randn(4)
        made, ordinary = linear(weight, bias), nn.Linear(5, 4)
        ordinary.load_state_dict(made.state_dict(), strict=True)
        x = torch.randn(3, 5)
        assert torch.equal(made(x), ordinary(x))
        assert made.bias.data_ptr() == bias.data_ptr()

    def test_it_draws_no_random_numbers(self):
        state = torch.get_rng_state()
        linear(torch.ones(4, 5))
        assert torch.equal(torch.get_rng_state(), state)
