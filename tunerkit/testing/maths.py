"""Checks of the maths: where it starts, that its two forms agree, and its gradients."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import numpy  # noqa: ICN001 - a name is enough
import torch
from torch import Tensor, nn

from tunerkit.layer import tuner_layers
from tunerkit.sites import Bound
from tunerkit.testing.bench import (
    adapted_layers,
    adapter_tensors,
    all_tensors,
    cast,
    loss_of,
    move,
    trained,
)
from tunerkit.testing.comparing import check_bits, check_close, check_moved, first_tensor, same_bits
from tunerkit.testing.disagreement import where_they_disagree

if TYPE_CHECKING:
    from tunerkit.adapted_layer import AdaptedLayer
    from tunerkit.model import PeftModel
    from tunerkit.sites import Below
    from tunerkit.testing.bench import Bench


class MathsChecks:
    """Checks of the maths."""

    def test_identity_at_start(self, bench: Bench) -> None:
        """A new adapter changes nothing, so that training starts from the base model.

        To mend: let one of the factors start at zero, a scale at one, a rotation at the identity.
        """
        model = bench.start()
        plain = bench.run(bench.base())
        bench.check_same(bench.run(model), plain, "The output with a new adapter and that of the base model")
        move(model, "default")
        what = "The output with all tensors of the adapter moved at random and that of the base model"
        check_moved(bench.run(model), plain, what)

    def test_forward_agrees_with_merged(self, bench: Bench) -> None:
        """The adapter's own `forward` gives what the layer gives with the parameters of `merged`, and changes no input.

        To mend: compare both on paper; often a scale, a transpose or the bias is in one and not in the other. Compute
        with `below(x)` and `below.weight`, never with the base layer, or adapters below are lost.
        """
        model = bench.adapted("under", "upper")
        bench.need_merged_form(model)
        for layer, (x, *args), kwargs in self._inputs_of_layers(bench, model):
            below: Below = Bound(layer.site, layer.bare_site, tuple(args), kwargs)
            adapter = layer.adapters["upper"]
            before = x.clone()
            with torch.no_grad():
                own = adapter.forward(x, below)
                weight, bias = adapter.merged(below)
                where, output, shape = f"At {layer.site.name!r}", first_tensor(own), tuple(first_tensor(below(x)).shape)
                assert tuple(output.shape) == shape, f"{where} `forward` gives {tuple(output.shape)}, and not {shape}."
                shape = tuple(below.weight.shape)
                assert tuple(weight.shape) == shape, f"{where} `merged` gives {tuple(weight.shape)}, and not {shape}."
                merged = first_tensor(below.run(x, weight, bias))
                hint = "" if bench.same(output, merged) else where_they_disagree(adapter, x, below, bench.tolerance)
                what = f"{where} the output of `forward` and that of what `merged` returns"
                check_close(output, merged, what, bench.tolerance, hint)
                again = first_tensor(below.run(x, *adapter.merged(below)))
                bench.check_same(merged, again, f"{where} the outputs of what `merged` returns and returns again")
            check_bits(x, before, f"{where} the inputs before and after `forward` and `merged`")

    def test_gradients(self, bench: Bench) -> None:
        """Every tensor that trains gets a gradient, and it is the slope that the output really has; the inputs' too.

        To mend: use the parameter itself, not its `.data`, a detached copy, or something computed once in `__init__`;
        do nothing in place. A tensor that is not to be trained is registered with requires_grad=False.
        """
        model = bench.adapted().to(torch.float64)
        inputs = [cast(value, torch.float64).clone() for value in bench.inputs]
        leaves = {f"input {number}": value for number, value in enumerate(inputs) if value.is_floating_point()}
        for value in leaves.values():
            value.requires_grad_()
        leaves.update(trained(model, "default"))
        gradients = torch.autograd.grad(_loss(model, inputs), list(leaves.values()), allow_unused=True)
        generator = torch.Generator().manual_seed(0)
        for (name, tensor), gradient in zip(leaves.items(), gradients, strict=True):
            assert gradient is not None, f"{name} got no gradient."
            direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            slope = _slope(model, inputs, tensor, direction)
            expected = float((gradient * direction).sum())
            assert abs(slope - expected) <= 1e-5 * max(1.0, abs(slope)), f"{name}: {expected} is not the slope {slope}."

    def test_input_is_not_changed(self, bench: Bench) -> None:
        """Neither the model's input nor that of any adapted layer is changed, with gradients and without.

        To mend: in `forward`, change `x` and what `below` gives by no method that ends in `_`, nor by `+=` and `*=`.
        """
        model = bench.adapted("under", "upper")
        before = [value.clone() for value in bench.inputs]
        changed: list[str] = []
        waiting: list[list[tuple[Tensor, Tensor]]] = []

        def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            waiting.append([(value, value.detach().clone()) for value in values])

        def compare(path: str, *_call: Any) -> None:
            changed.extend(path for value, old in waiting.pop() if not same_bits(value.detach(), old))

        for path, layer in tuner_layers(model.get_base_model()):
            layer.register_forward_pre_hook(note, with_kwargs=True)  # type: ignore[attr-defined]
            layer.register_forward_hook(functools.partial(compare, path))  # type: ignore[attr-defined]
        for name in ("under", "upper"):
            model.set_adapter(name)
            bench.run(model)
            loss_of(bench.call(model)).backward()  # type: ignore[no-untyped-call]
        assert changed == [], f"The inputs of these layers were changed: {changed}."
        for old, value in zip(before, bench.inputs, strict=True):
            check_bits(old, value, "The model's input before and after its calls")

    def test_seed_is_honoured(self, bench: Bench) -> None:
        """What an adapter draws at random is decided by `torch.manual_seed`, and by nothing else.

        To mend: draw with `site.normal`, `site.uniform` or `torch.rand` without a generator; not from `random` or
        numpy; and do not seed torch, which would decide what the program draws afterwards.
        """
        old_states = random.getstate(), numpy.random.get_state()  # noqa: NPY002 - what a method might use
        starts, states = [], []
        try:
            with torch.random.fork_rng(devices=[]):
                for number, seed in enumerate((3, 3, 4)):
                    random.seed(number)
                    numpy.random.seed(number)  # noqa: NPY002
                    torch.manual_seed(seed)
                    model = bench.start()
                    starts.append({**adapter_tensors(model, "default"), **all_tensors(model, "default")})
                    states.append(torch.get_rng_state())
        finally:
            random.setstate(old_states[0])
            numpy.random.set_state(old_states[1])  # noqa: NPY002
        first, second, _ = starts
        assert first.keys() == second.keys()
        wrong = [key for key, tensor in first.items() if not same_bits(tensor, second[key])]
        assert wrong == [], f"With the same seed these start differently: {wrong}."
        assert torch.equal(states[0], states[1]), "With the same seed torch draws other numbers afterwards."
        assert not torch.equal(states[0], states[2]), "Attaching an adapter seeds torch anew."

    @staticmethod
    def _inputs_of_layers(bench: Bench, model: PeftModel) -> list[tuple[AdaptedLayer, list[Any], dict[str, Any]]]:
        """Return the layers and what reaches them when the model is run; not those whose parameters are only read."""
        found: list[tuple[AdaptedLayer, list[Any], dict[str, Any]]] = []

        def note(layer: AdaptedLayer, _called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # What is called may be a twin of the layer.
            if all(layer is not noted for noted, _, _ in found):
                found.append((layer, [args[0].detach().clone(), *args[1:]], kwargs))

        layers = [layer for layer in adapted_layers(model) if type(layer.site).alone(layer.get_base_layer()) is None]
        handles = [
            layer.register_forward_pre_hook(functools.partial(note, layer), with_kwargs=True) for layer in layers
        ]
        bench.run(model)
        for handle in handles:
            handle.remove()
        assert len(found) == len(handles), "The model runs only some of its adapted layers on the given inputs."
        return found


def _loss(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    return loss_of(first_tensor(model(*inputs)))


def _slope(model: nn.Module, inputs: list[Tensor], tensor: Tensor, direction: Tensor, step: float = 1e-5) -> float:
    """Return how much the loss rises as a tensor goes in a direction, by moving it a little both ways."""
    with torch.no_grad():
        start = tensor.clone()
        tensor.copy_(start + step * direction)
        above = float(_loss(model, inputs))
        tensor.copy_(start - step * direction)
        below = float(_loss(model, inputs))
        tensor.copy_(start)
    return (above - below) / (2 * step)
