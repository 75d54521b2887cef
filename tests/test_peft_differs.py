"""What PEFT does otherwise, as `docs/differences.md` says: each test runs both libraries and shows the difference."""

import contextlib
import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tunerkit
from tunerkit.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    KeywordError,
    LoadWarning,
    TargetError,
    TargetWarning,
    UnsupportedSiteError,
)
from tunerkit.testing.parity import Pair, assert_close, peft_config, quiet, run
from tunerkit_ia3 import IA3Config
from tunerkit_lora import LoraConfig

peft = pytest.importorskip("peft", reason="what is compared with: pip install peft")
BOTH = pytest.mark.parametrize("library", [tunerkit, peft], ids=lambda library: library.__name__)
X = {"x": torch.randn(5, 6, generator=torch.Generator().manual_seed(1))}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def base():
    torch.manual_seed(0)
    return Net().eval()


def lora(*targets, r=2, **values):
    return LoraConfig(r=r, target_modules=list(targets or ("first", "last")), init_lora_weights=False, **values)


def of(library, config):
    return config if library is tunerkit else peft_config(config)


def adapted(library, config=None, model=None, **options):
    with quiet():
        return library.get_peft_model(base() if model is None else model, of(library, config or lora()), **options)


def flags(model, name="default"):
    return {p.requires_grad for key, p in model.named_parameters() if f".{name}." in f"{key}."}


def silent(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return not seen


class TestLoading:
    @pytest.fixture
    def saved(self, tmp_path):
        adapted(tunerkit).save_pretrained(tmp_path)
        return tmp_path

    def edit(self, folder, **values):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def test_tensors_that_have_no_place(self, saved):
        self.edit(saved, target_modules=["first"])
        loaded = peft.PeftModel.from_pretrained(base(), saved)  # without a word
        assert not any("lora" in name for name, _ in loaded.get_base_model().last.named_parameters())
        with pytest.raises(CheckpointError, match="no place"):
            tunerkit.PeftModel.from_pretrained(base(), saved)

    def test_tensors_that_are_missing(self, saved):
        self.edit(saved, target_modules=["first"])
        adapted(tunerkit, lora("first")).save_pretrained(saved)
        self.edit(saved, target_modules=["first", "last"])
        with pytest.warns(UserWarning, match="missing adapter keys"):
            peft.PeftModel.from_pretrained(base(), saved)
        with pytest.raises(CheckpointError, match="lacks"):
            tunerkit.PeftModel.from_pretrained(base(), saved)

    def test_keys_of_the_report(self, saved):
        path = saved / "adapter_model.safetensors"
        tensors = tunerkit.load_peft_weights(saved)
        save_file({key: value for key, value in tensors.items() if "last.lora_A" not in key}, path)
        theirs = adapted(peft).load_adapter(saved, "new")
        with pytest.warns(LoadWarning, match="lacks"):
            ours = adapted(tunerkit).load_adapter(saved, "new", strict=False)
        assert theirs.missing_keys == ["base_model.model.last.lora_A.new.weight"]
        assert ours.missing_keys == ["base_model.model.last.lora_A.weight"]

    def test_taken_name_with_another_config(self, tmp_path):
        adapted(tunerkit, lora(lora_alpha=9)).save_pretrained(tmp_path)
        theirs = adapted(peft)
        with quiet():
            theirs.load_adapter(tmp_path, "default")
        assert theirs.peft_config["default"].lora_alpha == 8  # the tensors of the one, the scale of the other
        ours = adapted(tunerkit)
        with pytest.raises(AdapterNameError, match="lora_alpha: 9 there, 8 here"):
            ours.load_adapter(tmp_path, "default")

    def test_unknown_key_of_a_config(self, saved):
        self.edit(saved, use_novelty=True)
        with pytest.warns(UserWarning, match="use_novelty"):
            peft.PeftConfig.from_pretrained(saved)
        with pytest.raises(ConfigError, match="use_novelty"):
            tunerkit.PeftConfig.from_pretrained(saved)

    def test_unknown_keyword(self, saved):
        peft.PeftModel.from_pretrained(base(), saved, key_maping={})
        with pytest.raises(KeywordError, match="key_maping"):
            tunerkit.PeftModel.from_pretrained(base(), saved, key_maping={})

    def test_pickles(self, tmp_path):
        adapted(peft).save_pretrained(tmp_path, safe_serialization=False)
        assert (tmp_path / "adapter_model.bin").is_file()
        with pytest.raises(CheckpointError, match="safe_serialization"):
            adapted(tunerkit).save_pretrained(tmp_path / "ours", safe_serialization=False)

    def test_half_precision_on_meta(self, saved):
        found = []
        for library in (tunerkit, peft):
            model = library.PeftModel.from_pretrained(base().bfloat16(), saved, low_cpu_mem_usage=True)
            found.append(model.get_base_model().first.lora_A["default"].weight)
        tensor = tunerkit.load_peft_weights(saved)["base_model.model.first.lora_A.weight"]
        assert found[0].dtype is found[1].dtype is torch.float32
        assert torch.equal(found[0], tensor)
        assert torch.equal(found[1], tensor.bfloat16().float())
        assert not torch.equal(*found)


class TestAttaching:
    def test_what_fails_half_way(self):
        class Other(nn.Module):
            def forward(self, x):
                return x

        model = nn.Sequential(nn.Linear(4, 4), Other(), nn.Linear(4, 4))
        for library, left in ((tunerkit, False), (peft, True)):
            tried = copy.deepcopy(model)
            with pytest.raises(ValueError, match=r"not supported|is a Other"):
                adapted(library, lora("0", "1"), tried)
            assert (type(tried[0]) is not nn.Linear) == left

    def test_entry_that_matches_nothing(self):
        assert silent(lambda: adapted(peft, lora("first", "lost")))
        with pytest.warns(TargetWarning, match="'lost'"):
            adapted(tunerkit, lora("first", "lost"))

    def test_numbers_of_layers(self):
        model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(2))})
        config = lora("q", layers_to_transform=[0])
        assert list(tunerkit.plan(copy.deepcopy(model), config).adapted) == ["h.0.q"]
        with pytest.raises(ValueError, match="not found"):
            adapted(peft, config, model)

    @BOTH
    def test_the_config_that_is_passed(self, library):
        model = base()
        model.config = {"model_type": "bert"}
        model.bert = nn.ModuleDict({"query": nn.Linear(6, 6), "value": nn.Linear(6, 6)})
        config = of(library, LoraConfig(base_model_name_or_path="here", r=2))
        ours = library is tunerkit
        with contextlib.nullcontext() if ours else pytest.warns(UserWarning, match="was renamed from 'here' to 'None'"):
            wrapped = library.get_peft_model(model, config)
        assert (config.target_modules is None) == ours
        assert wrapped.peft_config["default"].target_modules == {"query", "value"}
        assert wrapped.peft_config["default"].base_model_name_or_path == ("here" if ours else None)

    def test_a_second_time(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(adapted(peft), of(peft, lora()))
        assert isinstance(theirs.get_base_model(), peft.PeftModel)
        with pytest.raises(AdapterNameError, match="PeftModel already"):
            tunerkit.get_peft_model(adapted(tunerkit), lora())

    @BOTH
    def test_a_module_at_several_places(self, library):
        model = base()
        model.again = model.first
        adapted(library, lora("first", "again"), model)
        assert (model.first is model.again) == (library is tunerkit)

    def test_module_to_save_that_is_not_there(self):
        assert silent(lambda: adapted(peft, lora("first", modules_to_save=["hed"])))
        with pytest.warns(TargetWarning, match="hed"):
            adapted(tunerkit, lora("first", modules_to_save=["hed"]))

    @BOTH
    def test_module_to_save_inside_another(self, library):
        model = nn.ModuleDict({"first": nn.Linear(6, 8), "head": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})
        wrapped = adapted(library, lora("first", modules_to_save=["head", "head.1"]), model)
        inner = {name for name, _ in wrapped.named_parameters() if "head.1.modules_to_save" in name}
        assert (inner == set()) == (library is tunerkit)

    def test_module_to_save_that_another_adapter_adapts(self):
        model = nn.ModuleDict({"first": nn.Linear(6, 8), "head": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})
        first, second = lora("first", "0"), lora("first", modules_to_save=["head"])
        theirs = adapted(peft, first, copy.deepcopy(model))
        theirs.add_adapter("second", of(peft, second))
        assert any("modules_to_save.second.0.lora_A" in name for name, _ in theirs.named_parameters())
        with pytest.raises(KeyError):
            peft.get_peft_model_state_dict(theirs, adapter_name="second")
        with pytest.raises(TargetError, match="head"):
            adapted(tunerkit, first, model).add_adapter("second", second)

    @pytest.mark.parametrize("name", ["a/b", "a\\b", "a\nb", 101 * "a", "a.b", "training", "keys"])
    def test_names(self, name):
        if name not in {"a.b", "training", "keys"}:
            adapted(peft, adapter_name=name)
        else:
            with pytest.raises(KeyError):
                adapted(peft, adapter_name=name)
        with pytest.raises(AdapterNameError):
            adapted(tunerkit, adapter_name=name)

    def test_a_seed(self):
        factors = []
        for library in (tunerkit, peft):
            torch.manual_seed(3)
            model = library.get_peft_model(base(), of(library, LoraConfig(target_modules=["first"])))
            factors.append(model.get_base_model().first.lora_A["default"].weight)
        assert not torch.equal(*factors)
        assert factors[0].abs().max() < 6**-0.5 > factors[1].abs().max()  # the same distribution

    def test_starts_from_a_quantised_base(self):
        """PEFT fails at layers that are not linear; here embeddings start as ever, and the others are refused."""
        for layer in (nn.Embedding(8, 4), nn.Conv2d(3, 4, 3)):
            config = peft.LoraConfig(target_modules=["0"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
            with pytest.raises(TypeError, match="config"):
                peft.get_peft_model(nn.Sequential(layer), config)
        ours = LoraConfig(target_modules=["0"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
        model = tunerkit.get_peft_model(nn.Sequential(nn.Embedding(8, 4)), ours)
        assert model.get_base_model()[0].lora_embedding_A["default"].abs().max() == 0
        with pytest.raises(UnsupportedSiteError, match="init_lora_weights='loftq' is for linear layers"):
            tunerkit.get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), ours)


class TestState:
    @BOTH
    def test_a_frozen_adapter_beside_another(self, library):
        """PEFT has mended this."""
        model = adapted(library)
        model.add_adapter("frozen", of(library, lora(inference_mode=True)))
        assert flags(model) == {True}

    @BOTH
    def test_disabled_while_merged(self, library):
        model = adapted(library)
        model.merge_adapter()
        with model.disable_adapter():
            assert_close(run(model, X), run(base(), X))
        assert model.get_base_model().first.merged == (library is tunerkit)

    def test_several_names(self):
        for library in (tunerkit, peft):
            model = adapted(library)
            model.add_adapter("b", of(library, lora()))
            if library is peft:
                with pytest.raises((ValueError, TypeError)):
                    model.set_adapter(["default", "b"])
            else:
                model.set_adapter(["default", "b"])
                assert model.active_adapters == ["default", "b"]

    @BOTH
    def test_the_last_adapter_of_a_layer(self, library):
        model = base()
        layer = model.first
        wrapped = adapted(library, model=model)
        wrapped.delete_adapter("default")
        assert (model.first is layer) == (library is tunerkit)

    @BOTH
    def test_what_trained_before(self, library):
        model = adapted(library).unload()
        assert {p.requires_grad for p in model.parameters()} == {library is tunerkit}

    @BOTH
    def test_biases_while_another_adapter_is_active(self, library):
        model = adapted(library, lora(bias="all"))
        with torch.no_grad():
            model.get_base_model().first.bias.add_(1)
        model.add_adapter("b", of(library, lora("last")))
        model.set_adapter("b")
        kept = torch.equal(model.get_base_model().first.bias, base().first.bias)
        assert kept == (library is tunerkit)

    @BOTH
    def test_keys_of_biases_beside_another_adapter(self, library):
        alone = adapted(library, lora("first", bias="lora_only"))
        beside = adapted(library, lora("first", bias="lora_only"))
        beside.add_adapter("b", of(library, lora("last")))
        keys = [set(library.get_peft_model_state_dict(model, adapter_name="default")) for model in (alone, beside)]
        assert (keys[0] == keys[1]) == (library is tunerkit)

    @BOTH
    def test_an_injected_models_status(self, library):
        model = library.inject_adapter_in_model(of(library, lora()), base())
        status = library.get_model_status(model)
        known = ("Net", {"default": "LORA"}) if library is tunerkit else ("other", {})
        assert (status.base_model_type, status.peft_types) == known


class TestMerging:
    @BOTH
    def test_unmerging_in_half_precision(self, library):
        model = base().bfloat16()
        before = model.first.weight.clone()
        wrapped = adapted(library, model=model)
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()
        assert torch.equal(model.first.base_layer.weight, before) == (library is tunerkit)

    @BOTH
    def test_update_of_ia3(self, library):
        config = IA3Config(target_modules=["first"], feedforward_modules=[])
        layer = adapted(library, config).get_base_model().first
        assert hasattr(layer, "get_delta_weight") == (library is tunerkit)

    @BOTH
    def test_feed_forward_layers(self, library):
        config = IA3Config(target_modules=["first"], feedforward_modules=["first"])
        layer = adapted(library, config).get_base_model().first
        assert layer.is_feedforward == ({"default": True} if library is tunerkit else True)

    @BOTH
    def test_merging_one_that_has_copies(self, library):
        model = adapted(library, lora("first", modules_to_save=["last"]), adapter_name="one")
        model.add_adapter("two", of(library, lora("first", modules_to_save=["last"])))
        copies = model.get_base_model().last.modules_to_save
        with torch.no_grad():
            copies["one"].bias.fill_(1)
            copies["two"].bias.fill_(2)
        merged = model.merge_and_unload(adapter_names=["two"])
        assert merged.last.bias[0] == (2 if library is tunerkit else 1)


class TestCombining:
    def test_the_name_of_an_adapter_that_is_there(self):
        pair = Pair(base(), lora(), X, "one")
        pair.add("two", lora())
        before = pair.theirs.get_base_model().first.lora_A["two"].weight.clone()
        pair.theirs.add_weighted_adapter(["one"], [1.0], "two")  # without a word
        assert torch.equal(pair.theirs.get_base_model().first.lora_A["two"].weight, before)
        with pytest.raises(AdapterNameError, match="There is an adapter 'two' already"):
            pair.ours.add_weighted_adapter(["one"], [1.0], "two")

    @pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
    def test_rank_stabilised(self, kind):
        pair = Pair(base(), lora(r=4, use_rslora=True), X, "one")
        expected = run(pair.ours, X)
        for model, right in ((pair.ours, True), (pair.theirs, False)):
            model.add_weighted_adapter(["one"], [1.0], "new", kind)
            model.set_adapter("new")
            assert ((run(model, X) - expected).abs().max() < 1e-4) == right


class TestSwapping:
    def test_layers_that_the_new_one_lacks_and_the_config(self, tmp_path):
        from peft.utils.hotswap import hotswap_adapter

        other = adapted(tunerkit, LoraConfig(r=2, lora_alpha=3, target_modules=["first"]))
        with torch.no_grad():
            other.get_base_model().first.lora_B["default"].weight.fill_(1)
        other.save_pretrained(tmp_path)
        expected = run(tunerkit.PeftModel.from_pretrained(base(), tmp_path), X)
        ours, theirs = adapted(tunerkit), adapted(peft)
        tunerkit.hotswap_adapter(ours, tmp_path, "default")
        assert_close(run(ours, X), expected)
        assert ours.peft_config["default"].lora_alpha == 3
        with quiet():
            hotswap_adapter(theirs, tmp_path, "default")
        assert theirs.peft_config["default"].lora_alpha == 8

    def test_other_methods(self, tmp_path):
        from peft.utils.hotswap import hotswap_adapter

        config = IA3Config(target_modules=["first"], feedforward_modules=[], init_ia3_weights=False)
        adapted(tunerkit, config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="IA3"):
            hotswap_adapter(adapted(peft, config), tmp_path, "default")
        ours = adapted(tunerkit, config)
        tunerkit.hotswap_adapter(ours, tmp_path, "default")
        assert_close(run(ours, X), run(tunerkit.PeftModel.from_pretrained(base(), tmp_path), X))


class TestStarts:
    @BOTH
    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_the_base_weight(self, library, start):
        model = base()
        before = model.first.weight.clone()
        adapted(library, LoraConfig(r=2, target_modules=["first"], init_lora_weights=start), model)
        changed = (model.first.base_layer.weight - before).abs().max() > 1e-3
        assert changed == (library is peft)

    def test_olora_where_weights_are_stored_in_x_out(self):
        conv1d = pytest.importorskip("transformers", reason="it has the layer").pytorch_utils.Conv1D
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora", fan_in_fan_out=True)
        shapes = []
        for library in (tunerkit, peft):
            layer = adapted(library, config, nn.Sequential(conv1d(5, 6))).get_base_model()[0]
            shapes.append((tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)))
        assert shapes[0] == ((2, 6), (5, 2)) != shapes[1]

    @pytest.mark.parametrize(
        ("start", "layer", "targets"),
        [
            ("eva", nn.MultiheadAttention(8, 2), {"target_modules": ["0"]}),
            ("eva", nn.Linear(8, 6), {"target_parameters": ["0.weight"]}),
            ("orthogonal", nn.Linear(8, 6), {"target_parameters": ["0.weight"]}),
        ],
    )
    @pytest.mark.filterwarnings(
        "ignore:`init_lora_weights` is 'eva':UserWarning", "ignore:lora with eva init"
    )  # PEFT's
    def test_layers_that_have_no_such_start(self, start, layer, targets, tmp_path):
        rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))

        def call(model):
            return model(rows) if isinstance(layer, nn.Linear) else model(rows, rows, rows)[0]

        config = peft.LoraConfig(r=2, init_lora_weights=start, **targets)
        theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).eval()
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                if "lora_" in name:
                    tensor.normal_(std=0.3)  # small: softmax makes much of the last digits of large numbers
        theirs.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedSiteError, match=f"init_lora_weights='{start}'"):
            tunerkit.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(layer)), tmp_path)
        plain = LoraConfig(r=2, **targets)
        ours = tunerkit.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(layer)), tmp_path, config=plain)
        found = call(ours.get_base_model()[0])
        assert_close(found, call(theirs.get_base_model()[0]))
        assert (found - call(layer)).abs().max() > 1e-3

    def test_orthogonal_factors_of_a_stack(self):
        """PEFT makes as few rows as for one matrix."""

        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3, 8, 8))

            def forward(self, x):
                return x @ self.weight[0]

        config = {"r": 2, "init_lora_weights": "orthogonal", "target_parameters": ["0.weight"]}
        theirs = peft.get_peft_model(nn.Sequential(Experts()), peft.LoraConfig(**config))
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            theirs(torch.randn(5, 8))
        with pytest.raises(UnsupportedSiteError, match="init_lora_weights='orthogonal'"):
            tunerkit.get_peft_model(nn.Sequential(Experts()), LoraConfig(**config))

    def test_dora_on_a_convolution_with_groups(self):
        config = {"r": 2, "use_dora": True, "target_modules": ["0"]}
        with pytest.warns(UserWarning, match="groups"):
            peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), peft.LoraConfig(**config))
        with pytest.raises(UnsupportedSiteError, match="groups"):
            tunerkit.get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(**config))

    def test_the_initial_folder(self, tmp_path):
        config = LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa")
        for library, starts in ((tunerkit, "pissa"), (peft, True)):
            folder = tmp_path / library.__name__
            model = adapted(library, config)
            with warnings.catch_warnings():  # PEFT's, of the change of the base
                warnings.simplefilter("ignore")
                model.save_pretrained(folder / "initial")
                model.save_pretrained(folder / "final", path_initial_model_for_weight_conversion=folder / "initial")
            settings = json.loads((folder / "initial" / "adapter_config.json").read_text())
            assert settings["init_lora_weights"] == starts


def test_a_task_takes_the_base_models_arguments():
    class Classifier(Net):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(4, 2)

        def forward(self, x, factor):
            return self.classifier(super().forward(x)) * factor

    for library in (tunerkit, peft):
        model = Classifier().eval()
        model.config = {"model_type": "own"}
        wrapped = adapted(library, lora("first", task_type="SEQ_CLS"), model)
        if library is peft:
            with pytest.raises((TypeError, AttributeError)):
                wrapped(X["x"], 2)
        else:
            assert_close(wrapped(X["x"], 2), wrapped(x=X["x"], factor=2))
