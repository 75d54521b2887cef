"""A disk that refuses an operation, or a process that ends at it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class Killed(BaseException):
    """Stands for the end of the process."""


class Faults:
    """Counts the operations of a save on the disk and fails at the k-th; after a kill, at all that follow too."""

    OPERATIONS = (
        (Path, "open"),
        (Path, "mkdir"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "rmdir"),
        (Path, "iterdir"),
        (os, "open"),
        (os, "fsync"),
        (os, "close"),
    )

    def __init__(self, monkeypatch, raised, at, *, after):
        self.raised, self.at, self.after = raised, at, after
        self.count = 0
        for owner, name in self.OPERATIONS:
            monkeypatch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, operation):
        def call(*args, **options):
            self.count += 1
            dead = isinstance(self.raised, Killed) and self.count > self.at
            hit = self.count == self.at
            if dead or (hit and not self.after):
                raise self.raised
            result = operation(*args, **options)
            if hit:
                if hasattr(result, "close"):  # Nobody else will.
                    result.close()
                raise self.raised
            return WrittenFile(result, self) if getattr(result, "writable", bool)() else result

        return call

    @property
    def was_reached(self):
        return self.count >= self.at


class WrittenFile:
    """A file that is open for writing, whose writes count: the one that fails writes half of what it should."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *problem):
        return self.file.__exit__(*problem)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        fails = self.faults.count + 1 == self.faults.at
        return self.faults.wrapped(self.file.write)(data[: len(data) // 2] if fails else data)


def fail_everywhere(path, raised, save, *, after, prepare):
    """Call `save` on what `prepare` made, failing at its k-th operation, for every k; yield that and the outcome."""
    at, outcome = 0, None
    while True:
        at += 1
        target = prepare(path / str(at))
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, raised, at, after=after)
            try:
                save(target)
            except BaseException as caught:  # noqa: BLE001 - interrupts are the point
                outcome = caught
            else:
                outcome = None
        if not faults.was_reached:
            break
        yield target, outcome
    assert outcome is None
    assert at > 15
