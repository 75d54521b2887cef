"""Checks of batches in which each row has an adapter of its own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

from tunerkit.errors import RouteError
from tunerkit.rows import BASE
from tunerkit.testing.bench import Snapshot, adapted_layers, loss_of
from tunerkit.testing.comparing import check_moved
from tunerkit.testing.models import Recomputed

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.model import PeftModel
    from tunerkit.testing.bench import Bench

_NAMES = ("two", BASE, "one", "two", "three")


class RowChecks:
    """Checks of rows with adapters of their own."""

    def test_rows(self, bench: Bench) -> None:
        """Each row of a batch gets what it would get in a batch of its adapter alone, and nothing on the model changes.

        To mend: let `forward` work on a batch of any size, and do nothing in it that `torch.vmap` would hide. If what
        it does with a row depends on the other rows, say why in `crosses_rows`. A method's own `forward_rows` must
        give what `forward` gives. Layers written by hand are not routed.
        """
        model = bench.adapted("one", "two", "three")
        rows = rows_of(bench)
        if is_refused(model, rows):
            return
        before = Snapshot.of(model)
        expected = of_each(bench, model, rows).detach()
        with torch.no_grad(), model.use_rows(rows):
            found = bench.call(model)
            assert before.differences(model) == []
        bench.check_same(found, expected, "The output of a batch with rows and that of a batch of each adapter alone")
        check_moved(expected, bench.run(model), "The output of a batch with rows and that of the active adapter")
        for name in ("one", "two"):
            with torch.no_grad(), model.use_rows([name] * len(rows)):
                found = bench.call(model)
            with model.use_adapter(name):
                what = f"The output of a batch whose rows all have {name!r} and that of {name!r}"
                bench.check_same(found, bench.run(model), what)

    @pytest.mark.parametrize("recompute", [None, False, True], ids=["plain", "not re-entrant", "re-entrant"])
    def test_gradients_of_rows(self, bench: Bench, recompute: bool | None) -> None:
        """Each adapter gets the gradients of its own rows, in training, and also if the backward runs the layers again.

        To mend: as for `test_rows`; do nothing in place, and keep nothing of one call for the next.
        """
        model = bench.adapted("one", "two", "three").train()
        rows = rows_of(bench)
        if is_refused(model, rows):
            return
        expected = _gradients(bench, model, rows, whole=False)
        base = bench.base()
        if recompute is not None:
            model = bench.adapted("one", "two", "three", base=Recomputed(base, use_reentrant=recompute)).train()
        found = _gradients(bench, model, rows, whole=True)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            what = f"The gradient of {name} in a batch with rows and that of one adapter at a time"
            bench.check_same(found[name], gradient, what)


def _gradients(bench: Bench, model: PeftModel, rows: list[str], *, whole: bool) -> dict[str, Tensor]:
    """Return the gradients of the adapters' tensors, of one batch with rows or of one batch for each adapter."""
    names = sorted(set(rows) - {BASE})
    model.set_requires_grad(["one", "two", "three"], requires_grad=False)
    model.set_requires_grad(names)
    if whole:
        with model.use_rows(rows):
            output = bench.call(model)
    else:
        output = of_each(bench, model, rows)
    loss_of(output).backward()  # type: ignore[no-untyped-call]
    found = {
        f"{name}: {key.removeprefix('model.')}": gradient.clone()
        for name in names
        for key, gradient in bench.gradients(model, name).items()
    }
    assert any(float(gradient.abs().max()) > 0 for gradient in found.values())
    model.zero_grad()
    return found


def rows_of(bench: Bench, names: tuple[str, ...] = _NAMES) -> list[str]:
    """Return a name for each row of the inputs."""
    count = bench.inputs[0].shape[0]
    return [names[row % len(names)] for row in range(count)]


def of_each(bench: Bench, model: PeftModel, rows: list[str]) -> Tensor:
    """Return for each row of the batch what its adapter makes of it."""
    outputs: dict[str, Tensor] = {}
    for name in rows:
        if name not in outputs:
            with model.use_adapter([] if name == BASE else name):
                outputs[name] = bench.call(model)
    return torch.stack([outputs[name][row] for row, name in enumerate(rows)])


def is_refused(model: PeftModel, rows: list[str]) -> bool:
    """Return whether the method says that rows cannot have adapters of their own; if so, assert that it is refused."""
    reasons = [
        reason
        for layer in adapted_layers(model)
        for reason in (layer.site.crosses_rows, *(adapter.crosses_rows for adapter in layer.adapters.values()))
        if reason is not None
    ]
    parts = model.base_model.parts.values()
    reasons += ["does something around a call" for part in parts if part.surrounds()]
    if reasons:
        with pytest.raises(RouteError, match="|".join(re.escape(reason) for reason in reasons)), model.use_rows(rows):
            pass
    return bool(reasons)
