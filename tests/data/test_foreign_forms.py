"""Records in formats of other trainers: a key that changes the training is applied, or its record is refused."""

import json

import pytest
from PIL import Image
from source_cases import get_contents, open_path, read_record, write

from lit_vlm.config.choices import Format, MarkerMeaning, Markup
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.index.build import build_index
from lit_vlm.data.sources import open_source
from lit_vlm.types import ImagePlaceholder, RecordError, Role


def make_user(content, **keys):
    return {"role": "user", "content": content, **keys}


def make_answer(content="a", **keys):
    return {"role": "assistant", "content": content, **keys}


def make_messages(*turns, **keys):
    return {"messages": list(turns), **keys}


def make_conversation(*turns, **keys):
    return {"conversations": list(turns), **keys}


def make_human(value="q", **keys):
    return {"from": "human", "value": value, **keys}


def make_gpt(value="a", **keys):
    return {"from": "gpt", "value": value, **keys}


def assert_refused(folder, record, words, **options):
    with pytest.raises(RecordError) as caught:
        read_record(folder, record, **options)
    assert words in str(caught.value), caught.value


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.png")
    return tmp_path


# Markers


def test_images_of_plain_messages_are_placed_at_their_markers(folder):
    turns = [make_user("<image>What?"), make_answer(), make_user("And\n<image>"), make_answer()]
    sample = read_record(folder, make_messages(*turns, images=["a.png", "b.png"]))
    assert get_contents(sample) == [(ImagePlaceholder(0), "What?"), ("a",), ("And", ImagePlaceholder(1)), ("a",)]
    assert [image.path for image in sample.images] == ["a.png", "b.png"]
    parts = make_user([{"type": "text", "text": "<image>q"}])
    assert get_contents(read_record(folder, make_messages(parts, make_answer(), images=["a.png"])))[0] == (
        ImagePlaceholder(0),
        "q",
    )
    pair = {"prompt": [make_user("<image>q")], "chosen": "a", "rejected": "b", "images": ["a.png"]}
    assert read_record(folder, pair).prompt[0].content == (ImagePlaceholder(0), "q")


def test_different_numbers_of_markers_and_images_are_refused_unless_markers_are_set_to_text(folder):
    one, two = (
        make_messages(make_user("<image>q"), make_answer()),
        make_messages(make_user("q <image>"), make_answer(), images=["a.png", "b.png"]),
    )
    assert_refused(
        folder,
        one,
        "1 image placeholder but 0 images; each '<image>' needs one. Fix the record, or say data.sources.mine.marks=text",
    )
    assert_refused(folder, two, "1 image placeholder but 2 images")
    assert get_contents(read_record(folder, one, marks=MarkerMeaning.text))[0] == ("<image>q",)
    assert get_contents(read_record(folder, two, marks=MarkerMeaning.text))[0] == (
        ImagePlaceholder(0),
        ImagePlaceholder(1),
        "q <image>",
    )


def test_a_record_can_declare_its_markers_as_text(folder):
    sample = read_record(folder, make_messages(make_user("<image> <video>"), make_answer("<bbox>"), marks="text"))
    assert get_contents(sample) == [("<image> <video>",), ("<bbox>",)] and sample.unused_keys == ()
    assert_refused(folder, make_messages(make_user("<video>"), make_answer(), marks=5), "'<video>' in a text")


def test_markers_together_with_image_parts_are_refused(folder):
    parts = make_user([{"type": "image"}, {"type": "text", "text": "<image>q"}])
    assert_refused(
        folder,
        make_messages(parts, make_answer(), images=["a.png"]),
        "'<image>' in a text stands for a picture in other forms",
    )
    sample = read_record(folder, make_messages(parts, make_answer(), images=["a.png"]), marks=MarkerMeaning.text)
    assert get_contents(sample)[0] == (ImagePlaceholder(0), "<image>q")


# Image parts


def make_image_part(**keys):
    return {"type": "image", "text": None, **keys}


def test_the_index_of_an_image_part_selects_its_image(folder):
    parts = make_user(
        [{"type": "text", "text": "q", "index": None}, make_image_part(index=1), make_image_part(index=0)]
    )
    sample = read_record(folder, make_messages(parts, make_answer(), images=["a.png", "b.png"]))
    assert [each.path for each in sample.images] == ["b.png", "a.png"]
    twice = read_record(
        folder,
        make_messages(make_user([make_image_part(index=0), make_image_part(index=0)]), make_answer(), images=["a.png"]),
    )
    assert [each.path for each in twice.images] == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([make_image_part(index=2)], "has the index 2, and 'images' holds 2 images, counted from 0"),
        ([make_image_part(index=-1)], "has the index -1"),
        (
            [make_image_part(index=1)],
            "no image part has the index 0, so that this one of 'images' would be shown nowhere",
        ),
        ([make_image_part(index=0), make_image_part()], "1 image part has an index and 1 without a path has none"),
        ([make_image_part(index=True)], "content[0].index is True; it must be the number"),
        ([make_image_part(index=0, path="a.png")], "has both 'path' and 'index'; one of them must go"),
        (
            [make_image_part(path="b.png"), make_image_part(url="a.png")],
            "2 images in 'images', and each image part already names its own",
        ),
        ([make_image_part(image_url="a.png")], "has 'image_url', which a part of type 'image' has not"),
        ([{"type": "text", "text": "q", "image": "a.png"}], "has 'image', which a part of type 'text' has not"),
        ([{"type": "image", "text": "q"}], "has 'text', which a part of type 'image' has not"),
    ],
)
def test_contradictory_image_parts_are_refused(folder, parts, words):
    assert_refused(folder, make_messages(make_user(parts), make_answer(), images=["a.png", "b.png"]), words)


# Keys of records and turns

RECORD_KEYS = {
    "tools": [{"name": "f"}], "functions": [{}, {"a": 1}], "tool_calls": [{"id": 1}], "function_call": {"name": "f"},
    "videos": ["a.mp4"], "video": "a.mp4", "audios": ["a.wav"], "audio": "a.wav",
    "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}, "rejected_response": "b", "rejected_messages": [make_user("q")],
    "history": [["q", "a"]], "label": False, "kto_tag": True, "split": "test", "reasoning_content": "hm",
    "weight": 0, "loss": False, "train": False, "sample_weight": 1, "input_ids": [1], "loss_mask": [0, 1],
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
HARMLESS = {"sample_weight", "source"}


# Format -> a record, and the keys of RECORD_KEYS that it reads
RECORDS = {
    "messages": (make_messages(make_user("q"), make_answer()), ()),
    "llava": (make_conversation(make_human(), make_gpt()), ()),
    "caption": ({"image": "a.png", "caption": "c"}, ()),
    "question_answer": ({"image": "a.png", "question": "q", "answer": "a"}, ("history",)),
    "alpaca": ({"instruction": "q", "output": "a"}, ("history",)),
    "query_response": ({"query": "q", "response": "a"}, ("history",)),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, ()),
    "cauldron": ({"texts": [{"user": "q", "assistant": "a"}]}, ()),
}


@pytest.mark.parametrize("key", RECORD_KEYS)
@pytest.mark.parametrize("form", RECORDS)
def test_a_key_of_a_record_that_changes_the_training_is_refused_by_name(folder, key, form):
    record, read_keys = RECORDS[form]
    record = record | {key: RECORD_KEYS[key]}
    if key in HARMLESS:
        assert read_record(folder, record, format=form).unused_keys == (key,)
    elif key in read_keys:
        assert len(read_record(folder, record, format=form).messages) == 4
    else:
        assert_refused(folder, record, f"'{key}'", format=form)


def test_empty_keys_are_ignored(folder):
    nothing = {
        "tools": "[]",
        "videos": None,
        "history": [],
        "objects": {"ref": [], "bbox": []},
        "tool_calls": [{"id": None}],
    }
    turn = make_answer(tool_calls=None, reasoning_content="", function_call={"name": None})
    assert read_record(folder, make_messages(make_user("q"), turn, **nothing)).unused_keys == ()


TURN_KEYS = [
    ({"tool_calls": [{"id": "1"}]}, "has 'tool_calls': calls of tools are not read"),
    ({"function_call": {"name": "f"}}, "has 'function_call'"),
    ({"reasoning_content": "hm"}, "has 'reasoning_content': thoughts beside an answer are not read"),
    ({"thinking": "hm"}, "has 'thinking'"),
    ({"images": ["a.png"]}, "has 'images': pictures are read from the record's 'images'"),
    ({"train_detail": [{"begin_offset": 0}]}, "has 'train_detail'"),
    ({"mask": True}, "has 'mask'"),
    ({"weight": 0.5}, "weight is 0.5; a turn is trained on (1, true) or not (0, false)"),
    ({"loss": "no"}, "loss is 'no'; a turn is trained on"),
]


@pytest.mark.parametrize(("keys", "words"), TURN_KEYS)
def test_a_key_of_a_turn_that_changes_the_training_is_refused_by_name(folder, keys, words):
    assert_refused(
        folder,
        make_messages(make_user("q"), make_answer(**keys)),
        f"messages[1]{'.' if ' is ' in words else ' '}{words}",
    )
    assert_refused(
        folder,
        make_conversation(make_human(), make_gpt(**keys)),
        f"conversations[1]{'.' if ' is ' in words else ' '}{words}",
    )


def test_a_question_cannot_be_trained_on(folder):
    assert_refused(
        folder,
        make_messages(make_user("q", loss=True), make_answer()),
        "messages[0].loss is True in the user's message",
    )
    assert read_record(folder, make_messages(make_user("q", loss=False), make_answer(loss=True))).messages[1].supervised


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"train": False}, {"training": 0.0}])
def test_a_turn_that_is_not_trained_on_is_encoded_and_left_out_of_the_loss(folder, processor, flag):
    for record in (
        make_messages(make_user("q"), make_answer("first", **flag), make_user("r"), make_answer("second")),
        make_conversation(make_human(), make_gpt("first", **flag), make_human("r"), make_gpt("second")),
    ):
        sample = read_record(folder, record)
        (encoded,) = processor.encode_sequences(sample)
        (plain,) = processor.encode_sequences(
            read_record(
                folder, make_messages(make_user("q"), make_answer("first"), make_user("r"), make_answer("second"))
            )
        )
        assert encoded.input_ids.tolist() == plain.input_ids.tolist()
        supervised_text = processor.tokenizer.decode(encoded.input_ids[encoded.supervised].tolist())
        assert "second" in supervised_text and "first" not in supervised_text
        assert 0 < encoded.num_supervised < plain.num_supervised
        assert processor.compute_cost(sample).num_supervised == encoded.num_supervised


def test_turns_after_the_last_answer_that_is_trained_on_are_left_out_and_reported(folder):
    shown = [{"type": "image"}, {"type": "text", "text": "r"}]
    sample = read_record(
        folder,
        make_messages(make_user("q"), make_answer(), make_user(shown), make_answer(loss=False), images=["a.png"]),
    )
    assert get_contents(sample) == [("q",), ("a",)] and sample.images == ()
    assert sample.unused_keys == ("turns behind the last answer that is trained on",)
    assert_refused(
        folder, make_messages(make_user("q"), make_answer(train=False)), "every answer says that it is not trained on"
    )
    pair = {"prompt": [make_user("q")], "chosen": [make_answer("a", weight=0)], "rejected": [make_answer("b")]}
    assert_refused(folder, pair, "chosen says that it is not trained on")


def test_records_that_differ_in_supervision_have_different_digests(folder, processor):
    turns = lambda **keys: make_messages(
        make_user("q"), make_answer("first", **keys), make_user("r"), make_answer("second")
    )
    index = build_index([open_path(write(folder / "train.jsonl", [turns(), turns(loss=False)]))], processor)
    assert len(set(index.columns["digest"].tolist())) == 2


def test_the_system_column_is_the_system_message_in_every_format(folder):
    rows = [
        make_messages(make_user("q"), make_answer()),
        make_conversation(make_human(), make_gpt()),
        {"image": "a.png", "caption": "c"},
    ]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    for row in rows:
        for key in ("system", "system_prompt"):
            sample = read_record(folder, row | {key: "Be brief."})
            first = (sample.prompt if hasattr(sample, "prompt") else sample.messages)[0]
            assert (first.role, first.content) == (Role.system, ("Be brief.",)) and not sample.unused_keys
        assert_refused(
            folder, row | {"system": "s", "system_prompt": "t"}, "both 'system' and 'system_prompt' are given"
        )


def test_records_of_another_split_than_that_of_the_source_are_refused(folder):
    path = write(
        folder / "all.jsonl",
        [make_messages(make_user("q"), make_answer(), split=split) for split in ("train", "val", "restval")],
    )
    source = open_path(path)
    assert [source[index].unused_keys for index in (0, 2)] == [("split",)] * 2
    with pytest.raises(RecordError, match="its 'split' is 'val', and the source is read for 'train'"):
        source[1]
    held_out = open_source("mine", SourceConfig(path=str(path)), max_image_pixels=10**6, held_out=True)
    assert held_out[1].unused_keys == ("split",)


@pytest.mark.parametrize("depth", [600, 900, 5000])
def test_a_deeply_nested_record_is_read_or_is_a_record_error(folder, depth):
    good = json.dumps(make_messages(make_user("q"), make_answer()))
    source = open_path(write(folder / "train.jsonl", [good, good[:-1] + f', "m": {"[" * depth + "]" * depth}}}']))
    try:
        assert source[1].unused_keys == ()
    except RecordError as error:
        assert depth > 900 or "nested" in str(error)


@pytest.mark.parametrize(
    "keys",
    [{"Split": "VAL"}, {"SPLIT": "검증"}, {"split": "testA"}, {"phase": "test"}, {"split": ["train"]}, {"split": "held-out"}],
    ids=str,
)  # fmt: skip
def test_the_key_of_a_split_is_recognised_in_any_spelling(folder, keys):
    (key,) = keys
    assert_refused(folder, make_messages(make_user("q"), make_answer(), **keys), f"'{key}' is ")
    assert read_record(
        folder, make_messages(make_user("q"), make_answer(), phase="pretrained", Split="훈련")
    ).unused_keys == (
        "phase",
        "Split",
    )


def test_the_split_of_a_single_file_must_be_that_of_its_records(folder):
    rows = [make_messages(make_user("q"), make_answer(), split=split) for split in ("val", "train")]
    path = write(folder / "val.jsonl", rows)
    with pytest.raises(RecordError, match=r"data\.sources\.mine\.split=val"):
        open_path(path)[0]
    source = open_path(path, split="val")
    assert source[0].unused_keys == ("split",)
    with pytest.raises(RecordError, match="its 'split' is 'train', and the source is read for 'val'"):
        source[1]


def test_object_names_and_a_text_about_history_are_only_counted(folder):
    plain = {"objects": ["dog", "cat"], "history": "old"}
    for row in ({"image": "a.png", "caption": "c"}, make_messages(make_user("q"), make_answer())):
        assert read_record(folder, row | plain).unused_keys == ("objects", "history")


MASKS = [{key: [0, 1, 1.0]} for key in ("labels", "mask", "loss_mask", "loss_weights", "prompt_mask", "token_weights")]


@pytest.mark.parametrize(
    "keys", [*MASKS, {"kto_tag": 0}, {"kto_tag": "false"}, {"Loss": False}, {"WEIGHT": 0.5}], ids=str
)
def test_masks_and_flags_of_the_loss_are_refused_by_name(folder, keys):
    assert_refused(folder, make_messages(make_user("q"), make_answer(), **keys), f"'{next(iter(keys))}'")
    assert read_record(folder, make_messages(make_user("q"), make_answer(), labels="flower", label=3)).unused_keys == (
        "labels",
        "label",
    )
    assert (
        not read_record(folder, make_messages(make_user("q"), make_answer(Loss=False), make_user("r"), make_answer()))
        .messages[1]
        .supervised
    )


def test_other_keys_are_counted_for_each_source(folder, processor):
    rows = [
        make_messages(make_user("q"), make_answer(f"a{n}", name="bob"), model="m", **({"score": n} if n > 6 else {}))
        for n in range(10)
    ]
    store = folder / "index"
    for _ in range(2):  # read once, and loaded from the store once
        index = build_index([open_path(write(folder / "train.jsonl", rows))], processor, store=store)
        assert index.unused_keys == {"mine": {"model": 10, "messages[].name": 10, "score": 3}}


def test_keys_that_differ_in_each_record_are_counted_together(folder, processor):
    rows = [
        make_messages(make_user("q"), make_answer(f"a{n}"), **{f"key {n:03}\x1b": 1, "model": "m"}) for n in range(40)
    ]
    (counts,) = build_index([open_path(write(folder / "train.jsonl", rows))], processor).unused_keys.values()
    assert len(counts) == 31 and counts["model"] == 40 and counts["11 other keys"] == 11
    assert r"key 000\x1b" in counts


def test_boxes_in_texts_are_counted_if_markup_is_not_set(folder):
    row = make_conversation(make_human(), make_gpt("<obj>꽃</obj><bbox>0.1, 0.2, 0.5, 0.6</bbox>"))
    assert read_record(folder, row).unused_keys == ("boxes written in texts, which markup=on would read",)
    assert (
        read_record(folder, row, markup=Markup.off).unused_keys
        == read_record(folder, row, markup=Markup.on).unused_keys
        == ()
    )


# Errors for other formats


def test_formats_of_other_trainers_are_reported_by_their_keys(folder):
    both = {key: {"answer": key} for key in ("chosen", "rejected")}
    assert_refused(
        folder,
        make_conversation(make_human(), **both),
        "chosen is an object with the keys 'answer'; it must be text, a message or a list",
    )
    assert_refused(
        folder,
        make_conversation(make_human(), make_answer()),
        "conversations[1] has 'role' and 'content', and other turns 'from'",
    )
    row = make_messages(make_user("q"), make_answer(), chosen="a", rejected="b")
    assert_refused(folder, row, "it has 'chosen': it makes the record a preference pair", format=Format.messages)


# JSON


TWICE = {
    "key": '{"id": "1", "conversations": [], "id": "2"}',
    "nested": json.dumps(make_conversation(make_human(), make_gpt())).replace(
        '"value": "a"', '"value": "a", "value": "b"'
    ),
}


@pytest.mark.parametrize("shape", TWICE)
@pytest.mark.parametrize("ending", ["jsonl", "json", "tar", "parquet"])
def test_a_duplicate_key_is_refused_wherever_json_is_read(folder, shape, ending):
    good, path = json.dumps(make_conversation(make_human(), make_gpt())), folder / f"train.{ending}"
    if ending == "tar":
        import io
        import tarfile

        with tarfile.open(path, "w") as shard:
            for name, text in (("0", TWICE[shape]), ("1", good)):
                info = tarfile.TarInfo(f"{name}.json")
                info.size = len(text)
                shard.addfile(info, io.BytesIO(text.encode()))
    elif ending == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        column = [
            f"[{json.dumps(make_human())}, {text}]"
            for text in ('{"from": "gpt", "value": "a", "value": "b"}', json.dumps(make_gpt()))
        ]
        table = pa.table({"conversations": pa.array(column, pa.json_())})
        parquet.write_table(table, path)
    else:
        write(path, [TWICE[shape], good])
    source = open_path(path, format=Format.webdataset if ending == "tar" else Format.llava)
    with pytest.raises(RecordError, match=r"the key '(id|value)' stands twice in one object"):
        source[0]
    assert source[1].messages[1].text == "a"


# Names


def test_half_a_surrogate_pair_in_an_image_name_is_a_record_error(folder):
    write(folder / "train.jsonl", [r'{"image": "r\ud800.png", "caption": "c"}', {"image": "a.png", "caption": "c"}])
    source = open_path(folder / "train.jsonl")
    with pytest.raises(RecordError, match=r"image 'r\\ud800.png' is no file name"):
        source[0]
    assert source[1].images[0].size == (10, 20)


EVIL = "a\x1b]0;x\x07\x9b31m\u202eb\u2066c"


def test_control_characters_of_names_and_records_never_reach_a_terminal_or_a_page(folder, capsys):
    from lit_vlm.reports.templates import escape_text
    from lit_vlm.tasks.terminal import say

    path = write(folder / f"{EVIL}.jsonl", ["{bad", make_conversation(make_human(), make_gpt(), **{EVIL: "x"})])
    source = open_path(path)
    with pytest.raises(RecordError) as caught:
        source[0]
    say(f"{path}: {source[1].unused_keys[0]}\n")
    shown = [
        str(caught.value),
        caught.value.origin,
        caught.value.reason,
        capsys.readouterr().out,
        escape_text(f"<td>{EVIL}</td>"),
    ]
    for text in shown:
        assert not set(text) & set("\x1b\x07\x9b\u202e\u2066"), ascii(text)
    assert r"\x1b]0;x\x07\x9b31m\u202eb\u2066c" in shown[0] and "\n" in shown[3]
