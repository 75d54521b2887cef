from __future__ import annotations

import dataclasses
import gc
import sys
import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapter import Adapter, AdditiveAdapter
from tunerkit.errors import RouteError
from tunerkit.route import BACKWARD, CALL, Owner, current, enter_call, hold_in_backward, hold_routes, leave_call, routed
from tunerkit.sites import make_site

NAMES = ("a", "b", "c")


class Plus(AdditiveAdapter):
    entries = ("toy_plus",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_plus = nn.Parameter(site.normal(site.out_features, site.in_features, std=0.3))

    def delta(self, base):
        return self.toy_plus


class Times(Adapter):
    entries = ("toy_times",)

    def __init__(self, site, config):
        super().__init__(site, config)
        self.toy_times = nn.Parameter(site.normal(site.out_features, 1))

    def merged(self, below):
        bias = below.bias
        return below.weight * self.toy_times, None if bias is None else bias * self.toy_times[:, 0]


class Model(nn.Module):
    """A few adapted layers; what it returns carries its route into the backward, as a tuner's outputs do."""

    def __init__(self, depth=3, width=8, how=None, kinds=(Plus, Times, Plus)):
        super().__init__()
        self.how, self.owner = how, Owner()
        self.layers = nn.ModuleList()
        for index in range(depth):
            layer = AdaptedLayer(
                make_site(nn.Linear(width, width).requires_grad_(requires_grad=False), f"layers.{index}"), self.owner
            )
            for name, kind in zip(NAMES, kinds, strict=True):
                layer.add_adapter(name, kind(layer.bare_site, None), "toy")
            self.layers.append(layer)
        self.activate("a")

    def activate(self, *names):
        self.active = names
        for layer in self.layers:
            layer.set_adapter(list(names))

    def run(self, x, start=0):
        for layer in self.layers[start:]:
            x = torch.tanh(layer(x))
        return x

    def body(self, x):
        if self.how is None:
            return self.run(x)
        if self.how == "nested":
            return checkpoint(lambda h: checkpoint(self.run, h, use_reentrant=False), x, use_reentrant=False)
        if self.how == "nested re-entrant":
            return checkpoint(lambda h: checkpoint(self.run, h, use_reentrant=True), x, use_reentrant=True)
        return checkpoint(self.run, x, use_reentrant=self.how == "re-entrant")

    def forward(self, x):
        enter_call(self.owner)
        y = self.body(x)
        leave_call(self.owner, y, self.active)
        return y

    def gradients(self):
        for layer in self.layers:
            layer.set_requires_grad(NAMES)
        found = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        self.zero_grad()
        return found


def twins(how, **kwargs):
    """Return a model that checkpoints and one that does not, with the same numbers."""
    torch.manual_seed(0)
    plain = Model(**kwargs)
    torch.manual_seed(0)
    other = Model(how=how, **kwargs)
    for model in (plain, other):
        for layer in model.layers:
            layer.set_requires_grad(NAMES)
    return plain, other


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    gc.collect()
    assert BACKWARD == {}
    assert CALL.route is None


def expected(model, *names):
    before = model.active
    model.activate(*names)
    with torch.no_grad():
        y = model.run(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))
    model.activate(*before)
    return y


def assert_same(found, wanted):
    assert set(found) == set(wanted) != set()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


class TestForward:
    @pytest.mark.parametrize("names", [("b",), ("c",), ("a", "b"), ("b", "a"), (), ("b", "c", "a")])
    def test_a_route_is_like_being_active(self, model, x, names):
        before = expected(model, "a")
        wanted = expected(model, *names)
        with routed(model.owner, names):
            assert torch.equal(model.run(x), wanted)
            assert current(model.owner) == names
        assert torch.equal(model.run(x), before)
        assert (wanted - before).abs().max() > 1e-3
        assert current(model.owner) is None

    def test_nothing_on_the_model_changes(self, model, x):
        states = [dict(layer.__dict__) for layer in model.layers]
        with routed(model.owner, ("b",)):
            model.run(x)
        assert states == [layer.__dict__ for layer in model.layers]

    def test_a_name_that_a_layer_lacks(self, model, x):
        model.layers[0].delete_adapter("b")
        with routed(model.owner, ("b",)):
            y = model.layers[0](x)
        assert torch.equal(y, model.layers[0].base_layer(x))

    def test_nested(self, model, x):
        with routed(model.owner, ("b",)):
            with routed(model.owner, ("c",)):
                assert torch.equal(model.run(x), expected(model, "c"))
            assert torch.equal(model.run(x), expected(model, "b"))

    def test_two_models_in_one_thread(self, model, x):
        torch.manual_seed(0)
        other = Model()
        with routed(model.owner, ("b",)):
            assert torch.equal(other.run(x), expected(other, "a"))
            with routed(other.owner, ("c",)):
                assert torch.equal(model.run(x), expected(model, "b"))
                assert torch.equal(other.run(x), expected(other, "c"))
            assert torch.equal(other.run(x), expected(other, "a"))

    def test_an_error_in_the_block(self, model, x):
        with pytest.raises(ZeroDivisionError), routed(model.owner, ("b",)):
            raise ZeroDivisionError
        assert torch.equal(model.run(x), expected(model, "a"))

    def test_other_threads_do_not_see_it(self, model):
        seen = []
        with routed(model.owner, ("b",)):
            thread = threading.Thread(target=lambda: seen.append(current(model.owner)))
            thread.start()
            thread.join()
        assert seen == [None]

    def test_merged(self, model, x):
        model.layers[0].merge()
        with (
            routed(model.owner, ("b",)),
            pytest.raises(
                RouteError, match=r"'layers.0' has 'a' merged .* cannot be routed to 'b'. Call unmerge_adapter\(\)"
            ),
        ):
            model.run(x)

    def test_many_threads(self):
        torch.manual_seed(0)
        model = Model(depth=2)
        routes = [("a",), ("b",), ("c",), (), ("a", "b"), ("b", "a"), ("c", "b"), None]
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        wanted = [expected(model, *(("a",) if names is None else names)) for names in routes]
        wrong, interval = [], sys.getswitchinterval()
        start = threading.Barrier(len(routes))

        def work(names, y):
            start.wait()
            for _ in range(40):
                with torch.no_grad():
                    if names is None:
                        out = model.run(x)
                    else:
                        with routed(model.owner, names):
                            out = model.run(x)
                if not torch.equal(out, y):
                    wrong.append(names)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(routes, wanted, strict=True)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert wrong == []


def test_a_block_counts_no_calls_of_other_threads(model, x):
    """Its hooks are on the model that all threads call."""
    counts = []

    def work():
        with routed(model.owner, ("b",)), hold_routes(model.layers, model.owner, lambda: ("a",)):
            barrier.wait()
            with routed(model.owner, ("c",)):
                for hook in list(model.layers._forward_pre_hooks.values()):
                    hook(model.layers, (x,))
                counts.append(CALL.route.calls)
            barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [1, 1]
    assert not model.layers._forward_hooks
    assert not model.layers._forward_pre_hooks


@pytest.mark.parametrize("how", ["re-entrant", "not re-entrant", "nested"])
class TestBackward:
    def run(self, model, x, loss):
        x = x.detach().requires_grad_()
        loss(model, x).backward()
        found = model.gradients()
        return {**found, "x": x.grad}

    def compare(self, how, x, loss, **kwargs):
        plain, other = twins(how, **kwargs)
        wanted = self.run(plain, x, loss)
        assert_same(self.run(other, x, loss), wanted)
        return wanted

    def test_after_the_block(self, how, x):
        def loss(model, x):
            with routed(model.owner, ("b",)):
                y = model(x)
            return y.square().sum()

        wanted = self.compare(how, x, loss)
        assert {name.split(".")[-1] for name in wanted} == {"b", "x"}

    def test_within_the_block(self, how, x):
        plain, other = twins(how)
        found = []
        for model in (plain, other):
            with routed(model.owner, ("b", "c")):
                found.append(self.run(model, x, lambda model, x: model(x).square().sum()))
        assert_same(*found)

    def test_two_routes_in_one_backward(self, how, x):
        def loss(model, x):
            with routed(model.owner, ("b",)):
                first = model(x)
            with routed(model.owner, ("c", "a")):
                second = model(x)
            return first.square().sum() + 2 * second.square().sum() + 3 * model(x).square().sum()

        wanted = self.compare(how, x, loss)
        assert {name.split(".")[-1] for name in wanted} == {*NAMES, "x"}

    def test_one_call_on_the_outputs_of_another(self, how, x):
        def loss(model, x):
            with routed(model.owner, ("b",)):
                y = model(x)
            with routed(model.owner, ("c",)):
                return model(y).square().sum() + y.sum()

        self.compare(how, x, loss)

    def test_switched_in_between(self, how, x):
        def loss(model, x):
            y = model(x)
            model.activate("b")
            for layer in model.layers:
                layer.set_requires_grad(NAMES)
            return y.square().sum()

        wanted = self.compare(how, x, loss)
        assert {name.split(".")[-1] for name in wanted} == {"a", "x"}

    def test_within_the_block_of_another_route(self, how, x):
        plain, other = twins(how)
        found = []
        for model in (plain, other):
            x = x.detach().requires_grad_()
            with routed(model.owner, ("b",)):
                y = model(x)
            with routed(model.owner, ("c",)), routed(Owner(), ("d",)):
                y.square().sum().backward()
            found.append(model.gradients())
        assert_same(*found)
        assert {name.split(".")[-1] for name in found[0]} == {"b"}

    def test_two_models(self, how, x):
        torch.manual_seed(0)
        plain = [Model(), Model()]
        torch.manual_seed(0)
        others = [Model(how=how), Model(how=how)]
        found = []
        for first, second in (plain, others):
            for model in (first, second):
                for layer in model.layers:
                    layer.set_requires_grad(NAMES)
            with routed(first.owner, ("b",)), routed(second.owner, ("c",)):
                y = first(x)
                z = second(y)
                w = first(second(z))
            with routed(second.owner, ("a",)):
                (w.square().sum() + z.sum() + y.sum() + second(x).sum()).backward()
            found.append({f"{i}.{k}": g for i, m in enumerate((first, second)) for k, g in m.gradients().items()})
        assert_same(*found)

    def test_merged(self, how, x):
        plain, other = twins(how, kinds=(Plus, Plus, Plus))
        for layer in other.layers:
            layer.merge()
        found = []
        for model in (plain, other):
            given = x.detach().requires_grad_()
            model(given).square().sum().backward()
            found.append(given.grad)
        assert torch.allclose(*found, atol=1e-6)

    def test_an_error_on_the_way(self, how, x):
        plain, other = twins(how)

        def fail(gradient):
            raise ZeroDivisionError

        y = other(x)
        handle = other.layers[0].adapters["a"].toy_plus.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        handle.remove()
        assert BACKWARD == {}
        other.gradients()
        # A part of the model called by itself knows nothing of a route, and an earlier failure is not held against it.
        checkpoint(other.run, x, use_reentrant=False).square().sum().backward()
        plain.run(x).square().sum().backward()
        assert_same(other.gradients(), plain.gradients())

    @pytest.mark.parametrize("kind", ["dict", "tuple", "list", "dataclass", "namedtuple", "object", "deep"])
    def test_outputs_of_every_form(self, how, x, kind):
        @dataclasses.dataclass
        class Output:
            loss: torch.Tensor
            note: str = "text"

        class Pair(NamedTuple):
            y: torch.Tensor

        class Thing:
            def __init__(self, loss):
                self.loss = loss

        pack, unpack = {
            "dict": (lambda y: {"y": y, "n": 1}, lambda o: o["y"]),
            "tuple": (lambda y: (None, y), lambda o: o[1]),
            "list": (lambda y: [y], lambda o: o[0]),
            "dataclass": (Output, lambda o: o.loss),
            "namedtuple": (Pair, lambda o: o.y),
            "object": (Thing, lambda o: o.loss),
            "deep": (lambda y: {"y": [(y, None)]}, lambda o: o["y"][0][0]),
        }[kind]

        class Packing(Model):
            def body(self, x):
                return pack(super().body(x))

        torch.manual_seed(0)
        plain = Model()
        torch.manual_seed(0)
        other = Packing(how=how)
        for layer in (*plain.layers, *other.layers):
            layer.set_requires_grad(NAMES)
        with routed(plain.owner, ("b",)), routed(other.owner, ("b",)):
            y, outputs = plain(x), other(x)
        y.square().sum().backward()
        unpack(outputs).square().sum().backward()
        assert_same(other.gradients(), plain.gradients())


class TestRefusals:
    def test_nested_re_entrant(self, x):
        _, model = twins("nested re-entrant")
        with routed(model.owner, ("b",)):
            y = model(x)
        with pytest.raises(
            RouteError, match=r"re-entrant checkpointing inside re-entrant .* Use checkpointing with use_reent"
        ):
            y.sum().backward()
        gc.collect()
        assert BACKWARD == {}

    def test_threads_with_different_routes_in_one_backward(self, x):
        """Each thread counts its own calls, so in the backward their parts are mixed."""
        plain, model = twins("not re-entrant")

        def losses(model):
            outputs = []

            def work(names):
                with routed(model.owner, names):
                    outputs.append(model(x).square().sum())

            for names in (("b",), ("c",)):
                thread = threading.Thread(target=work, args=(names,))
                thread.start()
                thread.join()
            return outputs

        with pytest.raises(RouteError, match=r"made in different threads .* Run the backward of each call by itself\."):
            sum(losses(model)).backward()
        model.gradients()
        sum(losses(plain)).backward()
        for loss in losses(model):
            loss.backward()
        assert_same(model.gradients(), plain.gradients())

    def test_a_model_that_calls_its_own_within_a_backward(self, model, x):
        """A block within a hook of the backward counts there, whatever the outputs were made with."""
        seen = []

        def hook(gradient):
            seen.append(current(model.owner))
            with routed(model.owner, ("c",)):
                seen.append(current(model.owner))

        with routed(model.owner, ("b",)):
            h = model.layers[0](x)
            y = model.run(h, start=1)
            h.register_hook(hook)
            hold_in_backward(y, model.owner, ("b",))
        y.sum().backward()
        assert seen == [("b",), ("c",)]

    def test_a_backward_that_reached_only_another_model(self, model, x):
        seen = []
        y = model.run(x)
        x.register_hook(lambda _: seen.append(current(model.owner)))
        hold_in_backward(y, Owner(), ("b",))
        y.sum().backward()
        assert seen == [None]


class TestHolding:
    def test_without_gradients_nothing_is_held(self, model, x):
        with torch.no_grad():
            y = model(x)
        assert y._backward_hooks is None
        hold_in_backward({"x": x, "n": 3}, model.owner, ("a",))
        assert x._backward_hooks is None

    def test_only_so_deep(self, model, x):
        y = model.run(x)
        hold_in_backward([[[[[y]]]]], model.owner, ("a",))
        assert y._backward_hooks is None
        hold_in_backward(model, model.owner, ("a",))

    def test_second_derivatives(self, x):
        plain, other = twins("not re-entrant")
        found = []
        for model in (plain, other):
            with routed(model.owner, ("b",)):
                y = model(x)
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            first.square().sum().backward()
            found.append(model.gradients())
        assert_same(*found)


@pytest.fixture
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore")
class TestCompiled:
    def test_one_graph_for_every_route(self, model, x):
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()

        def step(x):
            return model.run(x)

        compiled = torch.compile(step, backend=counter, fullgraph=True)
        wanted = {names: expected(model, *names) for names in (("a",), ("b",), ("c",), (), ("a", "b"))}
        assert torch.allclose(compiled(x), wanted["a",], atol=1e-6)
        assert counter.frame_count == 1
        compiled(x)
        assert counter.frame_count == 1
        for names, y in wanted.items():
            with routed(model.owner, names):
                assert torch.allclose(compiled(x), y, atol=1e-6), names
        assert torch.allclose(compiled(x), wanted["a",], atol=1e-6)
        count = counter.frame_count
        for names, y in wanted.items():
            with routed(model.owner, names):
                assert torch.allclose(compiled(x), y, atol=1e-6), names
        assert counter.frame_count == count

    def test_each_of_several_adapters(self, model, x):
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for names in (("a",), ("b",), ("c",), ("a", "c"), ()):
            wanted = expected(model, *names)
            model.activate(*names)
            assert torch.allclose(compiled(x), wanted, atol=1e-6), names
        assert counter.frame_count <= 5

    def test_gradients(self, x):
        plain, model = twins(None)
        compiled = torch.compile(model.run, backend="aot_eager", fullgraph=True)
        for one, call in ((plain, plain.run), (model, compiled)):
            with routed(one.owner, ("b",)):
                call(x).square().sum().backward()
        assert_same(model.gradients(), plain.gradients())

    def test_checkpointing(self, x):
        plain, model = twins("not re-entrant")
        compiled = torch.compile(model, backend="aot_eager")
        for one, call in ((plain, plain), (model, compiled)):
            with routed(one.owner, ("b",)):
                y = call(x)
            y.square().sum().backward()
        assert_same(model.gradients(), plain.gradients())

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("names", [("a",), ("a", "b"), ("b", "c", "a")])
    def test_export(self, model, x, strict, names):
        wanted = expected(model, *names)
        model.activate(*names)
        program = torch.export.export(model, (x.detach(),), strict=strict)
        assert torch.allclose(program.module()(x), wanted, atol=1e-6)
        assert "layers.0.toy_plus.a" in program.state_dict
