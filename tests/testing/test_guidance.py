"""What the kit says of a check that failed: by how much, where to look, what to mend first, and what was meant."""

import sys

import pytest
import torch
from testing.wrong.maths import BiasForgotten, ClaimsAMergedForm, ScaleForgottenInMerged, Transposed
from testing.wrong.running import CHECKS
from testing.wrong.table import plugin_with
from toys import registered, rows
from toys.sound import SoundAdapter

from tunerkit.adapter import Adapter, AdditiveAdapter, Part
from tunerkit.testing import MethodConformance
from tunerkit.testing.bench import Bench
from tunerkit.testing.comparing import check_bits, check_close, check_moved, check_near
from tunerkit.testing.failures import Failure, checks_in_order, findings, how_to_mend
from tunerkit.testing.misspelling import misspelt


class TestFindings:
    ALIKE = (Failure("test_rows", "one"), Failure("test_gradients", "one"))

    def test_a_message_is_told_once(self):
        [found] = findings(self.ALIKE)
        assert found.checks == ("test_gradients", "test_rows")
        assert found.title == "test_gradients and 1 other"
        assert found.lines() == ["one"]

    def test_the_most_basic_comes_first(self):
        first, second, third = findings(
            [*self.ALIKE, Failure("test_pickle", "two"), Failure("test_identity_at_start", "")]
        )
        assert first.title == "test_identity_at_start"
        assert second.title == "test_gradients and 1 other"
        assert third.lines() == ["two", f"To mend: {how_to_mend('test_pickle')}"]

    def test_messages_of_one_check_stand_together(self):
        [found] = findings([Failure("test_pickle", "here\nand there"), Failure("test_pickle", "elsewhere")])
        assert found.lines()[:3] == ["here", "and there", "elsewhere"]

    def test_every_check_says_how_to_mend(self):
        order = checks_in_order()
        assert order[:3] == ("test_identity_at_start", "test_forward_agrees_with_merged", "test_gradients")
        assert [check for check in order if not how_to_mend(check)] == []
        assert sorted(order) == CHECKS

    def test_how_to_mend(self):
        assert how_to_mend("test_unload_restores_the_original") == "as for `test_delete_restores_the_original`."


class WrongInBoth(SoundAdapter):
    def merged(self, below):
        return below.weight + self.delta().exp(), below.bias


class TestDisagreement:
    """Where `forward` and `merged` disagree, and the layer is known, the check says what to look at."""

    @pytest.mark.parametrize(
        ("kind", "hint"),
        [
            (BiasForgotten, "; they agree in what the weight does: look at the bias that `merged` returns."),
            (
                ScaleForgottenInMerged,
                " what `forward` adds to what the weight does is 2 times what `merged` adds: look at the scale.",
            ),
            (Transposed, "; they agree when what `merged` adds to the weight is transposed."),
            (ClaimsAMergedForm, "; they agree in the bias: look at the weight that `merged` returns."),
            (WrongInBoth, "(tolerance 1e-05)."),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_hints(self, kind, hint, tmp_path):
        plugin = plugin_with(kind, sys.modules[kind.__bases__[0].__module__])

        class Case(MethodConformance):
            def config(self):
                return plugin.Config()

        with registered(plugin), pytest.raises(AssertionError) as caught:
            Case().test_forward_agrees_with_merged(Bench(Case(), "linear", tmp_path))
        message = str(caught.value)
        assert message.startswith(
            "At 'wide' the output of `forward` and that of what `merged` returns differ by up to "
        )
        assert message.endswith(hint)

    def test_no_hint_where_zeros_mean_nothing(self, tmp_path):
        class Doubled(rows.RowsAdapter):
            def forward(self, x, below):
                return 2 * super().forward(x, below)

        plugin = plugin_with(Doubled, rows)

        class Case(MethodConformance):
            def config(self):
                return plugin.Config()

        with registered(plugin), pytest.raises(AssertionError, match=r"At 'words' .*\(tolerance 1e-05\)\.$"):
            Case().test_forward_agrees_with_merged(Bench(Case(), "embedding", tmp_path))


class TestComparing:
    ONE = torch.ones(2)

    def test_what_is_equal(self):
        check_close(self.ONE, self.ONE + 1e-7, "these", 1e-5)
        check_near(self.ONE, self.ONE + 0.1, "these", 0.2)
        check_bits(self.ONE, self.ONE.clone(), "these")
        check_moved(self.ONE, self.ONE + 0.1, "these")

    @pytest.mark.parametrize(
        ("check", "other", "message"),
        [
            (check_close, ONE + 0.25, "These differ by up to 0.25 (tolerance 0.01)."),
            (check_near, ONE + 0.25, "These differ by up to 0.25 (limit 0.01)."),
            (check_near, ONE * torch.nan, "These differ by up to nan (limit 0.01)."),
            (check_bits, ONE + 0.25, "These must be equal bit for bit, and differ by up to 0.25."),
            (check_bits, ONE.double(), "These must be of one dtype, and are torch.float32 and torch.float64."),
            (check_close, ONE[:1], "These must be of one shape, and are (2,) and (1,)."),
            (check_moved, ONE + 2**-13, "These must differ by more than 0.001, and do by 0.00012."),
        ],
    )
    def test_what_the_message_says(self, check, other, message):
        limit = (0.01,) if check in (check_close, check_near) else ()
        with pytest.raises(AssertionError) as caught:
            check(self.ONE, other, "These", *limit)
        assert str(caught.value) == message


class TestMisspelling:
    def test_says_what_was_meant(self):
        class Diag(Adapter):
            setings = ("scale",)

            def foward(self, x, below): ...

            def from_chekpoint(self, tensors): ...

        assert misspelt(Diag) == {"foward": "forward", "from_chekpoint": "from_checkpoint", "setings": "settings"}

    def test_helpers_are_none(self):
        class Diag(AdditiveAdapter):
            @classmethod
            def kind(cls): ...

            def deltas(self, base): ...

            def delta(self, base):
                return self.kind(), [self.deltas(one) for one in base]

        assert misspelt(Diag) == {}

    def test_what_is_inherited_counts(self):
        class Base(Part):
            def arround(self, call, *args, **kwargs): ...

            def exposed(self): ...

        class Derived(Base):
            def calls(self):
                return self.exposed()

        assert misspelt(Derived) == {"arround": "around"}

    def test_without_source_nothing_is_found(self):
        assert misspelt(type("Diag", (Adapter,), {"foward": None})) == {}
