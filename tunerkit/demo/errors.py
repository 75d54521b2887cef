"""What the demo raises."""

from __future__ import annotations

from tunerkit.errors import TunerkitError


class DemoError(TunerkitError, RuntimeError):
    """The demo cannot run as asked."""
