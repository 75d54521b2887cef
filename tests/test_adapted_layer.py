from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunerkit import get_peft_model, get_peft_model_state_dict
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter, AdditiveAdapter, linear
from tunerkit.errors import AdapterStateError, MergeError, UnknownAdapterError
from tunerkit.layer import BaseTunerLayer
from tunerkit.low_rank import add_low_rank
from tunerkit.names import PerAdapter
from tunerkit.route import Owner, routed
from tunerkit.sites import LinearSite, make_site
from tunerkit.testing.bench import Snapshot
from tunerkit_lora import LoraConfig


class LowRank(AdditiveAdapter):
    """Two factors, by a cheaper way in `forward` and with dropout there."""

    entries = ("toy_A", "toy_B")

    def __init__(self, site, config=None):
        super().__init__(site, config)
        self.scaling, self.dropout = 0.5, 0.0
        self.toy_A = linear(site.kaiming_uniform(2, site.in_features))
        self.toy_B = linear(site.normal(site.out_features, 2))

    def delta(self, base):
        return self.scaling * self.toy_B.weight @ self.toy_A.weight

    def forward(self, x, below):
        return add_low_rank(below(x), F.dropout(x, self.dropout, self.training), self.toy_A, self.toy_B, self.scaling)


class Times(Adapter):
    """Scales the rows; defined only by what it does to the weight."""

    entries = ("toy_times",)

    def __init__(self, site, config=None):
        super().__init__(site, config)
        self.toy_times = nn.Parameter(site.normal(site.out_features))

    def merged(self, below):
        bias = below.bias
        return below.weight * self.toy_times[:, None], None if bias is None else bias * self.toy_times


class OfBare(Adapter):
    """Adds a share of the bare layer's weight, wherever it stands."""

    entries = ("toy_share",)

    def __init__(self, site, config=None):
        super().__init__(site, config)
        self.toy_share = nn.Parameter(site.normal(site.out_features, 1))

    def merged(self, below):
        return below.weight + self.toy_share * below.base.weight, below.bias


class Alone(Times):
    def together(self, others):
        return f"it wants to be alone, not with {len(others)} others" if others else None


class Scaled(nn.Linear):
    """A layer that takes more than its input."""

    def forward(self, input, scale=1.0, *, shift=0.0):  # noqa: A002 - torch's own name
        return super().forward(input) * scale + shift


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer_on(base, **adapters):
    layer = AdaptedLayer(make_site(base, "fc"), Owner())
    for name, kind in adapters.items():
        layer.add_adapter(name, kind(layer.bare_site), "toy")
    layer.set_adapter(list(adapters))
    return layer


def weight_with(layer, *names):
    """Fold adapters into the weight, one by one, by their definition."""
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias
    bare = weight
    for name in names:
        adapter = layer.adapters[name]
        if isinstance(adapter, LowRank):
            weight = weight + adapter.scaling * adapter.toy_B.weight @ adapter.toy_A.weight
        elif isinstance(adapter, OfBare):
            weight = weight + adapter.toy_share * bare
        else:
            weight, bias = weight * adapter.toy_times[:, None], bias * adapter.toy_times
    return weight, bias


class TestStacking:
    @pytest.mark.parametrize(
        "names",
        [[], ["low"], ["times"], ["low", "times"], ["times", "low"], ["times", "bare", "low"], ["bare", "times"]],
    )
    def test_order(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times, bare=OfBare)
        layer.set_adapter(names)
        x = torch.randn(3, 5)
        assert torch.allclose(layer(x), F.linear(x, *weight_with(layer, *names)), atol=1e-5)

    def test_the_order_matters(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        x = torch.randn(3, 5)
        one = layer(x)
        layer.set_adapter(["times", "low"])
        assert (one - layer(x)).abs().max() > 1e-3

    def test_every_adapter_gets_its_gradient(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times, bare=OfBare)
        x = torch.randn(3, 5, requires_grad=True)
        layer(x).square().sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters() if "base" not in name}
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
        wanted = torch.autograd.grad(F.linear(x, *weight_with(layer, "low", "times", "bare")).square().sum(), x)[0]
        assert torch.allclose(x.grad, wanted, atol=1e-4)

    def test_together(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        layer.add_adapter("alone", Alone(layer.bare_site), "toy")
        layer.set_adapter("alone")
        with pytest.raises(
            AdapterStateError,
            match="'low', 'alone' cannot be active together on 'fc': it wants to be alone, not with 1 others",
        ):
            layer.set_adapter(["low", "alone"])
        assert layer.active_adapters == ["alone"]
        layer.set_adapter(["missing", "alone"])

    def test_conversion(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        assert layer.supports_lora_conversion("low")
        assert not layer.supports_lora_conversion("times")
        assert not layer.supports_lora_conversion()


class TestCall:
    @pytest.mark.parametrize("names", [[], ["low"], ["times"], ["low", "times"]])
    def test_more_arguments(self, names):
        layer = layer_on(Scaled(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(3, 5)
        if "times" in names:  # what is defined by its weight is run by the layer itself
            wanted = F.linear(x, *weight_with(layer, *names)) * 3.0 + 1.0
        else:
            wanted = layer.base_layer(x, 3.0, shift=1.0) + sum(F.linear(x, layer.delta["low"](None)) for _ in names)
        calls = [
            layer(x, 3.0, shift=1.0),
            layer(x, scale=3.0, shift=1.0),
            layer(input=x, scale=3.0, shift=1.0),
            layer(shift=1.0, scale=3.0, input=x),
        ]
        assert all(torch.allclose(call, wanted, atol=1e-5) for call in calls)

    def test_only_the_input_by_name(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        x = torch.randn(3, 5)
        assert torch.equal(layer(input=x), layer(x))

    @pytest.mark.parametrize("names", [[], ["low"], ["low", "times"]])
    def test_no_input(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            layer()

    def test_names_that_the_layer_does_not_show(self):
        class Wrapped(nn.Linear):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        layer = layer_on(Wrapped(5, 4), low=LowRank)
        x = torch.randn(3, 5)
        assert torch.equal(layer(input=x), layer(x))

    @pytest.mark.parametrize("names", [["low"], ["times"], ["low", "times"]])
    @pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5), (0, 5), (2, 0, 5)])
    def test_shapes(self, names, shape):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], 4)
        assert torch.allclose(y, F.linear(x, *weight_with(layer, *names)), atol=1e-5)

    @pytest.mark.parametrize("names", [["low"], ["times"], ["low", "times"]])
    def test_inputs_in_disorder(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(5, 3, 2)
        assert torch.allclose(layer(x.permute(2, 1, 0)), layer(x.permute(2, 1, 0).contiguous()), atol=1e-6)
        wide = torch.randn(3, 10)[:, ::2]
        assert torch.allclose(layer(wide), layer(wide.contiguous()), atol=1e-6)
        one = torch.randn(1, 5).expand(3, 5)
        assert torch.allclose(layer(one), layer(one.contiguous()), atol=1e-6)

    def test_dropout_only_in_training(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        layer.adapters["low"].dropout = 0.5
        x = torch.randn(3, 5)
        layer.eval()
        weight, bias = weight_with(layer, "low")
        assert torch.allclose(layer(x), F.linear(x, weight, bias), atol=1e-6)
        layer.train()
        assert layer.adapters["low"].training
        assert not torch.allclose(layer(x), layer(x))
        nn.Sequential(layer).eval()
        assert torch.equal(layer(x), layer(x))


class TestPrecision:
    @pytest.mark.parametrize("names", [["low"], ["times"], ["times", "low"], ["low", "times", "bare"]])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64])
    def test_mixed(self, names, dtype, other):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times, bare=OfBare)
        layer.set_adapter(names)
        x = torch.randn(3, 5)
        wanted = layer(x)
        layer.base_layer.to(dtype)
        for adapter in layer.adapters.values():
            for parameter in adapter.parameters():
                parameter.data = parameter.data.to(other)
        y = layer(x.to(dtype))
        assert y.dtype is dtype
        assert torch.allclose(y.float(), wanted, atol=0.15, rtol=0.1)
        y.float().sum().backward()
        gradients = [p.grad for name in names for p in layer.adapters[name].parameters()]
        assert {gradient.dtype for gradient in gradients} == {other}

    @pytest.mark.parametrize("names", [["low"], ["times"], ["times", "low"]])
    def test_autocast(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(3, 5)
        wanted = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype is torch.bfloat16
        assert torch.allclose(y.float(), wanted, atol=0.1, rtol=0.1)

    @pytest.mark.parametrize("hooked", [False, True])
    def test_low_precision_with_factors_of_high(self, hooked):
        layer = layer_on(nn.Linear(5, 4, dtype=torch.bfloat16), low=LowRank)
        for parameter in layer.adapters["low"].parameters():
            parameter.data = parameter.data.float()
        seen = []
        if hooked:
            layer.toy_A["low"].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        y = layer(torch.randn(3, 5, dtype=torch.bfloat16))
        assert y.dtype is torch.bfloat16
        assert seen == [torch.float32] * hooked


class TestWhatIsAdded:
    def test_in_the_shape_of_the_weight(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        low = layer.adapters["low"]
        assert torch.equal(layer.get_delta_weight("low"), low.delta(layer.bare_site))
        assert layer.get_delta_weight("low").requires_grad

    def test_in_the_dtype_of_the_adapter(self):
        layer = layer_on(nn.Linear(5, 4).bfloat16(), low=LowRank)
        layer.adapters["low"].float()
        assert layer.get_delta_weight("low").dtype is torch.float32

    def test_of_what_is_not_there(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        with pytest.raises(KeyError) as error:
            layer.get_delta_weight("lo")
        assert type(error.value) is UnknownAdapterError
        assert str(error.value) == "The layer 'fc' has no adapter 'lo'; it has 'low', 'times'."


class TestForwarding:
    def test_the_base_layer(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        assert (layer.in_features, layer.out_features) == (5, 4)
        assert layer.weight is layer.base_layer.weight
        assert layer.bias is layer.base_layer.bias
        with pytest.raises(AttributeError, match="no attribute 'missing'"):
            layer.missing  # noqa: B018 - reading it is what raises
        with pytest.raises(AttributeError, match="no attribute '_missing'"):
            layer._missing  # noqa: B018 - reading it is what raises

    def test_the_adapters(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        assert isinstance(layer.scaling, PerAdapter)
        assert layer.scaling["low"] == 0.5
        assert "times" not in layer.scaling
        assert layer.delta["low"](layer.bare_site).shape == (4, 5)

    def test_the_base_layer_comes_first(self):
        """The model's own code reads `in_features` of its layer and knows of no adapters."""
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        layer.adapters["low"].in_features = "mine"
        assert layer.in_features == 5

    def test_nested(self):
        inner = layer_on(nn.Linear(5, 4), low=LowRank)
        outer = AdaptedLayer(make_site(inner, "fc", "bias"), Owner())
        assert dict(outer.scaling) == {"low": 0.5}
        assert outer.in_features == 5
        assert outer.parameter_name == "bias"
        assert inner.parameter_name is None

    def test_what_is_merged_is_not_changed(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, other=LowRank)
        held = layer.scaling
        held["low"] = 2.0
        layer.merge(adapter_names=["low"])
        for change in (lambda: held.update(low=3.0), lambda: layer.scaling.pop("low")):
            with pytest.raises(AdapterStateError) as error:
                change()
            assert str(error.value) == (
                "The adapter 'low' is merged into 'fc', so changing it would have no effect there. Call "
                "unmerge_adapter() first."
            )
        held["other"] = 3.0
        assert dict(layer.scaling) == {"low": 2.0, "other": 3.0}
        layer.unmerge()
        held["low"] = 4.0
        assert layer.adapters["low"].scaling == 4.0

    def test_adapters_are_a_copy(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        layer.adapters.clear()
        assert list(layer.adapters) == ["low"]


@pytest.mark.parametrize("names", [["low"], ["times"], ["low", "times"]])
class TestBaseLayerAsItIsNow:
    def test_replaced(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(3, 5)
        layer.base_layer = Scaled(5, 4)
        assert torch.allclose(layer(x), F.linear(x, *weight_with(layer, *names)), atol=1e-5)
        assert layer.site.module is layer.base_layer
        assert isinstance(layer.site, LinearSite)

    def test_parameter_replaced(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(3, 5)
        layer.base_layer.weight = nn.Parameter(torch.randn(4, 5))
        assert torch.allclose(layer(x), F.linear(x, *weight_with(layer, *names)), atol=1e-5)

    def test_hooks_fire(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(3, 5, requires_grad=True)
        plain = layer(x)
        seen = []
        base = layer.base_layer
        base.register_forward_pre_hook(lambda module, args: seen.append("pre"))
        base.register_forward_hook(lambda module, args, y: y + 1)
        base.register_full_backward_hook(lambda module, gin, gout: seen.append("backward"))
        y = layer(x)
        assert not torch.allclose(y, plain)
        y.sum().backward()
        assert seen == ["pre", "backward"]

    def test_only_backward_hooks(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        seen = []
        layer.base_layer.register_full_backward_pre_hook(lambda module, gout: seen.append("pre"))
        layer.base_layer.register_full_backward_hook(lambda module, gin, gout: seen.append("post"))
        layer(torch.randn(3, 5, requires_grad=True)).sum().backward()
        assert seen == ["pre", "post"]

    def test_compiled_base_layer(self, names):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(names)
        x = torch.randn(3, 5)
        y = layer(x)
        layer.base_layer.compile(backend="eager")
        assert torch.allclose(layer(x), y, atol=1e-6)


def offload(module):
    """Keep a module's weight on the meta device but for the time of its call, as offloaders do."""
    real = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    calls = []

    def bring(module, args):
        calls.append(module)
        for name, tensor in real.items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def send_away(module, args, output):
        for name, tensor in real.items():
            module._parameters[name] = nn.Parameter(tensor.to("meta"), requires_grad=False)

    module.register_forward_pre_hook(bring)
    module.register_forward_hook(send_away)
    send_away(module, (), None)
    return calls


class TestFactorsAsTheyAreNow:
    @pytest.fixture
    def layer(self):
        return layer_on(nn.Linear(5, 4), low=LowRank)

    @pytest.fixture
    def x(self):
        return torch.randn(2, 3, 5)

    @pytest.mark.parametrize("entries", [["toy_A"], ["toy_B"], ["toy_A", "toy_B"]])
    def test_offloaded(self, layer, x, entries):
        y = layer(x)
        calls = [offload(layer.get_submodule(entry)["low"]) for entry in entries]
        assert any(parameter.is_meta for parameter in layer.parameters())
        assert torch.allclose(layer(x), y, atol=1e-6)
        assert all(len(call) == 1 for call in calls)

    @pytest.mark.parametrize("entry", ["toy_A", "toy_B"])
    def test_brought_by_a_hook_on_all_modules(self, layer, x, entry):
        y, factor = layer(x), layer.get_submodule(entry)["low"]
        real = factor.weight.detach().clone()

        def bring(module, args):
            if module is factor:
                factor.weight = nn.Parameter(real)

        factor.to("meta")
        handle = nn.modules.module.register_module_forward_pre_hook(bring)
        try:
            assert torch.allclose(layer(x), y, atol=1e-6)
        finally:
            handle.remove()

    @pytest.mark.parametrize(
        "register",
        [
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        ],
    )
    @pytest.mark.parametrize("entry", ["toy_A", "toy_B"])
    def test_hooks_fire(self, layer, x, register, entry):
        y = layer(x)
        seen = []
        getattr(layer.get_submodule(entry)["low"], register)(lambda *args: seen.append(1))
        assert torch.allclose(layer(x.requires_grad_()), y, atol=1e-6)
        layer(x).sum().backward()
        assert len(seen) >= 1

    def test_a_forward_set_on_the_instance(self, layer, x):
        layer.toy_B["low"].forward = lambda h: torch.zeros(*h.shape[:-1], 4)
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_replaced(self, layer, x):
        y = layer(x)
        down = layer.toy_A["low"]

        class Doubling(nn.Module):
            def forward(self, x):
                return 2 * down(x)

        layer.toy_A["low"] = Doubling()
        assert torch.allclose(layer(x), y + (y - layer.base_layer(x)), atol=1e-5)

    def test_with_a_bias(self, layer, x):
        y = layer(x)
        layer.toy_B["low"].bias = nn.Parameter(torch.ones(4))
        assert torch.allclose(layer(x), y + 0.5, atol=1e-5)

    def test_parametrized_and_pruned(self, layer, x):
        from torch.nn.utils import parametrize, prune

        y = layer(x)

        class Half(nn.Module):
            def forward(self, weight):
                return weight / 2

        parametrize.register_parametrization(layer.toy_B["low"], "weight", Half())
        assert torch.allclose(layer(x), (y + layer.base_layer(x)) / 2, atol=1e-5)
        prune.random_unstructured(layer.toy_A["low"], "weight", 0.99)
        assert torch.allclose(layer(x), layer.base_layer(x), atol=1e-5)


class TestTheRest:
    def test_data_parallel(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        with pytest.raises(
            AdapterStateError, match=r"nn.DataParallel cannot copy the layer 'fc'.*DistributedDataParallel"
        ):
            layer._replicate_for_data_parallel()

    def test_mode_of_the_base_layer(self):
        assert not layer_on(nn.Linear(5, 4).eval()).training
        assert layer_on(nn.Linear(5, 4)).training

    def test_delete(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter(["low", "times"])
        layer.delete_adapter("times")
        x = torch.randn(3, 5)
        assert torch.allclose(layer(x), F.linear(x, *weight_with(layer, "low")), atol=1e-6)
        assert layer._sole is layer.adapters["low"]

    def test_delete_what_is_merged(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.merge(adapter_names=["low"])
        with pytest.raises(
            AdapterStateError, match=r"'low' is merged into 'fc'. Call unmerge_adapter\(\) before deleting"
        ):
            layer.delete_adapter("low")
        assert layer.available_adapters == ["low", "times"]

    def test_tensors_that_stay_frozen(self):
        class Part(Times):
            entries = ("toy_times", "toy_fixed")

            def __init__(self, site):
                super().__init__(site)
                self.toy_fixed = nn.Parameter(site.ones(1), requires_grad=False)

        layer = layer_on(nn.Linear(5, 4), part=Part)
        layer.set_adapter("part")
        adapter = layer.adapters["part"]
        assert list(layer.trainable_tensors("part")) == [adapter.toy_times]
        assert adapter.toy_times.requires_grad
        assert not adapter.toy_fixed.requires_grad
        assert list(layer.trainable_tensors("missing")) == []
        assert layer.adapter_tensors("missing") == {}
        assert set(layer.adapter_tensors("part")) == {"toy_times", "toy_fixed"}

    def test_it_is_a_tuner_layer(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank)
        assert isinstance(layer, BaseTunerLayer)
        assert layer.adapter_layer_names == ("toy_A", "toy_B")
        assert layer.get_base_layer() is layer.base_layer

    def test_a_copy_has_an_owner_of_its_own(self):
        layer = layer_on(nn.Linear(5, 4), low=LowRank, times=Times)
        layer.set_adapter("low")
        other = copy.deepcopy(layer)
        x = torch.randn(3, 5)
        y = layer(x)
        with routed(layer._owner, ("times",)):
            assert torch.equal(other(x), y)
            assert not torch.allclose(layer(x), y)


class TestDeltaWeight:
    @pytest.mark.parametrize("kind", [LowRank, Times, OfBare])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_what_the_adapter_alone_changes(self, kind, dtype):
        base = nn.Linear(3, 4).to(dtype)
        original = base.weight.detach().clone()
        layer = AdaptedLayer(make_site(base, "lin"), Owner())
        for name in ("a", "b"):
            adapter = kind(layer.site).float()
            layer.add_adapter(name, adapter, "toy")
        layer.set_adapter(["b", "a"])
        alone = layer.get_delta_weight("a")
        assert alone.shape == (4, 3)
        assert alone.requires_grad
        assert alone.abs().max() > 1e-3
        layer.merge(adapter_names=["b"])
        torch.testing.assert_close(layer.get_delta_weight("a"), alone)
        layer.unmerge()
        layer.set_adapter(["a"])
        layer.merge()
        torch.testing.assert_close(layer.weight, (original.float() + alone.detach()).to(dtype))

    def test_refusals(self):
        layer = AdaptedLayer(make_site(nn.Linear(3, 4), "lin"), Owner())
        layer.add_adapter("a", Times(layer.site), "toy")
        with pytest.raises(UnknownAdapterError, match=r"The layer 'lin' has no adapter 'b'; it has 'a'."):
            layer.get_delta_weight("b")
        layer.adapters["a"].unfoldable = "it looks at the input"
        with pytest.raises(MergeError, match=r"'a' on 'lin' does not change its weight: it looks at the input."):
            layer.get_delta_weight("a")


def test_printed_it_names_its_methods_and_its_base():
    layer = AdaptedLayer(make_site(nn.Linear(3, 4), "lin"), Owner())
    layer.add_adapter("a", Times(layer.site), "times")
    layer.add_adapter("b", LowRank(layer.site), "low-rank")
    assert repr(layer).startswith("low-rank+times.Linear(\n  (base_layer): Linear(in_features=3")


@pytest.mark.parametrize("word", ["set_adapter", "set_requires_grad", "enable_adapters"])
class TestOwnWayToSwitch:
    """A subclass may override PEFT's calls, which the model then makes as well."""

    @pytest.fixture
    def calls(self):
        return []

    @pytest.fixture
    def model(self, word, calls):
        def own(layer, *args, **kwargs):
            getattr(AdaptedLayer, word)(layer, *args, **kwargs)
            calls.append((args, kwargs))
            if len(calls) == 3:
                raise KeyboardInterrupt

        model = get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), LoraConfig(target_modules=["0", "1"]))
        model.add_adapter("two", LoraConfig(target_modules=["0", "1"]))
        for layer in model.base_model.layers():
            layer.__class__ = type("Own", (AdaptedLayer,), {word: own})
        return model

    @pytest.fixture
    def call(self, word, model):
        return {
            "set_adapter": lambda: model.set_adapter("two"),
            "set_requires_grad": lambda: model.set_requires_grad(["default", "two"], requires_grad=False),
            "enable_adapters": model.base_model.disable_adapter_layers,
        }[word]

    def test_is_called(self, word, call, calls, model):
        call()
        wanted = {
            "set_adapter": ((["two"],), {"inference_mode": False}),
            "set_requires_grad": ((["default", "two"], False), {}),
            "enable_adapters": ((False,), {}),
        }[word]
        assert calls == [wanted] * 2
        first = model.get_base_model()[0].adapters
        trains = {name: adapter.lora_A.weight.requires_grad for name, adapter in first.items()}
        assert trains == {"default": False, "two": word == "set_adapter"}

    def test_is_undone(self, call, calls, model):
        calls.append(None)
        before = Snapshot.of(model)
        with pytest.raises(KeyboardInterrupt):
            call()
        assert before.differences(model) == []


class TestSubclass:
    """What a load does to the core's layers it does to those of a subclass too."""

    @pytest.fixture
    def model(self):
        model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_modules=["0"], lora_dropout=0.5))
        (layer,) = model.base_model.layers()
        layer.__class__ = type("Own", (AdaptedLayer,), {})
        model.train()
        return model

    def test_is_set_to_evaluation_by_a_load(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path, "two")
        (layer,) = model.base_model.layers()
        assert not any(one.training for adapter in layer.adapters.values() for one in adapter.modules())

    def test_saves_what_its_adapters_are_filled_up_with_no_more_than_others(self, model):
        (layer,) = model.base_model.layers()
        layer.adapters["default"].make_room(16, torch.device("cpu"))
        assert {tuple(tensor.shape) for tensor in get_peft_model_state_dict(model).values()} == {(8, 3), (3, 8)}
