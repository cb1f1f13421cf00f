"""Synthetic task without an image: short sums, translation of colour and shape words, greetings."""

from __future__ import annotations

from lit_vlm.data.builtin.scenes import Dice, Scene
from lit_vlm.data.builtin.words import COLOURS, NAMES_EN, NAMES_KO, SHAPES, Colour, names, phrase, with_particle
from lit_vlm.types import Language

_SUMS = tuple((a, b) for a in range(1, 21) for b in range(1, 21))
_HARD_SUMS = tuple((a, b) for a in range(10, 100) for b in range(10, 100))
_THINGS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_GREETINGS = {
    Language.ko: tuple((name, form) for name in NAMES_KO for form in ("안녕하세요", "반갑습니다", "좋은 아침이에요")),
    Language.en: tuple((name, form) for name in NAMES_EN for form in ("Hello", "Hi", "Good morning")),
}


def text(dice: Dice) -> Scene:
    """Make a question and its answer; `facts` is one wrong answer. Held-out questions are never training questions."""
    chance = dice.random()
    question, answer, wrong = _sum(dice) if chance < 0.5 else _translation(dice) if chance < 0.8 else _greeting(dice)
    return Scene((), [((question,), (answer,))], (wrong,))


def _sum(dice: Dice) -> tuple[str, str, str]:
    """Make a sum or difference: (question, answer, wrong answer)."""
    a, b = dice.from_world(_HARD_SUMS if dice.hard else _SUMS)
    off = dice.between(1, 3)
    if a >= b and dice.random() < 0.5:
        question = dice.say(f"{a} 빼기 {with_particle(str(b), '은')} 얼마인가요?", f"What is {a} minus {b}?")
        return question, str(a - b), str(a - b + off)
    question = dice.say(f"{a} 더하기 {with_particle(str(b), '은')} 얼마인가요?", f"What is {a} plus {b}?")
    return question, str(a + b), str(a + b + off)


def _translation(dice: Dice) -> tuple[str, str, str]:
    """Make a translation into the language of the sample: (question, answer, wrong answer)."""
    colour, shape = dice.from_world(_THINGS)
    other: Colour = dice.pick([choice for choice in COLOURS if choice is not colour])
    question = dice.say(
        f"한국어로 옮기세요: {phrase(colour, shape, Language.en)}",
        f"Into English: {phrase(colour, shape, Language.ko)}",
    )
    return question, phrase(colour, shape, dice.language), phrase(other, shape, dice.language)


def _greeting(dice: Dice) -> tuple[str, str, str]:
    """Make a greeting: (question, answer, wrong answer)."""
    name, form = dice.from_world(_GREETINGS[dice.language])
    other = dice.pick([choice for choice in names(dice.language) if choice != name])
    question = dice.say(f"{form}, 저는 {with_particle(name, '이에요')}.", f"{form}, I am {name}.")
    return (
        question,
        dice.say(f"{form}, {name} 님.", f"{form}, {name}."),
        dice.say(f"{form}, {other} 님.", f"{form}, {other}."),
    )
