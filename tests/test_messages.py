"""The catalogue has Korean for every text of the pages and for the commonest errors; nothing in it is stale."""

import ast
import re
import sys
from pathlib import Path
from string import Formatter

import pytest
from jinja2 import Environment, nodes

import run
from lit_vlm import messages
from lit_vlm.messages import find_language, set_language, tell, tell_count, translate
from lit_vlm.messages_ko import COUNTS, SENTENCES, TEXTS

ROOT = Path(__file__).resolve().parents[1]
HANGUL = re.compile("[가-힣]")


def list_placeholders(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in Formatter().parse(text) if name is not None)


@pytest.fixture(scope="module")
def constants() -> str:
    """All texts that the code writes, one a line: string constants, with {} for each value, and texts of templates."""
    found = [
        node.value
        for path in [*ROOT.glob("lit_vlm/**/*.py"), *ROOT.glob("callbacks/*.py")]
        if path.name != "messages_ko.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join([*found, *list_template_texts()])


def list_template_texts() -> list[str]:
    """List the texts that templates and code give to `t` and `tell`."""
    found = []
    for path in ROOT.glob("lit_vlm/**/*.html"):
        for node in Environment().parse(path.read_text(encoding="utf-8")).find_all(nodes.Filter):
            if node.name == "t" and isinstance(node.node, nodes.Const):
                found.append(node.node.value)
    for path in ROOT.glob("lit_vlm/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tell":
                found += [each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)]
    return found


def test_both_languages_of_a_text_have_the_same_placeholders():
    for english, korean in [*TEXTS.items(), *SENTENCES.items()]:
        assert list_placeholders(english) == list_placeholders(korean), english
        assert len(set(list_placeholders(english))) == len(list_placeholders(english)), english
    assert all(list_placeholders(korean) == [""] for korean in COUNTS.values())


def test_every_text_of_a_page_has_korean():
    texts = list_template_texts()
    assert len(texts) > 150
    assert [text for text in texts if text not in TEXTS] == []


def test_no_text_of_the_catalogue_is_unused(constants):
    lines = set(constants.split("\n"))
    unused = [text for text in TEXTS if not {text, text.replace(" ", "_")} & lines]
    unused += [noun for noun in COUNTS if not re.search(rf"\b{noun}", constants)]
    code = constants.lower()
    for text in SENTENCES:
        words = [literal.lower().split() for literal, *_ in Formatter().parse(text)]
        runs = [" ".join(part[start : start + 3]) for part in words for start in range(len(part) - 2)]
        unused += (
            [text] if len(runs) > 2 and sum(run in code for run in runs) < len(runs) / 3 else []
        )  # some are put together
    assert unused == []


def read_commonest_errors() -> list[str]:
    table = (
        (ROOT / "docs/first_hour.md").read_text(encoding="utf-8").split("| `python run.py` with ")[1].split("\n\n")[0]
    )
    return [row.split(" | ")[1].replace("`", "").removeprefix("failure: ") for row in table.splitlines()[2:]]


def test_the_twenty_commonest_errors_are_told_in_korean_with_the_same_settings_to_write():
    errors = read_commonest_errors()
    assert len(errors) == 20
    assert all(translate(text) == text for text in errors)  # English is what was written
    set_language("ko")
    for text in errors:
        korean = translate(text)
        assert HANGUL.search(korean), text
        settings = [
            word.strip(".,;:()?'") for word in text.split() if re.search(r"[\w.]+=\S", word) and "<" not in word
        ]
        assert all(word in korean for word in settings), (korean, settings)


def test_errors_of_a_list_are_told_one_by_one():
    set_language("ko")
    text = (
        "2 mistakes in the configuration:\n- unknown setting lr. Did you mean stage.learning_rate?\n- seed: a new text."
    )
    first, second, third = translate(text).split("\n")
    assert "2개" in first and third == "- seed: a new text."
    assert second.startswith("- 알 수 없는 설정 lr.") and "stage.learning_rate" in second


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"LANG": "ko_KR.UTF-8"}, "ko"),
        ({"LANG": "ko"}, "ko"),
        ({"LANG": "kok_IN.UTF-8"}, "en"),
        ({"LANG": "ko_KR.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "ko_KR"}, "ko"),
        ({"LANG": "ko_KR", "LC_ALL": ""}, "ko"),
        ({}, "en"),
    ],
)
def test_auto_is_the_language_of_the_locale(variables, language):
    assert find_language(variables) == language


@pytest.mark.parametrize("way", ["setting", "locale"])
def test_the_command_line_tells_its_error_in_the_chosen_language(way, monkeypatch):
    monkeypatch.setenv("LC_ALL", "ko_KR.UTF-8" if way == "locale" else "C.UTF-8")
    monkeypatch.setattr(sys, "argv", ["run.py", *(["language=ko"] if way == "setting" else []), "lr=1e-4"])
    with pytest.raises(SystemExit) as error:
        run.main()
    assert str(error.value) == "알 수 없는 설정 lr. 혹시 이것인가요? stage.learning_rate"


def test_a_name_of_the_user_is_no_text_of_the_catalogue():
    set_language("ko")
    assert tell("{source}: nothing is read from", source="step") == "step: 읽지 않는 키:"
    assert translate("time: 3 of 9 cannot be used (2 missing, 1 broken) and will be set aside.").startswith(
        "time: 9개 중 3개"
    )
    assert tell_count(1, "sample") == "샘플 1개" and translate("1,204 samples") == "샘플 1,204개"
    assert translate("an error that nobody translated") == "an error that nobody translated"


def test_a_pattern_takes_time_that_grows_with_its_text_alone():
    set_language("ko")
    text = "unknown setting " + "a: b, c=d. " * 20_000
    assert translate(text).startswith("알 수 없는 설정")
    assert all(pattern.literals[0] or pattern.literals[1] for pattern in messages._list_patterns())
