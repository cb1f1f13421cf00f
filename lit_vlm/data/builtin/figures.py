"""Synthetic tasks about tables and charts."""

from __future__ import annotations

from collections.abc import Sequence

from lit_vlm.data.builtin.scenes import Figure, Picture, Rgb, Scene, SceneRng, Text
from lit_vlm.data.builtin.words import COLOURS

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
