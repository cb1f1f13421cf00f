"""Synthetic tasks about coloured shapes: caption, image_only, grounding, referring, instruction, multi_image."""

from __future__ import annotations

from collections.abc import Sequence

from lit_vlm.data.markup import build_object_mention
from lit_vlm.data.synthetic.scenes import Figure, Picture, PixelBox, Rgb, Scene, SceneRng, Text, Thing
from lit_vlm.data.synthetic.vocabulary import COLOURS, SHAPES, add_particle, format_caption
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


_LINE: Rgb = (120, 120, 120)
_HEADER: Rgb = (30, 30, 30)


def make_table(rng: SceneRng) -> Scene:
    """Make a question about a cell of 2x2 digits; hard: of 3x3 two-digit numbers under column letters."""
    height, width = rng.choose_image_size()
    num = 3 if rng.hard else 2
    low, high = (10, 99) if rng.hard else (1, 9)
    values = [[rng.sample_int(low, high) for _ in range(num)] for _ in range(num)]
    row, column = rng.sample_int(0, num - 1), rng.sample_int(0, num - 1)
    if rng.hard:
        letter = "ABC"[column]
        question = rng.select_language(
            f"{letter}열 {row + 1}행의 수는 무엇인가요?", f"Which number is in column {letter}, row {row + 1}?"
        )
    else:
        question = rng.select_language(
            f"{row + 1}행 {column + 1}열의 수는 무엇인가요?", f"Which number is in row {row + 1}, column {column + 1}?"
        )
    rows: Sequence[Sequence[int | str]] = [list("ABC"), *values] if rng.hard else values
    picture = Picture(
        height,
        width,
        rng.sample_background(),
        (*_build_rules(rows, height, width), *_build_cells(rng, rows, height, width)),
    )
    return Scene((picture,), [((question,), (str(values[row][column]),))], values)


def make_chart(rng: SceneRng) -> Scene:
    """Make a question about a bar chart: colour of the tallest of three bars, or a value; hard: five bars with values."""
    height, width = rng.choose_image_size()
    num, max_value = (5, 9) if rng.hard else (3, 4)
    colours = rng.choose_distinct(COLOURS, num)
    values = rng.choose_distinct(range(1, max_value + 1), num)
    if rng.random() < 0.5:
        tallest = colours[values.index(max(values))]
        question = rng.select_language("가장 큰 막대는 무슨 색인가요?", "What color is the tallest bar?")
        answer = tallest.get_name(rng.language)
    else:
        which = rng.sample_int(0, num - 1)
        colour = colours[which]
        question = rng.select_language(
            f"{colour.ko} 막대의 값은 얼마인가요?", f"What is the value of the {colour.en} bar?"
        )
        answer = str(values[which])
    marks = _build_bars(rng, colours, values, max_value, height, width)
    return Scene((Picture(height, width, rng.sample_background(), tuple(marks)),), [((question,), (answer,))], values)


def _build_rules(rows: Sequence[Sequence[int | str]], height: int, width: int) -> list[Figure]:
    down = [
        Figure("square", (0, i * height // len(rows), width, i * height // len(rows) + 1), _LINE)
        for i in range(1, len(rows))
    ]
    num = len(rows[0])
    return down + [Figure("square", (i * width // num, 0, i * width // num + 1, height), _LINE) for i in range(1, num)]


def _build_cells(rng: SceneRng, rows: Sequence[Sequence[int | str]], height: int, width: int) -> list[Text]:
    cell_height, cell_width = height // len(rows), width // len(rows[0])
    size, rgb = (16 if rng.hard else 22), rng.sample_text_colour()
    cells = []
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            x, y = column * cell_width, row * cell_height
            area = (x + 2, y + 2, x + cell_width - 1, y + cell_height - 1)
            cells.append(rng.make_text(str(value), size, area, _HEADER if isinstance(value, str) else rgb, jitter=2))
    return cells


def _build_bars(
    rng: SceneRng, colours: list, values: list[int], max_value: int, height: int, width: int
) -> list[Figure | Text]:
    head = 14 if rng.hard else 4  # space for the values above the bars
    unit = (height - head - 4) // max_value
    floor = height - 3 - rng.sample_int(0, 2)
    marks: list[Figure | Text] = [
        Figure("square", (2, floor - level * unit, width - 2, floor - level * unit + 1), _LINE)
        for level in range(1 if rng.hard else max_value + 1)
    ]
    pitch = (width - 4) // len(values)
    for position, (colour, value) in enumerate(zip(colours, values, strict=True)):
        left, top = 2 + position * pitch + pitch // 6, floor - value * unit
        right = left + pitch * 2 // 3
        marks.append(Figure("square", (left, top, right, floor), rng.sample_shade(colour)))
        if rng.hard:
            marks.append(rng.make_text(str(value), 13, (left, top - 13, right, top - 1), _HEADER))
    return marks
