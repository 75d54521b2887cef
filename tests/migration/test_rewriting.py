from __future__ import annotations

import builtins
import importlib
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

libcst = pytest.importorskip("libcst", reason="the extra `migrate` brings it")

from tunerkit.migration.names import find, table  # noqa: E402 - after what it may be skipped for
from tunerkit.migration.rewriting import migrate  # noqa: E402


def rewritten(source):
    return migrate(textwrap.dedent(source).encode()).source.decode()


def findings(source):
    return [(finding.line, finding.what, finding.why) for finding in migrate(textwrap.dedent(source).encode()).findings]


def check(before, after, *found):
    """Check what a script becomes, and where in it are findings."""
    assert rewritten(before) == textwrap.dedent(after)
    assert [(line, what) for line, what, _ in findings(before)] == list(found)


# --- from peft import ...


class TestNames:
    def test_of_one_package(self):
        check(
            "from peft import PeftModel, get_peft_model as get\n",
            "from tunerkit import PeftModel, get_peft_model as get\n",
        )

    def test_of_several_packages(self):
        check(
            "from peft import LoraConfig, PeftModel as P, LoraModel\n",
            "from tunerkit_lora import LoraConfig, LoraModel\nfrom tunerkit import PeftModel as P\n",
        )

    def test_of_modules_below(self):
        check(
            "from peft.tuners.lora.layer import LoraLayer, Conv1d\nfrom peft.utils.other import ModulesToSaveWrapper\n",
            "from tunerkit_lora import LoraLayer, Conv1d\nfrom tunerkit import ModulesToSaveWrapper\n",
        )

    def test_that_is_called_otherwise_here(self):
        check(
            "from peft.utils import SAFETENSORS_WEIGHTS_NAME\n",
            "from tunerkit.checkpoint.files import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME\n",
        )
        check(
            "from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME as S\n",
            "from tunerkit.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME as S\n",
        )

    def test_that_is_not_here_stays(self):
        before = "from peft import VeraConfig, LoraConfig, Nothing\n"
        check(
            before,
            "from peft import VeraConfig, Nothing\nfrom tunerkit_lora import LoraConfig\n",
            (1, "peft.Nothing"),
            (1, "peft.VeraConfig"),
        )
        assert [why for *_, why in findings(before)] == [
            "no public name of PEFT's",
            "of a method that is not built yet",
        ]
        check("from peft import VeraConfig as V\n", "from peft import VeraConfig as V\n", (1, "peft.VeraConfig"))

    def test_all_of_them(self):
        check("from peft import *\n", "from peft import *\n", (1, "from peft import *"))

    def test_other_packages(self):
        source = (
            "from .peft import LoraConfig\nfrom . import peft\nfrom pefts import LoraConfig\nimport pefts, x.peft\n"
        )
        check(source, source)

    def test_wherever_it_stands(self):
        check(
            """
            if TYPE_CHECKING:
                from peft import PeftModel  # for types

            try:
                from peft import LoraConfig, PeftConfig
            except ImportError:
                LoraConfig = None

            def f():
                "Peft."
                from peft import IA3Config; x = 1

                class A:
                    from peft import IA3Config, PeftModel
            if x: from peft import IA3Config, PeftModel
            """,
            """
            if TYPE_CHECKING:
                from tunerkit import PeftModel  # for types

            try:
                from tunerkit_lora import LoraConfig
                from tunerkit import PeftConfig
            except ImportError:
                LoraConfig = None

            def f():
                "Peft."
                from tunerkit_ia3 import IA3Config; x = 1

                class A:
                    from tunerkit_ia3 import IA3Config
                    from tunerkit import PeftModel
            if x: from tunerkit_ia3 import IA3Config; from tunerkit import PeftModel
            """,
        )


class TestFormat:
    def test_of_what_is_not_split(self):
        check(
            """
            # above
            from peft  import (  # first
                    PeftModel , # model
                    # own line
                    PeftConfig,
            )   # last
            x = {1 :2}
            """,
            """
            # above
            from tunerkit  import (  # first
                    PeftModel , # model
                    # own line
                    PeftConfig,
            )   # last
            x = {1 :2}
            """,
        )

    def test_comments_go_with_their_names(self):
        check(
            """
            # above
            from peft import (  # first
                # the method
                LoraConfig,
                PeftModel,  # model
                # own line
                PeftConfig as P,
                IA3Config  # scales
                , IA3Model,
                # end
            )  # last
            """,
            """
            # above
            from tunerkit_lora import (  # first
                # the method
                LoraConfig,
            )  # last
            from tunerkit import (
                PeftModel,  # model
                # own line
                PeftConfig as P,
            )
            from tunerkit_ia3 import (
                IA3Config,  # scales
                IA3Model,
                # end
            )
            """,
        )

    @pytest.mark.parametrize(
        "names",
        ["(LoraConfig, PeftModel,\n    PeftConfig)", "(\n    LoraConfig,\n    PeftModel, PeftConfig\n)"],
    )
    def test_lines(self, names):
        check(
            f"from peft import {names}\n",
            "from tunerkit_lora import LoraConfig\nfrom tunerkit import (\n    PeftModel,\n    PeftConfig,\n)\n",
        )

    @pytest.mark.parametrize("names", ["(LoraConfig, PeftModel)", "LoraConfig, \\\n    PeftModel"])
    def test_one_line(self, names):
        check(f"from peft import {names}\n", "from tunerkit_lora import LoraConfig\nfrom tunerkit import PeftModel\n")

    def test_a_comment_for_a_tool_belongs_to_every_line(self):
        check(
            "from peft import LoraConfig, PeftModel  # noqa: E402\nimport os, peft  # why\npeft.PeftModel\n",
            "from tunerkit_lora import LoraConfig  # noqa: E402\nfrom tunerkit import PeftModel  # noqa: E402\n"
            "import os  # why\nimport tunerkit\ntunerkit.PeftModel\n",
        )

    @pytest.mark.parametrize(
        "source",
        [
            b"import peft\r\npeft.PeftModel\r\n",
            b"\xef\xbb\xbfimport peft\npeft.PeftModel",
            b"import peft\n\tpeft.PeftModel\n",
        ],
    )
    def test_bytes(self, source):
        source = source.replace(b"\n\t", b"\nif 1:\n\t")
        assert migrate(source).source == source.replace(b"peft", b"tunerkit")

    def test_encoding(self):
        before = "# coding: latin-1\nfrom peft import PeftModel  # é\n".encode("latin-1")
        assert migrate(before).source == before.replace(b"peft", b"tunerkit")


# --- import peft


class TestModules:
    def test_one_package(self):
        check("import peft\nm = peft.get_peft_model(1)\n", "import tunerkit\nm = tunerkit.get_peft_model(1)\n")

    def test_several_packages(self):
        check(
            "import os, peft as p, sys\n\n\n"
            "def f(x: p.PeftModel) -> None:\n    return (p.LoraConfig)(r=p.TaskType.X)\n",
            "import os, sys\nimport tunerkit\nimport tunerkit_lora\n\n\n"
            "def f(x: tunerkit.PeftModel) -> None:\n    return (tunerkit_lora.LoraConfig)(r=tunerkit.TaskType.X)\n",
        )

    def test_modules_below(self):
        check(
            """
            import peft.tuners.lora
            import peft.utils as u
            from peft.tuners import lora, LoraConfig
            peft.tuners.lora.LoraLayer.forward(u.SAFETENSORS_WEIGHTS_NAME, lora.Linear)
            """,
            """
            import tunerkit_lora
            import tunerkit.checkpoint.files
            from tunerkit_lora import LoraConfig
            import tunerkit_lora
            tunerkit_lora.LoraLayer.forward(tunerkit.checkpoint.files.WEIGHTS_NAME, tunerkit_lora.Linear)
            """,
        )

    def test_in_functions_and_classes(self):
        check(
            """
            import peft
            class A(peft.PeftModel):
                def f(self, peft):
                    return peft.LoraConfig
                def g(self):
                    import peft as q
                    return [q.IA3Config(peft=1) for _ in self.peft.LoraConfig], lambda: peft.PeftConfig
            """,
            """
            import tunerkit
            class A(tunerkit.PeftModel):
                def f(self, peft):
                    return peft.LoraConfig
                def g(self):
                    import tunerkit_ia3
                    return [tunerkit_ia3.IA3Config(peft=1) for _ in self.peft.LoraConfig], lambda: tunerkit.PeftConfig
            """,
        )

    def test_what_is_not_here_stays(self):
        check(
            "import peft\npeft.VeraConfig(peft.LoraConfig)\npeft.__version__\npeft.tuners.x.y\n",
            "import peft\nimport tunerkit_lora\n"
            "peft.VeraConfig(tunerkit_lora.LoraConfig)\npeft.__version__\npeft.tuners.x.y\n",
            (2, "peft.VeraConfig"),
            (3, "peft.__version__"),
            (4, "peft.tuners.x"),
        )

    def test_that_the_table_does_not_know(self):
        source = "import peft.a.b as x\nimport peft.tuners.vera.layer as y\nx.c\ny.VeraLayer\n"
        check(source, source, (3, "peft.a"), (4, "peft.tuners.vera.layer"))

    def test_a_line_is_listed_once(self):
        source = "import peft\npeft.VeraConfig, peft.VeraConfig\n"
        check(source, source, (2, "peft.VeraConfig"))

    def test_used_as_a_whole(self):
        check(
            "import peft\nreload(peft)\nx = peft.utils\npeft.PeftModel\n",
            "import peft\nimport tunerkit\nreload(peft)\nx = peft.utils\ntunerkit.PeftModel\n",
            (2, "peft"),
            (3, "peft.utils"),
        )

    @pytest.mark.parametrize("statement", ["peft.PeftModel = 1", "del peft.PeftModel", "peft.PeftModel += 1"])
    def test_set(self, statement):
        source = f"import peft\n{statement}\n"
        check(source, source, (2, "peft.PeftModel"))

    def test_not_used(self):
        source = "try:\n    import peft\nexcept ImportError:\n    pass\n"
        check(source, source, (2, "peft"))

    def test_that_may_not_be_there(self):
        check(
            "try:\n    import peft\nexcept ImportError:\n    peft = None\nif peft:\n    peft.PeftModel\n",
            "try:\n    import peft\n    import tunerkit\nexcept ImportError:\n    peft = None\n"
            "if peft:\n    tunerkit.PeftModel\n",
            (5, "peft"),
        )

    @pytest.mark.parametrize(
        "other",
        ["import other as peft", "peft = Fake()", "def peft(): pass", "import peft.utils as peft", "peft: int = 1"],
    )
    def test_that_may_be_something_else(self, other):
        source = f"try:\n    import peft\nexcept ImportError:\n    {other}\npeft.PeftModel\n"
        check(source, source, (5, "peft"))

    def test_names_that_are_taken(self):
        check(
            "import peft\nfrom peft import VeraConfig as tunerkit_\ndef f(tunerkit):\n    return peft.PeftModel\n",
            "import tunerkit as tunerkit__\nfrom peft import VeraConfig as tunerkit_\n"
            "def f(tunerkit):\n    return tunerkit__.PeftModel\n",
            (2, "peft.VeraConfig"),
        )
        check(
            "import peft.utils as tunerkit\ntunerkit.CONFIG_NAME\n",
            "import tunerkit.checkpoint.files as tunerkit_checkpoint_files\ntunerkit_checkpoint_files.CONFIG_NAME\n",
        )

    def test_names_that_are_there_already(self):
        check(
            "import tunerkit, peft, tunerkit.errors\npeft.PeftModel\n",
            "import tunerkit, tunerkit.errors\nimport tunerkit\ntunerkit.PeftModel\n",
        )


# --- What is listed


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ('importlib.import_module("peft")', '"peft"'),
        ("mock.patch('peft.tuners.lora.LoraLayer')", "'peft.tuners.lora.LoraLayer'"),
        ('x: "Optional[peft.PeftModel]"', '"Optional[peft.PeftModel]"'),
        ('x = f"peft.{y}"', "peft."),
        (f'x = "{"a " * 40} peft.LoraConfig()"', "... peft.LoraConfig ..."),
        ('x = "a\\n peft.x."; """\nb"""', '"a\\n peft.x."'),
        ("if is_peft_available(): pass", "is_peft_available()"),
        ("transformers.utils.is_peft_available()", "transformers.utils.is_peft_available()"),
    ],
)
def test_what_only_a_person_can_judge(source, what):
    check(f"\n{source}\n", f"\n{source}\n", (2, what))


@pytest.mark.parametrize(
    "source",
    [
        '"""peft.LoraConfig is good."""',
        'x = "pip install peft"',
        'x = "github.com/huggingface/peft.git"',
        'x = b"peft"',
        'x = "my-peft.x"',
        'x = f"{peft_x} peft."',
        'x = "It needs peft. Install it."',
        "x.peft.y",
    ],
)
def test_what_is_not_listed(source):
    check(f"{source}\n", f"{source}\n")


# --- What is no script


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (b"from peft import (", "never closed"),
        (b"# coding: nonsense peft\n", "unknown encoding"),
        (b"peft = '\xff'\n", "utf-8"),
        (b"peft = \0\n", "null bytes"),
        (b"peft = " + b"(" * 3000 + b")" * 3000, "too many nested parentheses|nested too deeply"),
        (b"peft = " + b"not " * 900 + b"1", "nested too deeply"),
        (b"peft = " + b"not " * 90000 + b"1", "nested too deeply"),
    ],
)
def test_what_is_no_script(source, why):
    with pytest.raises(SyntaxError, match=why):
        migrate(source)


def test_warnings_of_the_script_are_its_own():
    source = b"x = '\\d'\nx is 'peft'\n"
    assert migrate(source).source == source


def test_syntax_that_libcst_does_not_take(monkeypatch):
    def fail(source):
        raise libcst.ParserSyntaxError("new syntax", lines=["x"], raw_line=1, raw_column=0)

    monkeypatch.setattr(libcst, "parse_module", fail)
    with pytest.raises(SyntaxError, match="new syntax"):
        migrate(b"peft\n")


# --- For any names, aliases and forms, each alias is the thing that the table says.

HERE = sorted(
    entry for entry in table().values() if entry.place and importlib.util.find_spec(entry.place) and entry.name != "*"
)
ALIASES = ["a", "b", "lora", "p", "peft", "tunerkit", "tunerkit_", "tunerkit_lora", "utils", "x"]
FORMS = ["from", "from lines", "module", "module as", "module from", "function"]


@st.composite
def scripts(draw):
    """A script, and the names that it defines with the entries that they stand for."""
    lines, expected = [], {}
    for number in range(draw(st.integers(1, 4))):
        form, entry = draw(st.sampled_from(FORMS)), draw(st.sampled_from(HERE))
        alias, result = draw(st.sampled_from(ALIASES)), f"result_{number}"
        match form:
            case "from" | "from lines":
                entries = draw(
                    st.lists(st.sampled_from([one for one in HERE if one.module == entry.module]), min_size=1)
                )
                pairs = [(one, draw(st.sampled_from([one.name, *ALIASES]))) for one in entries]
                pairs = list({given: (one, given) for one, given in pairs}.values())
                names = [one.name if one.name == given else f"{one.name} as {given}" for one, given in pairs]
                start, comma, end = ("(\n    ", ",  # c\n    ", "\n)") if form == "from lines" else ("", ", ", "")
                lines.append(f"from {entry.module} import {start}{comma.join(names)}{end}")
                last = {given: one for one, given in pairs}
                lines.extend(f"{result}_{given} = {given}" for given in last)
                expected.update({f"{result}_{given}": one for given, one in last.items()})
                lines.extend(f"del {given}" for given in last)
                continue
            case "module":
                lines += [f"import {entry.module}", f"{result} = {entry.module}.{entry.name}"]
            case "module as":
                lines += [f"import os, {entry.module} as {alias}", f"{result} = ({alias}.{entry.name})"]
            case "module from" if entry.module.count("."):
                package, _, last = entry.module.rpartition(".")
                lines += [f"from {package} import {last} as {alias}_", f"{result} = {alias}_.{entry.name}"]
            case _:
                lines += [
                    f"def f_{number}():",
                    f"    import {entry.module} as {alias}; return {alias}.{entry.name}",
                    f"{result} = f_{number}()",
                ]
        expected[result] = entry
    return "\n".join(lines) + "\n", expected


@settings(max_examples=60, deadline=None)
@given(scripts())
def test_each_alias_is_the_thing_that_the_table_says(case):
    source, expected = case
    found = migrate(source.encode())
    assert migrate(found.source).source == found.source  # there is nothing left to do
    namespace = {"__name__": "script", "__builtins__": builtins}
    exec(compile(found.source, "script", "exec"), namespace)  # noqa: S102 - made above
    entangled = {
        finding.what for finding in found.findings if finding.why == "it is imported, and is also something else"
    }
    for name, entry in expected.items():
        assert find(entry.module, entry.name) == entry
        value, thing = namespace[name], getattr(importlib.import_module(entry.place), entry.now)
        theirs = getattr(importlib.import_module(entry.module), entry.name) if entangled else thing
        assert value is thing or value is theirs, source
    if not entangled:
        assert b"import peft" not in found.source
        assert b"from peft" not in found.source
        assert found.findings == []
