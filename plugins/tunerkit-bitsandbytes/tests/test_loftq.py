"""LoftQ on models that are quantised already: factors from what the quantised weights lack of the original ones."""

import copy
import json
import shutil

import pytest
import torch
from on_the_cpu import OnTheCpu
from quantised import FORMATS, TINY, Mlp, quantised
from safetensors.torch import load_file, save_file

from tunerkit import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tunerkit.errors import (
    AdapterStateError,
    ArgumentError,
    CheckpointError,
    CheckpointNotFoundError,
    UnknownAdapterError,
    UnsupportedSiteError,
)
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoftQConfig, LoraConfig, replace_lora_weights_loftq

transformers = pytest.importorskip("transformers", reason="LoftQ reads its models' files: pip install transformers")

TARGETS = ["first", "second", "head"]
STARTED = LoraConfig(target_modules=["first"], init_lora_weights="loftq", loftq_config=LoftQConfig())


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Mlp().eval()


@pytest.fixture
def folder(plain, tmp_path):
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def x():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


def adapted(plain, form="nf4", **settings):
    config = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **settings}
    return get_peft_model(quantised(copy.deepcopy(plain), form), LoraConfig(**config)).eval()


@torch.no_grad()
def errors_of(model, plain, name):
    """How far a layer's weight is from the original one, without and with the adapter."""
    layer = getattr(model.get_base_model(), name)
    lacking = getattr(plain, name).weight - layer.bare_site.weight
    return float(lacking.norm()), float((lacking - layer.get_delta_weight("default")).norm())


def bits_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" in name}


def unchanged(model, before):
    return all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("form", FORMATS)
class TestFactors:
    @pytest.mark.parametrize("settings", [{}, {"lora_alpha": 8}, {"use_rslora": True}, {"rank_pattern": {"first": 4}}])
    def test_are_the_best_for_what_the_weight_lacks(self, form, settings, plain, folder):
        model = adapted(plain, form, **settings)
        before = bits_of(model)
        replace_lora_weights_loftq(model, folder)
        for name in ("first", "second"):
            layer = getattr(model.get_base_model(), name)
            lacking = getattr(plain, name).weight - layer.bare_site.weight
            u, s, vh = torch.linalg.svd(lacking)
            rank = layer.r["default"]
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=1e-4, atol=1e-5)
            without, with_them = errors_of(model, plain, name)
            assert with_them < 0.95 * without
        head = [name for name in before if "head" in name]
        assert head
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in head)

    def test_with_dora(self, form, plain, folder):
        model = adapted(plain, form, use_dora=True)
        replace_lora_weights_loftq(model, folder)
        for name in ("first", "second"):
            without, with_them = errors_of(model, plain, name)
            assert with_them < 0.95 * without

    def test_a_rank_above_the_weights(self, form, plain, folder):
        model = adapted(plain, form, r=80, lora_alpha=80)
        model.base_model.model.first.lora_B["default"].weight.data.fill_(1)
        replace_lora_weights_loftq(model, folder)
        without, with_them = errors_of(model, plain, "first")
        assert with_them < 1e-3 * without


@pytest.mark.parametrize("form", ["nf4", "fp4"])  # those of eight bits round their inputs too
def test_the_output_comes_closer(form, plain, folder, x):
    model = adapted(plain, form, r=32, lora_alpha=32)
    expected, before = plain(x), model(x)
    replace_lora_weights_loftq(model, folder)
    assert (model(x) - expected).norm() < 0.8 * (before - expected).norm()


class TestCallback:
    def test_is_told_each_layer_and_decides(self, plain, folder):
        model = adapted(plain)
        before, seen = bits_of(model), []

        def keep(given, name):
            assert given is model
            seen.append((name, errors_of(model, plain, name)))
            return name == "second"

        replace_lora_weights_loftq(model, folder, callback=keep)
        assert [name for name, _ in seen] == ["first", "second"]
        assert all(with_them < without for _, (without, with_them) in seen)
        changed = {
            name.split(".")[2] for name, tensor in bits_of(model).items() if not torch.equal(tensor, before[name])
        }
        assert changed == {"second"}

    def test_that_fails_changes_nothing(self, plain, folder):
        model = adapted(plain, use_dora=True)
        before = bits_of(model)

        def fail(_model, name):
            if name == "second":
                raise KeyboardInterrupt
            return True

        with pytest.raises(KeyboardInterrupt):
            replace_lora_weights_loftq(model, folder, callback=fail)
        assert unchanged(model, before)


class TestFiles:
    def test_one_file(self, plain, folder):
        model = adapted(plain)
        other = folder.parent / "weights.safetensors"
        shutil.copy(folder / "model.safetensors", other)
        replace_lora_weights_loftq(model, str(other))
        without, with_them = errors_of(model, plain, "first")
        assert with_them < without

    @pytest.mark.parametrize("given", ["", "model.safetensors"])
    def test_shards(self, given, plain, folder):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {}
        for number, key in enumerate(state):
            name = f"model-{number + 1:05}-of-{len(state):05}.safetensors"
            save_file({key: state[key]}, folder / name)
            places[key] = name
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        model = adapted(plain)
        replace_lora_weights_loftq(model, folder / given)
        without, with_them = errors_of(model, plain, "second")
        assert with_them < without

    @pytest.mark.parametrize("saved", ["with_head", "without_head"])
    @pytest.mark.parametrize("kind", ["with_head", "without_head"])
    def test_of_a_transformers_model(self, kind, saved, tmp_path):
        torch.manual_seed(0)
        whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
        (whole if saved == "with_head" else whole.model).save_pretrained(tmp_path)
        original = whole if kind == "with_head" else whole.model
        base = quantised(copy.deepcopy(original))
        base.name_or_path = str(tmp_path)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
        replace_lora_weights_loftq(model)
        for layer in model.base_model.layers():
            lacking = original.get_submodule(layer.site.name).weight - layer.bare_site.weight
            assert (lacking - layer.get_delta_weight("default")).norm() < 0.95 * lacking.norm()


class TestRefusals:
    def refused(self, model, error, match, path=None, **arguments):
        before = bits_of(model)
        with pytest.raises(error, match=match):
            replace_lora_weights_loftq(model, path, **arguments)
        assert unchanged(model, before)

    def test_no_peft_model(self, plain, folder):
        match = r"peft_model must be a PeftModel; it is a Mlp\. Call get_peft_model first\."
        with pytest.raises(ArgumentError, match=match):
            replace_lora_weights_loftq(plain, folder)

    def test_no_such_adapter(self, plain, folder):
        self.refused(adapted(plain), UnknownAdapterError, "has no adapter 'defalt'", folder, adapter_name="defalt")

    @pytest.mark.parametrize("config", [LoraConfig(target_modules=["first"]), IA3Config(target_modules=["first"])])
    def test_no_quantised_layer_with_lora(self, config, plain, folder):
        base = plain if config.peft_type == "LORA" else quantised(plain)
        if config.peft_type != "LORA":
            config.feedforward_modules = []
        match = "'default' is no LoRA adapter on a quantised layer of this model, so there is nothing to start from"
        self.refused(get_peft_model(base, config), ArgumentError, match, folder)

    def test_the_folder_is_not_known(self, plain):
        match = "The base model, a Mlp, does not say what folder it was loaded from. Pass model_path"
        self.refused(adapted(plain), ArgumentError, match)

    def test_the_folder_is_not_there(self, plain, tmp_path):
        model = adapted(plain)
        self.refused(model, CheckpointNotFoundError, "There is no folder", tmp_path / "nowhere")
        model.get_base_model().name_or_path = "meta-llama/Llama-3.2-1B"
        self.refused(model, CheckpointNotFoundError, "Here only a folder will do: download it first")

    def test_the_folder_holds_no_weights(self, plain, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        self.refused(
            adapted(plain), CheckpointNotFoundError, "a pickle, and loading a pickle can run any code", tmp_path
        )

    def test_a_weight_is_missing(self, plain, folder):
        state = load_file(folder / "model.safetensors")
        state["secund.weight"] = state.pop("second.weight")
        save_file(state, folder / "model.safetensors")
        match = (
            r"The model's files lack the weight of 'second', 'second\.weight'; they hold 7 tensors\. "
            r"Closest: 'secund\.weight'"
        )
        self.refused(adapted(plain), CheckpointError, match, folder)

    @pytest.mark.parametrize("weight", [torch.zeros(64, 90), torch.zeros(64, 96, dtype=torch.uint8)])
    def test_a_weight_of_another_form(self, weight, plain, folder):
        state = load_file(folder / "model.safetensors")
        state["second.weight"] = weight
        save_file(state, folder / "model.safetensors")
        match = (
            r"'second\.weight' is \(64, 9\d\) of \w+ in '.*', and the weight of 'second' is \(64, 96\) of floating "
            r"point numbers\. Pass the files of this model as it was before it was quantised\."
        )
        self.refused(adapted(plain), CheckpointError, match, folder)

    @pytest.mark.filterwarnings("ignore::tunerkit.errors.QuantisationWarning")
    def test_it_is_merged(self, plain, folder):
        model = adapted(plain)
        model.merge_adapter()
        self.refused(model, AdapterStateError, "is merged into 'first'", folder)

    def test_a_start_that_is_taken_off(self, plain, folder):
        match = (
            "'default' cannot start anew on 'first': its start is one of the weight's own directions, which is taken "
            r"off again\. Use init_lora_weights=True\."
        )
        self.refused(adapted(plain, init_lora_weights="pissa"), AdapterStateError, match, folder)

    def test_a_scale_of_zero(self, plain, folder):
        match = "its scale is 0, and it must be above zero. Set another lora_alpha"
        self.refused(adapted(plain, lora_alpha=0), AdapterStateError, match, folder)


@pytest.mark.parametrize("form", FORMATS)
def test_the_other_start_wants_the_full_weight(form, plain):
    base = quantised(plain, form)
    before = dict(base.named_modules())
    with pytest.raises(UnsupportedSiteError) as error:
        get_peft_model(
            base, LoraConfig(target_modules=["first"], init_lora_weights="loftq", loftq_config=LoftQConfig())
        )
    assert str(error.value) == (
        "init_lora_weights='loftq' quantises the weight itself, and that of 'first' is quantised already. Give it the "
        "full model, or use True here and then replace_lora_weights_loftq. An adapter that was trained on these "
        "quantised weights is loaded with init_lora_weights=True in its config."
    )
    assert dict(base.named_modules()) == before


@pytest.mark.parametrize(("form", "bits"), [("nf4", 4), ("int8", 8)])
def test_both_starts_are_the_same(form, bits, plain, folder, x):
    settings = LoftQConfig(loftq_bits=bits)
    whole = get_peft_model(
        copy.deepcopy(plain), LoraConfig(target_modules=["first"], init_lora_weights="loftq", loftq_config=settings)
    )
    base = quantised(copy.deepcopy(plain), form, **({"compress_statistics": False} if bits == 4 else {}))
    model = get_peft_model(base, LoraConfig(target_modules=["first"]))
    replace_lora_weights_loftq(model, folder)
    ours, other = whole.get_base_model().first, model.get_base_model().first
    torch.testing.assert_close(ours.lora_start_weight["default"], other.bare_site.weight, rtol=1e-4, atol=1e-6)
    low, same = ours.adapters["default"], other.adapters["default"]
    torch.testing.assert_close(
        low.lora_B.weight @ low.lora_A.weight, same.lora_B.weight @ same.lora_A.weight, rtol=1e-4, atol=1e-6
    )


def test_as_in_peft(plain, folder):
    peft = pytest.importorskip("peft", reason="comparing with PEFT needs it: pip install peft")
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["first", "second"]}
    ours = get_peft_model(quantised(copy.deepcopy(plain)), LoraConfig(**config))
    theirs = peft.get_peft_model(quantised(copy.deepcopy(plain)), peft.LoraConfig(**config))
    seen = {"ours": [], "theirs": []}
    replace_lora_weights_loftq(ours, str(folder), callback=lambda _model, name: seen["ours"].append(name) or True)
    with OnTheCpu():
        peft.replace_lora_weights_loftq(
            theirs, str(folder), callback=lambda _model, name: seen["theirs"].append(name) or True
        )
    assert seen["ours"] == seen["theirs"] == ["first", "second"]
    for name in ("first", "second"):
        mine, other = (getattr(model.get_base_model(), name) for model in (ours, theirs))
        product = mine.lora_B["default"].weight @ mine.lora_A["default"].weight
        expected = other.lora_B["default"].weight @ other.lora_A["default"].weight
        assert product.abs().max() > 1e-3
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-6)


def test_qlora(tmp_path):
    """The loop of `test_qlora.py` with LoftQ's start."""
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    plain.save_pretrained(tmp_path / "base")
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}

    def load():
        base = quantised(copy.deepcopy(plain))
        base.name_or_path = str(tmp_path / "base")
        return prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(), config)
    before = copy.deepcopy(model).eval()
    replace_lora_weights_loftq(model)
    # Copies, because some processors reorder the numbers in a call without gradients, and then cannot train.
    after = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected, first, second = (each(**batch).logits for each in (plain, before, after))
    assert (second - expected).norm() < 0.9 * (first - expected).norm()

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses

    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
