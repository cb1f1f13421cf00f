"""VARCO's markup is written, parsed and recognised."""

import pytest

from lit_vlm.data.markup import build_object_mention, build_text_mention, format_box, parse_markup, parse_mentions
from lit_vlm.types import Box, ControlToken, Message, Role


def join_pieces(pieces) -> str:
    return Message(Role.user, tuple(pieces)).text


def get_controls(pieces) -> list[str]:
    return [piece.token for piece in pieces if isinstance(piece, ControlToken)]


@pytest.mark.parametrize(
    ("box", "text"),
    [
        (Box(0.51, 0.34, 0.9996, 0.12345), "0.51, 0.34, 1.0, 0.123"),
        (Box(0, -0.0, 1, 1.0), "0.0, 0.0, 1.0, 1.0"),
        (Box(0.014, 0.106, 0.51, 0.996), "0.014, 0.106, 0.51, 0.996"),
    ],
)
def test_a_box_is_written_without_trailing_zeros(box, text):
    assert format_box(box) == text


def test_built_markup_is_parsed_to_the_same_pieces():
    boxes = [Box(0.014, 0.106, 0.51, 0.996), Box(0.51, 0.054, 0.996, 0.787)]
    pieces = (
        "여기 ",
        *build_object_mention("고양이 두 마리", boxes),
        "와 ",
        *build_text_mention("백범로", boxes[0]),
        "가 있다.",
    )
    text = join_pieces(pieces)
    assert parse_markup(text) == pieces
    assert parse_mentions(text) == [("obj", "고양이 두 마리", boxes), ("char", "백범로", boxes[:1])]


@pytest.mark.parametrize("text", ["<gro>\n이미지를 자세히 묘사해줘.", " \n<ocr>", "<gro>"])
def test_a_task_token_at_the_start_is_a_control_token(text):
    assert len(get_controls(parse_markup(text))) == 1
    assert join_pieces(parse_markup(text)) == text


GOOD_BOX = "<bbox>0.1, 0.2, 0.3, 0.4</bbox>"


@pytest.mark.parametrize(
    "text",
    [
        "write <gro> here",
        "a <ocr>",
        "<obj>cat</obj>",
        GOOD_BOX,
        f"<obj></obj>{GOOD_BOX}",
        f"<obj>cat</char>{GOOD_BOX}",
        f"<obj>cat{GOOD_BOX}",
        f"<obj>a<delim>b</obj>{GOOD_BOX}",
        f"<obj>cat</obj> {GOOD_BOX}",
        "<obj>cat</obj><bbox>0.1, 0.2, 0.3</bbox>",
        "<obj>cat</obj><bbox>0.1, 0.2, 0.3, 1.4</bbox>",
        "<obj>cat</obj><bbox>0.5, 0.2, 0.3, 0.4</bbox>",
        "<obj>cat</obj><bbox>0.1, 0.2, 0.3, 0.4<delim></bbox>",
        "<obj>cat</obj><bbox>0.1, 0.2, 0.3, nan</bbox>",
        "<obj>cat</obj><bbox>\u0660.1, 0.2, 0.3, 0.4</bbox>",
        "<image> <|im_end|> a < b",
    ],
)
def test_ill_formed_markup_stays_text(text):
    assert parse_markup(text) == (text,)


def test_an_unclosed_mention_does_not_swallow_the_next_one():
    pieces = parse_markup(f"<obj>dog and <obj>cat</obj>{GOOD_BOX}")
    assert pieces[0] == "<obj>dog and "
    assert pieces[2] == "cat"


def test_empty_text_has_no_pieces():
    assert parse_markup("") == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<obj>cat</obj><bbox>0.1, 0.2, 0.3",
        "<obj>cat</obj><bbox>0.1, 0.2, x, 0.4</bbox>",
        "<obj>cat</obj><bbox>0.9, 0.2, 0.3, 0.4</bbox>",
        "<obj>cat</obj><bbox>0.1, 0.2, 0.3, inf</bbox>",
        "<obj>cat</obj><bbox>0.1, 0.2, 0.3, 0.4<delim>0.1</bbox>",
    ],
)
def test_output_that_cannot_be_parsed_gives_no_boxes(text):
    assert parse_mentions(text) == []


def test_output_is_parsed_leniently():
    text = "<char> 가 </char> <bbox>0.1,0.2 , 0.3,0.40</bbox>junk<obj>b</obj><bbox>0,0,1,1</bbox>"
    assert parse_mentions(text) == [("char", "가", [Box(0.1, 0.2, 0.3, 0.4)]), ("obj", "b", [Box(0, 0, 1, 1)])]
