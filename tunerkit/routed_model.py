"""`RoutedModel`: the calls of a model with adapters, and which adapters each of them uses."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.adapted_model import AdaptedModel
from tunerkit.errors import AdapterNameError, RouteError
from tunerkit.fast_path import set_fast_paths
from tunerkit.journal import Journal
from tunerkit.naming import listing
from tunerkit.processes import refuse_unaveraged
from tunerkit.route import current, hold_in_backward, hold_routes, named, routed
from tunerkit.rows import BASE, Rows, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tunerkit.layer import BaseTunerLayer
    from tunerkit.route import Names, Stacks


class RoutedModel(AdaptedModel):
    """A model with adapters whose calls can use other adapters than those that are active, also each row its own."""

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model with the adapters that are active, or that this call is routed to.

        Args:
            args: The arguments of the base model.
            adapter_names: The adapter of each row of the batch; `"__base__"` is the base model.
            kwargs: The arguments of the base model, by name.

        Raises:
            TunerkitError: The rows cannot have these adapters; see `use_rows`.
        """
        if adapter_names is None:
            return self._forward(args, kwargs)
        with self.rows_of_call(adapter_names, args, kwargs):
            return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_unaveraged()
        route = self._route()
        names = tuple(self.active_adapters) if route is None or isinstance(route, Rows) else route
        call: Any = self._modules["model"]
        for name in names if self.parts and not isinstance(route, Rows) else ():
            if name in self.parts:
                call = functools.partial(self.parts[name].around, call)
        outputs = call(*args, **kwargs)
        hold_in_backward(outputs, self.owner, route, names)
        return outputs

    def _route(self) -> Names | None:
        """Return the adapters that a call is routed to now; switched off is a route to none."""
        names = current(self.owner)
        return () if names is None and self.disabled else names

    @contextlib.contextmanager
    def use_adapter(self, adapter_name: str | Sequence[str]) -> Iterator[None]:
        """Within the block, calls of the model in this thread use these adapters; what is active does not change.

        It holds in the backward of those calls too, also when that runs after the block; for that, the base model has a
        forward hook while the block lasts. No names: the base model.

        Raises:
            UnknownAdapterError: There is no such adapter.
            RouteError: Adapters are merged, or a layer written by hand would use others.
            AdapterStateError: They cannot be active together.
        """
        names = tuple(self._names(adapter_name))
        layers = list(self.layers())
        self._check_together(layers, names)
        self.biases.check_routed(names)
        self._make_routable(layers, [names])
        adapted = (layer for layer in layers if isinstance(layer, AdaptedLayer))
        stacks = {layer._number: named(layer._adapters, names) for layer in adapted}
        with self._routed(names, stacks):
            yield

    @contextlib.contextmanager
    def use_rows(self, adapter_names: Sequence[str], repeats: int = 1) -> Iterator[None]:
        """Within the block, each row of the batches that the model gets in this thread has an adapter of its own.

        As `use_adapter`, it changes nothing on the model, holds in the backward too, and holds for calls from outside
        the script (a pipeline, a trainer). It works in training and with gradients.

        Args:
            adapter_names: The adapter of each row; `"__base__"` is the base model.
            repeats: How often `generate` repeats each row, if it is called on the base model: as many as beams, or as
                returned sequences if those are more. `PeftModel.generate(..., adapter_names=...)` finds it out itself.

        Raises:
            AdapterNameError: The names are no list of names.
            UnknownAdapterError: There is no such adapter.
            RouteError: Adapters are merged or switched off, or a method or a layer written by hand cannot tell rows
                apart. Later, from a layer: the first dimension of its input is not the rows.
        """
        with self._rows(rows_of(self._by_row(adapter_names), repeats)):
            yield

    @contextlib.contextmanager
    def _rows(self, rows: Rows) -> Iterator[None]:
        layers = list(self.layers())
        self._check_rows(layers, rows)
        for name in rows.names:
            self.biases.check_routed([] if name == BASE else [name])
        self._make_routable(layers, [() if name == BASE else (name,) for name in rows.names])
        with self._routed(rows):
            yield

    def rows_of_call(
        self, adapter_names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int = 1
    ) -> contextlib.AbstractContextManager[None]:
        """Return `use_rows` for one call, or a block that does nothing if no names are given.

        Args:
            adapter_names: The adapter of each row, or None.
            args: The arguments of the call, to see how many rows there are.
            kwargs: The same, by name.
            repeats: How often `generate` repeats each row.

        Raises:
            RouteError: There are more or fewer names than rows.
        """
        if adapter_names is None:
            return contextlib.nullcontext()
        names = self._by_row(adapter_names)
        count = len(names)
        shapes = [
            tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()
        ]
        if shapes and all(shape[0] != count for shape in shapes):
            msg = (
                f"adapter_names has {count} names, one for each row of the batch, and the call's first tensor is of "
                f"shape {shapes[0]}. Pass {shapes[0][0]} names."
            )
            raise RouteError(msg)
        return self._rows(rows_of(names, repeats))

    def _by_row(self, given: object) -> list[str]:
        """Return what a caller passed as the name of each row's adapter, all of them known."""
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(name, str) for name in given):
            msg = (
                "adapter_names is a list with the name of an adapter for each row of the batch, or '__base__'; it is "
                f"{given!r}. The model has {listing(self.peft_config)}. For the whole batch use use_adapter(name)."
            )
            raise AdapterNameError(msg)
        self.check_known([name for name in dict.fromkeys(given) if name != BASE])
        return list(given)

    def _check_rows(self, layers: Sequence[BaseTunerLayer], rows: Rows) -> None:
        """Raise `RouteError` if something that takes part cannot tell rows apart."""
        if self.disabled:
            msg = (
                "The adapters are switched off, so rows cannot have adapters of their own. Leave adapter_names out, or "
                "call enable_adapter_layers() first."
            )
            raise RouteError(msg)
        for name in rows.names if self.parts else ():
            part = self.parts.get(name)
            if part is not None and part.surrounds():
                msg = (
                    f"{type(part).__name__} of the adapter {name!r} does something around a call of the whole model, "
                    f"so it cannot be for some rows only. Use use_adapter({name!r}) and a batch of its own."
                )
                raise RouteError(msg)
        for layer in (layer for layer in layers if isinstance(layer, AdaptedLayer)):
            adapters, site = layer._adapters, layer.site
            for name in rows.names:
                reason = adapters[name].crosses_rows or site.crosses_rows if name in adapters else None
                if reason is not None:
                    msg = (
                        f"The adapter {name!r} on {layer.site.name!r} cannot be for some rows of a batch only: "
                        f"{reason}. Use use_adapter({name!r}) and a batch of its own."
                    )
                    raise RouteError(msg)

    @contextlib.contextmanager
    def _routed(self, names: Names, stacks: Stacks | None = None) -> Iterator[None]:
        # A script may call the base model, which then runs without the tuner around it.
        with (
            hold_routes(self.model, self.owner, lambda: tuple(self.active_adapters)),
            routed(self.owner, names, stacks),
        ):
            yield

    def _make_routable(self, layers: Sequence[BaseTunerLayer], routes: Sequence[Sequence[str]]) -> None:
        """See to it that the layers follow each of these routes of the model.

        Raises:
            RouteError: Adapters are merged, or a layer written by hand would use others.
        """
        merged = next((layer.merged_adapters for layer in layers if layer.merged), None)
        if merged:
            msg = (
                f"{listing(merged)} is merged into the model, so calls cannot be routed. Call unmerge_adapter() first."
            )
            raise RouteError(msg)
        if self.disabled:
            # Routed calls run adapters all the same; the other calls leave the fast path with them meanwhile.
            set_fast_paths(self.model, Journal(), disabled=False)
        for layer in layers:
            if layer.follows_routes:
                if layer._owner is not self.owner:  # a layer that was copied by itself brought an owner of its own
                    layer.__dict__.update(_number=self.owner.number(), _owner=self.owner)
                continue
            here = layer.available_adapters
            runs = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in here]
            for names in routes:
                if runs != [name for name in names if name in here]:
                    msg = (
                        f"Calls cannot be routed to {listing(names)}: a {type(layer).__name__} was put in by its "
                        f"method's own code, which does not know of routes and runs {listing(runs)}. Call "
                        "set_adapter() instead."
                    )
                    raise RouteError(msg)
