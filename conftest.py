"""What all tests of the repository share, those of the plugins too."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("tunerkit", deadline=None)
settings.load_profile("tunerkit")


def pytest_addoption(parser):
    parser.addoption("--messages", action="store_true", help="write docs/messages.md from the messages that tests read")


def pytest_configure(config):
    if config.getoption("messages"):
        from messages import Recorder

        config.pluginmanager.register(Recorder(), "messages")
