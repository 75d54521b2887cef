"""The check of an adapter that also trains and saves a module as a whole (`modules_to_save`)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from tunerkit.copied_module import ModulesToSaveWrapper
from tunerkit.functional import load_peft_weights
from tunerkit.layer import tuner_layers
from tunerkit.model import PeftModel
from tunerkit.rows import BASE
from tunerkit.testing.bench import Bench, Snapshot, adapted_layers
from tunerkit.testing.comparing import MOVED, check_bits, check_moved, difference, same_bits
from tunerkit.testing.rows import is_refused, of_each, rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunerkit.config import PeftConfig


class WholeModuleChecks:
    """The check of an adapter that also trains and saves a module as a whole."""

    def test_modules_to_save(self, bench: Bench) -> None:
        """With `modules_to_save` a copy of another module is trained, saved, loaded, run by rows, merged and taken out.

        To mend: leave `modules_to_save` to the core, also in a tuner's own `_check_target_module_exists`; put nothing
        on modules that the config does not target. Skipped where the method's config has no such setting. Of a method
        that declares `test_rows` or `test_merge_keeps_the_output` absent that part is left out.
        """
        whole = _WholeBench(bench)
        base = whole.base()
        before, plain = Snapshot.of(base), whole.run(base)
        model = whole.adapted("one", "two", base=base)
        output = whole.run(model)
        _check_that_the_copy_counts(whole, model, output)
        with model.disable_adapter():
            check_bits(whole.run(model), plain, "The output with the adapter switched off and that of the base model")
        _check_files(whole, model, output)
        if "test_rows" not in bench.case.absent:
            _check_rows(whole, model)
        if "test_merge_keeps_the_output" not in bench.case.absent and not any(
            adapter.unfoldable for layer in adapted_layers(model) for adapter in layer.adapters.values()
        ):
            _check_merging(whole, model, output)
        model.set_adapter("two")
        other = whole.run(model)
        check_moved(other, output, "The outputs of two adapters with copies of their own")
        model.delete_adapter("one")
        check_bits(whole.run(model), other, "The output of one adapter before and after the other was deleted")
        model.delete_adapter("two")
        assert [line for line in before.differences(base) if "requires_grad" not in line] == []
        check_bits(whole.run(base), plain, "The output after all adapters were deleted and that of the base model")


class _WholeBench(Bench):
    """A bench whose config also names a module to save as a whole, one that it does not target."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.case, bench.sample, bench.folder, bench.leave_out)
        self._wanted: list[str] = []
        if not hasattr(self.config(), "modules_to_save"):
            pytest.skip(f"{type(self.config()).__name__} has no modules_to_save")
        self._wanted = list(getattr(self.config(), "modules_to_save", None) or self._others()[-1:])
        if not self._wanted:
            pytest.skip("all modules of the model are targeted, so there is none to save as a whole")

    def _others(self) -> list[str]:
        """Return the modules with tensors of their own that the config does not target, as they are called."""
        targeted = [path for path, _ in tuner_layers(self.start().get_base_model())]
        base = self.base()
        called: list[str] = []
        for path, module in base.named_modules():
            if path and module._parameters and not any(f"{path}.".startswith(f"{one}.") for one in targeted):
                module.register_forward_hook(lambda *_, path=path: called.append(path))
        self.run(base)
        return called

    def config(self) -> PeftConfig:
        config = super().config()
        if self._wanted:
            config.modules_to_save = self._wanted  # type: ignore[attr-defined]
        return config

    def copies(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter's copies, by their key in a checkpoint."""
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        return {
            f"base_model.model.{path}.{key}": tensor
            for path, layer in tuner_layers(core)
            if isinstance(layer, ModulesToSaveWrapper)
            for key, tensor in layer.adapter_tensors(name).items()
        }


def _check_that_the_copy_counts(bench: _WholeBench, model: PeftModel, output: Tensor) -> None:
    """Check that the copy of the active adapter trains and is what runs, and that those of others are neither."""
    trains = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for name, counts in (("one", True), ("two", False)):
        copies = list(bench.copies(model, name).values())
        assert copies
        parameters = {id(tensor) for tensor in copies if tensor.is_floating_point()}
        assert parameters <= trains if counts else parameters.isdisjoint(trains)
        values = [tensor.detach().clone() for tensor in copies]
        with torch.no_grad():
            for tensor in copies:
                tensor.zero_()
            changed = difference(bench.run(model), output)
            for tensor, value in zip(copies, values, strict=True):
                tensor.copy_(value)
        assert changed > MOVED if counts else changed == 0
    check_bits(bench.run(model), output, "The outputs before and after the copies were set to zero and back")


def _check_files(bench: _WholeBench, model: PeftModel, output: Tensor) -> None:
    """Check that a checkpoint holds the copy's tensors under the module's own keys, and brings it back."""
    model.save_pretrained(bench.folder)
    saved, copies = load_peft_weights(bench.folder / "one"), bench.copies(model, "one")
    assert [key for key, tensor in copies.items() if key not in saved or not same_bits(saved[key], tensor)] == []
    loaded = PeftModel.from_pretrained(bench.base(), bench.folder / "one", "one")
    check_bits(bench.run(loaded), output, "The output of the loaded model and that of the saved one")
    report = loaded.load_adapter(bench.folder / "two", "two")
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    loaded.set_adapter("two")
    with model.disable_adapter():
        check_moved(bench.run(loaded), bench.run(model), "The output of a loaded adapter and that of the base model")


def _check_rows(bench: _WholeBench, model: PeftModel) -> None:
    """Check that each row has the copy of its adapter, or the base model's own module."""
    rows = rows_of(bench, ("two", BASE, "one"))
    if is_refused(model, rows):
        return
    expected = of_each(bench, model, rows).detach()
    with torch.no_grad(), model.use_rows(rows):
        what = "The output of a batch with rows and that of a batch of each adapter alone"
        bench.check_same(bench.call(model), expected, what)


def _check_merging(bench: _WholeBench, model: PeftModel, output: Tensor) -> None:
    """Check that merging keeps the output, and that the copy then stands in the module's place."""
    copies = {key: tensor.detach().clone() for key, tensor in bench.copies(model, "one").items()}
    merged = copy.deepcopy(model).merge_and_unload()
    bench.check_same(bench.run(merged), output, "The output after `merge_and_unload` and that before")
    assert not bench.copies(merged, "one")
    state = {f"base_model.model.{key}": tensor for key, tensor in merged.state_dict().items()}
    assert [key for key, tensor in copies.items() if not same_bits(state[key], tensor)] == []
    model.merge_adapter()
    bench.check_same(bench.run(model), output, "The output after merging and that before")
    model.unmerge_adapter()
    check_bits(bench.run(model), output, "The output after unmerging and that before merging")
