"""`CopiedModule`: a module of which adapters have copies of their own, that train and are saved as a whole."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from tunerkit.errors import AdapterStateError, MergeError, TunerkitError
from tunerkit.layer import BaseTunerLayer, split_input
from tunerkit.naming import listing
from tunerkit.route import BACKWARD, CALL, Owner, check_held, current, narrowed
from tunerkit.rows import Rows, only_input, split_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class CopiedModule(nn.Module, BaseTunerLayer):
    """A module and the copies of it that adapters have; a call runs the copy of the active one in its place.

    At most one of the active adapters may have a copy here, for each copy is the whole module. Where none has one, or
    the adapters are disabled, the original is run. What other code reads of the module (`weight`, `out_features`) is
    that of the module that would be run. A subclass says what the original and the container of the copies are called.

    Args:
        module: The original.
        name: Its path in the model.
        owner: Stands for the model to which it belongs.
    """

    replaces: ClassVar[bool] = True
    follows_routes: ClassVar[bool] = True
    adapter_layer_names: tuple[str, ...] = ("copies",)

    def __init__(self, module: nn.Module, name: str, owner: Owner) -> None:
        super().__init__()
        self._modules[self.base_name] = module
        self._modules[self.adapter_layer_names[0]] = nn.ModuleDict()
        self.training = self._container.training = module.training
        self.__dict__.update(_name=name, _owner=owner, _active_adapter=[], _running=None)

    _name: str
    _running: str | None

    @property
    def _container(self) -> nn.ModuleDict:
        return self._modules[self.adapter_layer_names[0]]  # type: ignore[return-value]

    @property
    def _copies(self) -> dict[str, nn.Module]:
        return self._container._modules

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy of the adapter that is active, or that this call is routed to; the original if there is none."""
        if CALL.route is not None:
            check_held(self._owner)
        if BACKWARD or CALL.route is not None:
            rows = current(self._owner)
            if isinstance(rows, Rows) and self._chosen(rows.names) is not None:
                return self._forward_rows(rows, args, kwargs)
        return self._current()(*args, **kwargs)

    def _forward_rows(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the copy of each row's adapter on its rows, or the original."""
        x, args, kwargs = split_input(self.get_base_layer(), args, kwargs)
        only_input(self._name, args, kwargs)

        def run(name: str, part: Tensor) -> Any:
            module = self._copies.get(name, self._modules[self.base_name])
            # What is adapted below this module is to take the rows of one adapter for the whole batch.
            with narrowed(self._owner, (name,)):
                return module(part, *args, **kwargs)  # type: ignore[misc]

        return split_rows(x, rows.groups(x, self._name), run)

    def _current(self) -> nn.Module:
        """Return the module that a call runs here and now."""
        name = self._running
        if BACKWARD or CALL.route is not None:
            names = current(self._owner)
            if isinstance(names, Rows):
                names = names.none_of(self._copies, self._name)
            name = name if names is None else self._chosen(names)
        return self._modules[self.base_name] if name is None else self._copies[name]  # type: ignore[return-value]

    def _chosen(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self._copies), None)

    @property
    def weight(self) -> Tensor:
        """The weight of the module that is run."""
        return self._current().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the module that is run."""
        return self._current().bias  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
        return getattr(self._current(), name)

    # Adapters

    def add_copy(self, name: str, memo: dict[int, Any]) -> None:
        """Give an adapter a copy of the original; it is not active yet.

        Args:
            name: The adapter's name.
            memo: What was copied before, by the id of the original, and is to be shared (see `copy.deepcopy`).
        """
        self._container[name] = copy.deepcopy(self.get_base_layer(), memo)

    def trainable_tensors(self, name: str) -> Iterator[Tensor]:
        """Go through the parameters of a copy, all of which train when its adapter does."""
        copied = self._copies.get(name)
        for parameter in () if copied is None else copied.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                yield parameter

    def cast_up(self, name: str) -> None:
        """Do nothing: a copy has the precision of the module whose place it takes."""

    def _remove(self, name: str) -> None:
        super()._remove(name)
        self._settle()

    # What is active

    def check_together(self, names: Sequence[str]) -> None:
        """Raise `AdapterStateError` if more than one of these adapters has a copy here."""
        self._refuse_several(names, "active", AdapterStateError)

    def _refuse_several(self, names: Sequence[str], what: str, error: type[TunerkitError]) -> None:
        here = [name for name in names if name in self._copies]
        if len(here) > 1:
            msg = (
                f"{listing(here)} cannot be {what} together: each has a copy of its own of the module {self._name!r}, "
                "and only one can take its place. Choose one of them."
            )
            raise error(msg)

    def _activate(self, names: list[str]) -> None:
        self.check_together(names)
        self.__dict__["_active_adapter"] = list(names)
        self._settle()

    def _settle(self) -> None:
        """Resolve which copy the next forward runs."""
        self.__dict__["_running"] = None if self._disable_adapters else self._chosen(self.active_adapters)
        self._owner.changes += 1

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, which leaves the original, or on again."""
        super().enable_adapters(enabled)
        self._settle()

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: the copy that is active is run in the original's place already."""

    def unmerge(self) -> None:
        """Do nothing; see `merge`."""

    def check_merge(self, names: Sequence[str]) -> None:
        """Raise `MergeError` if more than one of these adapters has a copy here."""
        self._refuse_several(names, "merged", MergeError)

    def merge_for_good(self, names: list[str]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Put the copy of one of these adapters in the original's place, if one has a copy.

        Returns:
            The original's parameters, each with the copy's.
        """
        name = self._chosen(names)
        if name is None:
            return []
        original, copied = self.get_base_layer(), self._copies[name]
        self._modules[self.base_name] = copied
        del self._copies[name]
        self.__dict__["_active_adapter"] = [other for other in self.active_adapters if other != name]
        self._settle()
        copied.requires_grad_(requires_grad=False)
        heirs = dict(copied.named_parameters(remove_duplicate=False))
        old = original.named_parameters(remove_duplicate=False)
        return [(parameter, heirs[key]) for key, parameter in old if key in heirs]


class ModulesToSaveWrapper(CopiedModule):
    """A module that a config names in `modules_to_save`, with PEFT's names.

    In the model the original is `<path>.original_module` and a copy `<path>.modules_to_save.<adapter>`; in a checkpoint
    a copy's tensors have the names of the original's, `<path>.weight`.
    """

    base_name: ClassVar[str] = "original_module"
    targeted: ClassVar[bool] = False
    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Return a copy's own tensors (parameters and persistent buffers) by their name below the module."""
        copied = self._copies.get(name)
        return {} if copied is None else copied.state_dict(keep_vars=True)

    def tensor_name(self, key: str, name: str) -> str:
        """Return what a tensor of a copy is called below this layer."""
        return f"{self.adapter_layer_names[0]}.{name}.{key}"
