"""Checks of an adapter in half precision, under autocast, and moved from one precision to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tunerkit.model import get_peft_model
from tunerkit.testing.bench import (
    adapter_tensors,
    all_tensors,
    copy_tensors,
    loss_of,
)
from tunerkit.testing.comparing import check_bits, check_near

if TYPE_CHECKING:
    from tunerkit.testing.bench import Bench

HALF = 0.05
"""How far the output in bfloat16 may be from that in single precision: some roundings of 1/256 each."""


class PrecisionChecks:
    """Checks of an adapter in half precision, under autocast, and moved from one precision to another."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_half_precision(self, bench: Bench, dtype: torch.dtype) -> None:
        """An adapter whose own tensors are in half precision, as the base's, gives half precision near the single one.

        To mend: compute in single precision what torch has not in half (`torch.linalg`), and give back what is of the
        dtype of the layer's output or weight.
        """
        model = bench.adapted()
        expected = bench.run(model)
        half = get_peft_model(bench.base().to(dtype), bench.config(), autocast_adapter_dtype=False).to(dtype).eval()
        copy_tensors(model, half)
        output = bench.run(half, dtype)
        assert output.dtype == dtype
        assert torch.isfinite(output).all()
        limit = HALF * float(expected.abs().max())
        check_near(output.float(), expected, f"The output in {dtype} and that in single precision", limit)

    def test_autocast(self, bench: Bench) -> None:
        """Under `torch.autocast` the output is near that without, of the base's dtype, and gradients are single.

        To mend: as for `test_half_precision_base`; under autocast a product is in half precision though both factors
        are single, so cast to the dtype of what is met, not to one that is known beforehand.
        """
        model = bench.adapted()
        expected = bench.run(model)
        with torch.autocast("cpu", torch.bfloat16):
            plain = bench.run(bench.base())
            output = bench.call(model)
        assert output.dtype == plain.dtype
        limit = HALF * float(expected.abs().max())
        check_near(output.detach().float(), expected, "The output under autocast and that without", limit)
        loss_of(output.float()).backward()  # type: ignore[no-untyped-call]
        for name, gradient in bench.gradients(model).items():
            assert gradient.dtype == torch.float32, f"The gradient of {name} is {gradient.dtype}."
            assert torch.isfinite(gradient).all()

    def test_moved_with_to(self, bench: Bench) -> None:
        """`model.to(...)` moves every tensor of the adapter, also one that is held as a plain attribute.

        To mend: register tensors as parameters or buffers (persistent=False for those that the config decides); torch
        moves nothing else.
        """
        model = bench.adapted()
        before = bench.run(model)
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)
            bench.run(model, dtype)
            tensors = {**adapter_tensors(model, "default"), **all_tensors(model, "default")}
            left = [key for key, t in tensors.items() if t.is_floating_point() and t.dtype != dtype]
            assert left == [], f"Not moved to {dtype}: {left}."
        check_bits(bench.run(model), before, "The outputs before and after the model was moved to float64 and back")
