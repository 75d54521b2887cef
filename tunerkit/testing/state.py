"""Checks of a model that is copied, pickled, moved, or held in another precision."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import torch

from tunerkit.testing.bench import (
    adapted_layers,
    adapter_tensors,
    copy_tensors,
    loss_of,
    move,
)
from tunerkit.testing.comparing import check_bits, check_moved, check_near
from tunerkit.testing.precision import HALF

if TYPE_CHECKING:
    from tunerkit.model import PeftModel
    from tunerkit.testing.bench import Bench


class StateChecks:
    """Checks of a model that is copied, pickled, moved, or held in another precision."""

    def test_deepcopy(self, bench: Bench) -> None:
        """A deep copy computes the same and shares nothing with the original.

        To mend: hold tensors as attributes of the adapter, not in closures or on the class.
        """
        model = bench.adapted("one", "two")
        self._check_copy(bench, model, copy.deepcopy(model))

    def test_pickle(self, bench: Bench) -> None:
        """A model comes back from a pickle (as when it is sent to another process) and computes the same.

        To mend: define classes at the top of a module; keep no lambdas, open files or locks on the adapter.
        """
        model = bench.adapted("one", "two")
        self._check_copy(bench, model, pickle.loads(pickle.dumps(model)))  # noqa: S301 - our own bytes

    def test_state_dict(self, bench: Bench) -> None:
        """`state_dict` holds the adapter under the names of `named_parameters`, and a strict load brings it back.

        To mend: register every tensor on the adapter as a parameter, buffer or module, and not under two names.
        """
        model, other = bench.adapted(), bench.start()
        state = model.state_dict()
        assert dict(model.named_parameters()).keys() <= state.keys()
        addresses = {tensor.data_ptr() for tensor in state.values() if tensor.numel()}
        assert all(tensor.data_ptr() in addresses for tensor in adapter_tensors(model, "default").values())
        other.load_state_dict(state)
        check_bits(bench.run(other), bench.run(model), "The output after load_state_dict and that of the saved model")

    def test_double_precision(self, bench: Bench) -> None:
        """`model.to(torch.float64)` takes the adapter along, and it computes in that precision.

        To mend: make constants from the tensors they meet (`x.new_zeros`, `torch.zeros_like`), and name no dtype.
        """
        model = bench.adapted()
        single = bench.run(model)
        model.to(torch.float64)
        tensors = adapter_tensors(model, "default")
        assert [key for key, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float64] == []
        double = bench.run(model, torch.float64)
        assert double.dtype == torch.float64
        bench.check_same(double.float(), single, "The output in double precision and that in single")
        if _foldable(model):
            model.merge_adapter()
            what = "In double precision, the output after merging and that before"
            bench.check_same(bench.run(model, torch.float64), double, what, 1e-9)

    def test_half_precision_base(self, bench: Bench) -> None:
        """On a base model in bfloat16 the adapter is in single precision, the output in bfloat16, and training works.

        To mend: cast the adapter's tensors to the dtype of what they meet (`self.scale.to(x.dtype)`,
        `below.weight.to(self.scale.dtype)`); PyTorch mixes no dtypes in a matrix product.
        """
        model = bench.adapted()
        expected = bench.run(model)
        half = bench.adapted(base=bench.base().to(torch.bfloat16))
        copy_tensors(model, half)
        tensors = adapter_tensors(half, "default")
        assert [key for key, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float32] == []
        output = bench.call(half, torch.bfloat16)
        assert output.dtype == torch.bfloat16
        limit = HALF * float(expected.abs().max())
        what = "The output on a base model in bfloat16 and that in single precision"
        check_near(output.detach().float(), expected, what, limit)
        loss_of(output).backward()  # type: ignore[no-untyped-call]
        assert all(gradient.dtype == torch.float32 for gradient in bench.gradients(half).values())
        if _foldable(half):
            half.merge_adapter()
            merged = bench.run(half, torch.bfloat16)
            assert merged.dtype == torch.bfloat16
            what = "The output merged into a base model in bfloat16 and that in single precision"
            check_near(merged.float(), expected, what, limit)

    @staticmethod
    def _check_copy(bench: Bench, model: PeftModel, other: PeftModel) -> None:
        outputs = {}
        for name in ("two", "one"):
            model.set_adapter(name)
            other.set_adapter(name)
            outputs[name] = bench.run(model)
            check_bits(bench.run(other), outputs[name], f"The output of {name!r} in the copy and that in the original")
        own = {tensor.data_ptr() for tensor in model.parameters()}
        assert own.isdisjoint(tensor.data_ptr() for tensor in other.parameters())
        move(other, "one")
        what = "The output of the copy, its tensors moved, and that of the original"
        check_moved(bench.run(other), outputs["one"], what)
        what = "The output of the original before and after the tensors of its copy were moved"
        check_bits(bench.run(model), outputs["one"], what)


def _foldable(model: PeftModel) -> bool:
    return all(a.unfoldable is None for layer in adapted_layers(model) for a in layer.adapters.values())
