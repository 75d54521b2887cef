"""What was there before, and putting it back.

A change to a model is noted before it is made. If anything goes wrong on the way, in the core or in a plugin, the notes
are undone from the last to the first, and the model is object for object what it was.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch

from tunerkit.names import EntryView
from tunerkit.route import CallHook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from torch import Tensor, nn
    from typing_extensions import Self

    from tunerkit.modules import Flag


class _Open(threading.local):
    """The journal that is open in this thread; weakly, so that one which an interrupt left open is not written on."""

    def __init__(self) -> None:
        self.journal: Callable[[], Journal | None] = lambda: None


_OPEN = _Open()
_CONTAINERS = (dict, set, list)


class _Kinds(dict[type, bool]):
    """Whether values of a type are containers whose content is noted: asked of each attribute of each module."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = answer = issubclass(kind, _CONTAINERS) and kind is not EntryView
        return answer


_KINDS = _Kinds()
_ABSENT = object()


class Journal:
    """Notes of what was; used as a context manager it undoes everything noted if the block raises anything.

    A journal that is opened within another's block writes on in the same notes, so the outer one also undoes what the
    inner one saw through: a call that is made of such calls is all or nothing too.
    """

    def __init__(self) -> None:
        outer = _OPEN.journal()
        self._outer = _OPEN.journal
        self._notes: list[tuple[Callable[..., object], tuple[Any, ...]]] = [] if outer is None else outer._notes
        self._start = len(self._notes)
        self._noted: set[int] = set()  # by id; the notes keep them alive

    def __enter__(self) -> Self:
        _OPEN.journal = weakref.ref(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _OPEN.journal = self._outer
        if kind is not None:
            self.undo()
            return
        outer = self._outer()
        if outer is not None:
            outer._noted |= self._noted

    def note(self, undo: Callable[..., object], *arguments: Any) -> None:
        """Note a call that will undo what happens next."""
        self._notes.append((undo, arguments))

    def note_all(self, undo: Callable[..., object], each: Iterable[tuple[Any, ...]]) -> None:
        """Note calls of one function that will undo what happens next."""
        self._notes += [(undo, arguments) for arguments in each]

    def note_module(self, module: nn.Module, apart: object = None) -> None:
        """Note a module's attributes, its dicts of children, tensors and hooks, and which of its own tensors train.

        What counts is how it was the first time, so a second note within the block is none.

        Args:
            module: The module.
            apart: A container among its attributes whose content is left out, for it is noted in another way.
        """
        if id(module) in self._noted:
            return
        state = module.__dict__.copy()
        # Of those that hold something: most are empty, of hooks; and views hold nothing themselves.
        containers = itertools.compress(state.values(), map(_KINDS.__getitem__, map(type, state.values())))
        contents = [(value, value.copy()) for value in containers if value and value is not apart]
        own = module._parameters
        flags = [(p, p.requires_grad) for p in own.values() if p is not None] if own else []
        self._notes.append((_restore_module, (module, state, contents, flags, apart)))
        self._noted.add(id(module))

    def note_item(self, container: dict[str, Any], key: str) -> None:
        """Note what a dict has under a key, or that it has nothing there."""
        self._notes.append((_restore_item, (container, key, container.get(key, _ABSENT))))

    def note_flags(self, tensors: Iterable[Tensor]) -> None:
        """Note which tensors train."""
        self._notes.append((_restore_flags, ([(tensor, tensor.requires_grad) for tensor in tensors],)))

    def note_changes(self) -> list[Flag]:
        """Return a list for flags that are about to change: what is in it in the end is put back."""
        flags: list[Flag] = []
        self._notes.append((_restore_flags, (flags,)))
        return flags

    def note_values(self, tensor: Tensor) -> None:
        """Note the numbers that a tensor holds, at the cost of a copy."""
        self._notes.append((_restore_values, (tensor, tensor.detach().clone())))

    def note_training(self) -> list[nn.Module]:
        """Return a list for modules that are about to leave training mode: what is in it in the end is put back."""
        trained: list[nn.Module] = []
        self._notes.append((_restore_training, (trained,)))
        return trained

    def undo(self) -> None:
        """Put everything back, the last change first."""
        while len(self._notes) > self._start:
            undo, arguments = self._notes.pop()
            undo(*arguments)


def _restore_module(
    module: nn.Module, state: dict[str, Any], contents: list[tuple[Any, Any]], flags: list[Flag], apart: object
) -> None:
    filled = {id(apart), *(id(container) for container, _ in contents)}
    for value in state.values():
        if _KINDS[type(value)] and id(value) not in filled:
            _refill(value, {})
    for container, content in contents:
        _refill(container, content)
    _refill(module.__dict__, state)
    _restore_flags(flags)


def _restore_item(container: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        container.pop(key, None)
    else:
        container[key] = value


def _refill(container: Any, content: Any) -> None:
    """Give a container its content back, which other threads may be reading: what stays is there throughout."""
    if not isinstance(container, dict):
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)
        return
    # The hooks of calls come and go by themselves, meanwhile too.
    content = {key: value for key, value in content.items() if not isinstance(value, CallHook)}
    for key, value in list(container.items()):
        if key not in content and not isinstance(value, CallHook):
            del container[key]
    container.update(content)
    if [key for key in list(container) if key in content] != list(content):
        for key, value in content.items():  # back in their order
            del container[key]
            container[key] = value


def _restore_values(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)


def _restore_training(trained: list[nn.Module]) -> None:
    for module in trained:
        module.training = True


def _restore_flags(flags: list[Flag]) -> None:
    for tensor, trained in reversed(flags):  # one may have changed twice
        if tensor.requires_grad != trained:
            tensor.requires_grad = trained  # not by a call, which a parameter without a shape refuses
