"""Everything tunerkit raises or warns with.

Each error is a `TunerkitError` and also the builtin a caller would expect. A message names the object, says what was
found and what is possible, and ends with what to do.
"""

from __future__ import annotations


class TunerkitError(Exception):
    """Base of all errors raised by tunerkit."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would put the sentence in quotes and escape its newlines.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(TunerkitError, ValueError):
    """A setting has the wrong type or value, is unknown, or asks for something that is not built."""


class KeywordError(ConfigError, TypeError):
    """A call has no such keyword argument, or does not do here what it asks for."""


class ArgumentError(TunerkitError, TypeError, ValueError):
    """An argument of a call has the wrong type or value."""


class UnknownMethodError(TunerkitError, KeyError, ValueError):
    """No installed package offers the method."""


class PluginError(TunerkitError, RuntimeError):
    """A method's package is installed and cannot be used; the cause is chained where there is one."""


class TargetError(TunerkitError, ValueError):
    """What a config targets cannot be adapted."""


class NoMatchingPeftModuleError(TargetError):
    """Nothing in the model matches what the config targets (PEFT's name for it)."""


class UnsupportedSiteError(TargetError, TypeError):
    """A targeted module is of a kind that the method does not adapt."""


class AdapterNameError(TunerkitError, ValueError):
    """An adapter name is illegal or already taken."""


class UnknownAdapterError(TunerkitError, KeyError, ValueError):
    """The model holds no adapter of that name."""


class AdapterStateError(TunerkitError, RuntimeError, ValueError):
    """An adapter is in a state (merged, active, frozen) in which the call cannot be carried out."""


class StatusError(TunerkitError, TypeError, ValueError):
    """The status of something that is no model is asked for."""


class MergeError(AdapterStateError):
    """Adapters cannot be merged as asked."""


class CombinationError(TunerkitError, ValueError):
    """Adapters cannot be combined as asked."""


class RouteError(AdapterStateError):
    """A call cannot be routed to the adapters it names."""


class CheckpointError(TunerkitError, RuntimeError, ValueError):
    """A checkpoint cannot be read, written or fitted to the model."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was looked for."""


class NoEffectError(CheckpointError):
    """A loaded adapter changes nothing, and the caller asked whether it does."""


class TunerkitWarning(UserWarning):
    """Base of all warnings issued by tunerkit."""


class KeywordWarning(TunerkitWarning):
    """A keyword argument has no effect; what it asks for is asked elsewhere."""


class CardWarning(TunerkitWarning):
    """A checkpoint was saved and its model card was not."""


class TargetWarning(TunerkitWarning):
    """An entry of the config (a target, an exclusion) matched nothing while others did."""


class ConfigWarning(TunerkitWarning):
    """A setting was corrected, or has no effect."""


class TyingWarning(TunerkitWarning):
    """Modules that share a weight are trained so that they come to differ, or none are where they were to be tied."""


class LoadWarning(TunerkitWarning):
    """A checkpoint was loaded although tensors were missing or left over (`strict=False`)."""


class SaveWarning(TunerkitWarning):
    """A checkpoint holds more or less than the adapter: the base model's embeddings."""


class PluginWarning(TunerkitWarning):
    """Something about the installed plugins deserves a look (`tunerkit plugins` lists them)."""


class MergeWarning(TunerkitWarning):
    """Merging or unmerging did something beyond what was literally asked."""


class QuantisationWarning(MergeWarning):
    """Adapters were merged into quantised weights, which rounded the result."""

    @property
    def errors(self) -> dict[str, float]:
        """How far each weight is from the exact one, by the path of its layer.

        That is the norm of the difference, divided by that of the exact weight.
        """
        return self.args[1]  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return str(self.args[0])


class AdapterWarning(TunerkitWarning):
    """Adding, deleting or switching adapters did something beyond what was literally asked."""


class IntegrationWarning(TunerkitWarning):
    """Another library is not as tunerkit knows it, and may treat a model with adapters like any other."""


PeftError = TunerkitError
"""PEFT's name for it."""

PeftWarning = TunerkitWarning
"""PEFT's name for it."""
