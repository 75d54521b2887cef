"""The settings that the toy methods have in common."""

from __future__ import annotations

from dataclasses import dataclass

from tunerkit.config import PeftConfig


@dataclass
class ToyConfig(PeftConfig):
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank: int = 2
