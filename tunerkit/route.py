"""Which adapters a call uses: set for that call alone, in this thread, and for its backward.

A route is pushed by `model.use_adapter(...)` and read by every layer of that model in this thread; nothing on the model
changes. Gradient checkpointing runs parts of a forward again during the backward, when the block that set the route may
be long over. So the outputs of a call carry the adapters it ran with: when the backward reaches them, it notes them
under its own task id, which the engine's worker threads share, and forgets them when it is done.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from tunerkit.errors import RouteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tunerkit.adapter import Adapter
    from tunerkit.rows import Rows

    Stacks = Mapping[int, tuple[Adapter, ...]]
    """The adapters that stand on each layer, from the lowest up, by the number of the layer."""

    Names = tuple[str, ...] | Rows
    """The adapters of a call: of all its rows, in the order in which they stand on one another, or of each row."""


class Owner:
    """Stands for one adapted model; its layers hold the same one, also after a deep copy of the whole.

    Attributes:
        changes: How often what is active changed on one of the layers.
        layers: How many layers it has given a number.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.layers = 0

    def number(self) -> int:
        """Return the next layer's number, by which routes know it."""
        self.layers += 1
        return self.layers


class Route:
    """The adapters that the calls of one model use, on top of the routes of other models in the same thread.

    Attributes:
        stacks: The adapters themselves by the number of their layer, as they were when the block began; for graphs.
        calls: How many calls of the whole model are under way; only their outputs hold the route for the backward.
    """

    __slots__ = ("calls", "names", "owner", "stacks", "task", "under")

    def __init__(self, owner: Owner, names: Names, under: Route | None, stacks: Stacks) -> None:
        self.owner = owner
        self.names = names
        self.stacks = stacks
        self.under = under
        self.calls = 0
        # While a graph is traced no backward is under way, and the compiler cannot ask for its id.
        self.task = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class Held:
    """The adapters that the outputs of a call were made with (None: it was not routed), and the threads concerned."""

    __slots__ = ("ambiguous", "names", "runs_in", "thread")

    def __init__(self, names: Names | None, thread: object, runs_in: object) -> None:
        self.names = names
        self.thread = thread
        self.runs_in = runs_in
        self.ambiguous = False


class _Call(threading.local):
    # Set here and not on the class: a compiled graph guards an instance's attribute and would miss the class's.
    def __init__(self) -> None:
        self.route: Route | None = None
        self.thread = object()


CALL = _Call()
BACKWARD: dict[int, dict[Owner, Held]] = {}
"""What the backward passes that are under way have reached, by the engine's task id and by model."""


class _Forgetter:
    """What the engine keeps for as long as a backward lasts, and drops also if it fails."""

    __slots__ = ("task",)

    def __init__(self, task: int) -> None:
        self.task = task

    def __call__(self) -> None:
        """Do nothing: the engine calls this only at the end of a backward that did not fail."""

    def __del__(self) -> None:
        BACKWARD.pop(self.task, None)


def current(owner: Owner) -> Names | None:
    """Return the names that calls of this model are routed to here and now, or None if they are not routed.

    Raises:
        RouteError: A layer runs again in a backward, and which adapters its forward used cannot be known.
    """
    route = _pushed(owner)
    if BACKWARD:
        task = torch._C._current_graph_task_id()
        # A block around the whole backward says nothing about the calls whose backward it is.
        if task != -1 and (route is None or route.task != task):
            held = _held(owner, task)
            if held is not None:
                return held.names
    return None if route is None else route.names


def stack_of(owner: Owner, layer: int, adapters: Mapping[str, Adapter], names: Sequence[str]) -> tuple[Adapter, ...]:
    """Return the adapters of a layer by these names, to which calls of the model are routed here and now.

    A graph in which they are looked up by name is for those names only. So while one is traced they are taken from what
    the route found when it began, if it did, and adapters of one shape do with one graph.
    """
    if torch.compiler.is_compiling():
        route = _pushed(owner)
        if route is not None and layer in route.stacks:
            return route.stacks[layer]
    return named(adapters, names)


def named(adapters: Mapping[str, Adapter], names: Sequence[str]) -> tuple[Adapter, ...]:
    """Return those of a layer's adapters that are named, in the order of the names."""
    return tuple(adapters[name] for name in names if name in adapters)


def _pushed(owner: Owner) -> Route | None:
    route = CALL.route
    while route is not None and route.owner is not owner:
        route = route.under
    return route


def _held(owner: Owner, task: int) -> Held | None:
    held = BACKWARD.get(task, {}).get(owner)
    if held is not None and held.ambiguous:
        msg = (
            "A layer runs again in a backward of several calls that were made in different threads with different "
            "adapters, whose parts come in no certain order. Run the backward of each call by itself."
        )
        raise RouteError(msg)
    outer = (others[owner] for others in list(BACKWARD.values()) if owner in others)
    if task not in BACKWARD and any(other.runs_in is CALL.thread for other in outer):
        msg = (
            "A layer runs again in a backward that does not know which adapters its forward used: re-entrant "
            "checkpointing inside re-entrant checkpointing, or a part of the model that was called by itself. Use "
            "checkpointing with use_reentrant=False and call the whole model."
        )
        raise RouteError(msg)
    return held


def enter_call(owner: Owner) -> None:
    """Note that a call of the whole model begins in this thread."""
    route = _pushed(owner)
    if route is not None and not torch.compiler.is_compiling():
        route.calls += 1


def leave_call(owner: Owner, outputs: Any, active: tuple[str, ...]) -> None:
    """Note that a call of the whole model is over, and hold its route for the backward of its outputs."""
    route = _pushed(owner)
    if route is not None and not torch.compiler.is_compiling():
        route.calls -= 1
    hold_in_backward(outputs, owner, current(owner), active)


class CallHook:
    """What a block hangs on a model, for the calls of its own thread; it is no part of the model."""

    __slots__ = ("act", "thread")

    def __init__(self, thread: object, act: Callable[..., None]) -> None:
        self.thread = thread
        self.act = act

    def __call__(self, *args: Any) -> None:
        """Act, unless it is another thread's call that comes by."""
        if not torch.compiler.is_compiling() and CALL.thread is self.thread:
            self.act(*args)


@contextlib.contextmanager
def hold_routes(model: nn.Module, owner: Owner, active: Callable[[], tuple[str, ...]]) -> Iterator[None]:
    """Within the block, the outputs of the model's calls hold their route for the backward, if there can be one."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    thread = CALL.thread
    enter = CallHook(thread, lambda *_: enter_call(owner))
    leave = CallHook(thread, lambda _module, _args, outputs: leave_call(owner, outputs, active()))
    hooks = model.register_forward_pre_hook(enter), model.register_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_held(owner: Owner) -> None:
    """Refuse to run a layer by a route that nobody will hold for the backward that runs the layer again.

    Raises:
        RouteError: Gradient checkpointing is at work in a part of the model that was called by itself.
    """
    route = _pushed(owner)
    if route is None or route.calls or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: FBT003 - torch takes no keyword
    checkpointing = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    if checkpointing and torch._C._current_graph_task_id() == -1:
        msg = (
            f"A part of the model was called by itself with the adapters {_listed(route.names)} and with gradient "
            "checkpointing, so its backward would run it again with others. Call the whole model, or make the adapters "
            "active with set_adapter()."
        )
        raise RouteError(msg)


@contextlib.contextmanager
def routed(owner: Owner, names: Names, stacks: Stacks | None = None) -> Iterator[None]:
    """Within the block, calls of the model in this thread use these adapters."""
    before = CALL.route
    CALL.route = Route(owner, names, before, stacks or {})
    try:
        yield
    finally:
        CALL.route = before


@contextlib.contextmanager
def narrowed(owner: Owner, names: tuple[str, ...]) -> Iterator[None]:
    """Within the block, which is a part of a layer's forward, the layers below that one use these adapters."""
    around = _pushed(owner)
    with routed(owner, names):
        if around is not None and CALL.route is not None:
            CALL.route.calls = around.calls
        yield


def _listed(names: Names) -> list[str]:
    return list(names if isinstance(names, tuple) else names.by_row)


def hold_in_backward(outputs: Any, owner: Owner, names: Names | None, active: tuple[str, ...] = ()) -> None:
    """Make recomputation in the backward of these outputs use the adapters that the call used.

    The parts of several calls of one thread come in the backward one after the other, the last call's first.

    Args:
        outputs: What the model returned; tensors are found in dicts, lists, tuples and objects with a dict.
        owner: The model.
        names: The adapters that the call was routed to, in order; None if its layers ran what is active on them.
        active: What is active, for a backward that comes after a change of that.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return  # nothing to differentiate; or the compiler traces the backward now, within the route
    thread, changes = CALL.thread, owner.changes

    def note(_gradient: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        ran = active if names is None and owner.changes != changes else names
        if ran is None and _pushed(owner) is None and owner not in BACKWARD.get(task, {}):
            return  # nothing here would make its layers run anything else
        if task not in BACKWARD:
            BACKWARD[task] = {}
            Variable._execution_engine.queue_callback(_Forgetter(task))
        here, before = Held(ran, thread, CALL.thread), BACKWARD[task].get(owner)
        if before is not None:
            here.ambiguous = before.ambiguous or (before.names != ran and before.thread is not thread)
        BACKWARD[task][owner] = here

    for tensor in _tensors(outputs):
        if tensor.grad_fn is not None:
            tensor.register_hook(note)  # type: ignore[no-untyped-call]


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        yield from _tensors(vars(value), depth - 1)
