"""What all tests of the repository share, those of the plugins too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings
from messages import Recorder

if TYPE_CHECKING:
    import pytest

# How long an example takes says more about the machine than about the code.
settings.register_profile("tunerkit", deadline=None)
settings.load_profile("tunerkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes the page of all messages."""
    parser.addoption("--messages", action="store_true", help="write docs/messages.md from the messages that tests read")


def pytest_configure(config: pytest.Config) -> None:
    """Listen to the tests, if their messages are to be written down."""
    if config.getoption("messages"):
        config.pluginmanager.register(Recorder(), "messages")
