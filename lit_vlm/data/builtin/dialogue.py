"""Synthetic task without an image: short sums, translation of colour and shape words, greetings."""

from __future__ import annotations

from lit_vlm.data.builtin.scenes import Scene, SceneRng
from lit_vlm.data.builtin.words import (
    COLOURS,
    NAMES_EN,
    NAMES_KO,
    SHAPES,
    Colour,
    add_particle,
    format_phrase,
    get_names,
)
from lit_vlm.types import Language

_SUMS = tuple((a, b) for a in range(1, 21) for b in range(1, 21))
_HARD_SUMS = tuple((a, b) for a in range(10, 100) for b in range(10, 100))
_THINGS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_GREETINGS = {
    Language.ko: tuple((name, form) for name in NAMES_KO for form in ("안녕하세요", "반갑습니다", "좋은 아침이에요")),
    Language.en: tuple((name, form) for name in NAMES_EN for form in ("Hello", "Hi", "Good morning")),
}


def make_text(rng: SceneRng) -> Scene:
    """Make a question and its answer; `facts` is one wrong answer. Held-out questions are never training questions."""
    chance = rng.random()
    question, answer, wrong = (
        _make_sum(rng) if chance < 0.5 else _make_translation(rng) if chance < 0.8 else _make_greeting(rng)
    )
    return Scene((), [((question,), (answer,))], (wrong,))


def _make_sum(rng: SceneRng) -> tuple[str, str, str]:
    """Make a sum or difference: (question, answer, wrong answer)."""
    a, b = rng.choose_from_world(_HARD_SUMS if rng.hard else _SUMS)
    off = rng.sample_int(1, 3)
    if a >= b and rng.random() < 0.5:
        question = rng.select_language(f"{a} 빼기 {add_particle(str(b), '은')} 얼마인가요?", f"What is {a} minus {b}?")
        return question, str(a - b), str(a - b + off)
    question = rng.select_language(f"{a} 더하기 {add_particle(str(b), '은')} 얼마인가요?", f"What is {a} plus {b}?")
    return question, str(a + b), str(a + b + off)


def _make_translation(rng: SceneRng) -> tuple[str, str, str]:
    """Make a translation into the language of the sample: (question, answer, wrong answer)."""
    colour, shape = rng.choose_from_world(_THINGS)
    other: Colour = rng.choose([choice for choice in COLOURS if choice is not colour])
    question = rng.select_language(
        f"한국어로 옮기세요: {format_phrase(colour, shape, Language.en)}",
        f"Into English: {format_phrase(colour, shape, Language.ko)}",
    )
    return question, format_phrase(colour, shape, rng.language), format_phrase(other, shape, rng.language)


def _make_greeting(rng: SceneRng) -> tuple[str, str, str]:
    """Make a greeting: (question, answer, wrong answer)."""
    name, form = rng.choose_from_world(_GREETINGS[rng.language])
    other = rng.choose([choice for choice in get_names(rng.language) if choice != name])
    question = rng.select_language(f"{form}, 저는 {add_particle(name, '이에요')}.", f"{form}, I am {name}.")
    return (
        question,
        rng.select_language(f"{form}, {name} 님.", f"{form}, {name}."),
        rng.select_language(f"{form}, {other} 님.", f"{form}, {other}."),
    )
