"""Tests that every method has to pass, for the authors of methods.

An author subclasses `MethodConformance` in a test module and says what the config is:

    class TestMyMethod(MethodConformance):
        def config(self):
            return MyConfig(rank=4)

pytest then runs every check that the core relies on. The docstring of a check says what it protects and how to mend
what it finds. Its name, `test_...`, is what `absent` takes to leave one out, with a reason that the report shows. What
an adapter's class declares that it cannot do (`Adapter.unfoldable`) is left out too, for that reason.
"""

from __future__ import annotations

try:
    import pytest
except ModuleNotFoundError as error:
    _msg = "tunerkit.testing needs pytest, which is not installed: pip install 'tunerkit[testing]'"
    raise ModuleNotFoundError(_msg, name=error.name) from error

# So that a failing check shows the values; pytest does it by itself only for an author's own modules.
pytest.register_assert_rewrite(
    *(
        f"{__name__}.{room}"
        for room in (
            "bench",
            "calls",
            "files",
            "graphs",
            "lifecycle",
            "maths",
            "merging",
            "mixing",
            "precision",
            "routes",
            "rows",
            "state",
            "wholes",
        )
    )
)

from tunerkit.testing.conformance import MethodConformance  # noqa: E402 - only after pytest was told to rewrite

__all__ = ["MethodConformance"]
