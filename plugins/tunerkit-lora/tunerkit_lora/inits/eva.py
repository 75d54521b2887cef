"""EVA: first factors from the directions in which a layer's inputs vary most, and ranks from how much they do."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunerkit import PeftModel, plan
from tunerkit.adapted_layer import AdaptedLayer
from tunerkit.errors import AdapterStateError, AdapterWarning, CheckpointError, ConfigError
from tunerkit.journal import Journal
from tunerkit.naming import PREFIX, listing
from tunerkit.sites import make_site
from tunerkit.targeting import adapted_places, exact_targets
from tunerkit_lora.config import LoraConfig
from tunerkit_lora.inits.activations import (
    Watch,
    forward_fn_dict,
    observe,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tunerkit.sites import Site
    from tunerkit_lora.subconfigs import EvaConfig


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return the first factors that EVA gives a model's layers, each of the rank that it gives them.

    From "Parameter Efficient Fine-tuning via Explained Variance Adaptation" (arXiv 2410.07170): the rows of ``A`` are
    the leading principal components of the layer's inputs. They are found batch by batch, and the dataloader is gone
    through until they stay as they are. The ranks of all layers together go to the components that explain most.

    Args:
        model: A `PeftModel`, which is run with its adapters disabled, or a base model.
        dataloader: The batches.
        peft_config: The settings; for a `PeftModel` those of the adapter if not given.
        forward_fn: Runs the model on a batch: `forward_fn(model, batch)`.
        prepare_model_inputs_fn: Makes of a batch what `prepare_layer_inputs_fn` is given, called with the batch and the
            config. The default returns which tokens count, by the attention mask and the labels. None: the batch.
        prepare_layer_inputs_fn: Makes of a layer's input rows x features, called with the input, the result of
            `prepare_model_inputs_fn` and the layer's path; or such a function by path. None: all rows count.
        adapter_name: The adapter.
        gather_distributed_inputs: Where several processes run, let each see the inputs of all.
        show_progress_bar: Show how many layers are done.

    Returns:
        By the path of each layer its components, rank x in; some ranks may be zero.

    Raises:
        ConfigError: No config is given, or the dataloader is empty, or its batches have too few rows.
    """
    if peft_config is None and not isinstance(model, PeftModel):
        msg = "The model is no PeftModel, so the settings are not known. Pass peft_config=LoraConfig(...)."
        raise ConfigError(msg)
    config: LoraConfig = model.peft_config[adapter_name] if peft_config is None else peft_config  # type: ignore[assignment,index]
    settings = _settings(config)
    watches = [
        Watch(name, module, config.rank_for(name.removeprefix(PREFIX)), settings)
        for name, module in _linear_layers(model, config, adapter_name)
    ]
    observe(
        model,
        dataloader,
        config,
        watches,
        forward_fn,
        prepare_model_inputs_fn,
        prepare_layer_inputs_fn,
        gather=gather_distributed_inputs,
        progress=show_progress_bar,
    )
    return {watch.name: watch.directions(whiten=settings.whiten) for watch in watches}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an adapter that was made with `init_lora_weights="eva"` its start; see `get_eva_state_dict`.

    Layers get the ranks that were found, those of rank zero are no longer adapted, and the adapter's config says so in
    `target_modules`, `rank_pattern` and `alpha_pattern`. Call it before the optimiser is made: the adapter's tensors
    are new ones. If anything goes wrong the model is as it was.

    Args:
        model: The model.
        dataloader: The batches; needed unless `eva_state_dict` is given.
        eva_state_dict: What `get_eva_state_dict` has returned; it is not changed.
        forward_fn: See `get_eva_state_dict`.
        prepare_model_inputs_fn: See `get_eva_state_dict`.
        prepare_layer_inputs_fn: See `get_eva_state_dict`.
        adapter_name: The adapter.
        gather_distributed_inputs: See `get_eva_state_dict`.
        show_progress_bar: See `get_eva_state_dict`.

    Raises:
        AdapterStateError: Several adapters are active, or the adapter is not made for EVA.
        ConfigError: There is neither a dataloader nor an `eva_state_dict`, or the model is no `PeftModel`.
        CheckpointError: The `eva_state_dict` does not fit the model.
    """
    if not isinstance(model, PeftModel):
        msg = (
            f"initialize_lora_eva_weights needs a PeftModel; it was given a {type(model).__name__}. Make one with "
            'get_peft_model(model, LoraConfig(init_lora_weights="eva", ...)).'
        )
        raise ConfigError(msg)
    model.base_model.check_known([adapter_name])
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        start = getattr(config, "init_lora_weights", None)
        msg = f'The adapter {adapter_name!r} has init_lora_weights={start!r}; EVA starts one that has "eva".'
        raise AdapterStateError(msg)
    if len(model.active_adapters) > 1:
        msg = (
            f"{listing(model.active_adapters)} are active together, and EVA looks at a layer for one adapter alone. "
            f"Call set_adapter({adapter_name!r}) first."
        )
        raise AdapterStateError(msg)
    if eva_state_dict is None and dataloader is None:
        msg = "EVA needs data to look at: pass a dataloader, or the eva_state_dict that get_eva_state_dict returned."
        raise ConfigError(msg)
    if eva_state_dict is None:
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,  # type: ignore[arg-type]  # one of the two is given
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    layers = _linear_layers(model, config, adapter_name)
    factors = _fitting(eva_state_dict, {name.removeprefix(PREFIX): layer for name, layer in layers})
    _start_anew(model, adapter_name, config, factors)


def _settings(config: LoraConfig) -> EvaConfig:
    if config.eva_config is None:
        msg = 'The config has no eva_config. Make it with init_lora_weights="eva", which sets one.'
        raise ConfigError(msg)
    return config.eva_config  # type: ignore[return-value]  # a dict has become one when the config was checked


def _linear_layers(model: nn.Module, config: LoraConfig, adapter_name: str) -> list[tuple[str, nn.Module]]:
    if isinstance(model, PeftModel):
        found = adapted_places(model.get_base_model())
        return [
            (f"{PREFIX}{name}", layer)
            for name, layer in found
            if isinstance(layer, AdaptedLayer) and adapter_name in layer.available_adapters and _is_linear(layer.site)
        ]
    sites = [(target, make_site(target.module)) for target in plan(model, config).targets]
    return [(target.name, target.module) for target, site in sites if site is not None and _is_linear(site)]


def _is_linear(site: Site) -> bool:
    return site.kind == "linear"


def _fitting(given: Mapping[str, Tensor], layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the factors by the layers' paths in the base model, if each fits a layer."""
    factors = {name.removeprefix(PREFIX): factor for name, factor in given.items()}
    unknown = [name for name in factors if name not in layers]
    if unknown:
        msg = (
            f"The eva_state_dict has {listing(unknown, 4)}, where the adapter has no layer; it has "
            f"{listing(list(layers), 4)}. Compute it with the same model and config."
        )
        raise CheckpointError(msg)
    for name, factor in factors.items():
        width = layers[name].site.in_features
        if factor.dim() != 2 or factor.shape[1] != width:  # noqa: PLR2004 - a matrix
            msg = f"In the eva_state_dict {name!r} is {tuple(factor.shape)}; the layer needs rank x {width}."
            raise CheckpointError(msg)
    return factors


def _start_anew(model: PeftModel, name: str, config: LoraConfig, factors: Mapping[str, Tensor]) -> None:
    """Replace an adapter by one with the ranks and the values of these factors."""
    layers = [path for path, layer in adapted_places(model.get_base_model()) if name in layer.available_adapters]
    missing = [layer for layer in layers if layer not in factors]
    ranks = {layer: len(factors[layer]) if layer in factors else config.rank_for(layer) for layer in layers}
    changed = _with_ranks(config, ranks)
    changed.target_modules = exact_targets(model.get_base_model(), [layer for layer in layers if ranks[layer]])
    active, tuner = model.active_adapters, model.base_model
    tensors = next(layer.adapter_tensors(name) for layer in tuner.layers() if name in layer.available_adapters)
    autocast = next(iter(tensors.values())).dtype is torch.float32
    with Journal(), warnings.catch_warnings():
        # Another adapter is active only until this one is back.
        warnings.simplefilter("ignore", AdapterWarning)
        model.delete_adapter(name)
        model.add_adapter(name, changed, autocast_adapter_dtype=autocast)
        if name in active:
            model.set_adapter(active, inference_mode=config.inference_mode)
        for path, layer in adapted_places(model.get_base_model()):
            if path in factors and name in layer.available_adapters:
                layer.lora_A[name].weight.copy_(factors[path])  # type: ignore[attr-defined]
    if missing:
        msg = f"The eva_state_dict lacks {listing(missing, 4)}, which start as with init_lora_weights=True."
        warnings.warn(AdapterWarning(msg), stacklevel=3)


def _with_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Return a config that gives layers these ranks; those of rank zero are not to be targeted."""
    changed = copy.deepcopy(config)
    alphas = {name: config.alpha_for(name) for name in ranks}
    if config.eva_config.adjust_scaling_factors:  # type: ignore[union-attr]
        alphas = {name: alpha * ranks[name] / config.rank_for(name) for name, alpha in alphas.items()}
    kept = [name for name, rank in ranks.items() if rank]
    # A name also means every path that ends in it, so of two that match the longer one must be found first.
    kept.sort(key=len, reverse=True)
    changed.rank_pattern = {name: ranks[name] for name in kept if ranks[name] != config.r}
    changed.alpha_pattern = {name: alphas[name] for name in kept if alphas[name] != config.lora_alpha}
    return changed
