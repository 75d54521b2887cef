"""What came of loading a checkpoint."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

from tunerkit.errors import CheckpointError, LoadWarning
from tunerkit.naming import listing


@dataclass
class LoadReport:
    """Which tensors of a checkpoint found their place; the first two fields are named as in PEFT.

    Attributes:
        missing_keys: Tensors of the adapter that the checkpoint does not hold.
        unexpected_keys: Tensors of the checkpoint that the adapter does not have.
        mismatched_keys: Tensors whose shapes differ, with a note of both.
        loaded_keys: Tensors that were loaded.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)
    loaded_keys: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor on both sides found its place."""
        return not (self.missing_keys or self.unexpected_keys or self.mismatched_keys)

    def refuse_mismatched(self, source: str) -> None:
        """Raise `CheckpointError` if shapes differ."""
        if self.mismatched_keys:
            msg = (
                f"{source} does not fit the adapter. Tensors whose shapes differ ({len(self.mismatched_keys)}): "
                f"{'; '.join(self.mismatched_keys[:4])}. Use the config (ranks, targets) and the base model that it "
                "was made with."
            )
            raise CheckpointError(msg)

    def settle(self, source: str, *, strict: bool, optional: bool = True) -> None:
        """Raise if anything is missing or left over, or warn if not `strict`; raise in any case if shapes differ.

        Args:
            source: What was loaded, for the message.
            strict: Whether missing and unexpected tensors are an error.
            optional: Whether the caller of the call could say that they are not.

        Raises:
            CheckpointError: The checkpoint does not fit.
        """
        self.refuse_mismatched(source)
        if self.complete:
            return
        parts = []
        if self.missing_keys:
            parts.append(f"tensors of the adapter that it lacks: {listing(self.missing_keys, 4)}")
        if self.unexpected_keys:
            parts.append(f"tensors that have no place in the adapter: {listing(self.unexpected_keys, 4)}")
        fitting = f"{len(self.loaded_keys)} of its tensors do" if self.loaded_keys else "none of its tensors does"
        found = f"{source} does not fit the adapter ({fitting}): {'; '.join(parts)}.{self._shift()}"
        if strict:
            way = ", or pass strict=False to load what fits" if self.loaded_keys and optional else ""
            msg = f"{found} Load it into the base model it was made for{way}."
            raise CheckpointError(msg)
        effects = [
            ("The missing ones keep the values they had.", self.missing_keys),
            ("Those without a place were left out.", self.unexpected_keys),
        ]
        warnings.warn(LoadWarning(" ".join([found, *(text for text, keys in effects if keys)])), stacklevel=3)

    def _shift(self) -> str:
        """Return a sentence on the text by which the names on both sides differ, if that is all that differs."""
        missing, unexpected = set(self.missing_keys), set(self.unexpected_keys)
        shared = os.path.commonprefix([*missing, *unexpected]).rpartition(".")  # noqa: RUF071 - names, no paths
        common = len(shared[0] + shared[1])
        for ours, theirs, where in (
            (missing, unexpected, "checkpoint's names hold {!r} where the adapter's do not"),
            (unexpected, missing, "adapter's names hold {!r} where the checkpoint's do not"),
        ):
            short, long = ({name[common:] for name in names} for names in (ours, theirs))
            for end in short:
                added = next(iter(long), "").removesuffix(end)
                if added.endswith(".") and {added + name for name in short} == long:
                    return f" All the {where.format(added)}: `key_mapping` renames them."
        return ""
