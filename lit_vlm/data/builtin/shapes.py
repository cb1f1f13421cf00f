"""Synthetic tasks about coloured shapes: caption, image_only, grounding, referring, instruction, multi_image."""

from __future__ import annotations

from lit_vlm.data.builtin.scenes import Dice, Figure, Picture, PixelBox, Scene, Thing
from lit_vlm.data.builtin.words import COLOURS, SHAPES, caption_of, with_particle
from lit_vlm.data.markup import obj
from lit_vlm.types import Box, Control

_GRO = Control("<gro>")
_HARD_SIDE = 33.6  # pixels: 3 tenths of 112 and 2 of 168, so that shapes stay square and corners lie on tenths


def caption(dice: Dice) -> Scene:
    """Make a caption of a single shape; hard: of two, from left to right."""
    question = dice.pick(
        dice.say(
            ("무엇이 보이나요?", "그림을 설명해 주세요.", "그림에 무엇이 있나요?"),
            ("What do you see?", "Describe the picture.", "What is in the picture?"),
        )
    )
    picture, things = _scatter(dice, 2) if dice.hard else _alone(dice)
    answer = caption_of([thing[:2] for thing in things], dice.language)
    return Scene((picture,), [((question,), (answer,))], things)


def image_only(dice: Dice) -> Scene:
    """Make a caption without a question."""
    scene = caption(dice)
    ((_, answer),) = scene.turns
    scene.turns = [((), answer)]
    return scene


def grounding(dice: Dice) -> Scene:
    """Make a grounding task: a single shape with its box on tenths; hard: one of three, named in the question."""
    picture, things = _scatter(dice, 3) if dice.hard else _alone_on_tenths(dice)
    thing = dice.pick(things)
    name = thing.phrase(dice.language)
    named = dice.say(f"{with_particle(name, '을')} 찾아 주세요.", f"Find the {name}.")
    where = dice.say(f"{with_particle(name, '은')} 어디에 있나요?", f"Where is the {name}?")
    questions = (named, where) if dice.hard else (named, dice.say("무엇이 어디에 있나요?", "What is where?"))
    turn = ((_GRO, "\n" + dice.pick(questions)), obj(name, thing.box))
    return Scene((picture,), [turn], [thing])


def referring(dice: Dice) -> Scene:
    """Make a question about the colour of the shape in the given box."""
    picture, things = _scatter(dice, 3 if dice.hard else 2)
    thing = dice.pick(things)
    noun = dice.pick(dice.say(("이 도형", "이 물체"), ("this shape", "this object")))
    mention = obj(noun, thing.box)
    if dice.language == "ko":
        question = (*mention, f"{with_particle(noun, '은')[-1]} 무슨 색인가요?")
    else:
        question = ("What color is ", *mention, "?")
    return Scene((picture,), [(question, (thing.colour.name(dice.language),))], [thing])


def instruction(dice: Dice) -> Scene:
    """Make two or three turns about the same image."""
    turns = _about_many(dice) if dice.hard else _about_one(dice)
    picture, questions = turns
    chosen = dice.some(questions, dice.between(2, 3))
    return Scene((picture,), [((question,), (answer,)) for question, answer in chosen])


def multi_image(dice: Dice) -> Scene:
    """Make a question about two images: which one has a shape, or do both have the same shape."""
    colours = dice.some(COLOURS, 2)
    same = dice.random() < 0.5
    shapes = [dice.pick(SHAPES)] * 2 if same else dice.some(SHAPES, 2)
    pictures, things = [], []
    for colour, shape in zip(colours, shapes, strict=True):
        picture, (thing,) = _alone(dice, (colour, shape))
        pictures.append(picture)
        things.append(thing)
    if dice.random() < 0.5:
        question = dice.say("두 그림에 같은 모양이 있나요?", "Do both pictures show the same shape?")
        answer = dice.say("네", "yes") if same else dice.say("아니요", "no")
    else:
        which = dice.between(0, 1)
        name = things[which].phrase(dice.language)
        question = dice.say(f"어느 그림에 {with_particle(name, '이')} 있나요?", f"Which picture has the {name}?")
        answer = dice.say(("첫 번째", "두 번째"), ("first", "second"))[which]
    return Scene(tuple(pictures), [((question,), (answer,))], things)


def _about_one(dice: Dice) -> tuple[Picture, list[tuple[str, str]]]:
    """Make an image with one shape, and (question, answer) pairs about it."""
    left = dice.random() < 0.5
    # Away from the centre, so that "left" and "right" are unambiguous.
    picture, (thing,) = _alone(dice, area=(0, 0, 30, 56) if left else (26, 0, 56, 56))
    colour, shape = thing.colour.name(dice.language), thing.shape.name(dice.language)
    side = dice.say("왼쪽", "left") if left else dice.say("오른쪽", "right")
    return picture, [
        dice.say(("무슨 색인가요?", f"{colour}입니다."), ("What color is it?", f"It is {colour}.")),
        dice.say(("어떤 모양인가요?", f"{shape}입니다."), ("What shape is it?", f"It is a {shape}.")),
        dice.say(
            ("왼쪽과 오른쪽 중 어디에 있나요?", f"{side}입니다."),
            ("Is it on the left or on the right?", f"On the {side}."),
        ),
    ]


def _about_many(dice: Dice) -> tuple[Picture, list[tuple[str, str]]]:
    """Make an image with two or three shapes, and (question, answer) pairs about them."""
    num = dice.between(2, 3)
    picture, things = _scatter(dice, num)
    colour, shape = things[0].colour.name(dice.language), things[-1].shape.name(dice.language)
    return picture, [
        dice.say(("도형이 몇 개 있나요?", f"{num}개입니다."), ("How many shapes are there?", f"There are {num}.")),
        dice.say(
            ("가장 왼쪽 도형은 무슨 색인가요?", f"{colour}입니다."),
            ("What color is the leftmost shape?", f"It is {colour}."),
        ),
        dice.say(
            ("가장 오른쪽 도형은 어떤 모양인가요?", f"{shape}입니다."),
            ("What is the rightmost shape?", f"It is a {shape}."),
        ),
    ]


def _alone(dice: Dice, kind: tuple | None = None, area: PixelBox | None = None) -> tuple[Picture, list[Thing]]:
    """Make an image with one large shape near the centre of its area; `kind` is its colour and shape."""
    height, width = dice.canvas()
    left, top, right, bottom = area if area and not dice.hard else (0, 0, width, height)
    side = dice.between(22, 28) if area else dice.between(34, 46) * min(height, width) // 56
    x, y = left + dice.near_middle(right - left - side, 4), top + dice.near_middle(bottom - top - side, 4)
    colour, shape = kind or (dice.pick(COLOURS), dice.pick(SHAPES))
    pixels = (x, y, x + side, y + side)
    picture = Picture(height, width, dice.paper(), (Figure(shape.key, pixels, dice.shade(colour)),))
    return picture, [Thing(colour, shape, picture.fractions(pixels), pixels)]


def _alone_on_tenths(dice: Dice) -> tuple[Picture, list[Thing]]:
    """Make an image with one shape away from the border: all corners are 0.1 to 0.9, one number format for a small model."""
    height, width = dice.canvas()
    side = dice.between(3, 5)
    x, y = dice.between(1, 9 - side), dice.between(1, 9 - side)
    thing = _on_tenths(dice.pick(COLOURS), dice.pick(SHAPES), (x, y, x + side, y + side), height, width)
    figure = Figure(thing.shape.key, thing.pixels, dice.shade(thing.colour))
    return Picture(height, width, dice.paper(), (figure,)), [thing]


def _scatter(dice: Dice, num: int) -> tuple[Picture, list[Thing]]:
    """Scatter shapes of different colours from left to right, without horizontal overlap, with corners on tenths."""
    height, width = dice.canvas()
    across, down = (round(10 * _HARD_SIDE / width), round(10 * _HARD_SIDE / height)) if dice.hard else (4, 4)
    gaps = sorted(dice.between(0, 10 - num * across) for _ in range(num))
    things = []
    for position, (gap, colour) in enumerate(zip(gaps, dice.some(COLOURS, num), strict=True)):
        x, y = gap + position * across, dice.between(0, 10 - down)
        things.append(_on_tenths(colour, dice.pick(SHAPES), (x, y, x + across, y + down), height, width))
    figures = tuple(Figure(thing.shape.key, thing.pixels, dice.shade(thing.colour)) for thing in things)
    return Picture(height, width, dice.paper(), figures), things


def _on_tenths(colour, shape, tenths: tuple[int, int, int, int], height: int, width: int) -> Thing:
    x1, y1, x2, y2 = tenths
    pixels = (round(x1 * width / 10), round(y1 * height / 10), round(x2 * width / 10), round(y2 * height / 10))
    return Thing(colour, shape, Box(x1 / 10, y1 / 10, x2 / 10, y2 / 10), pixels)
