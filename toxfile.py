"""Environments that share a folder.

tox removes and remakes an environment whose folder was last used under another name. The runner `shared` leaves the
name out of what tox compares, so that environments with one `env_dir` and equal dependencies use it in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tox.plugin import impl
from tox.tox_env.info import Info
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tox.tox_env.register import ToxEnvRegister


class SharedInfo(Info):
    """The record of an environment, without its name."""

    def compare(
        self, value: Any, section: str, sub_section: str | None = None
    ) -> AbstractContextManager[tuple[bool, Any | None]]:
        """Compare what the environment should be with what it was when last used."""
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if key != "name"}
        return super().compare(value, section, sub_section)


class SharedRunner(VirtualEnvRunner):
    """Runs in a folder that other environments use too."""

    @staticmethod
    def id() -> str:
        """Return the name by which `tox.ini` asks for this runner."""
        return "shared"

    @property
    def cache(self) -> Info:
        """The record of the environment."""
        return SharedInfo(self.env_dir)


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    """Make the runner known to tox."""
    register.add_run_env(SharedRunner)
