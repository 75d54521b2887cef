"""`PeftConfig`: the settings of an adapter, checked when they are made, and PEFT's JSON file of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

from tunerkit._typecheck import describe, fits
from tunerkit.errors import ConfigError, TunerkitError
from tunerkit.keywords import HUB_KEYWORDS, check_saving, of_download, of_upload
from tunerkit.naming import closest, listing, method_id, peft_type_name, shown
from tunerkit.peft_types import PeftType, TaskType
from tunerkit.settings import default_of, is_empty, is_unbuilt, rule_of, setting, unbuilt

if TYPE_CHECKING:
    import os

    from huggingface_hub import CommitInfo
    from typing_extensions import Self

__all__ = [
    "PEFT_FORMAT_VERSION",
    "Config",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "built_settings",
    "check_config",
    "check_if_peft_model",
    "config_class",
    "get_peft_config",
    "setting",
    "unbuilt",
]

PEFT_FORMAT_VERSION = "0.21.2"
"""The version of PEFT whose checkpoint format is written."""

Config = TypeVar("Config", bound="PeftConfig")


@dataclass
class PeftConfig:
    """Settings that every method has; a method's own config class adds its own.

    Every field is checked when the config is made, and again when it is used; see `check`.

    Attributes:
        task_type: What the model is used for; see `TaskType`.
        peft_type: The type of the method, given by the config's class.
        auto_mapping: The class and library of the base model, for models without a task type. Nothing imports them.
        peft_version: The version of PEFT whose format the checkpoint follows.
        base_model_name_or_path: Where the base model came from.
        revision: The revision of the base model.
        inference_mode: Whether the adapter is loaded frozen.

    Raises:
        ConfigError: A setting has the wrong type or is out of range, or asks for something that is not built.
    """

    task_type: str | TaskType | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    _sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")
    """Fields whose lists become sets, as in PEFT."""

    _patterns: ClassVar[tuple[str, ...]] = ()
    """Fields that give single modules values by patterns of their paths; see `tunerkit.patterns.pattern_value`."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check every field, and bring it into its form; a method's config class adds what it has to check.

        A field's type is checked against the annotation and its range against `setting(...)`; one that is declared with
        `unbuilt(...)` is refused unless it has its default.

        Raises:
            ConfigError: A setting has the wrong type or is out of range, or asks for something that is not built.
        """
        self._settle_types()
        hints = _hints(type(self))  # type: ignore[arg-type]  # the class can be hashed, though its instances cannot
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            where = f"{type(self).__name__}.{item.name}"
            if not fits(value, hints[item.name]):
                kind = type(value).__name__
                msg = f"{where} must be {describe(hints[item.name])}; it is {shown(value)} of type {kind}."
                raise ConfigError(msg)
            rule_of(item).check_range(where, value)
            if is_unbuilt(item, value):
                msg = (
                    f"{where}={shown(value)} is not supported by this version; only its default, {default_of(item)!r}, "
                    "is. Leave it out, or use the method without that feature."
                )
                raise ConfigError(msg)
        for name in self._sets:
            if isinstance(getattr(self, name, None), (list, tuple, frozenset)):
                setattr(self, name, set(getattr(self, name)))
        self._check_layers()

    def _check_layers(self) -> None:
        """Check the choice of layers of the methods that have one: it narrows a list of targets."""
        numbers, patterns = getattr(self, "layers_to_transform", None), getattr(self, "layers_pattern", None)
        targets = getattr(self, "target_modules", None)
        for name, value in (("layers_to_transform", numbers), ("layers_pattern", patterns)):
            if isinstance(targets, str) and value is not None:
                msg = (
                    f"{type(self).__name__}.{name}={shown(value)} narrows a list of names in target_modules, which is "
                    f"the text {shown(targets)}. Pass a list, or say in the pattern which layers are meant."
                )
                raise ConfigError(msg)
        if patterns and numbers is None:
            msg = (
                f"{type(self).__name__}.layers_pattern={shown(patterns)} is the name before a layer's number and does "
                "nothing without layers_to_transform. Set that too, or leave both out."
            )
            raise ConfigError(msg)

    def _settle_types(self) -> None:
        own = next((item.default for item in dataclasses.fields(self) if item.name == "peft_type"), None)
        if own is not None and self.peft_type not in (None, own):
            msg = f"{type(self).__name__} is the config of {own}; its peft_type cannot be {shown(self.peft_type)}."
            raise ConfigError(msg)
        kind: Any = own if own is not None else self.peft_type
        self.peft_type = PeftType(kind) if isinstance(kind, str) else kind
        if isinstance(self.task_type, str) and not isinstance(self.task_type, TaskType):
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                msg = f"task_type={shown(self.task_type)} is not a task; possible are {listing(TaskType)}."
                raise ConfigError(msg) from None
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT_VERSION

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns a prompt rather than adapting layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is PEFT's adaption prompt."""
        return False

    @property
    def saved_standalone(self) -> bool:
        """Whether an adapter is always saved in its standalone form, because its own could not be read back."""
        return False

    def standalone(self) -> Self:
        """Return the config of an adapter in its standalone form; see `Adapter.standalone`.

        Raises:
            ConfigError: The method has no such form.
        """
        msg = (
            f"An adapter of {self.peft_type} takes nothing off the base model, so there is nothing to convert. Leave "
            "path_initial_model_for_weight_conversion out."
        )
        raise ConfigError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that belong in a checkpoint, as a dict of plain values."""
        saved = [item.name for item in dataclasses.fields(self) if rule_of(item).saved]
        values = dataclasses.asdict(self)
        return {name: values[name] for name in saved}

    def copy(self) -> Self:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a folder, which is made if it is not there.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        from tunerkit.checkpoint.writing import write_config  # noqa: PLC0415 - above this room, and only needed here

        write_config(save_directory, self.to_dict())

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Upload `adapter_config.json` to the Hugging Face Hub; `kwargs` are as for `PeftModel.push_to_hub`.

        Raises:
            KeywordError: A keyword argument is unknown.
            CheckpointError: huggingface_hub is not installed, or the hub cannot be reached or refuses.
        """
        from tunerkit.checkpoint.upload import upload_config  # noqa: PLC0415 - above this room, and only needed here

        check_saving("push_to_hub", kwargs)
        return upload_config(self.to_dict(), **{**of_upload(kwargs), "repo_id": repo_id})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **overrides: Any
    ) -> PeftConfig:
        """Read the config of a checkpoint.

        Args:
            pretrained_model_name_or_path: The checkpoint's folder, or its id on the hub.
            subfolder: A folder below it, for adapters that were saved beside others.
            overrides: Values for settings that the file does not hold; the file's values win, as in PEFT. What a
                download takes (`revision`, `token`) goes there; it says nothing of a folder.

        Returns:
            A config of the class of the checkpoint's method.

        Raises:
            CheckpointError: The file is not there or cannot be read.
            UnknownMethodError: No installed package offers the method.
            ConfigError: A setting is wrong, or is unknown and matters.
        """
        from tunerkit.checkpoint.files import CONFIG_NAME, read_config  # noqa: PLC0415 - above, and only needed here
        from tunerkit.checkpoint.hub import fetched  # noqa: PLC0415 - the same

        download = of_download(overrides)
        values = read_config(fetched(pretrained_model_name_or_path, (CONFIG_NAME,), subfolder, download))
        given = {name: value for name, value in overrides.items() if name not in HUB_KEYWORDS}
        return cls.from_peft_type(**{**given, **values})

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Return the settings that a config's file holds, unchecked.

        Raises:
            CheckpointError: The file is not there or cannot be read.
        """
        from tunerkit.checkpoint.files import read_json  # noqa: PLC0415 - above this room, and only needed here

        return read_json(Path(path_json_file))

    @classmethod
    def from_peft_type(cls, /, **values: Any) -> PeftConfig:
        """Make a config from a checkpoint's values, of the class that their `peft_type`, or else this class, names.

        Raises:
            UnknownMethodError: No installed package offers the method.
            ConfigError: `peft_type` is missing, or a setting is wrong, or is unknown and matters.
        """
        kind = values.get("peft_type") or next(
            (f.default for f in dataclasses.fields(cls) if f.name == "peft_type"), None
        )
        if not isinstance(kind, str):
            msg = (
                f"The config names no method: its peft_type is {shown(kind)}. It must be the type of a method, as text."
            )
            raise ConfigError(msg)
        return config_class(kind).from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a config of this class from a checkpoint's values.

        A key that no field knows is ignored if its value is empty or off: then it changes nothing. Otherwise it asks
        for something this version does not do, and is refused.

        Raises:
            ConfigError: A setting is wrong, is not built, or is unknown and matters.
        """
        fields = {item.name: item for item in dataclasses.fields(cls)}
        unsaved = {name for name, item in fields.items() if not rule_of(item).saved}
        for key, value in values.items():
            if key in fields and key not in unsaved and is_unbuilt(fields[key], value):
                msg = (
                    f"{cls.__name__}.{key}={shown(value)} is not built in this version, so a checkpoint that was made "
                    "with it cannot be loaded yet."
                )
                raise ConfigError(msg)
        unknown = [key for key, value in values.items() if key not in fields and not is_empty(value)]
        if unknown:
            near = closest(unknown[0], fields, cutoff=0.75)
            hint = f" Closest to {shown(unknown[0])}: {listing(near)}." if near else ""
            msg = (
                f"{cls.__name__} does not know {listing(unknown)} (value {shown(values[unknown[0]])}), so the adapter "
                f"would not be what the file describes. {_provider(cls)}.{hint} Upgrade the package, or remove the key "
                "if it does not matter."
            )
            raise ConfigError(msg)
        return cls(**{key: value for key, value in values.items() if key in fields and key not in unsaved})


def config_class(peft_type: str) -> type[PeftConfig]:
    """Return the config class of a method.

    Raises:
        UnknownMethodError: No installed package offers the method.
    """
    from tunerkit.plugins import get_method  # noqa: PLC0415 - above this room, and only needed here

    return get_method(method_id(peft_type)).method.config


def check_config(config: object) -> PeftConfig:
    """Return what was passed as a config, if it is one.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(config, PeftConfig):
        return config
    kind = config if isinstance(config, type) else type(config)
    origin = next((base.__module__ for base in kind.__mro__ if base.__module__.partition(".")[0] == "peft"), None)
    if origin is not None:
        msg = (
            f"peft_config is PEFT's {kind.__name__} (from {origin}). Import the class of that name from the method's "
            f"package, `from tunerkit_<method> import ...`; installed methods: {_installed()}."
        )
    elif kind is config:
        msg = f"peft_config is the class {kind.__name__} itself: make a config of it, {kind.__name__}(...)."
    else:
        msg = f"peft_config must be the config of a method, a PeftConfig; it is a {kind.__name__}."
        msg += " Make one of the dict with get_peft_config(...)." if kind is dict else ""
    raise ConfigError(msg)


def built_settings(cls: type[PeftConfig]) -> list[str]:
    """Return the names of the settings that a method has beside those of every method, without those not built."""
    common = {item.name for item in dataclasses.fields(PeftConfig)}
    return [item.name for item in dataclasses.fields(cls) if item.name not in common and rule_of(item).built]


def chosen_config(peft_config: object, adapter_name: str) -> tuple[PeftConfig, str]:
    """Return which of a tuner's configs is meant, and its adapter's name.

    Args:
        peft_config: A config, or several by adapter name.
        adapter_name: The name; PEFT's default stands for the only one there is.

    Raises:
        ConfigError: It is something else, or has no config under that name.
    """
    if isinstance(peft_config, PeftConfig):
        return peft_config, adapter_name
    if not isinstance(peft_config, dict) or not all(isinstance(item, PeftConfig) for item in peft_config.values()):
        msg = f"peft_config must be a PeftConfig or a dict of them by adapter name; it is {peft_config!r}."
        raise ConfigError(msg)
    if adapter_name in peft_config:
        return peft_config[adapter_name], adapter_name
    if adapter_name == "adapter" and len(peft_config) == 1:
        name, config = next(iter(peft_config.items()))
        return config, name
    msg = f"peft_config has no entry {adapter_name!r}; it has {listing(peft_config)}. Say which with adapter_name."
    raise ConfigError(msg)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Make a config from a dict, of the class that its `peft_type` names.

    Raises:
        UnknownMethodError: No installed package offers the method.
        ConfigError: `peft_type` is missing, or a setting is wrong, or is unknown and matters.
    """
    return PeftConfig.from_peft_type(**config_dict)


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Return whether a folder, or a repository on the hub, holds the config of an adapter whose method can be used."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except TunerkitError:
        return False
    return True


def _provider(cls: type[PeftConfig]) -> str:
    from tunerkit.plugins import installed  # noqa: PLC0415 - above this room, and only needed here

    kind = next(item.default for item in dataclasses.fields(cls) if item.name == "peft_type")
    for info in installed():
        if info.kind == "method" and info.package is not None and peft_type_name(info.method) == kind:
            return f"The config class comes from {info.package} {info.version}"
    return f"The config class comes from the module {cls.__module__}"


def _installed() -> str:
    from tunerkit.plugins import method_ids  # noqa: PLC0415 - above this room, and only needed here

    return listing(method_ids())


@functools.cache
def _hints(cls: type[PeftConfig]) -> dict[str, Any]:
    return get_type_hints(cls)
