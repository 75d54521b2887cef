"""The conformance kit: what it refuses, what its report says, and its models; `test_wrong.py` shows what it finds."""

import builtins
import importlib
import sys
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from testing.wrong.maths import ScaleForgottenInMerged
from torch import nn
from toys import bottleneck, parameters, registered, rotation, rows
from toys.sound import Config, SoundAdapter

from tunerkit import Method
from tunerkit.config import PeftConfig
from tunerkit.copied_module import CopiedModule
from tunerkit.functional import load_peft_weights
from tunerkit.testing import MethodConformance
from tunerkit.testing.bench import Bench, Snapshot
from tunerkit.testing.comparing import first_tensor
from tunerkit.testing.models import SAMPLES, Recomputed
from tunerkit_lora import LoraConfig

pytest_plugins = ["pytester"]


class TestWhatIsRefused:
    def test_overridden_check(self):
        message = r"Case overrides the check 'test_gradients'.* absent = \{'test_gradients': 'the reason'\}"
        with pytest.raises(TypeError, match=message):

            class Case(MethodConformance):
                def test_gradients(self):
                    pass

    def test_check_overridden_by_nothing(self):
        with pytest.raises(TypeError, match="overrides the check 'test_pickle'"):

            class Case(MethodConformance):
                test_pickle = None

    def test_check_overridden_by_a_mixin(self):
        class Mixin:
            def test_pickle(self):
                pass

        with pytest.raises(TypeError, match="overrides the check 'test_pickle'"):

            class Case(Mixin, MethodConformance):
                pass

    def test_absent_check_that_does_not_exist(self):
        message = r"Case.absent names 'test_nothing', which is no check. The checks are \[.*'test_gradients'"
        with pytest.raises(TypeError, match=message):

            class Case(MethodConformance):
                absent = MappingProxyType({"test_nothing": "no reason"})

    @pytest.mark.parametrize("reason", ["", " ", None])
    def test_absent_without_a_reason(self, reason):
        with pytest.raises(TypeError, match=r"gives no reason for leaving out 'test_pickle'\. Say why"):

            class Case(MethodConformance):
                absent = MappingProxyType({"test_pickle": reason})

    def test_check_both_absent_and_expected_to_fail(self):
        with pytest.raises(TypeError, match=r"declares \['test_pickle'\] both absent and xfail"):

            class Case(MethodConformance):
                absent = MappingProxyType({"test_pickle": "one reason"})
                xfail = MappingProxyType({"test_pickle": "another"})

    def test_expected_failure_that_is_no_check(self):
        with pytest.raises(TypeError, match=r"Case.xfail names 'test_nothing', which is no check"):

            class Case(MethodConformance):
                xfail = MappingProxyType({"test_nothing": "no reason"})

    def test_missing_config(self, tmp_path):
        class Case(MethodConformance):
            pass

        with pytest.raises(NotImplementedError, match=r"Case must define config\(self\)"):
            Bench(Case(), "linear", tmp_path).base and Case().config()

    def test_missing_pytest(self, monkeypatch):
        imported = builtins.__import__

        def without_pytest(name, *args):
            if name == "pytest":
                raise ModuleNotFoundError("No module named 'pytest'", name="pytest")
            return imported(name, *args)

        before = {name: module for name, module in sys.modules.items() if name.startswith("tunerkit.testing")}
        for name in before:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", without_pytest)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'tunerkit\[testing\]'") as caught:
            importlib.import_module("tunerkit.testing")
        assert caught.value.name == "pytest"


class TestReport:
    CASE = """
        import pytest
        from toys import registered, rotation
        from tunerkit.testing import MethodConformance

        @pytest.fixture(autouse=True)
        def known():
            with registered(rotation):
                yield

        class TestRotation(MethodConformance):
            kinds = ("linear",)
            absent = {"test_pickle": "for the test's sake"}

            def config(self):
                return rotation.Config()
    """

    def test_ids_and_what_was_left_out(self, pytester):
        pytester.makepyfile(self.CASE)
        result = pytester.runpytest_inprocess("-v", "-ra", "-k", "pickle or merge_keeps", "-p", "no:cacheprovider")
        result.assert_outcomes(passed=2, skipped=1)
        result.stdout.fnmatch_lines_random(
            [
                "*::TestRotation::test_merge_keeps_the_output?linear-plain? PASSED*",
                "*SKIPPED*declared absent: for the test's sake",
            ]
        )

    def test_summary_counts_what_ran_and_what_did_not(self, pytester):
        pytester.makepyfile(self.CASE)
        result = pytester.runpytest_inprocess("-k", "pickle or merge_keeps or merged_form", "-p", "no:cacheprovider")
        result.stdout.fnmatch_lines(
            [
                "*= conformance =*",
                "TOY_ROTATION (TestRotation): 2 checks ran, 1 were declared absent, 0 failed as *, 1 did not apply",
            ]
        )

    @pytest.mark.parametrize("processes", ["0", "1"])
    def test_summary_beside_xdist(self, pytester, processes):
        pytester.makeconftest("pytest_plugins = ['tunerkit.testing.summary']")
        pytester.makepyfile(
            """
            from tunerkit.testing import MethodConformance
            from tunerkit_lora import LoraConfig

            class TestLora(MethodConformance):
                kinds = ("linear",)
                absent = {"test_pickle": "for the test's sake"}

                def config(self):
                    return LoraConfig()
            """
        )
        result = pytester.runpytest_subprocess("-n", processes, "-k", "test_pickle or test_deepcopy")
        result.assert_outcomes(passed=1, skipped=1)
        result.stdout.fnmatch_lines(["*= conformance =*", "LORA (TestLora): 1 checks ran, 1 were declared absent, *"])
        assert result.stdout.str().count("checks ran") == 1

    def test_no_summary_where_the_kit_is_not_used(self, pytester):
        pytester.makepyfile("def test_something(): pass")
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
        assert "= conformance =" not in result.stdout.str()

    @pytest.mark.parametrize(("failing", "outcome"), [(True, {"xfailed": 1}), (False, {"failed": 1})])
    def test_expected_failure_is_strict(self, pytester, failing, outcome):
        case = self.CASE.replace("absent =", "xfail =")
        if failing:
            case = case.replace("rotation.Config()", "rotation.Config(target_modules=['square'])") + (
                "\n"
                "            def make_model(self, kind):\n"
                "                model = super().make_model(kind)\n"
                "                model.act = lambda: None\n"
                "                return model\n"
            )
        pytester.makepyfile(case)
        result = pytester.runpytest_inprocess("-k", "test_pickle", "-p", "no:cacheprovider")
        result.assert_outcomes(**outcome)
        ran, expected = (0, 1) if failing else (1, 0)
        result.stdout.fnmatch_lines([f"*: {ran} checks ran, 0 were declared absent, {expected} failed as expected, *"])

    def test_failing_check_shows_how_to_mend(self, pytester):
        spoilt = self.CASE.replace("rotation.Config()", "self.spoilt()") + (
            "\n"
            "            def spoilt(self):\n"
            "                rotation.RotationAdapter.merged = lambda adapter, below: (0 * below.weight, below.bias)\n"
            "                return rotation.Config()\n"
        )
        pytester.makepyfile(spoilt)
        genuine = rotation.RotationAdapter.merged
        try:
            result = pytester.runpytest_inprocess("-k", "identity", "-p", "no:cacheprovider")
        finally:
            rotation.RotationAdapter.merged = genuine
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*To mend: let one of the factors start at zero*"])

    def test_begins_with_the_most_basic_check(self, pytester):
        spoilt = self.CASE.replace("rotation.Config()", "self.spoilt()") + (
            "\n"
            "            def spoilt(self):\n"
            "                genuine = rotation.RotationAdapter.merged\n"
            "                def forward(adapter, x, below):\n"
            "                    return below.run(x, *genuine(adapter, below)) + 0.5\n"
            "                rotation.RotationAdapter.forward = forward\n"
            "                return rotation.Config()\n"
        )
        pytester.makepyfile(spoilt)
        try:
            result = pytester.runpytest_inprocess("-k", "keeps_the or agrees or unload", "-p", "no:cacheprovider")
        finally:
            del rotation.RotationAdapter.forward
        result.assert_outcomes(failed=4, passed=1)
        result.stdout.fnmatch_lines(
            [
                "TOY_ROTATION (TestRotation): 5 checks ran, *",
                "  4 failed. Begin with test_forward_agrees_with_merged (what else was found may follow from it: *",
                "    At 'wide' the output of `forward` and that of what `merged` returns differ by up to 0.5 (*",
                "    1e-05); they agree in what the weight does: look at the bias that `merged` returns.",
                "    To mend: compare both on paper; often a scale, a transpose or the bias is in one and not in the",
            ]
        )


class TestModels:
    @pytest.mark.parametrize("kind", SAMPLES)
    def test_every_sample_has_what_it_targets(self, kind):
        model = SAMPLES[kind]()
        for name, paths in SAMPLES[kind].targets.items():
            getter = model.get_parameter if name == "target_parameters" else model.get_submodule
            assert all(getter(path) is not None for path in paths)
        assert model(*SAMPLES[kind].inputs()).shape[-1] == 3

    def test_recomputed_model_keeps_its_config(self):
        model = nn.Linear(2, 2)
        model.config = {"model_type": "small"}
        assert Recomputed(model, use_reentrant=False).config == {"model_type": "small"}

    def test_own_model_with_an_output_of_its_own_kind(self, tmp_path):
        class Case(MethodConformance):
            def make_model(self, kind):
                return OwnModel()

            def make_inputs(self, kind):
                return (torch.randn(4, 5),)

            def config(self):
                return rotation.Config(target_modules=["layer"])

        with registered(rotation):
            bench = Bench(Case(), "linear", tmp_path)
            assert bench.config().target_modules == {"layer"}
            Case().test_merge_keeps_the_output(bench, safe=True)

    def test_what_counts_as_equal(self, tmp_path):
        class Strict(MethodConformance):
            pass

        class Lax(MethodConformance):
            tolerance = 0.1

        one = torch.ones(2)
        assert [Bench(case(), "linear", tmp_path).same(one, one + 0.01) for case in (Strict, Lax)] == [False, True]

    def test_first_tensor_of_what_models_return(self):
        tensor = torch.zeros(2)
        for outputs in (tensor, (tensor, 1), [[tensor]], {"logits": tensor, "more": None}):
            assert first_tensor(outputs) is tensor

    def test_kinds_are_those_that_the_adapter_declares(self):
        class Case(MethodConformance):
            def config(self):
                return toy.Config()

        for toy, expected in ((rotation, ["linear"]), (rows, ["embedding"]), (parameters, ["parameter"])):
            with registered(toy):
                assert Case()._declared_kinds() == expected

    def test_a_kind_may_have_several_models(self):
        class Case(MethodConformance):
            def config(self):
                return LoraConfig()

        expected = ["linear", "embedding", "attention", "parameter", "conv1d", "conv2d", "conv3d", "grouped conv2d"]
        assert Case()._declared_kinds() == expected

    @pytest.mark.parametrize(("sample", "kind"), [("grouped conv2d", "conv2d"), ("linear", "linear"), ("own", "own")])
    def test_kind_of_a_model(self, sample, kind, tmp_path):
        class Case(MethodConformance):
            def make_inputs(self, kind):
                assert kind == sample
                return ()

        assert Bench(Case(), sample, tmp_path).kind == kind


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        return {"logits": self.layer(x), "loss": None}


class TestSnapshot:
    @pytest.fixture
    def model(self):
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def test_sees_nothing_where_nothing_changed(self, model):
        assert Snapshot.of(model).differences(model) == []

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda m: m.append(nn.ReLU()), "module '2' is new"),
            (lambda m: m.pop(1), "module '1' is gone"),
            (lambda m: m.__setitem__(0, nn.Linear(2, 2)), "module '0' is another object"),
            (lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias)), "tensor '0.bias' is another object"),
            (lambda m: setattr(m[0], "bias", None), "tensor '0.bias' is gone"),
            (lambda m: m[0].weight.data.add_(1), "tensor '0.weight' holds other numbers"),
            (lambda m: m[1].running_mean.add_(1), "tensor '1.running_mean' holds other numbers"),
            (
                lambda m: m[0].requires_grad_(requires_grad=False),
                "tensor '0.weight' has requires_grad=False, and had True",
            ),
            (lambda m: setattr(m[0], "note", 1), "attributes of '0' changed: ['note']"),
            (lambda m: m.eval(), "attributes of '' changed: ['training']"),
            (lambda m: m[0].register_forward_hook(print), "attributes of '0' changed: ['_forward_hooks']"),
        ],
    )
    def test_says_what_changed(self, model, change, expected):
        before = Snapshot.of(model)
        change(model)
        assert expected in before.differences(model)


def test_adapter_without_a_merged_form_must_say_so(tmp_path):
    class Case(MethodConformance):
        def config(self):
            return bottleneck.Config()

    with registered(bottleneck):
        bench = Bench(Case(), "linear", tmp_path)
        with pytest.raises(pytest.skip.Exception, match="no merged form: its output is not linear"):
            Case().test_merge_keeps_the_output(bench, safe=False)
        Case().test_merging_without_a_merged_form_is_refused(bench)


class TestModulesToSave:
    """The check finds what would be wrong with the copies, and says where there is nothing to check."""

    @dataclass
    class Bare(PeftConfig):
        peft_type: str | None = "TOY_SOUND"
        target_modules: list[str] | set[str] | str | None = None
        rank: int = 2

    def run(self, folder, make=Config, adapter=SoundAdapter, **attributes):
        folder.mkdir(exist_ok=True)
        kind = type("Case", (MethodConformance,), {"config": lambda _: make(), **attributes})
        config = type(make())
        with registered(SimpleNamespace(method=Method(config=config, adapter=adapter), Config=config)):
            kind().test_modules_to_save(Bench(kind(), "linear", folder))

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("trainable_tensors", lambda *_: iter(())),
            ("_chosen", lambda *_: None),
            ("_forward_rows", lambda self, rows, args, kwargs: self._current()(*args, **kwargs)),
            ("merge_for_good", lambda *_: []),
            ("add_copy", lambda self, name, memo: self._container.update({name: self.get_base_layer()})),
            ("_remove", lambda *_: None),
        ],
    )
    def test_finds_what_is_wrong_with_copies(self, name, wrong, tmp_path, monkeypatch):
        self.run(tmp_path / "right")
        monkeypatch.setattr(CopiedModule, name, wrong)
        with pytest.raises((AssertionError, RuntimeError)):
            self.run(tmp_path / "wrong")

    def test_takes_what_the_config_names(self, tmp_path):
        self.run(tmp_path, lambda: Config(target_modules=["square", "narrow"], modules_to_save=["wide"]))
        saved = load_peft_weights(tmp_path / "one")
        assert {key for key in saved if "toy_" not in key} == {
            "base_model.model.wide.weight", "base_model.model.wide.bias"
        }  # fmt: skip

    def test_rows_and_merging_may_be_absent(self, tmp_path, monkeypatch):
        absent = {"test_rows": "for the test's sake", "test_merge_keeps_the_output": "for the test's sake"}
        monkeypatch.setattr(CopiedModule, "_forward_rows", None)
        self.run(tmp_path, adapter=ScaleForgottenInMerged, absent=absent)

    def test_says_that_rows_are_refused(self, tmp_path):
        class Crosses(SoundAdapter):
            crosses_rows = "for the test's sake"

        self.run(tmp_path, adapter=Crosses)

    def test_without_the_setting(self, tmp_path):
        with pytest.raises(pytest.skip.Exception, match="Bare has no modules_to_save"):
            self.run(tmp_path, self.Bare)

    def test_without_another_module(self, tmp_path):
        with pytest.raises(pytest.skip.Exception, match="all modules of the model are targeted"):
            self.run(tmp_path, lambda: Config(target_modules=["wide", "square", "narrow", "head"]))
