"""Synthetic tasks about coloured shapes: caption, image_only, grounding, referring, instruction, multi_image."""

from __future__ import annotations

from lit_vlm.data.builtin.scenes import Figure, Picture, PixelBox, Scene, SceneRng, Thing
from lit_vlm.data.builtin.words import COLOURS, SHAPES, add_particle, format_caption
from lit_vlm.data.markup import build_object_mention
from lit_vlm.types import Box, ControlToken

_GRO = ControlToken("<gro>")
_HARD_SIDE = 33.6  # pixels: 3 tenths of 112 and 2 of 168, so that shapes stay square and corners lie on tenths


def make_caption(rng: SceneRng) -> Scene:
    """Make a caption of a single shape; hard: of two, from left to right."""
    question = rng.choose(
        rng.select_language(
            ("무엇이 보이나요?", "그림을 설명해 주세요.", "그림에 무엇이 있나요?"),
            ("What do you see?", "Describe the picture.", "What is in the picture?"),
        )
    )
    picture, things = _scatter_shapes(rng, 2) if rng.hard else _make_single_shape(rng)
    answer = format_caption([thing[:2] for thing in things], rng.language)
    return Scene((picture,), [((question,), (answer,))], things)


def make_image_only(rng: SceneRng) -> Scene:
    """Make a caption without a question."""
    scene = make_caption(rng)
    ((_, answer),) = scene.turns
    scene.turns = [((), answer)]
    return scene


def make_grounding(rng: SceneRng) -> Scene:
    """Make a grounding task: a single shape with its box on tenths; hard: one of three, named in the question."""
    picture, things = _scatter_shapes(rng, 3) if rng.hard else _make_single_shape_on_tenths(rng)
    thing = rng.choose(things)
    name = thing.describe(rng.language)
    named = rng.select_language(f"{add_particle(name, '을')} 찾아 주세요.", f"Find the {name}.")
    where = rng.select_language(f"{add_particle(name, '은')} 어디에 있나요?", f"Where is the {name}?")
    questions = (named, where) if rng.hard else (named, rng.select_language("무엇이 어디에 있나요?", "What is where?"))
    turn = ((_GRO, "\n" + rng.choose(questions)), build_object_mention(name, thing.box))
    return Scene((picture,), [turn], [thing])


def make_referring(rng: SceneRng) -> Scene:
    """Make a question about the colour of the shape in the given box."""
    picture, things = _scatter_shapes(rng, 3 if rng.hard else 2)
    thing = rng.choose(things)
    noun = rng.choose(rng.select_language(("이 도형", "이 물체"), ("this shape", "this object")))
    mention = build_object_mention(noun, thing.box)
    if rng.language == "ko":
        question = (*mention, f"{add_particle(noun, '은')[-1]} 무슨 색인가요?")
    else:
        question = ("What color is ", *mention, "?")
    return Scene((picture,), [(question, (thing.colour.get_name(rng.language),))], [thing])


def make_instruction(rng: SceneRng) -> Scene:
    """Make two or three turns about the same image."""
    turns = _make_many_shapes_turns(rng) if rng.hard else _make_single_shape_turns(rng)
    picture, questions = turns
    chosen = rng.choose_distinct(questions, rng.sample_int(2, 3))
    return Scene((picture,), [((question,), (answer,)) for question, answer in chosen])


def make_multi_image(rng: SceneRng) -> Scene:
    """Make a question about two images: which one has a shape, or do both have the same shape."""
    colours = rng.choose_distinct(COLOURS, 2)
    same = rng.random() < 0.5
    shapes = [rng.choose(SHAPES)] * 2 if same else rng.choose_distinct(SHAPES, 2)
    pictures, things = [], []
    for colour, shape in zip(colours, shapes, strict=True):
        picture, (thing,) = _make_single_shape(rng, (colour, shape))
        pictures.append(picture)
        things.append(thing)
    if rng.random() < 0.5:
        question = rng.select_language("두 그림에 같은 모양이 있나요?", "Do both pictures show the same shape?")
        answer = rng.select_language("네", "yes") if same else rng.select_language("아니요", "no")
    else:
        which = rng.sample_int(0, 1)
        name = things[which].describe(rng.language)
        question = rng.select_language(
            f"어느 그림에 {add_particle(name, '이')} 있나요?", f"Which picture has the {name}?"
        )
        answer = rng.select_language(("첫 번째", "두 번째"), ("first", "second"))[which]
    return Scene(tuple(pictures), [((question,), (answer,))], things)


def _make_single_shape_turns(rng: SceneRng) -> tuple[Picture, list[tuple[str, str]]]:
    """Make an image with one shape, and (question, answer) pairs about it."""
    left = rng.random() < 0.5
    # Away from the centre, so that "left" and "right" are unambiguous.
    picture, (thing,) = _make_single_shape(rng, area=(0, 0, 30, 56) if left else (26, 0, 56, 56))
    colour, shape = thing.colour.get_name(rng.language), thing.shape.get_name(rng.language)
    side = rng.select_language("왼쪽", "left") if left else rng.select_language("오른쪽", "right")
    return picture, [
        rng.select_language(("무슨 색인가요?", f"{colour}입니다."), ("What color is it?", f"It is {colour}.")),
        rng.select_language(("어떤 모양인가요?", f"{shape}입니다."), ("What shape is it?", f"It is a {shape}.")),
        rng.select_language(
            ("왼쪽과 오른쪽 중 어디에 있나요?", f"{side}입니다."),
            ("Is it on the left or on the right?", f"On the {side}."),
        ),
    ]


def _make_many_shapes_turns(rng: SceneRng) -> tuple[Picture, list[tuple[str, str]]]:
    """Make an image with two or three shapes, and (question, answer) pairs about them."""
    num = rng.sample_int(2, 3)
    picture, things = _scatter_shapes(rng, num)
    colour, shape = things[0].colour.get_name(rng.language), things[-1].shape.get_name(rng.language)
    return picture, [
        rng.select_language(
            ("도형이 몇 개 있나요?", f"{num}개입니다."), ("How many shapes are there?", f"There are {num}.")
        ),
        rng.select_language(
            ("가장 왼쪽 도형은 무슨 색인가요?", f"{colour}입니다."),
            ("What color is the leftmost shape?", f"It is {colour}."),
        ),
        rng.select_language(
            ("가장 오른쪽 도형은 어떤 모양인가요?", f"{shape}입니다."),
            ("What is the rightmost shape?", f"It is a {shape}."),
        ),
    ]


def _make_single_shape(
    rng: SceneRng, kind: tuple | None = None, area: PixelBox | None = None
) -> tuple[Picture, list[Thing]]:
    """Make an image with one large shape near the centre of its area; `kind` is its colour and shape."""
    height, width = rng.choose_image_size()
    left, top, right, bottom = area if area and not rng.hard else (0, 0, width, height)
    side = rng.sample_int(22, 28) if area else rng.sample_int(34, 46) * min(height, width) // 56
    x, y = left + rng.sample_offset(right - left - side, 4), top + rng.sample_offset(bottom - top - side, 4)
    colour, shape = kind or (rng.choose(COLOURS), rng.choose(SHAPES))
    pixels = (x, y, x + side, y + side)
    picture = Picture(height, width, rng.sample_background(), (Figure(shape.key, pixels, rng.sample_shade(colour)),))
    return picture, [Thing(colour, shape, picture.to_fractions(pixels), pixels)]


def _make_single_shape_on_tenths(rng: SceneRng) -> tuple[Picture, list[Thing]]:
    """Make an image with one shape away from the border: all corners are 0.1 to 0.9, one number format for a small model."""
    height, width = rng.choose_image_size()
    side = rng.sample_int(3, 5)
    x, y = rng.sample_int(1, 9 - side), rng.sample_int(1, 9 - side)
    thing = _build_thing(rng.choose(COLOURS), rng.choose(SHAPES), (x, y, x + side, y + side), height, width)
    figure = Figure(thing.shape.key, thing.pixels, rng.sample_shade(thing.colour))
    return Picture(height, width, rng.sample_background(), (figure,)), [thing]


def _scatter_shapes(rng: SceneRng, num: int) -> tuple[Picture, list[Thing]]:
    """Scatter shapes of different colours from left to right, without horizontal overlap, with corners on tenths."""
    height, width = rng.choose_image_size()
    across, down = (round(10 * _HARD_SIDE / width), round(10 * _HARD_SIDE / height)) if rng.hard else (4, 4)
    gaps = sorted(rng.sample_int(0, 10 - num * across) for _ in range(num))
    things = []
    for position, (gap, colour) in enumerate(zip(gaps, rng.choose_distinct(COLOURS, num), strict=True)):
        x, y = gap + position * across, rng.sample_int(0, 10 - down)
        things.append(_build_thing(colour, rng.choose(SHAPES), (x, y, x + across, y + down), height, width))
    figures = tuple(Figure(thing.shape.key, thing.pixels, rng.sample_shade(thing.colour)) for thing in things)
    return Picture(height, width, rng.sample_background(), figures), things


def _build_thing(colour, shape, tenths: tuple[int, int, int, int], height: int, width: int) -> Thing:
    x1, y1, x2, y2 = tenths
    pixels = (round(x1 * width / 10), round(y1 * height / 10), round(x2 * width / 10), round(y2 * height / 10))
    return Thing(colour, shape, Box(x1 / 10, y1 / 10, x2 / 10, y2 / 10), pixels)
