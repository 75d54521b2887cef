"""What all tests of the repository share, those of the plugins too."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("tunerkit", deadline=None)
settings.load_profile("tunerkit")
