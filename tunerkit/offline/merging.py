"""Merging an adapter into a model's folder without ever holding the model: tensor by tensor, file to file."""

from __future__ import annotations

import copy
import json
import shutil
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunerkit.checkpoint.encoding import bytes_of
from tunerkit.checkpoint.folder import check_folder
from tunerkit.errors import CheckpointError, LoadWarning, MergeError
from tunerkit.functional import loading_for
from tunerkit.naming import method_id
from tunerkit.offline.becoming import decide
from tunerkit.offline.fitting import NAME, match
from tunerkit.offline.folding import check_finite, fold_layer
from tunerkit.offline.keys import owners_of
from tunerkit.offline.model_folder import INDEX, MODEL_CONFIG, ModelFolder
from tunerkit.offline.skeleton import open_skeleton
from tunerkit.offline.tensor_file import DTYPES
from tunerkit.offline.writing import TensorWriter, check_out, new_folder, write_file
from tunerkit.plugins import get_method
from tunerkit.replication import wanted_ranges
from tunerkit.saved import SavedAdapter
from tunerkit.sums import split_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from tunerkit.offline.becoming import Becoming, Folded
    from tunerkit.offline.tensor_file import Entry


@dataclass
class MergeReport:
    """What was merged, and what was written.

    Attributes:
        base: The base model's folder.
        adapter: The adapter's folder.
        out: The folder that was written.
        method: The adapter's method.
        model: The class of the model.
        merged: The keys of the tensors into which the adapter was folded.
        replaced: The keys of those that the adapter's checkpoint holds itself: of modules trained as a whole
            (`modules_to_save`), of biases, and of embeddings.
        untouched: How many tensors were copied as they are.
        untied: The keys of tensors that the base's files left out because they were tied to another.
        lacking: Modules that the adapter's config means and of which its checkpoint holds nothing.
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
    replaced: list[str]
    untouched: int
    untied: list[str]
    lacking: list[str]
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

    Peak memory is the adapter and what folding one layer takes. The folder appears whole or not at all.

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
    becoming, lacking = _decide(folder, adapter)
    kept, left_out = folder.others()
    with new_folder(out) as work:
        merging = _Merging(folder, becoming, work, on_bytes)
        merging.run()
        _copy(folder.path, kept, work)
        # Last, because a folder without it is no model to anybody: what a kill leaves is not taken for one.
        _write_configs(folder, becoming, work)
    return MergeReport(
        base=str(base),
        adapter=str(adapter),
        out=str(out),
        method=method_id(str(becoming.adapter.peft_type)),
        model=becoming.model,
        merged=sorted(merging.merged),
        replaced=sorted(merging.replaced),
        untouched=len(merging.targets) - len(merging.merged | merging.replaced),
        untied=sorted(key for key, added in becoming.added.items() if added.tied),
        lacking=list(lacking),
        bytes=merging.total,
        left_out=[str(path) for path in left_out],
        seconds=round(time.perf_counter() - start, 3),
    )


def _decide(folder: ModelFolder, adapter: Path) -> tuple[Becoming, tuple[str, ...]]:
    """Read an adapter, put it onto the base model's skeleton and say what each of the base's tensors becomes.

    What was read is given up when this returns; the adapter's tensors are those on the skeleton.

    Returns:
        What they become, and the modules that the config means and of which the checkpoint holds nothing.
    """
    saved = SavedAdapter(adapter, None, None, is_trainable=False, device=None, key_mapping=None, download={})
    if wanted_ranges(saved.config):
        msg = (
            f"The adapter in '{adapter}' repeats layers of the base model (layer_replication), so the merged model "
            "would have other layers than the files. Load the model, call merge_and_unload() and save that."
        )
        raise MergeError(msg)
    owners = owners_of(saved.tensors, get_method(str(saved.config.peft_type)))
    skeleton = open_skeleton(folder.path, saved.config.to_dict(), {owner.path for owner in owners.values()})
    # What the model's parameters are called is asked before the adapter is put between them.
    names = skeleton.names()
    fit = match(skeleton.model, saved.config, saved.tensors, owners)
    tuner = fit.fitting_tuner(adapter, folder.path)
    if fit.doubt:
        warnings.warn(LoadWarning(f"The adapter in '{adapter}': {fit.doubt}"), stacklevel=3)
    loading_for(tuner, NAME, saved.tensors).write()
    return decide(folder, skeleton, names, tuner), fit.lacking


class _Merging:
    """One run from the base's files to those in the new folder, one module or tensor at a time."""

    def __init__(
        self, folder: ModelFolder, becoming: Becoming, work: Path, on_bytes: Callable[[int, int], None]
    ) -> None:
        self.becoming = becoming
        self.sources = folder.where
        self.on_bytes = on_bytes
        self.merged: set[str] = set()
        self.replaced: set[str] = set()
        self.targets: dict[str, TensorWriter] = {}
        self.done = self.total = 0
        self.writers = []
        for file in folder.files:
            entries = dict(file.entries)
            entries.update({key: added.entry for key, added in becoming.added.items() if added.beside in file.entries})
            writer = TensorWriter(work / file.path.name, entries, file.metadata)
            self.writers.append(writer)
            self.targets.update(dict.fromkeys(entries, writer))
            self.total += sum(entry.size for entry in entries.values())

    def run(self) -> None:
        """Write all tensors."""
        added, replaced = self.becoming.added, self.becoming.replaced
        for one in self.becoming.folded:
            self._fold(one)
        for key, tensor in replaced.items():
            self._replace(key, tensor, added[key].entry if key in added else self.sources[key].entries[key])
        written = {key for one in self.becoming.folded for key in one.results.values()}
        for key in self.targets:
            if key not in written and key not in replaced:
                self._copy(added[key].beside if key in added else key, key)
        for writer in self.writers:
            writer.finish()

    def _fold(self, one: Folded) -> None:
        def rows(local: str) -> Iterable[Tensor]:
            source = one.sources[local]
            given = self._given(source)
            return self.sources[source].rows(source) if given is None else split_rows(given)

        for layer in one.layers:
            tensors = {local: self._read(key) for local, key in one.sources.items()}
            folded = fold_layer(layer, tensors, rows, self.becoming.adapter)
            del tensors
            for local in list(folded):
                key = one.results[local]
                self._write(key, map(bytes_of, folded.pop(local)))
                self.merged.add(key)
        for local, key in one.results.items():
            if key not in self.merged:
                self._copy(one.sources[local], key)

    def _read(self, source: str) -> Tensor:
        given = self._given(source)
        return self.sources[source].read(source) if given is None else given

    def _given(self, source: str) -> Tensor | None:
        given = self.becoming.given.get(source)
        return None if given is None else given.detach().to(DTYPES[self.sources[source].entries[source].dtype])

    def _copy(self, source: str, key: str) -> None:
        """Write a tensor into which nothing is folded."""
        given = self.becoming.given.get(source)
        if given is None:
            self._write(key, self.sources[source].chunks(source))
        else:
            self._replace(key, given, self.sources[source].entries[source])

    def _replace(self, key: str, tensor: Tensor, entry: Entry) -> None:
        check_finite(key, tensor)
        self._write(key, [bytes_of(tensor.to(DTYPES[entry.dtype]))])
        self.replaced.add(key)

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
        where = folder.where
        counts = index.get("metadata") or {}
        for key, added in becoming.added.items():
            index["weight_map"][key] = where[added.beside].path.name
            for name, more in (("total_size", added.entry.size), ("total_parameters", added.entry.count)):
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
    try:
        target = out.resolve()
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for links in a circle.
        msg = f"'{out}' cannot be written to ({error}). Choose another path with --out."
        raise CheckpointError(msg) from error
    for source in (source.resolve() for source in sources):
        if target == source or target in source.parents or source in target.parents:
            msg = f"--out '{out}' and '{source}' are one folder, or one lies in the other. Write to a folder apart."
            raise CheckpointError(msg)
