"""Synthetic preference pairs: the rejected answer has a known error."""

from __future__ import annotations

from collections.abc import Callable

from lit_vlm.data.builtin import dialogue, reading, shapes
from lit_vlm.data.builtin.scenes import Dice, Scene, Thing
from lit_vlm.data.builtin.words import COLOURS, NUM_WORDS, SHAPES, caption_of, words
from lit_vlm.data.markup import obj
from lit_vlm.types import Box, Content, Kind


def pair(dice: Dice) -> tuple[Kind, Scene, tuple[Content, ...]]:
    """Make a pair: the kind, the scene with the right answer, and the wrong answer."""
    kind, task, make_wrong = dice.pick(_KINDS)
    scene = task(dice)
    return kind, scene, make_wrong(dice, scene)


def _wrong_thing(dice: Dice, scene: Scene) -> tuple[Content, ...]:
    """Make a caption with a wrong colour or a wrong shape of one object."""
    things = [thing[:2] for thing in scene.facts]
    which = dice.between(0, len(things) - 1)
    colour, shape = things[which]
    things[which] = (
        (_other(dice, COLOURS, colour), shape) if dice.random() < 0.5 else (colour, _other(dice, SHAPES, shape))
    )
    return (caption_of(things, dice.language),)


def _wrong_word(dice: Dice, scene: Scene) -> tuple[Content, ...]:
    (right,) = scene.facts
    return (_other(dice, words(dice.language, 2 * NUM_WORDS if dice.hard else NUM_WORDS), right),)


def _wrong_number(dice: Dice, scene: Scene) -> tuple[Content, ...]:
    """Make a number with one wrong digit."""
    (right,) = scene.facts
    place = dice.between(0, len(right) - 1)
    digit = _other(dice, "123456789", right[place])
    return (right[:place] + digit + right[place + 1 :],)


def _wrong_grounding(dice: Dice, scene: Scene) -> tuple[Content, ...]:
    """Make an answer with a wrong box, or without a box although <gro> asks for one."""
    thing: Thing = scene.facts[0]
    name = thing.phrase(dice.language)
    return (name,) if dice.random() < 0.5 else obj(name, _elsewhere(dice, thing.box))


def _wrong_text(dice: Dice, scene: Scene) -> tuple[Content, ...]:
    return tuple(scene.facts)


def _elsewhere(dice: Dice, box: Box) -> Box:
    """Move a box by at least a tenth; its size stays."""
    x, y = round(10 * box.x1), round(10 * box.y1)
    width, height = round(10 * box.x2) - x, round(10 * box.y2) - y
    while True:
        other_x, other_y = dice.between(0, 10 - width), dice.between(0, 10 - height)
        if (other_x, other_y) != (x, y):
            return Box(other_x / 10, other_y / 10, (other_x + width) / 10, (other_y + height) / 10)


def _other(dice: Dice, choices, right):
    return dice.pick([choice for choice in choices if choice != right])


_KINDS: tuple[tuple[Kind, Callable[[Dice], Scene], Callable[[Dice, Scene], tuple[Content, ...]]], ...] = (
    (Kind.caption, shapes.caption, _wrong_thing),
    (Kind.word, reading.word, _wrong_word),
    (Kind.number, reading.number, _wrong_number),
    (Kind.grounding, shapes.grounding, _wrong_grounding),
    (Kind.text, dialogue.text, _wrong_text),
)
