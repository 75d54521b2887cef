"""What tunerkit changes in other libraries, so that they treat its models as they treat PEFT's.

Nothing here is imported before the first `PeftModel` is made, and nothing here imports another library: what is to be
changed in a module is changed once that is imported, by whomever. The module named like a library says all of it.
"""

from __future__ import annotations

from tunerkit.integrations import transformers
from tunerkit.integrations.imports import after_import


def introduce(model: type) -> None:
    """Let the libraries that know PEFT's models know tunerkit's; to call it again does nothing.

    Args:
        model: The class of which they all are.
    """
    for name, change in transformers.changes(model).items():
        after_import(name, change)
