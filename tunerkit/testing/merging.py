"""Checks of merging: that nothing is lost by it, and that all of it can be taken back."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

import pytest

from tunerkit.errors import MergeError
from tunerkit.layer import tuner_layers
from tunerkit.testing.bench import Snapshot, adapted_layers
from tunerkit.testing.comparing import check_bits, check_moved

if TYPE_CHECKING:
    from tunerkit.testing.bench import Bench


class MergingChecks:
    """Checks of merging."""

    @pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
    def test_merge_keeps_the_output(self, bench: Bench, safe: bool) -> None:
        """The merged model computes what the model with the adapter computes.

        To mend: see that `merged` returns the weight and the bias that `forward` stands for, scale included.
        """
        model = bench.adapted()
        bench.need_merged_form(model)
        before, plain = bench.run(model), bench.run(bench.base())
        model.merge_adapter(safe_merge=safe)
        assert all(layer.merged for layer in model.base_model.layers())
        bench.check_same(bench.run(model), before, "The output after merging and that before")
        with model.disable_adapter():
            check_bits(
                bench.run(model),
                plain,
                "The output of a merged model with the adapter switched off and that of the base model",
            )
        bench.check_same(
            bench.run(model), before, "The output of a merged model with the adapter switched on again and that before"
        )

    def test_unmerge_is_exact(self, bench: Bench) -> None:
        """Unmerging gives back the base model's parameters, the same objects with the same bits.

        To mend: `merged` must not write into the tensors that it is given. A layer written by hand keeps the original
        parameter; subtracting what was added leaves rounding errors.
        """
        model = bench.adapted()
        bench.need_merged_form(model)
        before, output = Snapshot.of(model), bench.run(model)
        for _ in range(2):
            model.merge_adapter()
            assert before.differences(model), "merge_adapter left all parameters as they were."
            model.unmerge_adapter()
            assert before.differences(model) == []
            check_bits(bench.run(model), output, "The output after unmerging and that before merging")

    def test_merge_and_unload(self, bench: Bench) -> None:
        """`merge_and_unload` gives a plain model that computes the same and trains like the one before.

        To mend: as for `test_merge_keeps_the_output`; a layer written by hand names its base layer in `base_name`.
        """
        base = bench.base()
        shape = {name: type(module) for name, module in base.named_modules()}
        flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        model = bench.adapted(base=base)
        bench.need_merged_form(model)
        before = bench.run(model)
        plain = model.merge_and_unload()
        assert plain is base
        assert {name: type(module) for name, module in plain.named_modules()} == shape
        assert list(tuner_layers(plain)) == []
        assert flags.items() <= {name: parameter.requires_grad for name, parameter in plain.named_parameters()}.items()
        bench.check_same(bench.run(plain), before, "The output after `merge_and_unload` and that before")

    def test_two_adapters_merge(self, bench: Bench) -> None:
        """Two active adapters, in either order, compute the same merged and unmerged, and both take part.

        To mend: in `forward` and `merged`, stand on `below` and not on the base layer, unless the method is defined
        against the bare weight (`below.base`).
        """
        model = bench.adapted("one", "two")
        bench.need_merged_form(model)
        bench.need_company(model, ["one", "two"])
        alone = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            alone[name] = bench.run(model)
        for names in itertools.permutations(alone):
            model.set_adapter(list(names))
            together = bench.run(model)
            for output in alone.values():
                check_moved(together, output, f"The output of {names} together and that of one of them")
            model.merge_adapter()
            bench.check_same(bench.run(model), together, f"The output after merging {names} and that before")
            model.unmerge_adapter()
            check_bits(bench.run(model), together, f"The output after unmerging {names} and that before merging")

    @pytest.mark.parametrize("first", [0, 1], ids=["lower first", "upper first"])
    def test_two_adapters_merge_one_by_one(self, bench: Bench, first: int) -> None:
        """One of two active adapters can be merged while the other stays, or is refused because of the order they need.

        To mend: `commutes = True` promises that the adapter adds something that depends on no other adapter. Leave it
        False if what it adds depends on `below.weight`.
        """
        model = bench.adapted("one", "two")
        bench.need_merged_form(model)
        names = ["one", "two"]
        bench.need_company(model, names)
        model.set_adapter(names)
        together = bench.run(model)
        commute = all(adapter.commutes for layer in adapted_layers(model) for adapter in layer.adapters.values())
        refused = first == 1 and not commute and any(True for _ in adapted_layers(model))
        with pytest.raises(MergeError, match="does not commute") if refused else contextlib.nullcontext():
            model.merge_adapter([names[first]])
        assert any(layer.merged for layer in model.base_model.layers()) != refused
        bench.check_same(bench.run(model), together, "The output with one of two adapters merged and that before")
        model.merge_adapter([name for name in names if refused or name != names[first]])
        bench.check_same(bench.run(model), together, "The output with two adapters merged one by one and that before")
        model.unmerge_adapter()
        check_bits(bench.run(model), together, "The output after unmerging and that before merging")

    def test_merging_without_a_merged_form_is_refused(self, bench: Bench) -> None:
        """An adapter that says it has no merged form is not merged, the reason is told, and nothing is changed.

        To mend: `unfoldable` is the reason in words; it is asked of the instance. Skipped where every
        adapter has a merged form.
        """
        model = bench.adapted()
        reasons = [a.unfoldable for layer in adapted_layers(model) for a in layer.adapters.values() if a.unfoldable]
        if not reasons:
            pytest.skip("every adapter has a merged form")
        assert all(isinstance(reason, str) for reason in reasons), "unfoldable is the reason, in words."
        before = Snapshot.of(model)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError) as caught:
                merge()
            assert any(reason in str(caught.value) for reason in reasons)
            assert before.differences(model) == []
