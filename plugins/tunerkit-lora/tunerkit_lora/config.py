"""`LoraConfig`: the settings of a LoRA adapter."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from tunerkit.config import PeftConfig, setting, unbuilt
from tunerkit.errors import ConfigError, ConfigWarning, LoadWarning
from tunerkit.naming import shown
from tunerkit.patterns import pattern_value
from tunerkit_lora.inits import ANCHORED, SPECIAL
from tunerkit_lora.subconfigs import EvaConfig, LoftQConfig

if TYPE_CHECKING:
    from typing_extensions import Self

Made = TypeVar("Made", EvaConfig, LoftQConfig)

_BASE_CHANGED = {
    "corda": (
        "CorDA takes its start off the base weight, and only the data it was computed from give it again. In PEFT, "
        "save with path_initial_model_for_weight_conversion."
    ),
    "lora_ga": (
        "LoRA-GA takes its start off the base weight, and only the gradients it was computed from give it again. In "
        "PEFT, save with path_initial_model_for_weight_conversion."
    ),
}
"""The starts that PEFT has and this package does not make, each with how an adapter that has it gets here."""


@dataclass
class LoraRuntimeConfig:
    """Settings that belong to one run and never to a checkpoint.

    Attributes:
        ephemeral_gpu_offload: Whether layers that live on the CPU visit the GPU while an adapter is made. It is taken
            and changes nothing: adapters are made where their layer is.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """What a LoRA adapter adapts, and how: `W + scaling * B @ A` with `A` of `r` rows and `B` of `r` columns.

    All fields of PEFT's class are here, so that its files can be read. Those marked *(not built)* are refused by name
    away from their default.

    Attributes:
        r: The rank of the update, which is the number of rows of `A`.
        target_modules: The modules to adapt: names or their last parts, a regex that fits the whole name, or
            `"all-linear"`. If not given, what the type of a transformers model calls for.
        exclude_modules: Modules to leave alone though they are targeted: names or their last parts, or a regex.
        lora_alpha: The numerator of `scaling`.
        lora_dropout: The probability with which each element of the adapter's input is dropped while training.
        fan_in_fan_out: Whether the weights are stored in x out. The layer knows; a value that is wrong for the targeted
            layers is corrected in the completed config, with a `ConfigWarning`.
        bias: Which biases of the base model are trained and saved too: `"none"`, `"all"`, or `"lora_only"`, those of
            the adapted layers. One adapter at a time can do that.
        use_rslora: Whether `scaling` is divided by the root of the rank rather than by the rank.
        modules_to_save: Modules to train and save as a whole, a copy for each adapter: names or their last parts.
        init_lora_weights: How `A` and `B` start. `True`: `A` Kaiming uniform, `B` zero. `"gaussian"`: `A` normal with
            standard deviation `1 / r`, `B` zero. `False`: both as PyTorch starts a linear layer, so that the adapter
            changes the output at once; for tests. `"pissa"`, `"pissa_niter_<number>"`, `"olora"`, `"orthogonal"`,
            `"mica"`, `"loftq"` and `"eva"`: see `tunerkit_lora.inits`; for linear layers, `"mica"` for embeddings too.
        layers_to_transform: The number of the layer to adapt, or several: of the modules that a list of targets means
            by the end of their path, only those in these layers are adapted.
        layers_pattern: A regex for the name before a layer's number in a path, or several; if not given, any name.
        rank_pattern: Ranks of single modules, by regexes that fit a module's path or the end of it after a dot. The
            first that fits counts; `^` at the start of one means the whole path.
        alpha_pattern: `lora_alpha` of single modules, in the same way.
        megatron_config: Arguments of Megatron's parallel layers. *(not built)*
        megatron_core: The module that holds Megatron's core. *(not built)*
        trainable_token_indices: Rows of an embedding to train. *(not built)*
        loftq_config: Settings of the start `"loftq"`, a `LoftQConfig` or a dict of its fields; it is kept as a dict.
        eva_config: Settings of the start `"eva"`, an `EvaConfig`.
        corda_config: Settings of the CorDA start, which is not made here; without effect.
        lora_ga_config: Settings of the LoRA-GA start. *(not built)*
        use_dora: Whether magnitude and direction of the weight are learned apart (DoRA).
        velora_config: Settings of VeLoRA's compressed activations. *(not built)*
        alora_invocation_tokens: The tokens after which the adapter sets in (aLoRA). *(not built)*
        use_qalora: Whether the input is pooled for a grouped quantisation (QALoRA). *(not built)*
        qalora_group_size: The size of QALoRA's groups. *(not built)*
        monteclora_config: Settings of MonteCLoRA's sampling. *(not built)*
        layer_replication: Ranges of layers, each from one to before another, that the model is to consist of: layers
            are repeated with shared weights and adapters of their own. `[(0, 4), (2, 5)]` makes 7 layers of 5.
        runtime_config: Settings of this run, which are not saved.
        lora_bias: Whether `B` has a bias, which is trained and scaled with it. Not for embeddings, and only with
            `init_lora_weights` at `True` or `False`.
        target_parameters: Bare parameters to adapt, matrices or stacks of matrices such as a mixture's fused experts:
            paths or the ends of them after a dot. Without dropout, DoRA and `lora_bias`, which need a layer.
        use_bdlora: Settings of block-diagonal factors (BD-LoRA). *(not built)*
        arrow_config: Settings of Arrow's routing between adapters. *(not built)*
        kasa_config: Settings of KaSA. *(not built)*
        ensure_weight_tying: Whether modules that share a weight with one that is adapted, or saved as a whole, are too,
            with the same tensors: the input embedding and the output layer of many language models. Their factors
            start as those of a linear layer do, with `init_lora_weights` at `True`, `False` or `"gaussian"`.

    Raises:
        ConfigError: A setting has the wrong type or is out of range, or asks for something that is not built.
    """

    peft_type: str | None = "LORA"
    r: int = setting(8, above=0)
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = setting(0.0, minimum=0, maximum=1)
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = setting(factory=dict)
    alpha_pattern: dict[str, float] | None = setting(factory=dict)
    megatron_config: dict[str, Any] | None = unbuilt(None)
    megatron_core: str | None = unbuilt("megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = unbuilt(None)
    loftq_config: dict[str, Any] | LoftQConfig | None = setting(factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = unbuilt(None)
    use_dora: bool = False
    velora_config: dict[str, Any] | None = unbuilt(None)
    alora_invocation_tokens: list[int] | None = unbuilt(None)
    use_qalora: bool = unbuilt(default=False)
    qalora_group_size: int = unbuilt(16)
    monteclora_config: dict[str, Any] | None = unbuilt(None)
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = setting(factory=LoraRuntimeConfig, saved=False)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = unbuilt(None)
    arrow_config: dict[str, Any] | None = unbuilt(None)
    kasa_config: dict[str, Any] | None = unbuilt(None)
    ensure_weight_tying: bool = False

    _patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    def check(self) -> None:
        """Check every field; see `PeftConfig.check`.

        Raises:
            ConfigError: A setting has the wrong type or is out of range, or asks for something that is not built.
        """
        self._check_start()
        super().check()
        if self.layer_replication is not None:  # a file has lists
            self.layer_replication = [(start, end) for start, end in self.layer_replication]
        for entry, rank in (self.rank_pattern or {}).items():
            if rank <= 0:
                msg = f"LoraConfig.rank_pattern[{entry!r}] must be above 0; it is {rank!r}."
                raise ConfigError(msg)
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            msg = (
                f"LoraConfig.lora_bias=True needs init_lora_weights=True or False; it is {self.init_lora_weights!r}. "
                "Leave one of the two out."
            )
            raise ConfigError(msg)

        if self.use_dora and (self.lora_bias or not self.trains_second):
            other = "lora_bias=True" if self.lora_bias else "init_lora_weights='mica'"
            msg = f"LoraConfig.use_dora=True does not go with {other}. Leave one of the two out."
            raise ConfigError(msg)

    def _check_start(self) -> None:
        """Check how the factors start, and the settings of single starts."""
        given: object = self.init_lora_weights
        if isinstance(given, str):
            start = self.init_lora_weights = given.lower()  # PEFT takes the name in any case
            if start in _BASE_CHANGED:
                msg = (
                    f"LoraConfig.init_lora_weights={given!r} is not supported: {_BASE_CHANGED[start]} On a base that "
                    "is the changed one already, set init_lora_weights to True."
                )
                raise ConfigError(msg)
            if start != "gaussian" and not SPECIAL.fullmatch(start):
                msg = (
                    f"LoraConfig.init_lora_weights={shown(given)} is not known; possible are True, False, "
                    "'gaussian', 'pissa', 'pissa_niter_<number>', 'olora', 'orthogonal', 'eva', 'mica' and 'loftq'."
                )
                raise ConfigError(msg)
        if isinstance(self.eva_config, dict):
            self.eva_config = _made(EvaConfig, "eva_config", self.eva_config)
        if given == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig()
        self._check_loftq()
        idle = {
            "eva_config": self.eva_config if self.init_lora_weights != "eva" else None,
            "corda_config": self.corda_config,
        }
        for name in (name for name, value in idle.items() if value):
            msg = f"LoraConfig.{name} has no effect with init_lora_weights={given!r}."
            warnings.warn(ConfigWarning(msg), stacklevel=5)

    def _check_loftq(self) -> None:
        """Check the settings of LoftQ, and bring them to the form in which PEFT's files have them."""
        given = self.loftq_config
        if self.init_lora_weights != "loftq":
            if given:
                msg = f"LoraConfig.loftq_config has no effect with init_lora_weights={self.init_lora_weights!r}."
                warnings.warn(ConfigWarning(msg), stacklevel=6)
            self.loftq_config = {}
            return
        if not given:
            msg = (
                "LoraConfig.init_lora_weights='loftq' needs loftq_config, for example "
                "LoftQConfig(loftq_bits=4, loftq_iter=1)."
            )
            raise ConfigError(msg)
        made = _made(LoftQConfig, "loftq_config", given) if isinstance(given, dict) else given
        self.loftq_config = dict(vars(made))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a config from a checkpoint's values; see `PeftConfig.from_dict`.

        An adapter that was started by LoRA-GA becomes the plain one that its tensors are, as in PEFT, with a warning:
        it is right only on the base that it was trained on, which LoRA-GA has changed.

        Raises:
            ConfigError: A setting is wrong, is not built, or is unknown and matters.
        """
        if str(values.get("init_lora_weights")).lower() == "lora_ga":
            msg = (
                "The adapter was started by LoRA-GA, which changed the base model. Its tensors are right on that base "
                "only, which must have been saved with it. For the original base convert it, by "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
            )
            warnings.warn(LoadWarning(msg), stacklevel=4)
            values = {**values, "init_lora_weights": True}
        # What it was started with says nothing of an adapter whose factors are in the file.
        idle: dict[str, Any] = {"lora_ga_config": None}
        if str(values.get("init_lora_weights")).lower() != "loftq":
            idle["loftq_config"] = {}
        return super().from_dict({**values, **idle})

    @property
    def has_own_start(self) -> bool:
        """Whether the factors start from what belongs to one layer alone: its weight, or its inputs."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    @property
    def is_anchored(self) -> bool:
        """Whether the factors start from the weight itself, and that start is taken off again."""
        return self.has_own_start and ANCHORED.fullmatch(str(self.init_lora_weights)) is not None

    @property
    def replaces_base(self) -> bool:
        """Whether the factors go with another weight in place of the base's."""
        return self.init_lora_weights == "loftq"

    @property
    def loftq_settings(self) -> LoftQConfig:
        """The settings of LoftQ."""
        return _made(LoftQConfig, "loftq_config", self.loftq_config)

    @property
    def trains_second(self) -> bool:
        """Whether `B` is trained, as it is but for MiCA."""
        return self.init_lora_weights != "mica"

    @property
    def saved_standalone(self) -> bool:
        """Whether an adapter is always saved as a plain one: PEFT would derive another start than a random one here."""
        return str(self.init_lora_weights).startswith("pissa_niter_")

    def standalone(self) -> Self:
        """Return the config of a plain adapter of twice the rank, with the same scale at every module."""
        changed, factor = self.copy(), math.sqrt(2) if self.use_rslora else 2
        changed.init_lora_weights, changed.eva_config = True, None
        changed.r *= 2
        changed.lora_alpha *= factor
        changed.rank_pattern = {name: 2 * rank for name, rank in (self.rank_pattern or {}).items()}
        changed.alpha_pattern = {name: factor * alpha for name, alpha in (self.alpha_pattern or {}).items()}
        return changed

    def rank_for(self, name: str) -> int:
        """Return the rank at the module of a path."""
        return pattern_value(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        """Return the numerator of the scale at the module of a path."""
        return pattern_value(self.alpha_pattern, name, self.lora_alpha)


def _made(kind: type[Made], name: str, values: Any) -> Made:
    """Return the settings that a dict of their fields stands for."""
    try:
        return kind(**values)
    except TypeError as error:
        msg = f"LoraConfig.{name} is not what {kind.__name__} takes: {error}."
        raise ConfigError(msg) from error
