"""Checks of an adapter's life in a model: trained, switched off, beside another, taken out, and never half put in."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tunerkit.testing.bench import (
    Snapshot,
    adapted_layers,
    adapter_tensors,
    loss_of,
    move,
    trained,
)
from tunerkit.testing.comparing import check_bits, check_moved, same_bits
from tunerkit.tuner import BaseTuner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from tunerkit.testing.bench import Bench


class LifecycleChecks:
    """Checks of an adapter's life in a model."""

    def test_training_changes_only_the_adapter(self, bench: Bench) -> None:
        """Two optimiser steps change every tensor of the adapter that trains, and not a bit of anything else.

        To mend: make trained tensors `nn.Parameter`, frozen ones with requires_grad=False or as buffers; never write
        into the base layer; do not share tensors between adapters.
        """
        model = bench.adapted().train()
        trains = trained(model, "default")
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trains.values()}
        before = {name: (t, t.detach().clone()) for name, t in {**dict(model.named_parameters())}.items()}
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        optimizer = torch.optim.SGD(trains.values(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(bench.call(model)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, (tensor, bits) in before.items():
            if tensor.requires_grad:
                assert not same_bits(tensor, bits), f"{name} trains and did not change."
            else:
                assert same_bits(tensor, bits), f"{name} does not train and changed."
        assert [name for name, buffer in model.named_buffers() if not same_bits(buffer, buffers[name])] == []

    def test_disabled_is_the_base(self, bench: Bench) -> None:
        """Switched off, the model is the base model bit for bit, and nothing trains; switched on, all is as it was.

        To mend: change the base layer in no way, not even by something that is nothing at the start. A layer written by
        hand runs its base layer alone while `disable_adapters` is set.
        """
        base = bench.base()
        plain = bench.run(base)
        model = bench.adapted("one", "two", base=base)
        before, output = Snapshot.of(model), bench.run(model)
        with model.disable_adapter():
            check_bits(bench.run(model), plain, "The output with the adapter switched off and that of the base model")
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert [line for line in before.differences(model) if line.startswith("tensor")] == []
        check_bits(bench.run(model), output, "The output with the adapter switched on again and that before")
        with pytest.raises(RuntimeError, match="on purpose"), model.disable_adapter():
            raise RuntimeError("on purpose")  # noqa: EM101, TRY003
        check_bits(bench.run(model), output, "The output after an error with the adapter switched off and that before")

    def test_delete_restores_the_original(self, bench: Bench) -> None:
        """When the last adapter is deleted, the base model is made of the very objects it was made of.

        To mend: keep everything on the adapter, nothing on the base layer, its parent or the model.
        """
        base = bench.base()
        before = Snapshot.of(base)
        model = bench.adapted("one", "two", base=base)
        output = bench.run(model)
        model.delete_adapter("two")
        assert list(model.peft_config) == ["one"]
        check_bits(bench.run(model), output, "The output of one adapter before and after the other was deleted")
        model.delete_adapter("one")
        assert [line for line in before.differences(base) if "requires_grad" not in line] == []

    def test_unload_restores_the_original(self, bench: Bench) -> None:
        """`unload` gives back the base model: the same objects, bits, attributes and flags.

        To mend: as for `test_delete_restores_the_original`.
        """
        base = bench.base()
        next(base.parameters()).requires_grad = False
        before, plain = Snapshot.of(base), bench.run(base)
        model = bench.adapted("one", "two", base=base)
        assert model.unload() is base
        assert before.differences(base) == []
        check_bits(bench.run(base), plain, "The output after `unload` and that of the base model")

    def test_two_adapters_are_independent(self, bench: Bench) -> None:
        """Two adapters share no memory, and changing, switching or deleting one leaves the other's output as it is.

        To mend: make new tensors in `__init__` of the adapter (or of the `Part`); nothing on the class or the module.
        """
        model = bench.start(name="one")
        trains = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        model.add_adapter("two", bench.config())
        assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trains
        model = bench.adapted("one", "two")
        tensors = {name: adapter_tensors(model, name) for name in ("one", "two")}
        memory = {name: {t.untyped_storage().data_ptr() for t in own.values()} for name, own in tensors.items()}
        assert memory["one"].isdisjoint(memory["two"])
        one = bench.run(model)
        model.set_adapter("two")
        two = bench.run(model)
        check_moved(one, two, "The outputs of two adapters")
        move(model, "two", seed=7)
        check_moved(bench.run(model), two, "The outputs before and after the adapter's tensors were moved")
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained(model, "two").values()}
        model.set_adapter("one")
        check_bits(bench.run(model), one, "The output of one adapter before and after the other was moved")
        model.delete_adapter("two")
        check_bits(bench.run(model), one, "The output of one adapter before and after the other was deleted")

    def test_two_adapters_are_active_together(self, bench: Bench) -> None:
        """Two active adapters stand on one another: neither alone gives what both give, and both train.

        To mend: in `forward`, run what is below by `below(x)` or `below.run(...)`.
        """
        model = bench.adapted("one", "two")
        bench.need_company(model, ["one", "two"])
        alone = []
        for name in ("one", "two"):
            model.set_adapter(name)
            alone.append(bench.run(model))
        model.set_adapter(["one", "two"])
        both = bench.run(model)
        for output in alone:
            check_moved(both, output, "The output of two active adapters and that of one of them")
        every = {**trained(model, "one"), **trained(model, "two")}
        trains = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert {id(tensor) for tensor in every.values()} <= trains
        loss_of(bench.call(model)).backward()  # type: ignore[no-untyped-call]
        for name in ("one", "two"):
            assert all(float(gradient.abs().max()) > 0 for gradient in bench.gradients(model, name).values())
        model.set_adapter("one")
        check_bits(bench.run(model), alone[0], "The output of one adapter before and after both were active")

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("beside", [False, True], ids=["first", "beside another"])
    @pytest.mark.parametrize("moment", ["constructor", "hook"])
    def test_failing_half_way_changes_nothing(
        self,
        bench: Bench,
        moment: str,
        beside: bool,
        error: type[BaseException],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If putting in an adapter fails at any layer, the model is object for object and bit for bit what it was.

        To mend: change nothing outside the adapter while it is made; a hook that replaces a module changes only its
        parent.
        """
        started = bench.start()
        method = bench.method
        adapter = method.adapter_for(bench.kind) if bench.kind in method.kinds else None
        if moment == "constructor" and adapter is None:
            pytest.skip("the method has no adapter class whose constructor could fail")
        tuner = bench.method.tuner or BaseTuner
        victim: type = adapter if moment == "constructor" and adapter is not None else tuner
        name = "__init__" if moment == "constructor" else "_create_and_replace"
        owner = next(kind for kind in victim.__mro__ if name in vars(kind))
        made = [adapter for layer in adapted_layers(started) for adapter in layer.adapters.values()]
        calls = sum(isinstance(adapter, owner) for adapter in made)
        if moment == "hook":
            calls = len(list(started.base_model.layers()))
        for number in range(calls):
            base = bench.base()
            model = bench.adapted("one", base=base) if beside else None
            whole: nn.Module = model if model is not None else base
            fail: Callable[[], object] = (
                functools.partial(model.add_adapter, "two", bench.config())
                if model is not None
                else functools.partial(bench.case.attach, base, bench.config(), "two")
            )
            before, output = Snapshot.of(whole), bench.run(whole)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, _failing_after(vars(owner)[name], number, error))
                with pytest.raises(error, match="on purpose"):
                    fail()
            assert before.differences(whole) == []
            check_bits(bench.run(whole), output, "The output after an adapter could not be put in and that before")
            if model is not None:
                assert list(model.peft_config) == ["one"]
                assert all(list(layer.adapters) == ["one"] for layer in adapted_layers(model))


def _failing_after(function: Callable[..., Any], number: int, error: type[BaseException]) -> Callable[..., Any]:
    """Return the function, which does its work and then raises when it is called after so many other calls."""
    calls = iter(range(number + 1))

    @functools.wraps(function)
    def failing(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(calls) == number:
            msg = "on purpose"
            raise error(msg)
        return result

    return failing
