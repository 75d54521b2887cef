"""The signatures and descriptions in some pages of `docs/`, taken from the source.

The pages are written by hand but for what stands between `[[[cog` and `[[[end]]]`: there cog puts what `show`,
`show_checks`, `show_places` and `show_reasons` print. `tests.toml` says which tests show each of the words.

`tox -e reference` writes them anew.
"""

from __future__ import annotations

import ast
import functools
import re
import runpy
import sys
import textwrap
from pathlib import Path

import griffe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("api", "hooks", "contract", "checks", "migrating-from-peft")]
WIDTH = 100
SHOWN = re.compile(r"\[\[\[cog show\((?P<arguments>.+)\) \]\]\]")
KINDS = griffe.ParameterKind
SECTIONS = griffe.DocstringSectionKind


@functools.cache
def read(package, folder):
    return griffe.load(package, search_paths=[folder], docstring_parser="google")


@functools.cache
def peft_names():
    """Return the table of PEFT's names; its module is run by itself, as the core needs PyTorch."""
    return list(runpy.run_path(str(ROOT / "tunerkit" / "migration" / "names.py"))["table"]().values())


@functools.cache
def named_tests():
    return tomllib.loads((Path(__file__).parent / "tests.toml").read_text(encoding="utf-8"))


def find(path):
    """Return what a path means, wherever it is defined; a name that a package gives again is an alias."""
    package, *inside = path.split(".")
    found = read(package, ROOT)
    for name in inside:
        found = found[name] if name not in found.imports else found.modules_collection[found.imports[name]]
    return found.final_target if found.is_alias else found


def shown(pages=PAGES):
    """Return what pages show: the path of each thing, and its words by name."""
    calls = [match["arguments"] for page in pages for match in SHOWN.finditer(page.read_text(encoding="utf-8"))]
    return {
        path: words_of(find(path), names) for path, *names in map(ast.literal_eval, [f"({call},)" for call in calls])
    }


def words_of(thing, names=()):
    """Return what there is to tell of a thing, by name.

    Args:
        thing: It is told itself; of a class, what it defines but for private names, and for those that a base class
            tells of if the class itself has nothing to say of them.
        names: What to tell of a class instead, also of what it inherits.
    """
    if not thing.is_class:
        return {thing.name: thing}
    if names:
        found = {name: thing.all_members[name] for name in names}
        return {name: word.final_target if word.is_alias else word for name, word in found.items()}
    own = {name: word for name, word in thing.members.items() if not word.is_alias}
    public = {name: word for name, word in own.items() if name == "__call__" or not name.startswith("_")}
    return {name: word for name, word in public.items() if not is_told_above(word, thing)}


def is_told_above(word, owner):
    """Return whether a base class tells of a word to which the class that gives it again has nothing to add."""
    above = [(base.members[word.name], base) for base in owner.mro() if word.name in base.members]
    return not description(word, owner) and any(description(*one) for one in above)


def description(word, owner=None):
    """Return the first paragraph of what the source says of a word; of an attribute, maybe in the class's docstring."""
    told = told_attributes(owner).get(word.name) if owner is not None else None
    if told is None and word.docstring:
        told = word.docstring.value.partition("\n\n")[0]
    return " ".join((told or "").split())


# How it is written


def show(path, *names):
    """Print what a page tells of a thing: its signature and its docstring, and the same of what a class defines.

    Args:
        path: The thing's path in the package.
        names: The members of a class to tell of, if not of all.
    """
    thing = find(path)
    words = words_of(thing, names)
    gap = "\n" * (3 if thing.is_class else 2)  # what the formatter wants where it can read the code
    print_word(3, thing.name, thing, path, imported=f"from {path.rpartition('.')[0]} import {thing.name}{gap}")
    if not thing.is_class:
        return
    attributes = [word for word in words.values() if is_plain_attribute(word)]
    for word in attributes:
        print(f"- `{declaration(word)}`: {description(word, thing)}{tests_of(path, word.name)}")
    if attributes:
        print()
    for name, word in words.items():
        if word not in attributes:
            print_word(4, f"{thing.name}.{name}", word, path)


def show_checks():
    """Print the name of each check of the conformance kit and its docstring, by the module that it stands in."""
    # As pytest runs them.
    for base in reversed(find("tunerkit.testing.conformance.MethodConformance").bases):
        checks = find(base.canonical_path)
        print(f"### {checks.docstring.value.partition(chr(10))[0].rstrip('.')}\n")
        for name, check in checks.members.items():
            if name.startswith("test_"):
                print(f"#### `{name}`\n\n{textwrap.dedent(check.docstring.value)}\n")


def show_places(*packages):
    """Print where PEFT's names are that some packages have."""
    print("| PEFT | tunerkit |\n| --- | --- |")
    for entry in peft_names():
        if entry.place.partition(".")[0] in packages:
            print(f"| `from {entry.module} import {entry.name}` | `from {entry.place} import {entry.now}` |")
    print()


def show_reasons():
    """Print PEFT's names that are not here, by the reason."""
    reasons = {}
    for entry in peft_names():
        if entry.reason:
            reasons.setdefault(entry.reason, []).append(f"`{entry.module}.{entry.name}`")
    for reason, names in reasons.items():
        print(f"- **{reason[0].upper()}{reason[1:]}.** {', '.join(names)}.")


def print_word(level, heading, word, path, imported=""):
    print(f"{'#' * level} `{heading}`\n")
    print(f"```py\n{imported}{signature(word)}\n```\n")
    for section in word.docstring.parsed if word.docstring else ():
        print_section(section, word)
    if not word.is_class and (shown_by := tests_of(path, word.name)):
        print(f"{shown_by.strip()}\n")


def print_section(section, word):
    match section.kind:
        case SECTIONS.text:
            print(f"{section.value}\n")
        case SECTIONS.parameters:
            for item in section.value:
                print(f"- `{item.name}`: {one_line(item.description)}")
            print()
        case SECTIONS.returns:
            print(f"Returns: {' '.join(one_line(item.description) for item in section.value)}\n")
        case SECTIONS.raises | SECTIONS.warns as kind:
            for item in section.value:
                print(f"- {kind.value.capitalize()} `{item.annotation}`: {one_line(item.description)}")
            print()
        case SECTIONS.attributes:
            pass  # each stands with its declaration
        case other:
            msg = f"{word.path} has a section that is not written yet: {other}."
            raise ValueError(msg)


def signature(word):
    """Return the lines with which the source begins a class, a function or a property, or declares a value."""
    if word.is_class:
        line = decorators(word) + in_lines(f"class {word.name}", list(map(str, word.bases)), ":")
        own = word.members.get("__init__")
        is_written = own is not None and own.is_function and own.lineno is not None and own.lineno > word.lineno
        return f"{line}\n{textwrap.indent(signature(own), '    ')}" if is_written else f"{line} ..."
    if word.is_attribute:
        return f"@property\ndef {word.name}(self) -> {word.annotation}" if is_property(word) else declaration(word)
    returns = f" -> {word.returns}" if word.returns is not None else ""
    return decorators(word) + in_lines(f"def {word.name}", list_of(word.parameters), returns, empty="()")


def in_lines(start, items, end, empty=""):
    """Return what begins a class or a function, in one line or with a line for each item."""
    line = f"{start}({', '.join(items)}){end}" if items else f"{start}{empty}{end}"
    if len(line) <= WIDTH:
        return line
    return "".join([f"{start}(\n", *(f"    {item},\n" for item in items), f"){end}"])


def decorators(word):
    return "".join(f"@{decorator.value}\n" for decorator in word.decorators)


def list_of(parameters):
    """Return parameters as they stand in a signature, with the `/` and `*` between them."""
    written, before = [], None
    for parameter in parameters:
        kind = parameter.kind
        if before is KINDS.positional_only and kind is not before:
            written.append("/")
        if kind is KINDS.keyword_only and before not in {kind, KINDS.var_positional}:
            written.append("*")
        stars = {KINDS.var_positional: "*", KINDS.var_keyword: "**"}.get(kind, "")
        text = stars + parameter.name
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and not stars:
            text += f" = {parameter.default}" if parameter.annotation is not None else f"={parameter.default}"
        written.append(text)
        before = kind
    return written


def is_property(word):
    return word.is_attribute and "property" in word.labels


def is_plain_attribute(word):
    return word.is_attribute and not is_property(word)


def declaration(attribute):
    """Return how an attribute is declared; griffe tells that it is one of the class, and leaves out `ClassVar`."""
    text, kind = attribute.name, attribute.annotation
    if attribute.labels == {"instance-attribute"}:  # set in `__init__`, often to one of its arguments
        kind = kind or next((given.annotation for given in attribute.parent.parameters if given.name == text), None)
        return f"{text}: {kind}"
    if kind is not None:
        text += f": ClassVar[{kind}]" if attribute.labels == {"class-attribute"} else f": {kind}"
    return text if attribute.value is None else f"{text} = {attribute.value}"


def told_attributes(thing):
    """Return what a class's docstring says of its attributes, by name."""
    sections = thing.docstring.parsed if thing.docstring else ()
    return {item.name: item.description for one in sections if one.kind is SECTIONS.attributes for item in one.value}


def one_line(text):
    return " ".join(text.split())


def tests_of(path, name):
    named = named_tests().get(path, {}).get(name, [])
    return f" Shown by {', '.join(f'`{test}`' for test in named)}." if named else ""
