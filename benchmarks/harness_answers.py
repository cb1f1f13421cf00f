"""Made answers in the layout of four Korean sets, one form of answer after the other. Used by benchmarks.harnesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCD"
THINGS = [
    ("빨간 원", "파란 네모", "노란 별", "초록 세모"),
    ("서울역", "부산항", "제주도", "한라산"),
    ("1,000원", "2,500원", "3,000원", "4,500원"),
]


@dataclass(frozen=True)
class AnswerForm:
    """Form in which a model states its choice.

    Args:
        name: name in the table, about the right option A.
        make: function of the right letter, the text of its option, a wrong letter and the text of that option.
        is_right: a person reads the right option, and no other, from the answer.
        texts: texts of the options, the right one first; None: one of `THINGS`.
    """

    name: str
    make: Callable[[str, str, str, str], str]
    is_right: bool
    texts: tuple[str, str, str, str] | None = None


FORMS = [
    AnswerForm("A", lambda right, text, wrong, other: right, True),
    AnswerForm("a", lambda right, text, wrong, other: right.lower(), True),
    AnswerForm("A.", lambda right, text, wrong, other: f"{right}.", True),
    AnswerForm("A. 빨간 원", lambda right, text, wrong, other: f"{right}. {text}", True),
    AnswerForm("A: 빨간 원", lambda right, text, wrong, other: f"{right}: {text}", True),
    AnswerForm("A입니다.", lambda right, text, wrong, other: f"{right}입니다.", True),
    AnswerForm("(A)", lambda right, text, wrong, other: f"({right})", True),
    AnswerForm("**A**", lambda right, text, wrong, other: f"**{right}**", True),
    AnswerForm("Ａ (full-width)", lambda right, text, wrong, other: chr(ord(right) + 0xFEE0), True),
    AnswerForm("정답은 A", lambda right, text, wrong, other: f"정답은 {right}", True),
    AnswerForm("정답은 A입니다.", lambda right, text, wrong, other: f"정답은 {right}입니다.", True),
    AnswerForm("정답: A", lambda right, text, wrong, other: f"정답: {right}", True),
    AnswerForm("Answer: A", lambda right, text, wrong, other: f"Answer: {right}", True),
    AnswerForm("The answer is A.", lambda right, text, wrong, other: f"The answer is {right}.", True),
    AnswerForm(
        "사진에 보이는 것은 … 이므로 정답은 A 입니다.",
        lambda right, text, wrong, other: f"사진에 보이는 것은 {text} 이므로 정답은 {right} 입니다.",
        True,
    ),
    AnswerForm("빨간 원", lambda right, text, wrong, other: text, True),
    AnswerForm("빨간 원입니다.", lambda right, text, wrong, other: f"{text}입니다.", True),
    AnswerForm(
        "11,000원 (another option is 1,000원)",
        lambda right, text, wrong, other: text,
        True,
        ("11,000원", "1,000원", "12,500원", "13,000원"),
    ),
    AnswerForm(
        "정답은 A입니다. B는 아닙니다.",
        lambda right, text, wrong, other: f"정답은 {right}입니다. {wrong}는 아닙니다.",
        True,
    ),
    AnswerForm("B가 아니라 A입니다.", lambda right, text, wrong, other: f"{wrong}가 아니라 {right}입니다.", True),
    AnswerForm(
        "The answer is A. Both dogs sit on a CD.",
        lambda right, text, wrong, other: f"The answer is {right}. Both dogs sit on a CD.",
        True,
    ),
    AnswerForm("A, B", lambda right, text, wrong, other: f"{right}, {wrong}", False),
    AnswerForm("A 또는 B", lambda right, text, wrong, other: f"{right} 또는 {wrong}", False),
    AnswerForm("B", lambda right, text, wrong, other: wrong, False),
    AnswerForm("정답은 B입니다.", lambda right, text, wrong, other: f"정답은 {wrong}입니다.", False),
    AnswerForm("파란 네모", lambda right, text, wrong, other: other, False),
    AnswerForm("Apple pie", lambda right, text, wrong, other: "Apple pie", False),
    AnswerForm("잘 모르겠습니다.", lambda right, text, wrong, other: "잘 모르겠습니다.", False),
    AnswerForm(
        "Sorry, I can't help with images of people yet.",
        lambda right, text, wrong, other: "Sorry, I can't help with images of people yet.",
        False,
    ),
    AnswerForm("(no answer)", lambda right, text, wrong, other: "", False),
]


def make_answers(name: str) -> list[dict[str, Any]]:
    """Make the rows of a set, two of each form (right options A and C), with `prediction` and `form`.

    K-MMBench has one question of each form with the four rotations of its options.
    """
    rows = []
    for number, form in enumerate(FORMS):
        texts = form.texts or THINGS[number % len(THINGS)]
        for turn in range(4) if name == "k_mmbench" else (0, 2):
            options = dict(zip(LETTERS, texts[-turn:] + texts[:-turn] if turn else texts, strict=True))
            right = next(letter for letter, text in options.items() if text == texts[0])
            wrong = next(letter for letter, text in options.items() if text == texts[1])
            index = number + turn * 1_000_000 if name == "k_mmbench" else number * 2 + turn // 2
            row = MAKERS[name](index, f"{number:02}번 ({name}): 사진에 무엇이 있습니까?", options, right)
            rows.append(row | {"form": form.name, "prediction": form.make(right, texts[0], wrong, texts[1])})
    return rows


def make_lettered(index: int, question: str, options: dict[str, str], right: str) -> dict[str, Any]:
    named = {f"choice_{letter.lower()}": text for letter, text in options.items()}
    return {"index": index, "question": question, **named, "answer": right, "category": "document"}


def make_seed(index: int, question: str, options: dict[str, str], right: str) -> dict[str, Any]:
    row = make_lettered(index, question, options, right)
    return {"question_id": str(row.pop("index")), **row, "data_type": "image"}


def make_mmbench(index: int, question: str, options: dict[str, str], right: str) -> dict[str, Any]:
    more = {"hint": None, "category": "object", "l2-category": "coarse", "source": "made", "split": "dev"}
    return {"index": index, "question": question, **options, "answer": right, **more}


def make_mmstar(index: int, question: str, options: dict[str, str], right: str) -> dict[str, Any]:
    inline = ", ".join(f"{letter}: {text}" for letter, text in options.items())
    more = {"category": "coarse perception", "l2_category": "image scene and topic"}
    return {"index": index, "question": f"{question}\nOptions: {inline}", "answer": right, **more}


MAKERS = {"k_dtcbench": make_lettered, "k_seed": make_seed, "k_mmstar": make_mmstar, "k_mmbench": make_mmbench}
