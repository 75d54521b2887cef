"""Comparing a method with the same method of PEFT, for authors whose method PEFT has too.

`Pair` adapts one base model twice, by tunerkit and by the installed `peft`, with equal settings, moves every tensor of
the adapters at random, to the same values on both sides, and asserts that the output moved: an adapter at its start
leaves the model as it is, and so would anything. Its checks then compare the two; `check_parity` runs them all:

    def test_mlp(tmp_path):
        torch.manual_seed(0)
        check_parity(MLP(), LnTuningConfig(target_modules=["norm"]), {"x": torch.randn(4, 8)}, tmp_path)

Models are compared in evaluation mode, so that dropout does not count. Without `peft` the tests are skipped.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tunerkit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    from tunerkit.config import PeftConfig

MOVED = 1e-3
"""By how much an output must move, and a gradient differ from zero, for a comparison to mean something."""

TOLERANCE = 1e-5
"""The greatest difference from PEFT in single precision, absolute or relative."""

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_VERSION = "peft_version"


def peft_config(config: PeftConfig) -> Any:
    """Return the same settings as a config of PEFT's class."""
    return _peft().get_peft_config(config.to_dict())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings that PEFT earns by how it calls other libraries, where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        yield


def check_parity(base: nn.Module, config: PeftConfig, inputs: Mapping[str, Tensor], folder: Path) -> None:
    """Assert that an adapter is the same as PEFT's: names, counts, outputs, files, gradients, training and merging.

    Args:
        base: The model to adapt; it is copied and stays as it is.
        config: The settings.
        inputs: Arguments of the model's forward, by name. Those of a floating dtype get gradients that are compared.
        folder: An empty folder to save checkpoints in.
    """
    pair = Pair(base, config, inputs)
    pair.check_parameters()
    pair.check_tensors()
    pair.check_outputs()
    pair.check_disabled()
    pair.check_files(folder)
    pair.check_gradients()
    pair.check_steps()
    pair.check_merged()


class Pair:
    """One base model adapted by tunerkit and by PEFT, with equal settings and equal tensors.

    Attributes:
        base: The model without adapters.
        inputs: Arguments of the model's forward, by name.
        ours: tunerkit's `PeftModel` around a copy of the base.
        theirs: PEFT's `PeftModel` around another copy.
        adapters: The names of the adapters.
    """

    def __init__(
        self, base: nn.Module, config: PeftConfig, inputs: Mapping[str, Tensor], adapter_name: str = "default"
    ) -> None:
        self.base = base.eval()
        self.inputs = inputs
        self.ours: Any = tunerkit.get_peft_model(copy.deepcopy(base), config, adapter_name=adapter_name).eval()
        with quiet():
            theirs = _peft().get_peft_model(copy.deepcopy(base), peft_config(config), adapter_name=adapter_name)
        self.theirs: Any = theirs.eval()
        self.adapters = [adapter_name]
        self._generator = torch.Generator().manual_seed(0)
        self.move(adapter_name)

    def add(self, adapter_name: str, config: PeftConfig) -> None:
        """Add an adapter on both sides and move its tensors; which one is active stays as it is."""
        self.ours.add_adapter(adapter_name, config)
        self.theirs.add_adapter(adapter_name, peft_config(config))
        self.ours.eval()
        self.theirs.eval()
        self.adapters.append(adapter_name)
        active = self.theirs.active_adapter
        self.set_adapter(adapter_name)
        self.move(adapter_name)
        self.set_adapter(active)

    def set_adapter(self, adapter_name: str) -> None:
        """Make one adapter the active one on both sides."""
        self.ours.set_adapter(adapter_name)
        self.theirs.set_adapter(adapter_name)

    def move(self, adapter_name: str) -> None:
        """Move every tensor of the active adapter, to the same values on both sides, and assert that this shows."""
        tensors = moved_tensors(self.theirs, adapter_name, self._generator)
        _peft().set_peft_model_state_dict(self.theirs, dict(tensors), adapter_name=adapter_name)
        tunerkit.set_peft_model_state_dict(self.ours, dict(tensors), adapter_name=adapter_name)
        moved = (run(self.theirs, self.inputs) - run(self.base, self.inputs)).abs().max().item()
        assert moved > MOVED, f"the adapter changes the output by only {moved:g}"

    def check_parameters(self) -> None:
        """Parameters have PEFT's names, shapes and flags, and their counts and the text about them agree."""
        assert describe_parameters(self.ours) == describe_parameters(self.theirs)
        assert self.ours.get_nb_trainable_parameters() == self.theirs.get_nb_trainable_parameters()

    def check_tensors(self) -> None:
        """Each adapter's tensors have PEFT's keys and PEFT's values."""
        for name in self.adapters:
            theirs = _peft().get_peft_model_state_dict(self.theirs, adapter_name=name)
            assert_same_tensors(tunerkit.get_peft_model_state_dict(self.ours, adapter_name=name), theirs)

    def check_outputs(self) -> None:
        """Both models return the same."""
        assert_close(run(self.ours, self.inputs), run(self.theirs, self.inputs))

    def check_disabled(self) -> None:
        """With adapters disabled the output is the base model's, bit for bit, and afterwards it is as before."""
        with self.ours.disable_adapter():
            assert torch.equal(run(self.ours, self.inputs), run(self.base, self.inputs))
        self.check_outputs()

    def check_gradients(self) -> None:
        """The gradients of every trainable tensor and of every input of a floating dtype are the same."""
        ours, theirs = gradients(self.ours, self.inputs), gradients(self.theirs, self.inputs)
        assert max(gradient.abs().max().item() for gradient in theirs.values()) > MOVED
        assert_same_tensors(ours, theirs)

    def check_steps(self) -> None:
        """Two steps of an optimiser lead to the same tensors and outputs."""
        before = trainable(self.theirs)
        train(self.ours, self.inputs)
        train(self.theirs, self.inputs)
        after = trainable(self.theirs)
        assert max((after[name] - before[name]).abs().max().item() for name in before) > MOVED
        assert_same_tensors(trainable(self.ours), after)
        self.check_outputs()

    def check_files(self, folder: Path) -> None:
        """Both write the same files, and each reads what the other wrote and gives the same outputs.

        Args:
            folder: An empty folder to save checkpoints in.
        """
        self.ours.save_pretrained(folder / "ours")
        self.theirs.save_pretrained(folder / "theirs")
        for name in self.adapters:
            ours, theirs = self.folders(folder, name)
            assert_same_tensors(load_file(ours / _TENSORS), load_file(theirs / _TENSORS))
            assert plain_settings(ours) == plain_settings(theirs)
        for name in self.adapters:
            ours, theirs = self.folders(folder, name)
            self.set_adapter(name)
            expected = run(self.theirs, self.inputs)
            for on_meta in (False, True):
                model = tunerkit.PeftModel.from_pretrained(
                    copy.deepcopy(self.base), theirs, adapter_name=name, low_cpu_mem_usage=on_meta
                )
                assert not any(parameter.is_meta for parameter in model.parameters())
                assert_close(run(model, self.inputs), expected)
            with quiet():
                model = _peft().PeftModel.from_pretrained(copy.deepcopy(self.base), ours, adapter_name=name)
            assert_close(run(model, self.inputs), expected)
        self.set_adapter(self.adapters[0])

    @staticmethod
    def folders(folder: Path, adapter_name: str) -> tuple[Path, Path]:
        """Return where tunerkit and PEFT have saved an adapter in `check_files`."""
        below = "." if adapter_name == "default" else adapter_name
        return folder / "ours" / below, folder / "theirs" / below

    def check_merged(self) -> None:
        """Merging the active adapters gives the same plain model; it ends the pair."""
        before = run(self.ours, self.inputs)
        ours, theirs = self.ours.merge_and_unload(), self.theirs.merge_and_unload()
        assert type(ours) is type(self.base)
        assert_same_tensors(ours.state_dict(), theirs.state_dict())
        assert_close(run(ours, self.inputs), run(theirs, self.inputs))
        assert_close(run(ours, self.inputs), before)


def moved_tensors(peft_model: nn.Module, adapter_name: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the tensors of one of PEFT's adapters, each element moved by 0.1 to 0.3 up or down.

    Tensors that are one, those of tied copies, are moved alike.
    """
    state = _peft().get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    moved: dict[int, Tensor] = {}
    for _, tensor in sorted(state.items()):
        if tensor.data_ptr() not in moved:
            moved[tensor.data_ptr()] = tensor + _noise(tensor, generator)
    return {key: moved[tensor.data_ptr()] for key, tensor in sorted(state.items())}


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    # Kept away from zero: in a small model few elements could otherwise happen to change nothing to speak of.
    uniform = torch.rand(tensor.shape, generator=generator) * 2 - 1
    return (uniform.sign() * (0.1 + 0.2 * uniform.abs())).to(tensor.dtype)


def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the first output of a model, without gradients."""
    with torch.no_grad():
        return _first_output(model, inputs)


def gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of the trainable parameters, and of the inputs of a floating dtype, by name."""
    leaves = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    model.zero_grad()
    _loss(model, leaves).backward()  # type: ignore[no-untyped-call]
    found = dict(_with_gradient(leaves.items())) | dict(_with_gradient(model.named_parameters()))
    model.zero_grad()
    return found


def train(model: nn.Module, inputs: Mapping[str, Tensor], steps: int = 2) -> None:
    """Take steps of plain gradient descent on the trainable parameters."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model, inputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable parameters, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def describe_parameters(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    """Return shape, dtype and `requires_grad` of the parameters, by name."""
    return {name: (tuple(value.shape), value.dtype, value.requires_grad) for name, value in model.named_parameters()}


def plain_settings(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's config says, without the order of its lists and the version of PEFT."""
    settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    return {
        key: sorted(value) if isinstance(value, list) else value for key, value in settings.items() if key != _VERSION
    }


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Assert that two tensors agree up to the error of single precision."""
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def assert_same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Assert that two dicts hold the same names and that their tensors agree."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(ours[name], tensor, atol=TOLERANCE, rtol=TOLERANCE, msg=message)


def _first_output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output: Any = model(**inputs)
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    # Linear in the output: the square of what a normalising last layer returns would have no gradient.
    output = _first_output(model, inputs)
    weights = torch.arange(output.numel(), dtype=output.dtype).cos().reshape(output.shape)
    return (output * weights).sum() / math.sqrt(output.numel())


def _with_gradient(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.grad.clone()) for name, tensor in tensors if tensor.grad is not None)


def _peft() -> Any:
    return pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
