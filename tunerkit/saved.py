"""A saved adapter: reading one and putting it into a model, and what is written beside the tensors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunerkit.adapted_layer import AdaptedLayer, adapter_of
from tunerkit.checkpoint.card import Card, write_card
from tunerkit.checkpoint.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, read_checkpoint
from tunerkit.checkpoint.folder import entries_of
from tunerkit.checkpoint.hub import fetched
from tunerkit.config import PeftConfig, TaskType, check_config
from tunerkit.effect import check_effect
from tunerkit.errors import AdapterNameError, CardWarning, CheckpointError, ConfigError, PluginError
from tunerkit.functional import loading_for, renamed
from tunerkit.layer import tuner_layers
from tunerkit.modules import tensors_in
from tunerkit.naming import listing
from tunerkit.plugins import get_method

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import torch
    from torch import nn

    from tunerkit.checkpoint.report import LoadReport
    from tunerkit.layer import BaseTunerLayer
    from tunerkit.stored_model import StoredModel
    from tunerkit.tuner import BaseTuner

FORMAT = "1"
"""The version of what tunerkit writes into the metadata of a checkpoint's tensors."""

_ACCOUNT = {"base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version", "task_type"}
"""The settings that say where an adapter comes from rather than what it is."""


class SavedAdapter:
    """A checkpoint that has been read and is to be put into a model."""

    def __init__(
        self,
        model_id: str | os.PathLike[str],
        subfolder: str | None,
        config: PeftConfig | None,
        *,
        is_trainable: bool,
        device: str | torch.device | None,
        key_mapping: dict[str, str] | None,
        download: Mapping[str, Any],
    ) -> None:
        folder = fetched(model_id, (CONFIG_NAME, WEIGHTS_NAME), subfolder, download)
        checkpoint = read_checkpoint(folder, "cpu" if device is None else device)
        self.config = PeftConfig.from_peft_type(**checkpoint.config) if config is None else check_config(config).copy()
        self.config.inference_mode = not is_trainable
        self.source = f"The checkpoint in {os.fspath(model_id)!r}"
        self.tensors = renamed(checkpoint.tensors, key_mapping)

    def put_into(self, model: StoredModel, name: str, *, strict: bool, verify: bool) -> LoadReport:
        """Put the tensors into an adapter of the model, and refuse one without effect if that is to be verified."""
        layers = dict(tuner_layers(model.get_base_model()))
        loading = loading_for(model, name, self.tensors, layers)
        loading.report.settle(self.source, strict=strict)
        loading.write()
        self._check_no_meta(model.base_model, layers.values(), name, loading.report)
        if verify:
            check_effect(model.base_model, name, self.source)
        return loading.report

    def check_same(self, config: PeftConfig, name: str) -> None:
        """Raise `AdapterNameError` unless the checkpoint is of an adapter with the same config."""
        differing = self._differing(config)
        if differing:
            source = f"{self.source[0].lower()}{self.source[1:]}"
            found = f"the config of {source} differs"
            with contextlib.suppress(ConfigError):  # the method has no such form
                if not self._differing(config.standalone()):
                    found = f"{source} has the config of its standalone form, a plain adapter that holds the start too"
            msg = (
                f"There is an adapter {name!r} already, and {found} ({'; '.join(differing[:4])}). Choose another "
                "name, or delete that adapter first."
            )
            raise AdapterNameError(msg)

    def _differing(self, config: PeftConfig) -> list[str]:
        ours, theirs = config.to_dict(), self.config.to_dict()
        return [
            f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
            for key in {**ours, **theirs}
            if key not in _ACCOUNT and ours.get(key) != theirs.get(key)
        ]

    def _check_no_meta(
        self, tuner: BaseTuner, layers: Collection[BaseTunerLayer], name: str, report: LoadReport
    ) -> None:
        holders: list[nn.Module] = [held for layer in layers if (held := adapter_of(layer, name)) is not None]
        if name in tuner.parts:
            holders.append(tuner.parts[name])
        for holder in (held for held in holders if any(tensor.is_meta for tensor in tensors_in(held))):
            for key, tensor in (*holder.named_parameters(), *holder.named_buffers()):
                if tensor.is_meta and report.missing_keys:
                    msg = (
                        f"{self.source} lacks {listing(report.missing_keys, 4)}, and with low_cpu_mem_usage=True there "
                        "are no initial values to keep. Leave low_cpu_mem_usage out."
                    )
                    raise CheckpointError(msg)
                if tensor.is_meta and any(_is_on_meta(layer) for layer in layers if layer.holds(name)):
                    msg = (
                        f"{type(holder).__name__} derives {key!r} from the layer's weight, and the base model is on "
                        "the meta device. Load the base model's weights first."
                    )
                    raise CheckpointError(msg)
                if tensor.is_meta:
                    msg = (
                        f"{type(holder).__name__} made {key!r} with the site's words for new tensors, and no "
                        "checkpoint holds it. Tensors that are not saved must be made for real, on site.device."
                    )
                    raise PluginError(msg)


def _is_on_meta(layer: BaseTunerLayer) -> bool:
    return isinstance(layer, AdaptedLayer) and layer.site.device.type == "meta"


def refuse_offload(ephemeral_gpu_offload: bool) -> None:
    """Raise `ConfigError` if an adapter is to be made on another device than its layer's."""
    if ephemeral_gpu_offload:
        msg = "ephemeral_gpu_offload=True is not supported by this version; leave it out."
        raise ConfigError(msg)


def name_or_path(model: nn.Module) -> str | None:
    """Return where a base model says it came from."""
    name = model.__dict__.get("name_or_path", getattr(getattr(model, "config", None), "_name_or_path", None))
    return name or None


def own_folder(folder: Path, name: str) -> Path:
    """Return the folder in which an adapter is saved; that of `default` is the one around those of the others.

    Raises:
        CheckpointError: It is that of another adapter, on a file system where `a` and `A` are one name.
    """
    if name == "default":
        return folder
    own, there = folder / name, entries_of(folder)
    alike = [entry for entry in there if entry.casefold() == name.casefold()]
    if alike and name not in there and own.exists():
        msg = (
            f"The adapter {name!r} would go into the folder '{folder / alike[0]}', for the file system does not tell "
            "the names apart. Save it elsewhere with selected_adapters, or remove that folder first."
        )
        raise CheckpointError(msg)
    return own


def metadata(config: PeftConfig) -> dict[str, str]:
    """Return what tunerkit says of itself in a checkpoint, where PEFT does not look."""
    method = get_method(str(config.peft_type))
    return {
        "tunerkit_format": FORMAT,
        "tunerkit_version": importlib.metadata.version("tunerkit"),
        "tunerkit_plugin": method.distribution or "",
        "tunerkit_plugin_version": method.version or "",
    }


def write_model_card(
    folder: Path, base: nn.Module, configs: Mapping[str, PeftConfig], tags: Iterable[str] = ()
) -> None:
    """Write the model card of a folder that holds adapters, or bring the one that is there up to date.

    Args:
        folder: The folder.
        base: The base model.
        configs: The configs of the adapters in the folder by name.
        tags: Words to be found by, beside those that follow from these.

    Warns:
        CardWarning: It could not be written. No checkpoint is lost for its card.
    """
    try:
        write_card(folder, card_for(base, configs, tags))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        msg = (
            f"The model card '{folder / CARD_NAME}' could not be written ({reason}). The checkpoint beside it is "
            "whole; mend or move that file, and call create_or_update_model_card(folder)."
        )
        warnings.warn(CardWarning(msg), stacklevel=3)


def card_for(base: nn.Module, configs: Mapping[str, PeftConfig], extra_tags: Iterable[str] = ()) -> Card:
    """Return what the model card of adapters is to say."""
    methods = [get_method(str(config.peft_type)) for config in configs.values()]
    name = _public_name(base)
    tags = [*extra_tags, *(tag for method in methods for tag in method.method.tags)]
    tags += getattr(base, "model_tags", None) or []  # what transformers calls a model's own tags
    if any(kind.__module__.startswith("transformers.") for kind in type(base).__mro__):
        tags.append("transformers")
    if name is not None:
        tags.append(f"base_model:adapter:{name}")
    versions = {"tunerkit": importlib.metadata.version("tunerkit")}
    versions |= {method.distribution: method.version or "" for method in methods if method.distribution is not None}
    adapters = "".join(
        f"- `{adapter}`: {config.peft_type}, in {'this folder' if adapter == 'default' else f'`{adapter}/`'}\n"
        for adapter, config in configs.items()
    )
    causal = all(config.task_type == TaskType.CAUSAL_LM for config in configs.values())
    return Card(
        title="Adapters" if name is None else f"Adapters for {name}",
        text=_TEXT.format(adapters=adapters, kind=type(base).__name__),
        base_model=name,
        pipeline_tag="text-generation" if causal else None,
        tags=tuple(sorted(set(tags))),
        versions=versions,
    )


_TEXT = """\
Trained tensors of adapters for a base model of the class `{kind}`, which is not in here:

{adapters}
To use one, load the base model and put the adapter into it:

```python
from tunerkit import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/the/folder")
```

The files are in PEFT's format, so `from peft import PeftModel` loads them too."""


def _public_name(base: nn.Module) -> str | None:
    """Return the name under which others find the base model, or None: a folder of this machine tells them nothing."""
    name = name_or_path(base)
    public = name is not None and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists()
    return name if public else None


def config_to_save(config: PeftConfig, base: nn.Module) -> dict[str, Any]:
    """Return what a config file is to hold: marked for inference, with the base model named, as in PEFT."""
    values = {**config.to_dict(), "inference_mode": True}
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = name_or_path(base)
    if config.task_type is None:
        values["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return values
