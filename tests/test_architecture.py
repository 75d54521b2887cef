"""What holds the house together: the core knows no method, the packages know their neighbours, imports stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from wheels import LIBRARIES

from tunerkit import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CORE = ROOT / "tunerkit"
PLUGINS = {path.name.removeprefix("tunerkit-"): path for path in (ROOT / "plugins").iterdir() if path.is_dir()}
MODULES = sorted(f"tunerkit_{method.replace('-', '_')}" for method in PLUGINS)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted(
    [*CORE.rglob("*.py"), *(path for plugin in PLUGINS.values() for path in plugin.glob("tunerkit_*/**/*.py"))]
)

# fmt: off
PEFT_METHODS = [
    "adalora", "adamss", "adaption-prompt", "beft", "boft", "bone", "c3a", "cartridge", "cpt", "deft", "delora",
    "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln-tuning", "loha", "lokr", "lora",
    "miss", "multitask-prompt-tuning", "oft", "osf", "p-tuning", "peanut", "poly", "prefix-tuning",
    "prompt-tuning", "psoft", "pvera", "randlora", "road", "shira", "supertuning", "tinylora", "trainable-tokens",
    "unilora", "vblora", "vera", "waveft", "xlora",
]
# fmt: on
PLAIN_ENGLISH = {"miss", "poly", "road"}
PEFT_NAMES = re.compile("supports_lora_conversion|is_adaption_prompt")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# --- The core knows no method by name.


def method_pattern():
    """Match any method's id as a word, in the spellings of ids, modules, types and classes."""
    ids = {*PEFT_METHODS, *PLUGINS} - PLAIN_ENGLISH
    words = "|".join(sorted((name.replace("-", "[-_ ]?") for name in ids), key=len, reverse=True))
    return re.compile(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])")


def words_of(text):
    """Write CamelCase as snake_case, all in lower case."""
    return re.sub(r"(?<=[a-z0-9A-Z])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", text).lower()


def texts(tree):
    """Yield every identifier and string constant of a module, but no docstring."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and id(node) not in prose:
                yield node.lineno, node.value
            continue
        for field in ("id", "attr", "name", "asname", "arg", "module", "rest"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield getattr(node, "lineno", 0), value
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield from ((node.lineno, name) for name in node.names)


def methods_named(source):
    pattern = method_pattern()
    found = ((line, pattern.search(PEFT_NAMES.sub("", words_of(text)))) for line, text in texts(ast.parse(source)))
    return [(line, match[0]) for line, match in found if match]


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=relative)
def test_core_names_no_method(path):
    assert methods_named(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import tunerkit_lora",
        "from x import LoraConfig",
        "class IA3Model: pass",
        "is_lora = 1",
        "x = 'LORA'",
        "x.lora_A",
        "def f(C3AConfig): pass",
        "x = f'{y} needs ln-tuning'",
        "x = 'LN_TUNING'",
        "LnTuningConfig",
        "PTuningConfig()",
        "call(adalora=1)",
    ],
)
def test_a_method_named_in_the_core_is_seen(source):
    assert methods_named(source)


@pytest.mark.parametrize(
    "source",
    [
        "'''LoRA'''",
        "def f():\n    'As in LoRA.'",
        "x.supports_lora_conversion",
        "x = 'explore a road, miss a poly'",
        "veracity = 1",
    ],
)
def test_other_words_are_let_through(source):
    assert not methods_named(source)


# --- Who may import whom.


def contract(kind):
    return [entry for entry in PYPROJECT["tool"]["importlinter"]["contracts"] if entry["type"] == kind]


def test_contracts_name_every_plugin():
    assert sorted(PYPROJECT["tool"]["importlinter"]["root_packages"]) == ["tunerkit", *MODULES]
    [forbidden] = contract("forbidden")
    assert forbidden["source_modules"] == ["tunerkit"]
    assert sorted(forbidden["forbidden_modules"]) == MODULES
    [independence] = contract("independence")
    assert sorted(independence["modules"]) == MODULES


def test_checks_and_environments_name_every_plugin():
    mypy = PYPROJECT["tool"]["mypy"]
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    for method, module in zip(sorted(PLUGINS), MODULES, strict=True):
        folder = f"plugins/tunerkit-{method}"
        assert f"{folder}/{module}" in mypy["files"]
        assert f"$MYPY_CONFIG_FILE_DIR/{folder}" in mypy["mypy_path"]
        assert f"pytest {{tox_root}}/{folder}/tests" in tox
        assert re.search(rf"^commands_pre = .*{{tox_root}}/{folder}( |$)", tox, re.MULTILINE)


@pytest.mark.parametrize("method", sorted(PLUGINS))
def test_plugin_uses_only_what_is_public_in_the_core(method):
    for path in sorted(PLUGINS[method].glob("tunerkit_*/**/*.py")):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            private = [name for name in names if name.startswith("tunerkit.") and "._" in name]
            assert private == [], f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize("method", sorted(PLUGINS))
def test_plugin_is_named_after_its_method(method):
    project = tomllib.loads((PLUGINS[method] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module = f"tunerkit_{method.replace('-', '_')}"
    assert project["name"] == f"tunerkit-{method}"
    group = "tunerkit.sites" if method in LIBRARIES else "tunerkit"
    assert project["entry-points"] == {group: {method: module}}
    for name in (f"{module}/py.typed", "README.md", "LICENSE", "tests"):
        assert (PLUGINS[method] / name).exists(), name
    assert (PLUGINS[method] / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


# --- Warnings.


def warnings_in(source):
    """Yield the line of every call of `warnings.warn`, and the name of the class of what is warned of."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn"):
            message, *more = [*node.args[:2], *(word.value for word in node.keywords if word.arg == "category")]
            yield node.lineno, ast.unparse(more[0] if more else message).partition("(")[0]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_warning_has_a_class_of_its_own(path):
    for line, name in warnings_in(path.read_text(encoding="utf-8")):
        kind = getattr(errors, name, errors.TunerkitWarning)
        assert issubclass(kind, errors.TunerkitWarning), line
        assert kind is not errors.TunerkitWarning, (line, name)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("warnings.warn('text')", "'text'"),
        ("warnings.warn('text', UserWarning, stacklevel=2)", "UserWarning"),
        ("warnings.warn(MergeWarning(text), stacklevel=2)", "MergeWarning"),
        ("warn(text, stacklevel=2, category=LoadWarning)", "LoadWarning"),
    ],
)
def test_warnings_are_found(source, name):
    assert [found for _, found in warnings_in(source)] == [name]


# --- Size and weight.


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_module_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_module_can_be_parsed_by_the_oldest_python():
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


HEAVY = ["accelerate", "click", "huggingface_hub", "peft", "rich", "transformers"]


@pytest.mark.parametrize("statement", ["import tunerkit", *(f"import tunerkit, {module}" for module in MODULES)])
def test_import_is_light(statement):
    code = f"{statement}\nimport sys\nprint(sorted({{name.partition('.')[0] for name in sys.modules}} & set({HEAVY})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_use_is_light():
    """Attaching, training, saving, loading and merging on a plain model; the script checks what is loaded."""
    script = ROOT / "tests" / "packaging" / "session.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
