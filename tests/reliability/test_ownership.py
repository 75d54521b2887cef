"""What is promised of ownership: whatever modules and adapters are called, what is saved is what is loaded."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from toys import bare, bias, registered, rotation, shared

import tunerkit
from tunerkit.errors import CheckpointError
from tunerkit.testing.bench import adapter_tensors, difference, move, same_bits

lora = pytest.importorskip("tunerkit_lora", reason="what is saved is LoRA's: pip install tunerkit-lora")
ia3 = pytest.importorskip("tunerkit_ia3", reason="what is saved is (IA)3's: pip install tunerkit-ia3")

# fmt: off
PLAIN = ["0", "1", "10", "a", "ab", "b", "default", "default2", "weight", "bias", "model", "base_model", "copies"]
PARTS = [
    "base_layer", "modules_to_save", "original_module", "lora_A", "lora_B", "lora_", "lora_embedding_A",
    "lora_magnitude_vector", "ia3_l", "ia3_", "toy_angles", "toy_bias", "toy_down", "parametrizations", "adapters",
    "layer",
]
# fmt: on
"""Names that are awkward beside one another, and those that mean something in keys, or to PEFT (`layer` ends
`base_layer`)."""

INPUT = torch.linspace(-1, 1, 12).reshape(3, 4)
METHODS = {
    "lora": lambda **more: lora.LoraConfig(r=2, **more),
    "dora": lambda **more: lora.LoraConfig(r=2, use_dora=True, **more),
    "ia3": lambda **more: ia3.IA3Config(feedforward_modules=[], **more),
    "forward": lambda **more: ia3.IA3Config(feedforward_modules=more["target_modules"], **more),
    "rotation": rotation.Config,
    "shared": lambda **more: shared.Config(train_shared=True, **more),
    "bare": bare.Config,
    "bias": bias.Config,
}
ENTRIES = {
    "lora": ["lora_A.weight", "lora_B.weight"],
    "dora": ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
    "ia3": ["ia3_l"],
    "forward": ["ia3_l"],
    "rotation": ["toy_angles"],
    "shared": ["toy_inner", "toy_outer"],
    "bare": ["toy_down.weight", "toy_up.weight"],
    "bias": ["toy_bias"],
}
OF_PEFT = ["lora", "dora", "ia3", "forward"]


class Node(nn.Module):
    def forward(self, x):
        for child in self.children():
            x = x + torch.tanh(child(x))
        return x


@dataclass
class Wanted:
    """One adapter: its name, its method, and the paths of what it adapts and of what it copies."""

    name: str
    method: str
    targets: list[str]
    wholes: list[str]
    bias: str = "none"

    def config(self):
        more = {} if self.bias == "none" else {"bias": self.bias}
        return METHODS[self.method](
            target_modules="|".join(map(re.escape, self.targets)), modules_to_save=self.wholes or None, **more
        )


@dataclass
class Case:
    """A model, by the paths of its layers, and adapters on it."""

    paths: list[str]
    biased: list[bool]
    adapters: list[Wanted] = field(default_factory=list)

    def base(self):
        torch.manual_seed(0)
        root = Node()
        for path, biased in zip(self.paths, self.biased, strict=True):
            *above, last = path.split(".")
            holder = root
            for name in above:
                if name not in holder._modules:
                    holder.add_module(name, Node())
                holder = holder._modules[name]
            holder.add_module(last, nn.Linear(4, 4, bias=biased))
        return root.eval()


def meant(entry, paths):
    """Return the layers that a name in a list means: at or below a module whose path is that name or ends with it."""
    return {path for path in paths if f".{entry}." in f".{path}."}


def within_another(entries, paths):
    """Say whether one module that these names mean stands in another."""
    modules = {tuple(path.split(".")[:end]) for path in paths for end in range(1, path.count(".") + 2)}
    found = {module for module in modules for entry in entries if f".{'.'.join(module)}".endswith(f".{entry}")}
    return any(module[:end] in found for module in found for end in range(1, len(module)))


@st.composite
def cases(draw, names=(*PLAIN, *PARTS), methods=tuple(METHODS)):
    given_names = st.sampled_from(names)
    drawn = draw(st.lists(st.lists(given_names, min_size=1, max_size=3).map(".".join), min_size=2, max_size=6))
    paths = sorted(set(drawn), key=drawn.index)
    # A layer holds no other, and a name below a layer would be one of the layer's own.
    paths = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
    case = Case(paths, draw(st.lists(st.booleans(), min_size=len(paths), max_size=len(paths))))
    entries = sorted(draw(st.sets(st.sampled_from(paths), max_size=2)))
    # What is copied as a whole holds no adapters, so all that its name means is kept free of them.
    kept = set().union(*(meant(entry, paths) for entry in entries))
    free = [path for path in paths if path not in kept]
    if not free:
        free, kept, entries = paths, set(), []
    # Of two modules, one in the other, no two adapters can copy one each.
    together = within_another(kept, paths)
    called = draw(st.lists(st.sampled_from([*PLAIN, *PARTS]), min_size=1, max_size=4, unique=True))
    biases = True  # only one adapter at a time trains them
    for name in called:
        targets = draw(st.lists(st.sampled_from(free), min_size=1, max_size=3, unique=True))
        if together:
            wholes = draw(st.sampled_from([[], entries]))
        else:
            wholes = draw(st.lists(st.sampled_from(sorted(kept)), max_size=2, unique=True)) if kept else []
        wanted = Wanted(name, draw(st.sampled_from(methods)), targets, wholes)
        if biases and wanted.method in ("lora", "dora") and any(case.biased[paths.index(path)] for path in targets):
            wanted.bias = draw(st.sampled_from(["none", "lora_only", "all"]))
            biases = wanted.bias == "none"
        case.adapters.append(wanted)
    return case


def run(model):
    with torch.no_grad():
        return model(INPUT)


def adapted(case):
    first, *others = case.adapters
    model = tunerkit.get_peft_model(case.base(), first.config(), first.name)
    for wanted in others:
        model.add_adapter(wanted.name, wanted.config())
    for number, wanted in enumerate(case.adapters):
        move(model, wanted.name, seed=number)
        model.set_adapter(wanted.name)
        if wanted.bias != "none":
            with torch.no_grad():
                for parameter in model.base_model.biases.parameters():
                    parameter.add_(0.5)
        assert difference(run(model), run(case.base())) > 1e-4
    return model.eval()


def keys_of(case, wanted):
    """Return the keys that the file must have: written down from the paths alone."""
    own = dict(zip(case.paths, case.biased, strict=True))
    keys = {f"{path}.{entry}" for path in wanted.targets for entry in ENTRIES[wanted.method]}
    for path in set().union(*(meant(entry, case.paths) for entry in wanted.wholes)):
        keys |= {f"{path}.weight"} | ({f"{path}.bias"} if own[path] else set())
    trained = {"none": [], "all": case.paths, "lora_only": wanted.targets}[wanted.bias]
    # PEFT saves the bias of a layer that is adapted under the name that it has in the layer.
    keys |= {f"{path}.base_layer.bias" if path in wanted.targets else f"{path}.bias" for path in trained if own[path]}
    part = {"base_model.toy_down", "base_model.toy_up"} if wanted.method == "shared" else set()
    return {f"base_model.model.{key}" for key in keys} | part


def folder_of(folder, name):
    return folder if name == "default" else folder / name


def check(case, order, renamed):
    """Save all adapters, look at the files, and load them in some order, each under the name of another."""
    model = adapted(case)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder, save_embedding_layers=False)
        loaded = None
        for wanted in order:
            own, name = folder_of(folder, wanted.name), renamed[wanted.name]
            assert set(load_file(own / "adapter_model.safetensors")) == keys_of(case, wanted)
            if loaded is None:
                loaded = tunerkit.PeftModel.from_pretrained(case.base(), own, name, verify=True)
            else:
                report = loaded.load_adapter(own, name, verify=True)
                assert report.complete
    for wanted in case.adapters:
        name = renamed[wanted.name]
        before, after = adapter_tensors(model, wanted.name), adapter_tensors(loaded, name)
        assert before.keys() == after.keys()
        assert all(same_bits(tensor, after[key]) for key, tensor in before.items())
        model.set_adapter(wanted.name)
        loaded.set_adapter(name)
        assert same_bits(run(loaded), run(model))


def draw_and_check(data):
    case = data.draw(cases())
    event(f"{len(case.adapters)} adapters")
    names = [wanted.name for wanted in case.adapters]
    renamed = dict(zip(names, data.draw(st.permutations(names)), strict=True))
    check(case, data.draw(st.permutations(case.adapters)), renamed)


@pytest.fixture(autouse=True, scope="module")
def known():
    with registered(bare, bias, rotation, shared):
        yield


class TestSavedIsLoaded:
    @settings(max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_with_hostile_names(self, data):
        draw_and_check(data)

    @pytest.mark.long
    @settings(max_examples=500, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def test_long(self, data):
        draw_and_check(data)


def taken_by_peft(case, wanted):
    """Say whether PEFT can load a file under these names: it finds its way by looking for text in the keys."""
    words = {part for path in case.paths for part in path.split(".")}
    modules = [name for name, _ in case.base().named_modules()]
    ends = [name for name in modules for whole in wanted.wholes if name.endswith(whole) and name not in case.paths]
    ends += [path for path in case.paths for whole in wanted.wholes if path.endswith(whole) and path != whole]
    return words.isdisjoint(PARTS) and not ends


class TestPeftLoadsIt:
    @settings(max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(case=cases(names=tuple(PLAIN), methods=tuple(OF_PEFT)))
    def test_where_the_names_allow(self, case):
        peft = pytest.importorskip("peft", reason="comparing with PEFT needs it")
        model = adapted(case)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model.save_pretrained(folder, save_embedding_layers=False)
            for wanted in case.adapters:
                if not taken_by_peft(case, wanted):
                    event("PEFT cannot")
                    continue
                event("PEFT loads it")
                theirs = peft.PeftModel.from_pretrained(case.base(), folder_of(folder, wanted.name))
                model.set_adapter(wanted.name)
                assert difference(run(theirs), run(model)) < 1e-5


class TestFolders:
    """Adapters are saved into folders that have their names, beside the files of the one that is called default."""

    def case(self, name):
        return Case(["a"], [True], [Wanted(called, "lora", ["a"], []) for called in ("default", "a", name)])

    @pytest.mark.parametrize("name", ["é ü", "e\u0301", "~", " ", "-", "default2", "中" * 85])
    def test_a_name_that_is_a_folder_s(self, name):
        case = self.case(name)
        check(case, case.adapters, {wanted.name: wanted.name for wanted in case.adapters})

    def test_a_name_that_is_another_s_folder_where_case_does_not_count(self, tmp_path, monkeypatch):
        exists = Path.exists

        def exists_in_any_case(path):
            others = path.parent.iterdir() if exists(path.parent) else ()
            return exists(path) or path.name.lower() in [other.name.lower() for other in others]

        model = adapted(Case(["a"], [True], [Wanted(called, "lora", ["a"], []) for called in ("a", "A")]))
        model.save_pretrained(tmp_path / "both")
        assert {path.name for path in (tmp_path / "both").iterdir()} == {"a", "A", "README.md"}
        monkeypatch.setattr(Path, "exists", exists_in_any_case)
        model.save_pretrained(tmp_path / "both")
        with pytest.raises(CheckpointError, match=r"adapter 'A' would go into the folder '.*a', .* Save it elsewhere"):
            model.save_pretrained(tmp_path / "one")
        tunerkit.PeftModel.from_pretrained(self.case("b").base(), tmp_path / "one" / "a", verify=True)

    def test_a_name_that_no_folder_has(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"The checkpoint could not be written to .*中"):
            adapted(self.case("中" * 100)).save_pretrained(tmp_path)
        tunerkit.PeftModel.from_pretrained(self.case("b").base(), tmp_path, verify=True)
