"""Checks of what a call leaves behind, of what is adapted, and of the words in which an adapter tells of itself."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tunerkit.errors import TunerkitError
from tunerkit.hotswap import hotswap_adapter
from tunerkit.layer import tuner_layers
from tunerkit.targeting import match_target
from tunerkit.testing.bench import adapted_layers, all_tensors, loss_of
from tunerkit.testing.comparing import first_tensor
from tunerkit.testing.misspelling import misspelt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from tunerkit.adapter import Adapter, Part
    from tunerkit.config import PeftConfig
    from tunerkit.model import PeftModel
    from tunerkit.testing.bench import Bench


class CallChecks:
    """Checks of what a call leaves behind, of what is adapted, and of what an adapter tells of itself."""

    def test_words_are_of_the_contract(self, bench: Bench) -> None:
        """No name that the adapter's class or the `Part`'s defines is a misspelt word of the contract.

        To mend: write the word as the contract has it, `forward` or `from_checkpoint`, for nothing else is called. A
        helper of another meaning gets another name, or begins with `_`.
        """
        method = bench.method
        kinds: tuple[type[Adapter | Part], ...] = (*method.adapters, *([method.part] if method.part else []))
        found = [
            f"{kind.__name__} defines `{name}`, which nothing calls: did you mean `{word}`?"
            for kind in kinds
            for name, word in misspelt(kind).items()
        ]
        assert found == [], " ".join(found)

    def test_targets_only_what_is_asked(self, bench: Bench) -> None:
        """No module is adapted that the config's targets do not match, as names, as suffixes or as a pattern.

        To mend: let a hook `_check_target_module_exists` only narrow down what the core's own matching gives. A method
        whose config says in another way what to adapt declares this check absent.
        """
        model = bench.start()
        config, core = model.peft_config["default"], model.base_model
        names = core.targeted_module_names
        # A target may take in a module below it, as an attention layer does its output projection.
        asked = [name for name in names if match_target(config, name)]
        more = [name for name in names if not any(f"{name}.".startswith(f"{one}.") for one in asked)]
        assert more == [], f"These are adapted, and the config's targets are others: {more}."

    def test_keeps_nothing_of_a_call(self, bench: Bench) -> None:
        """After a call, in evaluation and in training, neither the layers' inputs nor any new tensor is held.

        To mend: set no attribute in `forward` or `around` to what a call brings or computes; it would stay in memory
        until the next call. What has to be counted or averaged is a buffer, written in place.
        """
        model = bench.adapted()
        for training in (False, True):
            model.train(training)
            before = all_tensors(model, "default")
            inputs = _inputs_of_layers(bench, model, backward=training)
            after = all_tensors(model, "default")
            new = [key for key, tensor in after.items() if before.get(key) is not tensor]
            assert new == [], f"After a call the adapter holds other tensors: {new}."
            held = [path for path, tensor in inputs if tensor() is not None]
            assert held == [], f"After a call something still holds the inputs of these layers: {held}."

    def test_draws_nothing_in_evaluation(self, bench: Bench) -> None:
        """In evaluation mode a call draws no random numbers, so that what the program draws next is as without it.

        To mend: draw only while `self.training` is set, and only where something is dropped.
        """
        models = {"base model": bench.base(), "adapted model": bench.adapted()}
        states = {}
        with torch.random.fork_rng(devices=[]):
            for name, model in models.items():
                torch.manual_seed(6)
                bench.run(model)
                states[name] = torch.get_rng_state()
        assert torch.equal(*states.values()), "A call of the adapter draws random numbers in evaluation mode."

    def test_has_effect(self, bench: Bench) -> None:
        """An adapter that changes the output says so, or loading it with `verify=True` would be refused.

        To mend: leave `has_effect` to the core, which compares the weights, or let it look at every tensor that counts.
        """
        model = bench.adapted()
        layers = adapted_layers(model)
        silent = [one.site.name for one in layers if not one.adapters["default"].has_effect(one.bare_site)]
        assert silent == [], f"The adapters of these layers say that they change nothing: {silent}."

    def test_hotswap(self, bench: Bench) -> None:
        """A checkpoint swapped into an adapter gives its output, also where a number of its config is another one.

        To mend: name in `settings` every plain number that `forward` reads and that the config decides, such as a
        scaling. What cannot be swapped is refused by `take`. Skipped where layers
        are written by hand, and where there is a `Part`.
        """
        source = bench.adapted()
        if source.base_model.parts or not any(True for _ in adapted_layers(source)):
            pytest.skip("neither what all layers share nor a layer written by hand can be swapped")
        source.save_pretrained(bench.folder)
        expected = bench.run(source)
        for what, config in _variants(bench.config()):
            try:
                model = bench.case.attach(bench.base(), config, "default").eval()
                hotswap_adapter(model, bench.folder, "default")
            except TunerkitError:
                assert what is not None, "A checkpoint of the same config cannot be swapped in."
                continue
            differing = f"where {what!r} was another" if what else "where the config was the same"
            bench.check_same(
                bench.run(model),
                expected,
                f"The output of a checkpoint swapped in {differing} and that of the saved model",
            )


def _variants(config: PeftConfig) -> Iterator[tuple[str | None, PeftConfig]]:
    """Go through configs that differ in nothing, and then in one number each, with its name."""
    yield None, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            other = config.copy()
            try:
                setattr(other, field.name, 2 * value)
            except TunerkitError:  # a config may check what it is given
                continue
            yield field.name, other


def _inputs_of_layers(bench: Bench, model: PeftModel, *, backward: bool) -> list[tuple[str, weakref.ref[Tensor]]]:
    """Call a model, and return what reached its layers, without holding it."""
    found: list[tuple[str, weakref.ref[Tensor]]] = []
    handles = []
    for path, layer in tuner_layers(model.get_base_model()):

        def note(_layer: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            found.extend((path, weakref.ref(value)) for value in args if isinstance(value, Tensor))

        handles.append(layer.register_forward_pre_hook(note))  # type: ignore[attr-defined]
    with torch.set_grad_enabled(backward):
        # Clones, for the bench itself holds its inputs.
        output = first_tensor(model(*(value.clone() for value in bench.inputs)))
        if backward:
            loss_of(output).backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    return found
