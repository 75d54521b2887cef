"""PEFT's tables from the type of a method to its classes, over what is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from tunerkit.config import PeftType
from tunerkit.naming import method_id
from tunerkit.plugins import get_method, method_ids
from tunerkit.tuner import BaseTuner

if TYPE_CHECKING:
    from tunerkit.config import PeftConfig
    from tunerkit.plugins.method import Method

Class = TypeVar("Class")


class InstalledMethods(Mapping[str, Class]):
    """What every installed method has of one thing, by its type; a method is loaded when it is looked up.

    Args:
        take: Returns the thing of one method.
    """

    def __init__(self, take: Callable[[Method], Class]) -> None:
        self._take = take

    def __getitem__(self, peft_type: str) -> Class:
        return self._take(get_method(peft_type).method)

    def __contains__(self, peft_type: object) -> bool:
        return isinstance(peft_type, str) and method_id(peft_type) in method_ids()

    def __iter__(self) -> Iterator[str]:
        return iter(PeftType)

    def __len__(self) -> int:
        return len(method_ids())


PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[str, type[PeftConfig]] = InstalledMethods(lambda method: method.config)
"""The config class of every installed method."""

PEFT_TYPE_TO_TUNER_MAPPING: Mapping[str, type[BaseTuner]] = InstalledMethods(lambda method: method.tuner or BaseTuner)
"""The tuner class of every installed method."""
