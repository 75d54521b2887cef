"""Kills processes that save in a loop, at random moments, and looks at what they leave: `killing.py WHAT KILLS FOLDER`.

Every save is of one number, which stands in the config and fills the tensors, so that a torn pair shows. The processes
are forks of this one, which has imported all that a save needs; it prints what it saw as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from torch import nn

from tunerkit import get_peft_model
from tunerkit.checkpoint.files import CONFIG_NAME, TEMPORARY, WEIGHTS_NAME, read_checkpoint, saved_id, temporary
from tunerkit.checkpoint.writing import write_checkpoint
from tunerkit.offline.tensor_file import TensorFile
from tunerkit_lora import LoraConfig

NUMBERS = (1, 2, 3)
PLACES = {"default": ".", "a": "a", "b": "b"}
"""The adapters of one model, and the folders below the one that is saved to."""


def read_pair(folder):
    """Return the number of a checkpoint, or what is wrong with it."""
    config, tensors, _ = read_checkpoint(folder)
    held = {value for tensor in tensors.values() for value in tensor.unique().tolist()}
    on_disk = json.loads((folder / CONFIG_NAME).read_bytes())
    return config["r"] if held == {config["r"]} and on_disk == config else f"{config['r']} beside {held}"


class Pairs:
    """A checkpoint, written without a model."""

    def __init__(self, folder):
        self.folders = [folder / "pair"]
        self.tensors = {number: {"a": torch.full((64, 64), float(number))} for number in NUMBERS}

    def save(self, number):
        write_checkpoint(self.folders[0], {"r": number}, self.tensors[number], {})

    def read(self):
        return {str(read_pair(folder)) for folder in self.folders}

    def state(self):
        """Say where the save was cut, by what it left: of each folder the furthest."""
        states = {self._state(folder) for folder in self.folders}
        return next(state for state in ("between the renames", "before the renames", "") if state in states)

    def _state(self, folder):
        pending = temporary(CONFIG_NAME, saved_id(folder) or "")
        left = [path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)]
        state = "between the renames" if any(path.name == pending for path in left) else "before the renames"
        for path in left:
            if path.name != pending:
                path.unlink()
        return state if left else ""


class Models(Pairs):
    """Several adapters of a model, each in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder / "model"
        self.folders = [self.folder / place for place in PLACES.values()]
        self.models = {number: self.model(number) for number in NUMBERS}

    def model(self, number):
        config = LoraConfig(r=number, lora_alpha=number, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), config)
        for name in PLACES:
            if name != "default":
                model.add_adapter(name, config)
        for key, tensor in model.state_dict().items():
            if "lora_" in key:
                tensor.fill_(number)
        return model

    def save(self, number):
        self.models[number].save_pretrained(self.folder)


class Merged:
    """A model's folder into which an adapter was merged, over an older one."""

    def __init__(self, folder):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.folder = folder / "merged"
        self.out = self.folder / "out"
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=False, **sizes))
        for number in NUMBERS:
            base = self.folder / f"base{number}"
            for tensor in llama.state_dict().values():
                tensor.fill_(number)
            llama.save_pretrained(base)
            values = json.loads((base / "config.json").read_bytes())
            (base / "config.json").write_text(json.dumps({**values, "number": number}), encoding="utf-8")
            (base / "tokenizer.json").write_text(str(number), encoding="utf-8")
        adapter = self.folder / "adapter"
        adapter.mkdir()
        path = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        pairs = [(path.format(layer, name), name) for layer in range(2) for name in "AB"]
        shapes = {"A": (1, 32), "B": (32, 1)}
        save_file({key: torch.ones(shapes[name]) for key, name in pairs}, adapter / WEIGHTS_NAME)
        values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
        (adapter / CONFIG_NAME).write_text(json.dumps(values), encoding="utf-8")

    def save(self, number):
        from tunerkit.offline.merging import merge_folder

        merge_folder(self.folder / f"base{number}", self.folder / "adapter", self.out, overwrite=True)

    def read(self):
        return {self._read(self.out)}

    def _read(self, folder):
        number = json.loads((folder / "config.json").read_bytes())["number"]
        file = TensorFile.open(folder / "model.safetensors")
        wrong = [
            key
            for key in file.entries
            if set(file.read(key).unique().tolist()) != {number + 1 if "q_proj" in key else number}
        ]
        wrong += [] if (folder / "tokenizer.json").read_text(encoding="utf-8") == str(number) else ["tokenizer.json"]
        return f"{number} without {wrong}" if wrong else str(number)

    def state(self):
        """Say what was left, which must be no model, or a whole one: that which was replaced."""
        state = ""
        for path in self.folder.glob("out.*"):
            whole = (path / "config.json").exists() and (path / "tokenizer.json").exists()
            if (path / "config.json").exists() and whole:
                self._read(path)
            state = "a whole folder beside it" if whole else "a part of a folder beside it"
            shutil.rmtree(path)
        return state


def kill(what, kills, seed):
    """Kill `kills` processes that save, and return what was seen."""
    chance = random.Random(seed)  # noqa: S311 - moments, not secrets
    start = time.perf_counter()
    for number in NUMBERS:
        what.save(number)
    window = 3 * (time.perf_counter() - start) / len(NUMBERS)
    torn, ended, states, seen = [], [], {}, set()
    for count in range(kills):
        child = os.fork()
        if child == 0:
            try:
                for number in itertools.islice(itertools.cycle(NUMBERS), count, None):
                    what.save(number)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, window))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            ended.append(status)
        state = what.state()
        states[state or "between two saves"] = states.get(state or "between two saves", 0) + 1
        try:
            found = what.read()
        except Exception as error:  # noqa: BLE001 - what it is stands in the report
            found = {f"{type(error).__name__}: {error}"}
        torn += sorted(found - set(map(str, NUMBERS)))
        seen |= found
    return {"kills": kills, "torn": torn, "ended": ended, "states": states, "seen": sorted(seen), "window": window}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = {"pairs": Pairs, "models": Models, "merged": Merged}
    place = Path(sys.argv[3])
    place.mkdir(exist_ok=True)
    print(json.dumps(kill(kinds[sys.argv[1]](place), int(sys.argv[2]), time.time_ns())))  # noqa: T201
