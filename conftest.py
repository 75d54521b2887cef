"""What all tests of the repository share, those of the plugins too."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch
from hypothesis import settings
from messages import Recorder

# So that what the conformance kit counts is printed also where pytest-xdist runs the tests.
pytest_plugins = ["tunerkit.testing.summary"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("tunerkit", deadline=None)
settings.load_profile("tunerkit")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes the page of all messages."""
    parser.addoption("--messages", action="store_true", help="write docs/messages.md from the messages that tests read")


def pytest_configure(config: pytest.Config) -> None:
    """Draw the layers that stand in parameters the same in every run; listen to the tests if `--messages` is given."""
    torch.manual_seed(0)
    if config.getoption("messages"):
        config.pluginmanager.register(Recorder(), "messages")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Let each test draw the same numbers in every run, and other ones than the tests beside it."""
    torch.manual_seed(crc32(request.node.nodeid.encode()))
