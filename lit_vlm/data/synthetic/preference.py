"""Synthetic preference pairs: the rejected answer has a known error."""

from __future__ import annotations

from collections.abc import Callable

from lit_vlm.data.markup import build_object_mention
from lit_vlm.data.synthetic import image_tasks, text_tasks
from lit_vlm.data.synthetic.scenes import Scene, SceneRng, Thing
from lit_vlm.data.synthetic.vocabulary import COLOURS, NUM_WORDS, SHAPES, format_caption, get_words
from lit_vlm.types import Box, ContentPart, SampleKind


def make_pair(rng: SceneRng) -> tuple[SampleKind, Scene, tuple[ContentPart, ...]]:
    """Make a pair: the kind, the scene with the right answer, and the wrong answer."""
    kind, task, make_wrong = rng.choose(_KINDS)
    scene = task(rng)
    return kind, scene, make_wrong(rng, scene)


def _make_wrong_thing(rng: SceneRng, scene: Scene) -> tuple[ContentPart, ...]:
    """Make a caption with a wrong colour or a wrong shape of one object."""
    things = [thing[:2] for thing in scene.facts]
    which = rng.sample_int(0, len(things) - 1)
    colour, shape = things[which]
    things[which] = (
        (_choose_other(rng, COLOURS, colour), shape)
        if rng.random() < 0.5
        else (colour, _choose_other(rng, SHAPES, shape))
    )
    return (format_caption(things, rng.language),)


def _make_wrong_word(rng: SceneRng, scene: Scene) -> tuple[ContentPart, ...]:
    (right,) = scene.facts
    return (_choose_other(rng, get_words(rng.language, 2 * NUM_WORDS if rng.hard else NUM_WORDS), right),)


def _make_wrong_number(rng: SceneRng, scene: Scene) -> tuple[ContentPart, ...]:
    """Make a number with one wrong digit."""
    (right,) = scene.facts
    place = rng.sample_int(0, len(right) - 1)
    digit = _choose_other(rng, "123456789", right[place])
    return (right[:place] + digit + right[place + 1 :],)


def _make_wrong_grounding(rng: SceneRng, scene: Scene) -> tuple[ContentPart, ...]:
    """Make an answer with a wrong box, or without a box although <gro> asks for one."""
    thing: Thing = scene.facts[0]
    name = thing.describe(rng.language)
    return (name,) if rng.random() < 0.5 else build_object_mention(name, _move_box(rng, thing.box))


def _make_wrong_text(rng: SceneRng, scene: Scene) -> tuple[ContentPart, ...]:
    return tuple(scene.facts)


def _move_box(rng: SceneRng, box: Box) -> Box:
    """Move a box by at least a tenth; its size stays."""
    x, y = round(10 * box.x1), round(10 * box.y1)
    width, height = round(10 * box.x2) - x, round(10 * box.y2) - y
    while True:
        other_x, other_y = rng.sample_int(0, 10 - width), rng.sample_int(0, 10 - height)
        if (other_x, other_y) != (x, y):
            return Box(other_x / 10, other_y / 10, (other_x + width) / 10, (other_y + height) / 10)


def _choose_other(rng: SceneRng, choices, right):
    return rng.choose([choice for choice in choices if choice != right])


_KINDS: tuple[
    tuple[SampleKind, Callable[[SceneRng], Scene], Callable[[SceneRng, Scene], tuple[ContentPart, ...]]], ...
] = (
    (SampleKind.caption, image_tasks.make_caption, _make_wrong_thing),
    (SampleKind.word, text_tasks.make_word, _make_wrong_word),
    (SampleKind.number, text_tasks.make_number, _make_wrong_number),
    (SampleKind.grounding, image_tasks.make_grounding, _make_wrong_grounding),
    (SampleKind.text, text_tasks.make_text, _make_wrong_text),
)
