"""Which tensors of a model belong to an adapter, and under which keys a checkpoint holds them.

A key follows from what each layer owns, never from what a name looks like, so adapters and modules may be called
anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tunerkit.adapted_layer import AdaptedLayer, adapter_of
from tunerkit.checkpoint.report import LoadReport
from tunerkit.errors import CheckpointError
from tunerkit.journal import Journal
from tunerkit.layer import BaseTunerLayer, entry_name, is_layer
from tunerkit.naming import PREFIX, uncompiled
from tunerkit.processes import copy_into, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tunerkit.adapter import Adapter, Part


@dataclass(eq=False)
class Piece:
    """What one layer, or the model-wide part, holds of an adapter.

    Attributes:
        path: Where it is, as in a checkpoint's keys.
        holder: The layer, or the tuner for the model-wide part.
        name: The adapter's name.
        tensors: Its tensors by their key below `path`.
        adapter: The adapter, if a checkpoint holds its tensors in another form than it does.
        in_model: Whether the tensors are in the model's state now, rather than kept for another time.
    """

    path: str
    holder: nn.Module
    name: str
    tensors: dict[str, Tensor]
    adapter: Adapter | None = None
    in_model: bool = True

    def key(self, local: str) -> str:
        """Return a tensor's key in a checkpoint."""
        return f"{self.path}.{local}" if self.path else local

    def keys(self) -> dict[str, str]:
        """Return the keys of all tensors in a checkpoint by their keys below `path`."""
        below = f"{self.path}." if self.path else ""
        return {local: below + local for local in self.in_file(self.tensors)}

    def named(self, local: str) -> str:
        """Return a tensor's name below the holder."""
        naming = self.holder.tensor_name if is_layer(self.holder) else entry_name
        return naming(local, self.name)

    def place(self, local: str) -> tuple[nn.Module, str]:
        """Return the module in which a tensor is, and its name there."""
        adapter = adapter_of(self.holder, self.name)
        module, path = (self.holder, self.named(local)) if adapter is None else (adapter, local)
        *above, leaf = path.split(".")
        for child in above:
            module = module._modules[child]  # type: ignore[assignment]
        return module, leaf

    def in_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of this piece in the form of a checkpoint."""
        return tensors if self.adapter is None else self.adapter.to_checkpoint(tensors)


def pieces(
    layers: Mapping[str, BaseTunerLayer],
    name: str,
    prefix: str,
    parts: Mapping[str, Part],
    tuner: nn.Module | None,
) -> list[Piece]:
    """Return what a model holds of an adapter.

    Args:
        layers: The layers of the base model by path; see `tuner_layers`.
        name: The adapter's name.
        prefix: What stands before the layers' paths in keys.
        parts: The model-wide parts by adapter name.
        tuner: Where those parts are visible in the module tree.
    """
    held = (piece_of(path, layer, name, prefix) for path, layer in _levels(layers, name))
    found = [piece for piece in held if piece.tensors]
    if name in parts and tuner is not None:
        found.append(Piece(prefix.partition(".")[0], tuner, name, parts[name].state_dict(keep_vars=True)))
    return found


def piece_of(path: str, layer: BaseTunerLayer, name: str, prefix: str) -> Piece:
    """Return what one layer holds of an adapter.

    Args:
        path: Where the layer is in the base model.
        layer: The layer.
        name: The adapter's name.
        prefix: What stands before the layers' paths in keys.
    """
    tensors = layer.adapter_tensors(name)
    adapter = adapter_of(layer, name)
    own = adapter if adapter is not None and adapter.to_checkpoint(tensors) is not tensors else None
    return Piece(uncompiled(f"{prefix}{path}"), layer, name, tensors, own)  # type: ignore[arg-type]


def _levels(layers: Mapping[str, BaseTunerLayer], name: str) -> list[tuple[str, BaseTunerLayer]]:
    """Return the layers with an adapter, by the paths that they would have in a model without other adapters.

    Layers of several parameters of a module stand on one another: in the order of the parameters where one adapter made
    them, and in whatever order others were added where they are of several.
    """
    held = {path: layer for path, layer in layers.items() if layer.holds(name)}
    if not _any_nested(layers):
        return list(held.items())
    paths: dict[int, list[str]] = {}
    stacks: dict[int, list[BaseTunerLayer]] = {}
    for path, layer in held.items():
        parts = path.split(".")
        above = [".".join(parts[:index]) for index in range(len(parts))]
        kept = [part for part, upper in zip(parts, above, strict=True) if upper not in layers or upper in held]
        paths.setdefault(id(layer.get_base_layer()), []).append(".".join(kept))
        stacks.setdefault(id(layer.get_base_layer()), []).append(layer)
    return [
        (path, layer)
        for base, stack in stacks.items()
        for path, layer in zip(paths[base], sorted(stack, key=_order, reverse=True), strict=True)
    ]


def _any_nested(paths: Iterable[str]) -> bool:
    """Return whether one of the paths leads through another; those below a path come right after it."""
    above = None
    for path in paths:
        if above is not None and path.startswith(above):
            return True
        above = f"{path}." if path else ""
    return False


def _order(layer: BaseTunerLayer) -> int:
    """Return which of its module's parameters a layer is for; -1 if it is for the module."""
    name = layer.parameter_name if isinstance(layer, AdaptedLayer) else None
    return -1 if name is None else list(layer.get_base_layer()._parameters).index(name)


def collect(
    found: list[Piece], state_dict: Mapping[str, Tensor] | None = None, path_of: Callable[[Piece], str] | None = None
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys in a checkpoint.

    Args:
        found: What the model holds of the adapter.
        state_dict: The model's state, gathered elsewhere, to take the values from instead of the model.
        path_of: Where a piece is in that state.

    Raises:
        CheckpointError: The given state lacks a tensor of the adapter.
    """
    tensors: dict[str, Tensor] = {}
    for piece in found:
        own = {key: whole(tensor.detach()) for key, tensor in piece.tensors.items()}
        if state_dict is not None and path_of is not None and piece.in_model:
            where = {key: f"{path_of(piece)}{piece.named(key)}" for key in own}
            lost = [name for name in where.values() if name not in state_dict]
            if lost:
                msg = (
                    f"The given state_dict lacks {lost[0]!r} of the adapter {piece.name!r}. "
                    "Pass the state of this very model."
                )
                raise CheckpointError(msg)
            own = {key: whole(state_dict[name]) for key, name in where.items()}
        tensors.update({piece.key(local): tensor for local, tensor in piece.in_file(own).items()})
    return tensors


def make_standalone(
    found: list[Piece], tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return an adapter's tensors in their standalone form, by their keys in a checkpoint.

    Args:
        found: What the model holds of the adapter.
        tensors: Its tensors by their keys in a checkpoint.
        initial: The same tensors as they were before training.

    Raises:
        CheckpointError: The initial tensors lack one of the adapter, or one has another shape.
    """
    given = None if initial is None else {_known(key, set(tensors)): tensor for key, tensor in initial.items()}
    made = dict(tensors)
    for piece in found:
        adapter = adapter_of(piece.holder, piece.name)
        if adapter is not None:
            keys = piece.keys()
            before = None if given is None else {local: _as_before(key, tensors, given) for local, key in keys.items()}
            own = {local: made.pop(key) for local, key in keys.items()}
            made.update({piece.key(local): value for local, value in adapter.standalone(own, before).items()})
    return made


def _as_before(key: str, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> Tensor:
    found = initial.get(key)
    if found is None or found.shape != tensors[key].shape:
        what = "lacks it" if found is None else f"has it as {tuple(found.shape)}"
        msg = (
            f"The adapter's {key} is {tuple(tensors[key].shape)}, and the initial adapter {what}. Give the folder of "
            "this very adapter as it was saved before training."
        )
        raise CheckpointError(msg)
    return found.to(tensors[key])


class _Assignment(NamedTuple):
    """A tensor of a checkpoint and the one that takes its values."""

    piece: Piece
    local: str
    own: Tensor
    value: Tensor


class Loading:
    """A checkpoint's tensors matched with an adapter's; nothing is written until `write` is called.

    Args:
        found: What the model holds of the adapter.
        tensors: The checkpoint's tensors.
        optional: What else the checkpoint may hold; nothing of it is missing.

    Attributes:
        report: What fits and what does not.
        optional: The optional pieces of which the checkpoint holds something.
    """

    def __init__(self, found: list[Piece], tensors: Mapping[str, Tensor], optional: Sequence[Piece] = ()) -> None:
        self.report = LoadReport()
        self.optional: list[Piece] = []
        self._assignments: list[_Assignment] = []
        left = dict(tensors)
        keys = [piece.keys() for piece in found]
        expected = set(chain.from_iterable(files.values() for files in keys))
        expected.update(piece.key(local) for piece in optional for local in piece.tensors)
        given = {key if key in expected else _known(key, expected): key for key in left}
        for piece, files in zip(found, keys, strict=True):
            values = {local: left.pop(given[key]) for local, key in files.items() if key in given}
            if len(values) < len(files):
                self.report.missing_keys += [key for local, key in files.items() if local not in values]
            if piece.adapter is not None:
                # A form of its own may need all of its tensors at once.
                values = piece.adapter.from_checkpoint(values) if len(values) == len(files) else {}
            for local, value in values.items():
                self._match(piece, local, value)
        for piece in optional:
            for local in piece.tensors:
                key = given.get(piece.key(local))
                if key in left:
                    self.optional.append(piece)
                    self._match(piece, local, left.pop(key))
        self.report.unexpected_keys += list(left)

    def _match(self, piece: Piece, local: str, value: Tensor) -> None:
        own = piece.tensors.get(local)
        key = piece.key(local)
        if own is None:
            self.report.unexpected_keys.append(key)
        elif value.dtype.is_complex and not own.dtype.is_complex:
            msg = (
                f"{key} holds complex numbers, and the adapter's are {own.dtype}: half of each would be lost. Load a "
                "checkpoint that the adapter's method has saved."
            )
            raise CheckpointError(msg)
        elif own.shape != value.shape:
            note = f"{key} is {tuple(value.shape)}, the adapter's {tuple(own.shape)}"
            self.report.mismatched_keys.append(note)
        else:
            self.report.loaded_keys.append(key)
            self._assignments.append(_Assignment(piece, local, own, value))

    def write(self) -> None:
        """Put the tensors that fit into the adapter; if anything goes wrong on the way, it keeps the values it had.

        Raises:
            CheckpointError: Adapters share a tensor, of which the checkpoint holds two different versions.
        """
        given: dict[int, _Assignment] = {}
        made: dict[int, Tensor] = {}
        replaced: list[tuple[dict[str, Any], str, Tensor]] = []
        holder: nn.Module | None = None
        device = torch.device("cpu")
        with torch.no_grad(), Journal() as journal:
            journal.note(_put_back, replaced)
            for item in self._assignments:
                piece, local, own, value = item
                earlier = given.setdefault(id(own), item)
                if earlier is not item and not torch.equal(value, earlier.value):
                    raise CheckpointError(untied(*(one.piece.key(one.local) for one in (earlier, item))))
                if not own.is_meta:
                    journal.note_values(own)
                    copy_into(own, value)
                    continue
                if piece.holder is not holder:
                    holder, device = piece.holder, _device_of(piece.holder)
                if id(own) not in made:
                    made[id(own)] = _filled(own, value, device)
                module, leaf = piece.place(local)
                held: dict[str, Any] = module._parameters if isinstance(own, nn.Parameter) else module._buffers
                replaced.append((held, leaf, own))
                held[leaf] = made[id(own)]


def _known(key: str, expected: set[str]) -> str:
    key = uncompiled(key)
    forms = (key, f"{PREFIX}{key}", key.removeprefix(PREFIX))
    return next((form for form in forms if form in expected), key)


def untied(first: str, second: str) -> str:
    """Return what is to be said of two tensors of a checkpoint that differ and are one in the model, by their keys."""
    return (
        f"{first} and {second} are one tensor of the model (ensure_weight_tying=True), and the checkpoint holds two "
        "that differ: they were not tied in training. Load it with a config that says ensure_weight_tying=False and "
        "whose target_modules name all the layers."
    )


def _filled(own: Tensor, value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor with the values, of the kind and dtype of one on the meta device."""
    alike = value.dtype is own.dtype and value.device == device
    new = value.clone() if alike else value.to(device=device, dtype=own.dtype, copy=True)
    return nn.Parameter(new, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else new


def _put_back(replaced: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for held, name, tensor in reversed(replaced):
        held[name] = tensor


def _device_of(holder: nn.Module) -> torch.device:
    base: Iterable[Tensor] = holder.parameters()
    if isinstance(holder, AdaptedLayer):
        site = holder.site
        if not site.stored.is_meta:
            return site.device
        base = holder.get_base_layer().parameters()
    return next((tensor.device for tensor in base if not tensor.is_meta), torch.device("cpu"))
