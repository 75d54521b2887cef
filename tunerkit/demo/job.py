"""The main job: frozen model, linear map and adapter on the same task; then save, load and merge, and check each."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tunerkit.demo import adapting
from tunerkit.demo.baseline import train_linear_map
from tunerkit.demo.data import read_split
from tunerkit.demo.encoder import Encoder, find_model
from tunerkit.demo.errors import DemoError
from tunerkit.demo.evaluation import Retrieval
from tunerkit.demo.training import contrastive_loss, make_batches, train
from tunerkit.errors import MergeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from tunerkit.demo.data import Pair
    from tunerkit.demo.report import Report

TOLERANCE = 1e-5
"""How far vectors of unit length may be apart, in any entry, and count as equal: some roundings of float32."""

CHECKED_PAIRS = 32


@dataclass(frozen=True)
class Options:
    """What the user can choose.

    Attributes:
        out: The folder for the adapter's checkpoint.
        method: The method's name; if `None`, the only one that is installed.
        settings: Fields of the method's config that differ from the defaults.
        steps: How many steps to train, at most one epoch; if `None`, one epoch.
        learning_rate: The adapter's highest learning rate; the default was chosen on a part of the training side.
        seed: Decides the adapter's first values, the order of the pairs and the dropout.
    """

    out: Path
    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    learning_rate: float = 5e-3
    seed: int = 0


def run_demo(options: Options, report: Report) -> bool:
    """Run the whole job.

    Args:
        options: What the user chose.
        report: Where the results are shown.

    Returns:
        Whether the loaded and the merged model gave the trained model's outputs.

    Raises:
        DemoError: The job cannot run as asked.
        TunerkitError: The method cannot be loaded, configured or attached.
    """
    started = time.perf_counter()
    # What can be wrong with the options is found before the long work.
    folder = find_model()
    method = adapting.choose_method(options.method)
    config = adapting.make_config(method, options.settings)
    prepare_folder(options.out)
    with report.wait("Reading the standard library"):
        split = read_split()
    pairs = choose_pairs(split.train, options.steps, options.seed)
    with report.wait("Loading the model"):
        base, learner = Encoder.load(folder), Encoder.load(folder)
    torch.manual_seed(options.seed)
    model = learner.model = adapting.attach(learner.model, config)

    report.show_data(split, len(pairs))
    report.show_adapter(method, adapting.summarise(adapting.adapted_modules(model)), adapting.count_parameters(model))
    frozen, mapped = evaluate_baselines(base, split.held_out, pairs, report)
    train_adapter(learner, pairs, options.learning_rate, report)
    with report.wait("Encoding with the adapter"):
        adapted = Retrieval.of(*encode_pairs(learner, split.held_out))
    report.show_scores(frozen, mapped, adapted)
    report.show_examples(split.held_out, frozen, adapted)

    adapting.save(model, options.out)
    report.show_checkpoint(options.out)
    texts = [text for pair in split.held_out[:CHECKED_PAIRS] for text in (pair.sentence, pair.line)]
    trained = learner.encode(texts)
    report.show_change(base.encode(texts), trained)
    equal = check_checkpoint(options.out, Encoder.load(folder), texts, trained, report)
    report.show_end(options.out, time.perf_counter() - started)
    return equal


def evaluate_baselines(
    base: Encoder, held_out: Sequence[Pair], pairs: Sequence[Pair], report: Report
) -> tuple[Retrieval, Retrieval]:
    """Evaluate what the adapter is compared with.

    Returns:
        The results of the frozen model, and of a linear map on its vectors trained on the adapter's pairs and batches.
    """
    with report.wait("Encoding with the frozen model"):
        frozen = Retrieval.of(*encode_pairs(base, held_out))
        sentences, lines = encode_pairs(base, pairs)
    batches = make_batches(len(pairs))
    with report.progress("Linear map", len(batches)) as on_step:
        linear_map = train_linear_map(sentences, lines, batches, on_step=on_step)
    with torch.no_grad():
        return frozen, Retrieval.of(linear_map(frozen.sentences), linear_map(frozen.lines))


def train_adapter(learner: Encoder, pairs: Sequence[Pair], learning_rate: float, report: Report) -> None:
    """Train what the adapter leaves trainable, one step per batch of pairs."""
    sentences, lines = [pair.sentence for pair in pairs], [pair.line for pair in pairs]
    batches = make_batches(len(pairs))
    learner.train()
    with report.progress("Adapter", len(batches)) as on_step:
        train(
            [parameter for parameter in learner.parameters() if parameter.requires_grad],
            lambda batch: contrastive_loss(*learner(sentences[batch] + lines[batch]).chunk(2)),
            batches,
            learning_rate=learning_rate,
            on_step=on_step,
        )


def check_checkpoint(out: Path, fresh: Encoder, texts: Sequence[str], trained: Tensor, report: Report) -> bool:
    """Load the checkpoint into a fresh base model and merge it, comparing the outputs each time.

    Args:
        out: The checkpoint's folder.
        fresh: The encoder as it was pretrained; it is changed.
        texts: The texts to compare on.
        trained: Their vectors as the trained model gave them.
        report: Where the results are shown.

    Returns:
        Whether all outputs were equal.
    """
    model = fresh.model = adapting.load(fresh.model, out)
    loaded = report.show_check("loaded into a fresh base", fresh.encode(texts), trained, TOLERANCE)
    try:
        fresh.model = adapting.merge(model)
    except MergeError as error:
        report.show_unmerged(error)
        return loaded
    merged = report.show_check("merged into the base", fresh.encode(texts), trained, TOLERANCE)
    return loaded and merged


def prepare_folder(folder: Path) -> None:
    """Make the folder for the checkpoint, so that what is wrong with it is known before the training.

    Raises:
        DemoError: It cannot be made or written to, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = "there is a file of that name" if folder.is_file() else (error.strerror or str(error))
        msg = f"The checkpoint cannot be written to the folder {str(folder)!r}: {found}. Choose another with --out."
        raise DemoError(msg) from error


def choose_pairs(pairs: Sequence[Pair], steps: int | None, seed: int) -> list[Pair]:
    """Shuffle the pairs to train on, and keep those that the steps need.

    Raises:
        DemoError: There are more steps than one epoch has.
    """
    shuffled = random.Random(seed).sample(pairs, len(pairs))  # noqa: S311 - no secret
    batches = make_batches(len(pairs))
    if steps is None:
        return shuffled
    if steps > len(batches):
        msg = f"--steps {steps} is more than one epoch. Give 1 to {len(batches)}, or leave it out for the whole epoch."
        raise DemoError(msg)
    return shuffled[: batches[steps - 1].stop]


def encode_pairs(encoder: Encoder, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Encode the sentences and the lines of pairs, (pairs, width) each."""
    return encoder.encode([pair.sentence for pair in pairs]), encoder.encode([pair.line for pair in pairs])
