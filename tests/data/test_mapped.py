"""Label files of other structures, read through a mapping: six sets of AI-Hub, and faulty mappings and labels."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
from delivery import decompose, label, make_pair, make_zip, open_mapped, open_named_set, picture
from PIL import Image

from lit_vlm.config.choices import MarkerMeaning
from lit_vlm.config.mapping import BoxFormat, BoxFrame, BoxUnit, RegionTask
from lit_vlm.data.lazy_images import FileImage
from lit_vlm.data.markup import parse_mentions
from lit_vlm.types import (
    ControlToken,
    Fault,
    ImagePlaceholder,
    Language,
    Message,
    RecordError,
    Role,
    SampleKind,
    UserError,
)

REGION = {"regions": "items", "text": "{text}", "box": ["box"], "answer": None}


def get_texts(sample):
    return [message.text for message in sample.messages]


def get_boxes(sample):
    return [
        (text, [(box.x1, box.y1, box.x2, box.y2) for box in found])
        for _, text, found in parse_mentions(sample.messages[1].text)
    ]


def test_79_food_names_come_from_the_folder(tmp_path):
    names = ["구이/갈비구이/Img_000_0000.jpg", "구이/갈비구이/Img_000_0001.jpg"]
    make_zip(tmp_path / "구이.zip", [(name, picture()) for name in names], encoding="cp949")
    make_zip(tmp_path / "국.zip", [(decompose("국/미역국/Img_001_0000.JPG"), picture())])
    source = open_named_set("aihub_79_food", tmp_path)
    assert sorted(sample.messages[1].text for sample in source) == ["갈비구이", "갈비구이", "미역국"]
    assert {(sample.kind, sample.language) for sample in source} == {(SampleKind.instruction, Language.ko)}
    assert all(
        sample.messages[0].content[0] == ImagePlaceholder(0) and sample.images[0].size == (50, 100) for sample in source
    )
    assert source[0].images[0].load().size == (100, 50)


def test_144_objects_become_grounding_answers(tmp_path):
    record = {
        "image": {"identifier": "HF010001_0001_0001.jpg", "imsize": [200, 100]},
        "regions": [{"boxcorners": [150, 80, 50, 20], "class": decompose("남산타워"), "tags": ["계절:봄"]}],
    }
    make_zip(tmp_path / "[라벨]건물.zip", [("HF010001_남산/HF010001_0001_0001.json", label(record))], "cp949")
    make_zip(tmp_path / "[원천]건물.zip", [("HF010001_남산/HF010001_0001_0001.jpg", picture(200, 100))], "cp949")
    (sample,) = open_named_set("aihub_144_objects", tmp_path)
    assert sample.messages[0].content[:2] == (ImagePlaceholder(0), ControlToken("<gro>"))
    assert sample.messages[0].content[2].startswith("\n사진") and (sample.kind, sample.language) == ("grounding", "ko")
    assert get_boxes(sample) == [("남산타워", [(0.25, 0.2, 0.75, 0.8)])] and sample.nfc_changed


def test_81_words_are_read_with_their_boxes(tmp_path):
    words = [("간판", "word"), ("간", "character"), ("2층", "word"), ("?", "ignored")]
    annotations = [
        {
            "id": number,
            "image_id": "00000001",
            "text": text,
            "attributes": {"class": kind},
            "bbox": [8, 4 * number, 16, 4],
        }
        for number, (text, kind) in enumerate(words)
    ]
    images = [{"id": f"0000000{number}", "width": 64, "height": 32, "file_name": f"{number}.jpg"} for number in (1, 2)]
    whole = {"info": {"images": []}, "images": images, "annotations": annotations, "licenses": []}
    (tmp_path / "textinthewild_data_info.json").write_bytes(b"\xef\xbb\xbf" + label(whole))
    make_zip(tmp_path / "01_book.zip", [(f"book/{number}.jpg", picture(64, 32)) for number in (1, 2)])
    source = open_named_set("aihub_81_glyphs", tmp_path)
    sample = source[0]
    assert sample.messages[0].content == (ImagePlaceholder(0), ControlToken("<ocr>")) and sample.kind is SampleKind.ocr
    assert get_texts(sample)[1] == (
        "<char>간판</char><bbox>0.125, 0.0, 0.375, 0.125</bbox>\n<char>2층</char><bbox>0.125, 0.25, 0.375, 0.375</bbox>"
    )
    assert sample.messages[1].content.count(ControlToken("<char>")) == 2
    with pytest.raises(RecordError, match="annotations is there") as caught:
        source[1]
    assert caught.value.fault is Fault.no_answer and caught.value.origin == "textinthewild_data_info.json[1]"


def test_71730_polygons_become_boxes(tmp_path):
    corners = [[10, 5], [30, 6], [31, 15], [11, 14]]
    record = {
        "Images": {"file_name": "a.jpg", "width": 100, "height": 50},
        "Annotation": [
            {"polygon": corners, "language": "ko", "transcription": "출구"},
            {"polygon": [[50, 25], [100.4, 25], [100.4, 50], [50, 50]], "language": "en", "transcription": "Exit"},
        ],
    }
    (sample,) = open_named_set("aihub_71730_ocr", make_pair(tmp_path, record))
    assert get_boxes(sample) == [("출구", [(0.1, 0.1, 0.31, 0.3)]), ("Exit", [(0.5, 0.5, 1.0, 1.0)])]
    assert (sample.kind, sample.language) == ("ocr", "ko")


def test_71711_questions_become_turns(tmp_path):
    record = {"questions": [{"question": "무엇인가요?", "answer": "컵"}, {"question": "몇 개인가요?", "answer": 2}]}
    (sample,) = open_named_set("aihub_71711_gqa", make_pair(tmp_path, record))
    assert get_texts(sample) == ["무엇인가요?", "컵", "몇 개인가요?", "2"]
    assert sample.messages[2].content == ("몇 개인가요?",) and sample.kind is SampleKind.instruction


def test_71357_reads_one_list_for_all_images(tmp_path):
    records = [
        {"IMAGE_ID": str(n), "IMAGE_NAME": f"{n}.jpg", "questions": [{"question_ko": f"{n}?", "answer_ko": f"답 {n}"}]}
        for n in range(3)
    ]
    make_zip(tmp_path / "VL_VQA.zip", [("vqa.json", label({"annotations": records}, "cp949"))])
    make_zip(tmp_path / "VS.zip", [(f"{n}.jpg", picture()) for n in range(3)])
    source = open_named_set("aihub_71357_ekvqa", tmp_path)
    assert [(sample.id, *get_texts(sample)) for sample in source] == [(str(n), f"{n}?", f"답 {n}") for n in range(3)]
    assert source.origin(2) == "VL_VQA.zip/vqa.json[2]" and len(source.digest_of(0, 2)) == 64


@pytest.mark.parametrize(
    ("box", "options"),
    [
        ([10, 5, 20, 10], {"box_format": BoxFormat.xywh}),
        ([10, 5, 30, 15], {}),
        (["10", "5", "30", "15"], {}),
        ([0.1, 0.1, 0.3, 0.3], {"box_unit": BoxUnit.fractions}),
        ([10, 5, 30, 5, 30, 15, 10, 15], {"box_format": BoxFormat.polygon}),
        ([{"x": 10, "y": 5}, {"x": 30, "y": 15}], {"box_format": BoxFormat.polygon}),
        ({"x": [10, 30, 30, 10], "y": [5, 5, 15, 15]}, {"box_format": BoxFormat.polygon, "box": ["box.x", "box.y"]}),
        ({"x": 10, "y": 5, "w": 20, "h": 10}, {"box_format": BoxFormat.xywh, "box": [f"box.{key}" for key in "xywh"]}),
    ],
)
def test_boxes_of_all_formats_are_fractions_of_the_image(tmp_path, box, options):
    make_pair(tmp_path, {"items": [{"text": "가", "box": box}]})  # 100 x 50, by its header
    (sample,) = open_mapped(tmp_path, **{**REGION, **options})
    assert get_boxes(sample)[0] == ("가", [pytest.approx((0.1, 0.1, 0.3, 0.3), abs=1e-6)])


def test_text_that_looks_like_tokens_stays_text(tmp_path):
    make_pair(tmp_path, {"q": "<image> <ocr> {@stem}", "items": [{"text": "</char><bbox>", "box": [0, 0, 9, 9]}]})
    with pytest.raises(RecordError, match="'<bbox>' in a text stands for a box in other forms"):
        open_mapped(tmp_path, **REGION)[0]
    (sample,) = open_mapped(tmp_path, **REGION, questions=["{q}"], marks=MarkerMeaning.text)
    assert sample.messages[0].content == (ImagePlaceholder(0), ControlToken("<ocr>"), "\n<image> <ocr> {@stem}")
    assert sample.messages[1].content[:3] == (ControlToken("<char>"), "</char><bbox>", ControlToken("</char>"))


def test_a_question_can_refer_to_regions(tmp_path):
    record = {
        "items": [{"text": "이것", "box": [0, 0, 50, 25]}, {"text": "이것", "box": [50, 25, 100, 50]}],
        "answer": "컵",
    }
    options = {**REGION, "task": RegionTask.referring, "questions": ["{@regions}은 무엇인가요?"], "answer": "{answer}"}
    (sample,) = open_mapped(make_pair(tmp_path, record), **options)
    asked = "<obj>이것</obj><bbox>0.0, 0.0, 0.5, 0.5<delim>0.5, 0.5, 1.0, 1.0</bbox>은 무엇인가요?"
    assert get_texts(sample) == [asked, "컵"] and sample.kind is SampleKind.referring


def test_an_image_is_found_in_folders_in_any_unicode_form(tmp_path):
    make_zip(tmp_path / "labels.zip", [(f"라벨/{decompose('사과')}.json", label({"answer": "사과"}))])
    (tmp_path / "원천").mkdir()
    (tmp_path / "원천" / f"{decompose('사과')}.jpg").write_bytes(picture())
    (sample,) = open_mapped(tmp_path, image="{@stem}.jpg")
    assert sample.images[0].load().size == (100, 50) and sample.messages[0].content == (ImagePlaceholder(0),)


def test_of_images_with_one_name_that_of_the_labels_pair_is_read(tmp_path):
    for part, colour in (("1", (255, 0, 0)), ("2", (0, 0, 255))):
        make_zip(tmp_path / f"TL_{part}.zip", [("a.json", label({"answer": part}))])
        make_zip(tmp_path / f"TS_{part}.zip", [("a.png", picture(kind="PNG", colour=colour))])
    source = open_mapped(tmp_path)
    assert [(sample.messages[1].text, sample.images[0].load().getpixel((0, 0))) for sample in source] == [
        ("1", (255, 0, 0)),
        ("2", (0, 0, 255)),
    ]


def test_an_ambiguous_image_is_refused_with_both_names(tmp_path):
    make_zip(
        tmp_path / "x.zip", [("a.json", label({"answer": "1"})), ("사진/a.jpg", picture()), ("b/a.jpg", picture())]
    )
    with pytest.raises(RecordError, match=r"'a' may be 'x\.zip/사진/a\.jpg' and 'x\.zip/b/a\.jpg'"):
        open_mapped(tmp_path)[0]
    (tmp_path / "b").mkdir()
    whole = open_mapped(tmp_path, image="b/{@stem}.jpg")[0]
    assert whole.images[0].member.name == "b/a.jpg"


@pytest.mark.parametrize(
    ("record", "mapping", "reason"),
    [
        ({"answer": "1"}, {"image": "b.jpg"}, "image 'b.jpg' not found in .*1 picture,"),
        ({"anwser": "1", "b": 2}, {}, r"there is no 'answer': the record has the keys 'anwser', 'b'"),
        ({"a": {"c": 1}}, {"answer": "{a.b}"}, r"there is no 'a\.b': a has the keys 'c'"),
        ({"a": [1]}, {"answer": "{a.1}"}, "there is no 'a.1': a has 1 items"),
        ({"answer": None}, {}, "answer is null; it must be text"),
        ({"answer": "  "}, {}, "the assistant's, is empty"),
        ({"items": 3}, REGION, "items is a number; it must be a list"),
        ({"items": []}, REGION, "no item of items is there"),
        ({"items": [{"text": " ", "box": [0, 0, 9, 9]}]}, REGION, r"items\[0\] has no text"),
        ({"items": [{"text": "a", "box": [0, 0, 9]}]}, REGION, "has 3 numbers; a box has 4"),
        ({"items": [{"text": "a", "box": [0, 0, "x", 9]}]}, REGION, "is 'x'; it must be a number"),
        ({"items": [{"text": "a", "box": [0, 0, 1e999, 9]}]}, REGION, "is inf; it must be a number"),
        ({"items": [{"text": "a", "box": [200, 0, 300, 9]}]}, REGION, "no box inside of 100 x 50"),
        ({"items": [{"text": "a", "box": [5, 0, 5, 9]}]}, REGION, "no box inside of 100 x 50"),
        ({"items": [{"text": "a", "box": [0, 0, 9, 9]}]}, {**REGION, "keep": ["kind=word"]}, "there is no 'kind'"),
        (b'{"answer": ', {}, "not JSON at line 1, column 12"),
        (b"\xff\xff\x80", {}, "neither UTF-8 nor CP949"),
        (b"[1]", {}, "the record is a list; it must be an object"),
        ({"answer": "\ud800"}, {}, "half of a surrogate pair"),
    ],
)
def test_a_label_that_does_not_fit_the_mapping_is_a_bad_record(tmp_path, record, mapping, reason):
    data = json.dumps(record).encode() if isinstance(record, dict) else record
    source = open_mapped(make_pair(tmp_path, data), **mapping)
    with pytest.raises(RecordError, match=reason) as caught:
        source[0]
    assert caught.value.origin == "TL_1.zip/a.json"


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        ({"answer": "{@fodler}"}, r"mapping\.answer: there is no {@fodler}\. .*Did you mean {@folder}\?"),
        ({"answer": "{a"}, r"mapping\.answer: "),
        ({"questions": ["{a!r}"]}, r"mapping\.questions\[0\]: a path alone"),
        ({"answer": None}, "answer is not set"),
        ({"answer": "{@regions}"}, "regions is not set"),
        ({**REGION, "box": ["a", "b"]}, "box: 1 or 4 paths are needed"),
        ({**REGION, "keep": ["word"]}, "keep: 'word' is no path=value"),
        ({"size": ["w"]}, "size: two paths"),
        ({"labels": "*.xml"}, r"looked for label files \*\.xml, found none"),
        ({"records": "items"}, "there is no 'items' .*; the keys are 'answer'"),
        ({"records": "answer"}, "'answer' .* is no list"),
    ],
)
def test_an_invalid_mapping_is_refused_when_the_source_is_opened(tmp_path, mapping, reason):
    with pytest.raises(UserError, match=reason):
        open_mapped(make_pair(tmp_path, {"answer": "1"}), **mapping)


def test_a_join_without_a_match_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(label({"images": [{"id": 1}], "annotations": [{"image_id": 7}]}))
    (tmp_path / "a.jpg").write_bytes(picture())
    with pytest.raises(UserError, match="names a record, the first says image_id='7'"):
        open_mapped(tmp_path, records="images", join="annotations")


def test_a_mapped_source_pickles_small_and_reads_the_same_in_another_process(tmp_path):
    make_zip(tmp_path / "l.zip", [(f"{n}.json", label({"answer": str(n)})) for n in range(200)])
    make_zip(tmp_path / "s.zip", [(f"{n}.jpg", picture()) for n in range(200)])
    source = open_mapped(tmp_path)
    packed = pickle.dumps(source)
    assert len(packed) < 3000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_answer, (packed, 7)) == source[7].messages[1].text == get_texts(source[7])[1]
    assert pickle.loads(packed).digest == source.digest


def _read_answer(packed, number):
    sample = pickle.loads(packed)[number]
    assert isinstance(sample.messages[0], Message) and sample.messages[0].role is Role.user
    sample.images[0].load()
    return sample.messages[1].text


def test_the_digest_changes_with_the_mapping_and_the_files(tmp_path):
    make_pair(tmp_path, {"answer": "1"})
    before = open_mapped(tmp_path).digest
    assert open_mapped(tmp_path).digest == before != open_mapped(tmp_path, questions=["?"]).digest
    make_zip(tmp_path / "TS_1.zip", [("a.jpg", picture(colour=(0, 0, 0)))])
    assert open_mapped(tmp_path).digest != before


# Images that EXIF rotates


RAW = (40, 30)  # width and height of the stored pixels
SPOT = (20, 3, 36, 9)  # a red rectangle in them


def save_photo(folder, orientation, size=RAW):
    """Save a photograph as a phone stores it, and return the box of the red area in the upright image."""
    image = Image.new("RGB", RAW, "white")
    image.paste("red", SPOT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.resize(size, Image.Resampling.NEAREST).save(folder / "a.png", exif=exif)
    shown = FileImage("a.png", folder, "a", 10**6).load()
    red = np.argwhere(np.asarray(shown)[..., 1] < 128)
    (top, left), (bottom, right) = red.min(axis=0), red.max(axis=0) + 1
    return [
        float(f"{value:.3f}")
        for value in (left / shown.width, top / shown.height, right / shown.width, bottom / shown.height)
    ]


def read_box(folder, labelled, box=SPOT, **options):
    record = {"w": labelled[0], "h": labelled[1], "items": [{"text": "점", "box": list(box)}]}
    (folder / "a.json").write_bytes(label(record))
    found = open_mapped(folder, **{**REGION, "size": ["w", "h"], **options})[0]
    return list(get_boxes(found)[0][1][0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_the_stored_pixels_are_rotated_with_the_image(tmp_path, orientation):
    expected = save_photo(tmp_path, orientation)
    is_sideways = orientation >= 5
    frame = BoxFrame.auto if is_sideways or orientation == 1 else BoxFrame.stored
    assert read_box(tmp_path, RAW, box_frame=frame) == pytest.approx(expected, abs=1e-9)
    assert read_box(tmp_path, RAW, size=[], box_frame=BoxFrame.stored) == pytest.approx(expected, abs=1e-9)
    fractions = [SPOT[0] / 40, SPOT[1] / 30, SPOT[2] / 40, SPOT[3] / 30]
    options = {"box_unit": BoxUnit.fractions, "box_frame": BoxFrame.stored}
    assert read_box(tmp_path, RAW, fractions, **options) == pytest.approx(expected, abs=1e-9)
    upright = (30, 40) if is_sideways else RAW
    upright_box = [
        round(expected[0] * upright[0]),
        round(expected[1] * upright[1]),
        round(expected[2] * upright[0]),
        round(expected[3] * upright[1]),
    ]
    frame = BoxFrame.auto if is_sideways or orientation == 1 else BoxFrame.upright
    assert read_box(tmp_path, upright, upright_box, box_frame=frame) == pytest.approx(expected, abs=1e-9)


def test_a_label_can_describe_the_image_at_another_scale(tmp_path):
    expected = save_photo(tmp_path, 6, size=(80, 60))
    assert read_box(tmp_path, RAW) == pytest.approx(expected, abs=1e-9)
    save_photo(tmp_path, 1, size=(81, 60))
    assert read_box(tmp_path, RAW)[0] == 0.5


@pytest.mark.parametrize(
    ("orientation", "size", "options", "words"),
    [
        (
            1,
            (30, 40),
            {},
            "the label says 30 x 40 pixels, and the picture has 40 x 30: its boxes are of another picture",
        ),
        (6, (50, 30), {}, "the label says 50 x 30 pixels, and the picture has 30 x 40, turned by EXIF from 40 x 30"),
        (6, RAW, {"box_frame": BoxFrame.upright}, "its boxes are of another picture"),
        (3, RAW, {}, "EXIF turns the picture (orientation 3), and nothing tells whether the boxes are turned too"),
        (6, RAW, {"size": []}, "set mapping.box_frame=upright, or stored for those of the file's pixels"),
        (1, (0, 30), {}, "w, h are 0, 30; a picture is larger"),
    ],
)
def test_a_label_whose_size_contradicts_its_image_is_refused(tmp_path, orientation, size, options, words):
    save_photo(tmp_path, orientation)
    with pytest.raises(RecordError) as caught:
        read_box(tmp_path, size, **options)
    assert words in str(caught.value), caught.value


# Duplicate keys


def test_a_duplicate_key_in_a_label_is_refused(tmp_path):
    make_pair(tmp_path, b'{"answer": "a", "answer": "b"}')
    with pytest.raises(RecordError, match=r"TL_1.zip/a.json: the key 'answer' stands twice in one object"):
        open_mapped(tmp_path)[0]
    coco = '{"images": [{"id": 1, "file": "a.jpg"}, {"id": 2, "file": "a.jpg"}], "annotations": [%s]}'
    twice, good = '{"image_id": 1, "a": {"x": 1, "x": 2}}', '{"image_id": 2, "a": {"x": 1}}'
    options = {
        "labels": "c.json",
        "records": "images",
        "join": "annotations",
        "image": "{file}",
        "answer": "{annotations.0.a.x}",
    }
    (tmp_path / "c.json").write_text(coco % f"{twice}, {good}")
    source = open_mapped(tmp_path, **options)
    with pytest.raises(RecordError, match=r"c.json\[0\]: the key 'x' stands twice"):
        source[0]
    assert source[1].messages[1].text == "1"
    (tmp_path / "c.json").write_text((coco % good)[:-1] + ', "images": []}')
    with pytest.raises(UserError, match=r"c.json: the key 'images' stands twice in one object"):
        open_mapped(tmp_path, **options)
