"""Checks of calls that are routed: `use_adapter`, other threads, and gradient checkpointing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from tunerkit.testing.bench import Snapshot, loss_of
from tunerkit.testing.comparing import check_bits, check_moved, same_bits
from tunerkit.testing.models import Recomputed

if TYPE_CHECKING:
    from torch import Tensor

    from tunerkit.testing.bench import Bench

_REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not re-entrant", "re-entrant"])


class RouteChecks:
    """Checks of calls that are routed."""

    def test_use_adapter(self, bench: Bench) -> None:
        """Within `use_adapter` calls use the adapters it names, nested too, and nothing on the model changes.

        To mend: keep in the adapter nothing about which adapter is active. Layers written by hand are not routed.
        """
        model = bench.adapted("one", "two")
        plain, one = bench.run(bench.base()), bench.run(model)
        model.set_adapter("two")
        two = bench.run(model)
        model.set_adapter("one")
        before = Snapshot.of(model)
        with model.use_adapter("two"):
            check_bits(bench.run(model), two, "The output within use_adapter('two') and that of 'two'")
            with model.use_adapter(["one"]):
                check_bits(bench.run(model), one, "The output within a nested use_adapter(['one']) and that of 'one'")
                with model.use_adapter([]):
                    check_bits(bench.run(model), plain, "The output within use_adapter([]) and that of the base model")
            check_bits(
                bench.run(model), two, "The output within use_adapter('two'), after a nested one, and that of 'two'"
            )
        # With gradients there is a hook on the base model while the block lasts, holding the route for the backward.
        with torch.no_grad(), model.use_adapter("two"):
            assert before.differences(model) == []
        with pytest.raises(RuntimeError, match="on purpose"), model.use_adapter("two"):
            raise RuntimeError("on purpose")  # noqa: EM101, TRY003
        check_bits(bench.run(model), one, "The output after use_adapter and that before")

    def test_use_adapter_is_of_this_thread(self, bench: Bench) -> None:
        """Another thread that calls the model meanwhile gets the active adapter.

        To mend: keep nothing of a call on the adapter, the layer or the class.
        """
        model = bench.adapted("one", "two")
        one = bench.run(model)
        outputs: list[Tensor] = []
        with model.use_adapter("two"):
            two = bench.run(model)
            thread = threading.Thread(target=lambda: outputs.append(bench.run(model)))
            thread.start()
            thread.join()
            check_bits(bench.run(model), two, "The output within use_adapter before and after a call of another thread")
        check_moved(one, two, "The outputs of two adapters")
        assert len(outputs) == 1
        check_bits(outputs[0], one, "The output of another thread and that of the active adapter")

    def test_threads(self, bench: Bench) -> None:
        """Two threads that call the model at once, each with its own adapter by `use_adapter`, each get its output.

        To mend: as for `test_use_adapter_is_of_this_thread`.
        """
        model = bench.adapted("one", "two")
        expected = {}
        for name in ("two", "one"):
            model.set_adapter(name)
            expected[name] = bench.run(model)
        both = threading.Barrier(2)

        def serve(name: str) -> list[Tensor]:
            with model.use_adapter(name):
                both.wait(timeout=60)
                return [bench.run(model) for _ in range(20)]

        with ThreadPoolExecutor(2) as threads:
            found = dict(zip(expected, threads.map(serve, expected), strict=True))
        wrong = [name for name, outputs in found.items() if not all(same_bits(o, expected[name]) for o in outputs)]
        assert wrong == [], f"Beside another thread these adapters gave another output: {wrong}."
        check_bits(bench.run(model), expected["one"], "The output after other threads called the model and that before")

    @_REENTRANT
    def test_checkpointing(self, bench: Bench, reentrant: bool) -> None:
        """Gradient checkpointing, which runs the layers again in the backward, gives the same gradients.

        To mend: let `forward` give the same result each time, and keep nothing of one call for the next.
        """
        expected = self._gradients(bench, "one", recompute=None, route=False)
        found = self._gradients(bench, "one", recompute=reentrant, route=False)
        _assert_same(bench, found, expected)

    @_REENTRANT
    def test_use_adapter_holds_in_the_backward(self, bench: Bench, reentrant: bool) -> None:
        """A backward outside `use_adapter` recomputes with the adapters that the forward used.

        To mend: keep in the adapter nothing about which adapter is active. Layers written by hand are not routed.
        """
        expected = self._gradients(bench, "two", recompute=None, route=True)
        found = self._gradients(bench, "two", recompute=reentrant, route=True)
        _assert_same(bench, found, expected)

    @staticmethod
    def _gradients(bench: Bench, name: str, *, recompute: bool | None, route: bool) -> dict[str, Tensor]:
        base = bench.base()
        outer = base if recompute is None else Recomputed(base, use_reentrant=recompute)
        model = bench.adapted("one", "two", base=outer).train()
        if route:
            model.set_requires_grad("one", requires_grad=False)
            model.set_requires_grad(name)
            with model.use_adapter(name):
                loss = loss_of(bench.call(model))
        else:
            loss = loss_of(bench.call(model))
        loss.backward()  # type: ignore[no-untyped-call]
        found = bench.gradients(model, name)
        assert all(float(gradient.abs().max()) > 0 for gradient in found.values())
        return {key if recompute is None else key.removeprefix("model."): value for key, value in found.items()}


def _assert_same(bench: Bench, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        bench.check_same(found[name], gradient, f"The gradients of {name} with recomputation and without")
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
