"""Merging an adapter into a model's folder without ever holding the model: tensor by tensor, file to file."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunerkit.checkpoint.folder import check_folder
from tunerkit.errors import CheckpointError
from tunerkit.naming import method_id
from tunerkit.offline.becoming import decide
from tunerkit.offline.fitting import NAME, match
from tunerkit.offline.folding import fold_layer
from tunerkit.offline.keys import entries_of, owner_of
from tunerkit.offline.model_folder import INDEX, MODEL_CONFIG, ModelFolder
from tunerkit.offline.skeleton import open_skeleton
from tunerkit.offline.writing import TensorWriter, bytes_of, check_out, new_folder, write_file
from tunerkit.plugins import get_method
from tunerkit.saved import SavedAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from tunerkit.config import PeftConfig
    from tunerkit.offline.becoming import Becoming, Folded


@dataclass
class MergeReport:
    """What was merged, and what was written.

    Attributes:
        base: The base model's folder.
        adapter: The adapter's folder.
        out: The folder that was written.
        method: The adapter's method.
        model: The class of the model.
        merged: The keys of the tensors that the adapter changed.
        untouched: How many tensors were copied as they are.
        untied: The keys of tensors that the base's files left out because they were tied to another.
        bytes: The size of all tensors that were written.
        left_out: Files of the base's folder that were not copied: weights in other formats.
        seconds: How long it took.
    """

    base: str
    adapter: str
    out: str
    method: str
    model: str
    merged: list[str]
    untouched: int
    untied: list[str]
    bytes: int
    left_out: list[str]
    seconds: float


def merge_folder(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    overwrite: bool = False,
    on_bytes: Callable[[int, int], None] = lambda _done, _total: None,
) -> MergeReport:
    """Merge an adapter into the model of a folder, and write the result as a folder like it.

    Peak memory is that of folding one layer. The folder appears whole or not at all.

    Args:
        base: The base model: a transformers model in safetensors, in one file or several.
        adapter: The adapter's checkpoint.
        out: Where to.
        overwrite: Replace what is at `out`, once the new folder is complete.
        on_bytes: Called with how many bytes are written, and how many there will be.

    Raises:
        CheckpointError: A folder cannot be read or written, or the adapter does not fit the base; nothing was written.
        MergeError: The adapter cannot be merged; nothing was written.
        TunerkitError: The adapter's method or transformers is not installed.
    """
    start = time.perf_counter()
    base, adapter = check_folder(base), check_folder(adapter)
    check_out(out, overwrite=overwrite)
    _check_apart(out, base, adapter)
    folder = ModelFolder.open(base)
    config, becoming, kind = _decide(folder, adapter)
    kept, left_out = folder.others()
    with new_folder(out) as work:
        merging = _Merging(folder, becoming, work, on_bytes)
        merging.run()
        _write_configs(folder, becoming, work)
        _copy(folder.path, kept, work)
    return MergeReport(
        base=str(base),
        adapter=str(adapter),
        out=str(out),
        method=method_id(str(config.peft_type)),
        model=kind.__name__,
        merged=sorted(merging.merged),
        untouched=len(merging.targets) - len(merging.merged),
        untied=sorted(becoming.added),
        bytes=merging.total,
        left_out=[str(path) for path in left_out],
        seconds=round(time.perf_counter() - start, 3),
    )


def _decide(folder: ModelFolder, adapter: Path) -> tuple[PeftConfig, Becoming, type]:
    """Read an adapter, put it onto the base model's skeleton and say what each of the base's tensors becomes.

    What was read is given up when this returns; the adapter's tensors are those on the skeleton.
    """
    saved = SavedAdapter(adapter, None, None, is_trainable=False, device=None, key_mapping=None)
    entries = entries_of(get_method(str(saved.config.peft_type)))
    owners = {key: owner_of(key, entries) for key in saved.tensors}
    skeleton = open_skeleton(folder.path, saved.config.to_dict(), {owner.path for owner in owners.values()})
    # What the model's parameters are called is asked before the adapter is put between them.
    names = skeleton.names()
    fit = match(skeleton.model, saved.config, saved.tensors, owners)
    tuner = fit.fitting_tuner(adapter, folder.path)
    saved.put_into(tuner, NAME, strict=True)
    return saved.config, decide(folder, skeleton, names, tuner), type(skeleton.model)


class _Merging:
    """One run from the base's files to those in the new folder, one module or tensor at a time."""

    def __init__(
        self, folder: ModelFolder, becoming: Becoming, work: Path, on_bytes: Callable[[int, int], None]
    ) -> None:
        self.becoming = becoming
        self.sources = folder.where
        self.on_bytes = on_bytes
        self.merged: set[str] = set()
        self.targets: dict[str, TensorWriter] = {}
        self.done = self.total = 0
        copies: dict[str, list[str]] = {}
        for key, source in becoming.added.items():
            copies.setdefault(source, []).append(key)
        self.writers = []
        for file in folder.files:
            # Beside what it was tied to, so that tensors of one dtype stay together, which keeps them aligned.
            entries = {name: entry for key, entry in file.entries.items() for name in (key, *copies.get(key, ()))}
            writer = TensorWriter(work / file.path.name, entries, file.metadata)
            self.writers.append(writer)
            self.targets.update(dict.fromkeys(entries, writer))
            self.total += sum(entry.size for entry in entries.values())

    def run(self) -> None:
        """Write all tensors."""
        for one in self.becoming.folded:
            self._fold(one)
        written = {key for one in self.becoming.folded for key in one.results.values()}
        for key in self.targets:
            if key not in written:
                self._copy(self.becoming.added.get(key, key), key)
        for writer in self.writers:
            writer.finish()

    def _fold(self, one: Folded) -> None:
        tensors = {local: self.sources[key].read(key) for local, key in one.sources.items()}
        changed: dict[str, Tensor] = {}
        for layer in one.layers:
            changed.update(fold_layer(layer, tensors))
        del tensors
        for local, key in one.results.items():
            if local in changed:
                tensor = changed.pop(local)
                self._write(key, [bytes_of(tensor)])
                del tensor
                self.merged.add(key)
            else:
                self._copy(one.sources[local], key)

    def _copy(self, source: str, key: str) -> None:
        self._write(key, self.sources[source].chunks(source))

    def _write(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        self.targets[key].write(key, self._counted(chunks))

    def _counted(self, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            yield chunk
            self.done += len(chunk)
            self.on_bytes(self.done, self.total)


def _write_configs(folder: ModelFolder, becoming: Becoming, work: Path) -> None:
    if becoming.config is None:
        write_file(work / MODEL_CONFIG, (folder.path / MODEL_CONFIG).read_bytes())
    else:
        write_file(work / MODEL_CONFIG, _json(becoming.config))
    if folder.index is not None and becoming.added:
        index = copy.deepcopy(folder.index)
        for key, source in becoming.added.items():
            file = folder.where[source]
            index["weight_map"][key] = file.path.name
            counts = index.get("metadata") or {}
            for name, more in (
                ("total_size", file.entries[source].size),
                ("total_parameters", file.entries[source].count),
            ):
                if isinstance(counts.get(name), int):
                    counts[name] += more
        write_file(work / INDEX, _json(index))
    elif folder.index is not None:
        write_file(work / INDEX, (folder.path / INDEX).read_bytes())


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _copy(folder: Path, names: list[Path], work: Path) -> None:
    for name in names:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, work / name)
        else:
            shutil.copy2(folder / name, work / name)


def _check_apart(out: Path, *sources: Path) -> None:
    """Raise `CheckpointError` if what is to be written would replace, or lie in, what is to be read."""
    target = out.resolve()
    for source in (source.resolve() for source in sources):
        if target == source or target in source.parents or source in target.parents:
            msg = f"--out '{out}' and '{source}' are one folder, or one lies in the other. Write to a folder apart."
            raise CheckpointError(msg)
