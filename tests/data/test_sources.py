"""Datasets of each format are read as the format defines it."""

import base64
import json
import os
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image
from source_cases import ANSWER, GPT, HUMAN, USER, encode_png, get_contents, make_llava, open_path, read_record, write

from lit_vlm.config.choices import Format, Markup
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.lazy_images import BytesImage, FileImage
from lit_vlm.data.sources import open_source
from lit_vlm.types import ControlToken, ImagePlaceholder, Language, RecordError, Role, SampleKind, UserError

# Records of each format


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_llava_records_are_read_completely(folder, photos, ending):
    again = {"from": "human", "value": "색은?"}, {"from": "gpt", "value": "붉은색"}
    records = [
        make_llava(HUMAN, GPT, *again, id="가-1", image="flower.png"),
        make_llava(
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}
        ),
        make_llava(
            {"from": "human", "value": "<image><image>\n차이는?"}, GPT, id=7, image=["flower.png", "사진/중국.jpg"]
        ),
    ]
    source = open_path(write(folder / f"train{ending}", records))
    assert isinstance(source.digest, str) and len(source) == 3 and source.name == "mine"
    first, second, third = source[0], source[1], source[2]
    assert get_contents(first) == [
        (ImagePlaceholder(0), "무엇이 보이나요?"),
        ("꽃이 보입니다.",),
        ("색은?",),
        ("붉은색",),
    ]
    assert (first.id, first.kind, first.language, first.source) == ("가-1", SampleKind.instruction, Language.ko, "mine")
    assert first.origin == ("train.json[0]" if ending == ".json" else "train.jsonl:1")
    assert np.array_equal(np.asarray(first.images[0].load()), np.asarray(photos[1]))
    assert [message.role for message in second.messages] == [Role.system, Role.user, Role.assistant]
    assert (second.id, second.kind, second.language, second.images) == (second.origin, SampleKind.text, Language.en, ())
    assert get_contents(third)[0] == (ImagePlaceholder(0), ImagePlaceholder(1), "차이는?")
    assert (third.id, third.kind, [image.size for image in third.images]) == (
        "7",
        SampleKind.multi_image,
        [(40, 60)] * 2,
    )


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<image>\nwhat?", (ImagePlaceholder(0), "what?")),
        ("<image>\r\nwhat?", (ImagePlaceholder(0), "what?")),
        ("what?\n<image>", ("what?", ImagePlaceholder(0))),
        ("<image>\n\nwhat?", (ImagePlaceholder(0), "\nwhat?")),
        ("this <image> here", ("this ", ImagePlaceholder(0), " here")),
        ("a\n<image>\nb", ("a", ImagePlaceholder(0), "\nb")),
        ("<image>", (ImagePlaceholder(0),)),
        ("<ima<image>ge>", ("<ima", ImagePlaceholder(0), "ge>")),
    ],
)
def test_a_marker_removes_one_line_break_next_to_it(folder, text, content):
    sample = read_record(folder, make_llava({"from": "human", "value": text}, GPT, image="flower.png"))
    assert sample.messages[0].content == content


def test_control_tokens_in_answers_and_system_messages_stay_text(folder):
    written = "<|im_start|> <|im_end|> <bbox>0.1, 0.1, 0.2, 0.2</bbox>"
    record = make_llava(
        {"from": "system", "value": written}, HUMAN, {"from": "gpt", "value": written}, image="flower.png"
    )
    sample = read_record(folder, record)
    assert get_contents(sample)[0] == get_contents(sample)[2] == (written,)


def test_an_image_without_a_question_is_of_the_kind_image_only(folder):
    record = make_llava({"from": "human", "value": "<image>\n"}, GPT, image="flower.png")
    assert read_record(folder, record).kind is SampleKind.image_only


def test_text_is_normalised_to_nfc(folder):
    decomposed = unicodedata.normalize("NFD", "한국어 설명")
    record = make_llava({"from": "human", "value": decomposed}, {"from": "gpt", "value": decomposed})
    assert get_contents(read_record(folder, record)) == [("한국어 설명",)] * 2


@pytest.mark.parametrize("images", [["flower.png"], "flower.png", [{"bytes": None, "path": "flower.png"}]])
def test_messages_take_their_images_from_the_column(folder, photos, images):
    sample = read_record(folder, {"messages": [USER, ANSWER], "images": images})
    assert get_contents(sample) == [(ImagePlaceholder(0), "What is it?"), ("A flower.",)]
    assert np.array_equal(np.asarray(sample.images[0].load()), np.asarray(photos[1]))


def test_messages_can_name_images_themselves_in_any_order(folder, photos):
    url = f"data:image/png;base64,{base64.b64encode(encode_png(photos[1])).decode()}"
    parts = [
        {"type": "image", "path": "flower.png"},
        {"type": "image"},
        {"type": "text", "text": "비교"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    sample = read_record(
        folder, {"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["사진/중국.jpg"]}
    )
    assert sample.messages[0].content == (ImagePlaceholder(0), ImagePlaceholder(1), "비교", ImagePlaceholder(2))
    assert [type(image) for image in sample.images] == [FileImage, FileImage, BytesImage]
    assert [image.path for image in sample.images[:2]] == ["flower.png", "사진/중국.jpg"]
    assert sample.images[2].load().size == (60, 40)


def test_images_come_first_in_messages_of_plain_text_as_in_trl(folder):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, ANSWER]
    sample = read_record(folder, {"messages": messages, "images": ["flower.png", "사진/중국.jpg"]})
    assert sample.messages[1].content == (ImagePlaceholder(0), ImagePlaceholder(1), "q")


@pytest.mark.parametrize("ending", ["parquet", "arrow", "saved"])
def test_columns_hold_messages_and_encoded_images(folder, photos, ending):
    import datasets

    rows = [
        {
            "messages": [USER, {"role": "assistant", "content": "꽃"}],
            "images": [{"bytes": encode_png(photos[1]), "path": None}],
        },
        {"messages": [{"role": "user", "content": "q"}, ANSWER], "images": []},
    ]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    table = table.cast(datasets.Features({**table.features, "images": datasets.List(datasets.Image())}))
    place = folder / f"한글 [0].{ending}"
    if ending == "parquet":
        table.to_parquet(place)
    else:
        table.save_to_disk(folder / "saved")
        place = folder / "saved" if ending == "saved" else next((folder / "saved").glob("*.arrow"))
    source = open_path(place)
    assert len(source) == 2 and source[0].origin == f"{place.name}[0]" and source[1].kind is SampleKind.text
    assert get_contents(source[0]) == [(ImagePlaceholder(0), "What is it?"), ("꽃",)]
    assert np.array_equal(np.asarray(source[0].images[0].load()), np.asarray(photos[1]))
    assert pickle.loads(pickle.dumps(source))[0].messages == source[0].messages


def test_columns_without_hugging_face_types_are_read_too(folder, photos):
    import pyarrow as pa
    from pyarrow import parquet

    parts = [{"type": "image", "text": None}, {"type": "text", "text": "q"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    (folder / "shards").mkdir()
    for number, count in enumerate((2, 0, 3)):
        row = {"messages": turns, "image": encode_png(photos[0])}
        schema = pa.Table.from_pylist([row]).schema
        parquet.write_table(pa.Table.from_pylist([row] * count, schema), folder / "shards" / f"{number}.parquet")
    source = open_path(folder / "shards")
    assert [source[index].origin for index in (0, 1, 2, 4)] == [
        "0.parquet[0]",
        "0.parquet[1]",
        "2.parquet[0]",
        "2.parquet[2]",
    ]
    assert get_contents(source[4]) == [(ImagePlaceholder(0), "q"), ("a",)] and source[4].images[0].size == (40, 60)


PAIRS = {
    "strings": {"prompt": "<image>\n무엇?", "chosen": "꽃", "rejected": "개", "image": "flower.png"},
    "llava_next": {"prompt": "무엇?", "answer": "-", "chosen": "꽃", "rejected": "개", "image": "flower.png"},
    "messages": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "무엇?"}]}],
        "chosen": [{"role": "assistant", "content": "꽃"}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "개"}]}],
        "images": ["flower.png"],
    },
    "implicit": {
        "chosen": [{"role": "user", "content": "무엇?"}, {"role": "assistant", "content": "꽃"}],
        "rejected": [{"role": "user", "content": "무엇?"}, {"role": "assistant", "content": "개"}],
        "images": ["flower.png"],
    },
}


@pytest.mark.parametrize("shape", PAIRS)
def test_preference_pairs_are_read_as_text_or_messages_with_or_without_a_prompt(folder, shape):
    pair = read_record(folder, PAIRS[shape])
    assert [message.content for message in pair.prompt] == [(ImagePlaceholder(0), "무엇?")]
    assert (pair.chosen.content, pair.rejected.content) == (("꽃",), ("개",))
    assert pair.chosen.role is pair.rejected.role is Role.assistant
    assert (pair.kind, pair.language, pair.images[0].size) == (SampleKind.preference, Language.ko, (40, 60))


@pytest.mark.parametrize("key", ["rejected_images", "rejected_image"])
def test_a_rejected_answer_can_have_another_image(folder, key):
    other = {key: ["other.png"] if key.endswith("s") else "other.png"}
    Image.new("RGB", (20, 30)).save(folder / "other.png")
    pair = read_record(folder, {**PAIRS["strings"], "rejected": "꽃", **other})
    assert pair.has_rejected_images and [image.size for image in pair.images] == [(40, 60), (30, 20)]
    assert pair.chosen == pair.rejected and pair.num_prompt_images == 1
    for wrong, message in (
        ({"rejected_images": ["other.png", "other.png"]}, "2 rejected images beside 1 image;"),
        ({"rejected_images": ["flower.png"], "images": ["flower.png"], "image": None}, "nothing to prefer"),
        ({"rejected_images": ["other.png"], "rejected_image": "other.png"}, "one of them must go"),
    ):
        with pytest.raises(UserError, match=message):
            read_record(folder, {**PAIRS["strings"], "rejected": "꽃", **wrong})


def test_digits_have_questions_in_the_language_of_the_source_and_hold_out_the_last_images():
    def open_digits(**options):
        held_out = options.pop("held_out", False)
        config = SourceConfig(format=Format.digits, **options)
        return open_source("mine", config, max_image_pixels=10**6, held_out=held_out)

    korean, english, mixed, held_out = (
        open_digits(language=Language.ko),
        open_digits(language=Language.en, num_samples=5),
        open_digits(),
        open_digits(held_out=True),
    )
    assert (len(korean), len(english), len(held_out)) == (1500, 5, 297)
    assert get_contents(korean[3]) == [(ImagePlaceholder(0), "이 숫자는 무엇인가요?"), ("3",)]
    assert get_contents(english[4]) == [(ImagePlaceholder(0), "What digit is this?"), ("4",)]
    assert {mixed[index].language for index in range(4)} == {Language.ko, Language.en}
    assert korean[0].images[0].size == (56, 56) and korean[0].images[0].load().getextrema()[0][1] > 200
    assert korean[0].kind is SampleKind.digit and held_out[0].id == "digit-1500"
    assert len({source.digest for source in (korean, english, mixed, held_out)}) == 4
    with pytest.raises(IndexError):
        english[5]


def test_builtin_receives_its_settings():
    config = SourceConfig(path="caption", format=Format.builtin, num_samples=4, language=Language.ko)
    train = open_source("mine", config, max_image_pixels=10**6, seed=1)
    held_out = open_source("mine", config, max_image_pixels=10**6, seed=1, held_out=True)
    assert len(train) == len(held_out) == 4 and train.digest != held_out.digest
    assert train[0].language is Language.ko and train[0].source == "mine"
    with pytest.raises(UserError, match=r"data\.sources\.mine: format=builtin needs path"):
        open_source("mine", SourceConfig(format=Format.builtin), max_image_pixels=10**6)


@pytest.mark.parametrize(
    ("options", "parsed"),
    [
        ({"markup": Markup.on}, True),
        ({"kind": "grounding"}, True),
        ({"kind": "ocr", "markup": Markup.off}, False),
        ({}, False),
        ({"kind": "caption"}, False),
    ],
)
def test_markup_becomes_control_tokens_only_if_the_settings_say_so(folder, options, parsed):
    answer = {"from": "gpt", "value": "<obj>꽃</obj><bbox>0.1, 0.2, 0.5, 0.6</bbox>이 있다."}
    sample = read_record(
        folder,
        make_llava({"from": "human", "value": "<gro>\n묘사해줘. <image>"}, answer, image="flower.png"),
        **options,
    )
    controls = [piece.token for content in get_contents(sample) for piece in content if isinstance(piece, ControlToken)]
    assert controls == (["<gro>", "<obj>", "</obj>", "<bbox>", "</bbox>"] if parsed else [])
    assert [message.text for message in sample.messages] == ["<gro>\n묘사해줘. ", answer["value"]]
    found = "grounding" if parsed else "instruction"
    assert sample.kind == options.get("kind", found)


def test_language_and_kind_of_the_source_take_precedence(folder):
    sample = read_record(folder, make_llava(HUMAN, GPT, image="flower.png"), language=Language.en, kind="caption")
    assert (sample.language, sample.kind) == (Language.en, SampleKind.caption)


def test_images_are_read_inside_image_root(folder):
    (folder / "labels").mkdir()
    path = write(folder / "labels" / "train.json", [make_llava(HUMAN, GPT, image="flower.png")])
    assert open_path(path, image_root=str(folder))[0].images[0].size == (40, 60)
    with pytest.raises(RecordError, match=r"not found in .*labels"):
        open_path(path)[0].images[0].load()
    outside = write(folder / "labels" / "b.json", [make_llava(HUMAN, GPT, image="../flower.png")])
    with pytest.raises(RecordError, match="leads out of"):
        open_path(outside)[0].images[0].load()


def test_line_numbers_are_correct_after_blank_and_bad_lines(folder):
    good = json.dumps(make_llava({"from": "human", "value": "q"}, GPT), ensure_ascii=False)
    path = folder / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{good}\r\n\n  \n{{bad\n{good}".encode())
    source = open_path(path)
    assert len(source) == 3
    assert (source[0].origin, source[2].origin) == ("train.jsonl:1", "train.jsonl:5")
    with pytest.raises(RecordError, match=r"train\.jsonl:4: not JSON at column 2: Expecting property name"):
        source[1]


def test_a_folder_joins_its_files_and_num_samples_takes_the_first(folder):
    for name, count in (("b", 2), ("a", 3)):
        write(
            folder / f"{name}.jsonl", [make_llava({"from": "human", "value": f"{name}{i}"}, GPT) for i in range(count)]
        )
    source = open_path(folder)
    assert [source[index].origin for index in range(5)] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:1",
        "b.jsonl:2",
    ]
    assert len(open_path(folder, num_samples=2)) == 2 and len(open_path(folder, num_samples=99)) == 5
    with pytest.raises(IndexError):
        open_path(folder, num_samples=2)[2]


def test_a_long_list_is_not_held_in_memory(folder):
    record = make_llava({"from": "human", "value": '질문 "[{,}]" \\'}, {"from": "gpt", "value": "답" * 1000}, id="가")
    source = open_path(write(folder / "train.json", [record] * 500))
    assert len(pickle.dumps(source)) < 20_000  # 1.5 MB of text
    assert all(source[index].messages == source[0].messages for index in (1, 250, 499))
    assert source[499].messages[0].content == ('질문 "[{,}]" \\',)


def test_the_digest_changes_with_the_file_and_the_settings(folder):
    path = write(folder / "train.jsonl", [make_llava({"from": "human", "value": "q"}, GPT)] * 2)
    others = {"kind": "other"}, {"num_samples": 1}, {"markup": Markup.on}, {"language": Language.ko}
    digests = [open_path(path, **options).digest for options in ({}, *others)]
    assert len(set(digests)) == 5
    assert open_path(path).digest == open_path(path, weight=3.0, format=Format.llava).digest == digests[0]
    os.utime(path, ns=(0, 1))
    assert open_path(path).digest != digests[0]
