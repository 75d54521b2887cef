"""Watching what reaches a model's layers, batch by batch, until its principal components are known."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from tunerkit import PeftModel
from tunerkit.errors import ArgumentError, ConfigError
from tunerkit.naming import listing
from tunerkit_lora.inits.pca import no_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tunerkit_lora.config import LoraConfig
    from tunerkit_lora.inits.pca import IncrementalPCA
    from tunerkit_lora.subconfigs import EvaConfig

    PrepareRows = Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None
    Seen = list[tuple[Tensor, IncrementalPCA, IncrementalPCA]]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model with a batch that is a dict of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Return the places of a batch of text that count: not padded, and if the config says so not without a label.

    Args:
        model_input: A dict with `input_ids` or `attention_mask`, batch x tokens, and perhaps `labels`.
        peft_config: The settings; those of `eva_config` count.

    Returns:
        The indices, places x 2.

    Raises:
        ArgumentError: The batch is no dict, or has neither.
    """
    if not isinstance(model_input, Mapping):
        msg = (
            f"The batch is a {type(model_input).__name__}, and prepare_model_inputs_fn_language_modeling needs a dict "
            "with input_ids. Pass another prepare_model_inputs_fn, or None."
        )
        raise ArgumentError(msg)
    mask: Tensor | None = model_input.get("attention_mask")
    words: Tensor | None = model_input.get("input_ids")
    if mask is None:
        if words is None:
            msg = (
                f"The batch has {listing(list(model_input))}, and prepare_model_inputs_fn_language_modeling needs "
                "input_ids or attention_mask. Pass another prepare_model_inputs_fn, or None."
            )
            raise ArgumentError(msg)
        mask = torch.ones_like(words)
    mask = mask.bool()
    settings: EvaConfig | None = peft_config.eva_config  # type: ignore[assignment]
    if settings is not None and settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the rows of a layer's input that stand at given places.

    Args:
        layer_input: The layer's input, batch x tokens x features, or a tuple that begins with it.
        model_input: The places, as `prepare_model_inputs_fn_language_modeling` returns them.
        layer_name: The layer's path.
    """
    return _first_tensor(layer_input, layer_name)[model_input.T.unbind()]


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Return all rows of a layer's input; see `prepare_layer_inputs_fn_language_modeling`."""
    del model_input
    return _first_tensor(layer_input, layer_name).flatten(0, -2)


def _first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(found, Tensor):
        msg = (
            f"The layer {layer_name!r} is called with a {type(found).__name__} first, not with a tensor. Pass a "
            "prepare_layer_inputs_fn that makes rows x features of it."
        )
        raise ArgumentError(msg)
    return found


class Watch:
    """One layer whose inputs are looked at.

    Attributes:
        name: Its path.
        rank: The rank it has now; at first as many as it may get, later what it is to get.
        pca: The components so far.
        share: What it brings in to the ranks that are dealt out.
    """

    def __init__(self, name: str, module: nn.Module, rank: int, settings: EvaConfig) -> None:
        self.name = name
        self.module = module
        self.share = rank
        self.rank = min(round(rank * settings.rho), _width(module))
        self.tau = settings.tau
        self.pca = no_rows(self.rank)
        self.converged = torch.zeros(self.rank, dtype=torch.bool)

    @property
    def settled(self) -> bool:
        """Whether the components that the layer is to get have stayed as they were."""
        return bool(self.converged[: self.rank].all())

    def add(self, rows: Tensor, last: Seen) -> None:
        """Take in rows of the layer's input; fewer than there are components to find are passed over.

        Args:
            rows: The rows.
            last: The rows that the layer before this one took in, with its components before and after. Layers that are
                given one input, as an attention's query, key and value are, find them once. It is brought up to date.
        """
        before = self.pca
        if len(rows) < before.count:
            return
        same = [after for known, start, after in last if start is before and torch.equal(known, rows)]
        self.pca = same[0] if same else before.with_rows(rows)
        last[:] = [(rows, before, self.pca)]
        if before.rows:
            self.converged = F.cosine_similarity(self.pca.components, before.components) >= self.tau

    def directions(self, *, whiten: bool) -> Tensor:
        """Return the components that the layer gets, rank x in."""
        found = self.pca.components[: self.rank]
        return found / self.pca.singular_values[: self.rank].sqrt()[:, None] if whiten else found.clone()


@torch.no_grad()
def observe(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: LoraConfig,
    watches: Sequence[Watch],
    forward_fn: Callable[..., Any],
    prepare_batch: Callable[..., Any] | None,
    prepare_rows: PrepareRows,
    *,
    gather: bool,
    progress: bool,
) -> None:
    """Run a model on batches until the components of all layers have converged, and deal out the ranks.

    The model is run in evaluation mode, with its adapters disabled, and is afterwards as it was.

    Raises:
        ConfigError: The dataloader is empty, or no batch has enough rows for some layer, or a function is given for a
            layer that is not looked at.
    """
    functions = _functions(watches, prepare_rows)
    modes = [(module, module.training) for module in model.modules()]
    disabled = model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()
    with disabled, _bar(len(watches), shown=progress) as show:
        model.eval()
        try:
            for batch in _again_and_again(dataloader, watches):
                moved = _to_device(batch, _device(model))
                places = moved if prepare_batch is None else prepare_batch(moved, config)
                last: Seen = []
                with contextlib.ExitStack() as hooks:
                    for watch in watches:
                        if not watch.settled:
                            hooks.callback(_hook(watch, functions[watch.name], places, last, gather=gather).remove)
                    forward_fn(model, moved)
                if all(watch.pca.rows for watch in watches):
                    _deal_out(watches)
                show(sum(watch.settled for watch in watches))
                if all(watch.settled for watch in watches):
                    return
        finally:
            for module, training in modes:
                module.training = training


def _functions(watches: Sequence[Watch], given: PrepareRows) -> dict[str, Callable[..., Tensor]]:
    names = [watch.name for watch in watches]
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, all_rows if given is None else given)
    unknown = [name for name in given if name not in names]
    if unknown:
        msg = f"prepare_layer_inputs_fn has {listing(unknown, 4)}, which are not looked at; {listing(names, 4)} are."
        raise ConfigError(msg)
    return {name: given.get(name, all_rows) for name in names}


def _hook(watch: Watch, prepare: Callable[..., Tensor], places: Any, last: Seen, *, gather: bool) -> Any:
    def look(_module: nn.Module, args: tuple[Any, ...], _output: object) -> None:
        rows = prepare(args, places, watch.name)
        together = gather and distributed.is_available() and distributed.is_initialized()
        watch.add(_gathered(rows) if together else rows, last)

    return watch.module.register_forward_hook(look)


def _again_and_again(dataloader: Iterable[Any], watches: Sequence[Watch]) -> Iterator[Any]:
    while True:
        count = 0
        for batch in dataloader:
            yield batch
            count += 1
        if not count:
            msg = "The dataloader is empty, or can be gone through only once. Pass one that gives batches every time."
            raise ConfigError(msg)
        lacking = [f"{watch.name!r} ({watch.pca.count})" for watch in watches if not watch.pca.rows]
        if lacking:
            msg = (
                f"No batch has as many rows (tokens that count) as there are components to find for {lacking[0]}. Use "
                "larger batches, or lower r or EvaConfig.rho."
            )
            raise ConfigError(msg)


def _deal_out(watches: Sequence[Watch]) -> None:
    """Give the ranks of all layers together to the components that explain most."""
    shares = [(float(share), number) for number, watch in enumerate(watches) for share in watch.pca.explained]
    shares.sort(key=lambda item: -item[0])
    counts = Counter(number for _, number in shares[: sum(watch.share for watch in watches)])
    for number, watch in enumerate(watches):
        watch.rank = counts[number]


def _gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes."""
    counts: list[int] = [0] * distributed.get_world_size()
    distributed.all_gather_object(counts, len(rows))
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _width(module: Any) -> int:
    weight: Tensor = module.get_base_layer().weight if hasattr(module, "get_base_layer") else module.weight
    return weight.shape[-1]


def _device(model: nn.Module) -> torch.device | None:
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _to_device(batch: Any, device: torch.device | None) -> Any:
    if device is None or isinstance(batch, (str, bytes)):
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)([_to_device(value, device) for value in batch])
    return batch


@contextlib.contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    if not shown:
        yield lambda _done: None
        return
    from rich.console import Console  # noqa: PLC0415 - imported only when a bar is asked for
    from rich.progress import Progress  # noqa: PLC0415 - the same

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("layers whose inputs are known", total=total)
        yield lambda done: progress.update(task, completed=done)
