"""`Bench`: a method on a small model, which the checks take apart; and what they compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.layer import tuner_layers
from tunerkit.lean import attributes_of
from tunerkit.plugins import get_method
from tunerkit.testing.comparing import MOVED, check_close, difference, first_tensor, is_close, same_bits
from tunerkit.testing.models import SAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import NoReturn

    from tunerkit.config import PeftConfig
    from tunerkit.model import PeftModel
    from tunerkit.plugins.method import Method
    from tunerkit.testing.conformance import MethodConformance

_CONTAINERS = ("_parameters", "_buffers")


class Bench:
    """One method on one kind of site.

    Args:
        case: The class that says what is checked.
        sample: The name of the model, which is the kind of its sites unless the kit says otherwise.
        folder: An empty folder for checkpoints.
        leave_out: Skips the check, for a reason that the method declares.

    Attributes:
        kind: The kind of site.
        tolerance: The greatest difference between two outputs that count as equal, absolute and relative.
        inputs: Arguments of the model's forward.
    """

    def __init__(
        self,
        case: MethodConformance,
        sample: str,
        folder: Path,
        leave_out: Callable[[str], NoReturn] = pytest.skip,
    ) -> None:
        self.case = case
        self.leave_out = leave_out
        self.sample = sample
        self.kind = SAMPLES[sample].kind if sample in SAMPLES else sample
        self.folder = folder
        self.tolerance = case.tolerance
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.inputs = case.make_inputs(sample)

    @property
    def method(self) -> Method:
        """What the method's plugin declares."""
        return get_method(str(self.config().peft_type)).method

    def base(self) -> nn.Module:
        """Return a new base model, with the same numbers every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.case.make_model(self.sample).eval()

    def config(self) -> PeftConfig:
        """Return a new config that says what to target in the model."""
        return self.case.targeted(self.case.config(), self.sample)

    def start(self, base: nn.Module | None = None, name: str = "default") -> PeftModel:
        """Return a model with an adapter as it is at its start."""
        return self.case.attach(self.base() if base is None else base, self.config(), name).eval()

    def adapted(self, *names: str, base: nn.Module | None = None) -> PeftModel:
        """Return a model with adapters whose tensors have all been moved; the first one is active and trains.

        The tensors have the same numbers every time.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return self._adapted(names, self.base() if base is None else base)

    def _adapted(self, names: tuple[str, ...], base: nn.Module) -> PeftModel:
        dtype = next(base.parameters()).dtype
        plain = self.run(base, dtype)
        first, *others = names or ("default",)
        model = self.start(base, first)
        for name in others:
            model.add_adapter(name, self.config())
        for number, name in enumerate([*others, first]):
            move(model, name, seed=number)
            model.set_adapter(name)
            change = difference(self.run(model, dtype), plain)
            assert change > MOVED, (
                f"With all tensors of the adapter moved at random, the output changed by {change:.1e} only."
            )
        return model.eval()

    def run(self, model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """Return the model's output, without gradients."""
        with torch.no_grad():
            return self.call(model, dtype).detach()

    def call(self, model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """Return the model's output."""
        return first_tensor(model(*(cast(value, dtype) for value in self.inputs)))

    def gradients(self, model: PeftModel, name: str = "default") -> dict[str, Tensor]:
        """Return the gradients of an adapter's tensors that train, by name."""
        found = {key: tensor.grad for key, tensor in trained(model, name).items()}
        missing = [key for key, gradient in found.items() if gradient is None]
        assert not missing, f"These tensors train and got no gradient: {missing}."
        return {key: gradient for key, gradient in found.items() if gradient is not None}

    def need_merged_form(self, model: PeftModel) -> None:
        """Skip the check if an adapter says that it has no merged form."""
        for layer in adapted_layers(model):
            for adapter in layer.adapters.values():
                if adapter.unfoldable is not None:
                    self.leave_out(f"{type(adapter).__name__} has no merged form: {adapter.unfoldable}")

    def need_company(self, model: PeftModel, names: list[str]) -> None:
        """Skip the check if the adapters say that they cannot be active together."""
        for layer in adapted_layers(model):
            stack = [layer.adapters[name] for name in names]
            for adapter in stack:
                reason = adapter.together([other for other in stack if other is not adapter])
                if reason is not None:
                    self.leave_out(f"Two {type(adapter).__name__} cannot be active together: {reason}")

    def same(self, one: Tensor, other: Tensor, tolerance: float | None = None) -> bool:
        """Return whether two outputs are equal but for rounding."""
        return is_close(one, other, self.tolerance if tolerance is None else tolerance)

    def check_same(self, one: Tensor, other: Tensor, what: str, tolerance: float | None = None) -> None:
        """Check that two outputs are equal but for rounding.

        Args:
            one: One of them.
            other: The other.
            what: What both are, as the message begins: "The output after merging and that before".
            tolerance: The greatest difference that counts as none, if not that of the class.
        """
        __tracebackhide__ = True
        check_close(one, other, what, self.tolerance if tolerance is None else tolerance)


@dataclass(frozen=True)
class Snapshot:
    """Which objects a model is made of, with their bits, flags and attributes."""

    modules: dict[str, nn.Module]
    attributes: dict[str, dict[str, Any]]
    tensors: dict[str, tuple[Tensor, Tensor, bool]]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Take note of a model as it is."""
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(
            modules,
            {path: _attributes(module) for path, module in modules.items()},
            {name: (t, t.detach().clone(), t.requires_grad) for name, t in _all_tensors(model)},
        )

    def differences(self, model: nn.Module) -> list[str]:
        """Return what is different now, in words."""
        now = Snapshot.of(model)
        found = [
            f"{what} {name!r} {'is gone' if name not in new else 'is new' if name not in old else 'is another object'}"
            for what, old, new in (
                ("module", self.modules, now.modules),
                ("tensor", _first(self.tensors), _first(now.tensors)),
            )
            for name in {**old, **new}
            if old.get(name) is not new.get(name)
        ]
        found += [
            f"attributes of {path!r} changed: {sorted(k for k in {**old, **new} if old.get(k) != new.get(k))}"
            for path, old in self.attributes.items()
            if (new := now.attributes.get(path, old)) != old
        ]
        for name, (_, bits, trains) in self.tensors.items():
            if name in now.tensors:
                _, new_bits, trains_now = now.tensors[name]
                if not same_bits(bits, new_bits):
                    found.append(f"tensor {name!r} holds other numbers")
                if trains != trains_now:
                    found.append(f"tensor {name!r} has requires_grad={trains_now}, and had {trains}")
        return found


def adapter_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter that a checkpoint holds, the very objects, by their place in the base model."""
    found = {
        f"{path}.{key}": tensor
        for path, layer in tuner_layers(model.get_base_model())
        for key, tensor in layer.adapter_tensors(name).items()
    }
    part = model.base_model.parts.get(name)
    return {**found, **({} if part is None else part.state_dict(keep_vars=True))}


def all_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return every tensor that an adapter holds in any way: also unsaved buffers, and those in plain attributes."""
    holders: dict[str, nn.Module] = {
        path: layer.adapters[name]
        for path, layer in tuner_layers(model.get_base_model())
        if isinstance(layer, AdaptedLayer) and name in layer.adapters
    }
    if name in model.base_model.parts:
        holders["part"] = model.base_model.parts[name]
    found: dict[str, Tensor] = {}
    for path, holder in holders.items():
        for below, module in holder.named_modules(prefix=path):
            for key, value in attributes_of(module).items():
                # The modules below come by themselves.
                found.update(_tensors_in(value, below if key in _CONTAINERS else f"{below}.{key}"))
    return found


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(item, f"{name}.{key}")


def trained(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return those of an adapter's tensors that train now, by their place in the base model."""
    return {key: tensor for key, tensor in adapter_tensors(model, name).items() if tensor.requires_grad}


def adapted_layers(model: PeftModel) -> Iterator[AdaptedLayer]:
    """Go through the layers that the core put in place, as opposed to those that a plugin wrote by hand."""
    for _, layer in tuner_layers(model.get_base_model()):
        if isinstance(layer, AdaptedLayer):
            yield layer


def move(model: PeftModel, name: str, seed: int = 0) -> None:
    """Add random numbers to every floating tensor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor))


def copy_tensors(source: PeftModel, target: PeftModel, name: str = "default") -> None:
    """Give an adapter the numbers of the adapter of the same name in another model."""
    values = adapter_tensors(source, name)
    with torch.no_grad():
        for key, tensor in adapter_tensors(target, name).items():
            tensor.copy_(values[key])


def loss_of(output: Tensor) -> Tensor:
    """Return a number that depends on every number of an output, on each in another way."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (output * weights).sum()


def cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return an input in another dtype; whole numbers stay as they are."""
    return value if dtype is None or not value.is_floating_point() else value.to(dtype)


def _first(tensors: dict[str, tuple[Tensor, Tensor, bool]]) -> dict[str, Tensor]:
    return {name: item[0] for name, item in tensors.items()}


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's own attributes; of containers only what they hold things under."""
    return {
        name: list(value) if isinstance(value, (dict, list, set)) else value
        for name, value in attributes_of(module).items()
    }
