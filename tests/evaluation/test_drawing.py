"""Boxes that are drawn on pictures."""

from PIL import Image

from lit_vlm.evaluation.box_drawing import PREDICTED, REFERENCE, draw_boxes, parse_box_marks, resize_to_readable

GREEN, RED = (18, 161, 80), (229, 72, 77)


def list_colours(image):
    return {colour for _, colour in image.getcolors(100_000)}


def test_boxes_are_drawn_in_their_colours_at_a_readable_size():
    marks = parse_box_marks("<obj>빨간 원</obj><bbox>0.1, 0.1, 0.5, 0.5</bbox>", REFERENCE)
    marks += parse_box_marks(
        "<char>글</char><bbox>0.2, 0.2, 0.6, 0.6<delim>0, 0, 0.1, 0.1</bbox>", PREDICTED, label_below=True
    )
    picture = Image.new("RGB", (56, 40), "white")
    drawn = draw_boxes(picture, marks)
    assert len(marks) == 3
    assert min(drawn.size) >= 224 and drawn.size[0] * 40 == drawn.size[1] * 56
    assert {GREEN, RED} <= list_colours(drawn)
    assert list_colours(picture) == {(255, 255, 255)}


def test_boxes_beyond_the_picture_are_clipped_at_its_edges():
    drawn = draw_boxes(
        Image.new("RGB", (300, 300), "white"), parse_box_marks("<obj>a</obj><bbox>-3, -1, 9, 2</bbox>", REFERENCE)
    )
    assert drawn.getpixel((0, 150)) == drawn.getpixel((299, 150)) == drawn.getpixel((150, 299)) == GREEN


def test_large_pictures_are_shrunk_and_narrow_ones_fit_the_page():
    assert resize_to_readable(Image.new("RGB", (4000, 1000))).size == (768, 192)
    assert max(resize_to_readable(Image.new("L", (700, 3))).size) <= 768
