"""The naming rules of CONTRIBUTING.md that can be measured: read with `ast`, without importing the package."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("lit_vlm/**/*.py"), *ROOT.glob("callbacks/*.py"), ROOT / "run.py"])

# First words of function names: verbs, and `is`, `has`, `can`, `should`, `to`, `from`, `on`.
VERBS = frozenset(
    """
    accumulate acquire add aggregate allocate append apply assert assign average balance batch benchmark broadcast build
    calculate call can check choose clean clip close collate collect compare compile compute concat configure convert
    copy count create crop decode delete describe detect disable discover dispatch display download draw drop dump
    enable encode ensure estimate eval evaluate export extend extract fetch fill filter find flatten fold format forward
    backward free freeze from gather generate get group handle has hash import index infer init initialize interleave is
    iter iterate join keep launch link list load lock log lookup make map mark mask match measure merge move next
    normalize on open pack pad parse patch plot pop prepare print process profile push put quantize raise read rebalance
    rebuild receive reduce register release remove rename render reorder repeat replace require rescale reset reshape
    resize resolve restart resume run sample save scale scatter search select send set setup shard share should show
    shuffle skip slice sort split stack start step stop store submit sum summarize sync test tie to tokenize train
    transform try unflatten unfreeze unlock unpack unwrap update upload use validate verify visit wait walk wrap write
    yield
    """.split()
)
MIN_VERB_SHARE = 0.70

# Past participles that were names of functions: `drawn`, `opened_sources`, `written`.
PARTICIPLES = frozenset(
    """
    asked built carried chosen composed computed counted decided decoded described dotted drawn entered fitted followed
    found gathered given held judged kept known laid left locked looked loaded made noted opened ordered packed parsed
    planned queued ranked redacted rendered resolved said saved sent settled shown smoothed sorted spelled staged
    started stored taken thinned told turned varied verified wanted written
    """.split()
)

BAD_FIRST_WORDS = frozenset({"what", "of", "by", "where", "how", "whether", "who", "which", "that"})
MAX_BAD_DOCSTRING_SHARE = 0.02

# Optional method of a source (`lit_vlm.types.Source`): classes of users may have it.
SOURCE_INTERFACE = {"digest_of"}
MIN_GLOSSARY_ROWS = 30
GLOSSARY_ROW = re.compile(r"^\| ([^|`]+) \| [^|]+ \| `(\w+)` in `([\w/]+\.py)` \|$", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def iter_functions() -> Iterator[tuple[str, Function]]:
    """Iterate over all functions and methods of the package, also private and nested ones, with their place."""
    for path in FILES:
        for node in ast.walk(parse_file(path)):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def is_attribute_or_special(function: Function) -> bool:
    """Return True for properties, their setters, and special methods such as `__len__`."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return function.name.startswith("__") or any(
        name.endswith(("property", ".setter")) or name.startswith("property") for name in decorators
    )


def get_first_word(name: str) -> str:
    return name.lstrip("_").split("_")[0]


def collect_defined_names(path: Path) -> set[str]:
    """Collect the names that a file defines: functions, classes, variables, fields and attributes of self."""
    names = set()
    for node in ast.walk(parse_file(path)):
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
            names |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
    return names


def test_no_function_name_ends_in_of():
    bad = [place for place, function in iter_functions() if function.name.endswith("_of")]
    assert [place for place in bad if place.split()[-1] not in SOURCE_INTERFACE] == []


def test_most_function_names_begin_with_a_verb():
    names = [(place, function.name) for place, function in iter_functions() if not is_attribute_or_special(function)]
    others = [place for place, name in names if get_first_word(name) not in VERBS]
    share = 1 - len(others) / len(names)
    assert share >= MIN_VERB_SHARE, f"{share:.1%} of {len(names)} begin with a verb; the others: " + "\n".join(others)


def test_no_public_function_is_named_by_a_past_participle():
    functions = [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node.name)
        for path in FILES
        for node in parse_file(path).body
        if isinstance(node, Function) and not node.name.startswith("_")
    ]
    assert functions
    assert [place for place, name in functions if get_first_word(name) in PARTICIPLES] == []


def test_docstrings_begin_with_a_verb_or_a_noun():
    docstrings = [
        (f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text)
        for path in FILES
        for node in ast.walk(parse_file(path))
        if isinstance(node, Function | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node))
    ]
    bad = [
        f"{place} {text.splitlines()[0]}"
        for place, text in docstrings
        if text.split()[0].strip(",.:;").lower() in BAD_FIRST_WORDS
    ]
    assert len(bad) <= MAX_BAD_DOCSTRING_SHARE * len(docstrings), "\n".join(bad)


def test_top_level_classes_of_the_package_have_different_names():
    counts = Counter(
        node.name
        for path in FILES
        for node in parse_file(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_name_of_the_glossary_exists_in_its_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    glossary = text.partition("\n## Glossary\n")[2].partition("\n## ")[0]
    rows = GLOSSARY_ROW.findall(glossary)
    assert len(rows) >= MIN_GLOSSARY_ROWS
    assert len(rows) == sum(line.startswith("| ") for line in glossary.splitlines()) - 1  # without the heading
    for term, name, file in rows:
        assert (ROOT / file).is_file(), f"{term}: {file} does not exist"
        assert name in collect_defined_names(ROOT / file), f"{term}: {file} does not define {name}"
