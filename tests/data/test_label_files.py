"""Label files as they are published: COCO's captions and objects, Flickr30k's captions, Visual Genome's regions."""

import json

import pytest
from PIL import Image
from source_cases import get_contents, open_path

from lit_vlm.config.mapping import BoxFormat, MappingConfig, RegionTask
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.markup import parse_mentions
from lit_vlm.data.readers.coco import CAPTION_QUESTIONS
from lit_vlm.data.sources import open_source
from lit_vlm.types import ImagePlaceholder, RecordError, UserError

IMAGES = [
    {"id": 7, "file_name": "a.jpg", "width": 40, "height": 20, "license": 1},
    {"id": 9, "file_name": "b.jpg", "width": 20, "height": 20, "license": 1},
]
CAPTIONS = [
    {"id": 1, "image_id": 7, "caption": "A dog and a cat."},
    {"id": 2, "image_id": 9, "caption": "Grass.\n"},
    {"id": 3, "image_id": 7, "caption": "Two animals."},
]
OBJECTS = [
    {"id": 1, "image_id": 7, "category_id": 18, "bbox": [4, 2, 10, 10], "iscrowd": 0, "area": 100, "segmentation": []},
    {
        "id": 2,
        "image_id": 7,
        "category_id": 17,
        "bbox": [20, 10, 25, 10],
        "iscrowd": 0,
        "area": 200,
        "segmentation": [],
    },
    {"id": 3, "image_id": 7, "category_id": 18, "bbox": [0, 0, 4, 4], "iscrowd": 0, "area": 16, "segmentation": []},
    {"id": 4, "image_id": 7, "category_id": 17, "bbox": [0, 0, 40, 20], "iscrowd": 1, "area": 800, "segmentation": {}},
]
CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for image in IMAGES:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "val2017" / image["file_name"])
    info = {"info": {"year": 2017}, "licenses": [], "images": IMAGES}
    for name, content in (
        ("captions_val2017.json", {"annotations": CAPTIONS}),
        ("instances_val2017.json", {"annotations": OBJECTS, "categories": CATEGORIES}),
    ):
        (tmp_path / "annotations" / name).write_text(json.dumps(info | content))
    return tmp_path


def open_coco(folder, name, **options):
    return open_path(folder / "annotations" / name, image_root=str(folder / "val2017"), **options)


def test_each_caption_of_coco_is_a_record_with_its_picture(coco):
    source = open_coco(coco, "captions_val2017.json")
    assert len(source) == 3
    assert [sample.messages[-1].text for sample in source] == ["A dog and a cat.", "Two animals.", "Grass."]
    assert get_contents(source[0])[0] == (ImagePlaceholder(0), CAPTION_QUESTIONS[0])
    assert [sample.images[0].size for sample in source] == [(20, 40), (20, 40), (20, 20)]
    assert len({sample.id for sample in source}) == 3 and source[1].origin == "captions_val2017.json: caption 3"


def test_objects_of_coco_are_named_with_their_boxes_and_crowds_are_counted_as_unread(coco):
    (sample,) = open_coco(coco, "instances_val2017.json")
    found = [
        (phrase, [(box.x1, box.y1, box.x2, box.y2) for box in boxes])
        for _, phrase, boxes in parse_mentions(sample.messages[1].text)
    ]
    assert found == [("dog", [(0.1, 0.1, 0.35, 0.6), (0.0, 0.0, 0.1, 0.2)]), ("cat", [(0.5, 0.5, 1.0, 1.0)])]
    assert sample.messages[0].text.startswith("<gro>\n") and sample.kind == "grounding"
    assert sample.unused_keys == ("crowds (iscrowd)",)


def test_captions_and_objects_read_together_give_one_record_for_each_picture(coco):
    source = open_coco(coco, "{captions,instances}_val2017.json")
    assert [len(sample.messages) for sample in source] == [6, 2]
    assert [message.text for message in source[0].messages[1:4:2]] == ["A dog and a cat.", "Two animals."]
    assert parse_mentions(source[0].messages[5].text) and source[1].messages[1].text == "Grass."


def test_captions_of_flickr30k_are_read_from_both_published_files(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "1000092795.jpg")
    lines = [f"1000092795.jpg#{number}\tTwo young guys {number} ." for number in range(5)]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines) + "\n")
    source = open_path(tmp_path / "results_20130124.token", image_root=str(tmp_path))
    assert [sample.messages[1].text for sample in source] == [f"Two young guys {number} ." for number in range(5)]
    splits = [
        {"filename": "1000092795.jpg", "split": "train", "sentences": [{"raw": "Two guys."}, {"raw": "Two men."}]}
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": splits, "dataset": "flickr30k"}))
    source = open_path(tmp_path / "dataset_flickr30k.json", image_root=str(tmp_path))
    assert [sample.messages[1].text for sample in source] == ["Two guys.", "Two men."]
    (tmp_path / "cut.token").write_text("1000092795.jpg#0 Two guys\n")
    with pytest.raises(UserError, match="cut.token:1 is .* needed: <picture>#<number>, a tab and a caption"):
        open_path(tmp_path / "cut.token")


def test_regions_of_visual_genome_are_read_by_a_mapping(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "2.jpg")
    regions = [
        {"region_id": 1, "x": 10, "y": 5, "width": 20, "height": 10, "image_id": 2, "phrase": "a red clock"},
        {"region_id": 2, "x": 50, "y": 0, "width": 50, "height": 50, "image_id": 2, "phrase": "the street"},
    ]
    (tmp_path / "region_descriptions.json").write_text(json.dumps([{"id": 2, "regions": regions}]))
    mapping = MappingConfig(
        image="{id}.jpg",
        labels="region_descriptions.json",
        records=".",
        regions="regions",
        text="{phrase}",
        box=["x", "y", "width", "height"],
        box_format=BoxFormat.xywh,
        task=RegionTask.grounding,
        questions=["Where?"],
    )
    config = SourceConfig(format="mapped", path=str(tmp_path), mapping=mapping)
    (sample,) = open_source("vg", config, max_image_pixels=10**6)
    assert "<obj>a red clock</obj><bbox>0.1, 0.1, 0.3, 0.3</bbox>" in sample.messages[1].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["annotations"].append({"id": 8, "image_id": 99, "caption": "x"}),
            "the label 8 belongs to picture 99",
        ),
        (lambda c: c.pop("images"), 'has no list "images"'),
        (lambda c: c["images"].append({"id": 3}), 'a picture has no "id" or no "file_name"'),
    ],
)
def test_a_label_file_that_does_not_fit_together_is_refused_with_the_place(coco, change, words):
    path = coco / "annotations/captions_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        open_coco(coco, path.name)


def test_boxes_of_a_picture_of_another_shape_are_refused_and_a_resized_copy_is_not(coco):
    Image.new("RGB", (80, 40)).save(coco / "val2017/a.jpg")
    assert "0.1, 0.1, 0.35, 0.6" in open_coco(coco, "instances_val2017.json")[0].messages[1].text
    Image.new("RGB", (20, 40)).save(coco / "val2017/a.jpg")
    with pytest.raises(RecordError, match="measured on 40 x 20 pixels, and the picture has 20 x 40"):
        open_coco(coco, "instances_val2017.json")[0]
