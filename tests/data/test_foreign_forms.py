"""Claims about rows of other trainers' forms: what changes what is trained is honoured, or the record is refused by name."""

import json

import pytest
from PIL import Image
from source_cases import contents, only, open_, write

from lit_vlm.config.schema import Format, MarkerMeaning, Markup, SourceConfig
from lit_vlm.data.index.store import build_index
from lit_vlm.data.sources import open_source
from lit_vlm.types import ImagePlaceholder, RecordError, Role


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def answer(content="a", **keys):
    return {"role": "assistant", "content": content, **keys}


def messages(*turns, **keys):
    return {"messages": list(turns), **keys}


def conversation(*turns, **keys):
    return {"conversations": list(turns), **keys}


def human(value="q", **keys):
    return {"from": "human", "value": value, **keys}


def gpt(value="a", **keys):
    return {"from": "gpt", "value": value, **keys}


def refused(folder, record, words, **options):
    with pytest.raises(RecordError) as caught:
        only(folder, record, **options)
    assert words in str(caught.value), caught.value


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (20, 10)).save(tmp_path / f"{name}.png")
    return tmp_path


# Marks


def test_pictures_of_plain_messages_stand_at_their_marks(folder):
    turns = [user("<image>What?"), answer(), user("And\n<image>"), answer()]
    sample = only(folder, messages(*turns, images=["a.png", "b.png"]))
    assert contents(sample) == [(ImagePlaceholder(0), "What?"), ("a",), ("And", ImagePlaceholder(1)), ("a",)]
    assert [image.path for image in sample.images] == ["a.png", "b.png"]
    parts = user([{"type": "text", "text": "<image>q"}])
    assert contents(only(folder, messages(parts, answer(), images=["a.png"])))[0] == (ImagePlaceholder(0), "q")
    pair = {"prompt": [user("<image>q")], "chosen": "a", "rejected": "b", "images": ["a.png"]}
    assert only(folder, pair).prompt[0].content == (ImagePlaceholder(0), "q")


def test_other_numbers_of_marks_than_of_pictures_are_refused_and_marks_may_be_said_to_be_text(folder):
    one, two = messages(user("<image>q"), answer()), messages(user("q <image>"), answer(), images=["a.png", "b.png"])
    refused(
        folder,
        one,
        "1 image placeholder but 0 images; each '<image>' needs one. Fix the record, or say data.sources.mine.marks=text",
    )
    refused(folder, two, "1 image placeholder but 2 images")
    assert contents(only(folder, one, marks=MarkerMeaning.text))[0] == ("<image>q",)
    assert contents(only(folder, two, marks=MarkerMeaning.text))[0] == (
        ImagePlaceholder(0),
        ImagePlaceholder(1),
        "q <image>",
    )


def test_a_record_may_say_itself_that_marks_are_text(folder):
    sample = only(folder, messages(user("<image> <video>"), answer("<bbox>"), marks="text"))
    assert contents(sample) == [("<image> <video>",), ("<bbox>",)] and sample.unused_keys == ()
    refused(folder, messages(user("<video>"), answer(), marks=5), "'<video>' in a text")


def test_marks_beside_image_parts_are_refused(folder):
    parts = user([{"type": "image"}, {"type": "text", "text": "<image>q"}])
    refused(
        folder, messages(parts, answer(), images=["a.png"]), "'<image>' in a text stands for a picture in other forms"
    )
    sample = only(folder, messages(parts, answer(), images=["a.png"]), marks=MarkerMeaning.text)
    assert contents(sample)[0] == (ImagePlaceholder(0), "<image>q")


# Image parts


def image(**keys):
    return {"type": "image", "text": None, **keys}


def test_the_index_of_an_image_part_says_which_picture_stands_there(folder):
    parts = user([{"type": "text", "text": "q", "index": None}, image(index=1), image(index=0)])
    sample = only(folder, messages(parts, answer(), images=["a.png", "b.png"]))
    assert [each.path for each in sample.images] == ["b.png", "a.png"]
    twice = only(folder, messages(user([image(index=0), image(index=0)]), answer(), images=["a.png"]))
    assert [each.path for each in twice.images] == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([image(index=2)], "has the index 2, and 'images' holds 2 images, counted from 0"),
        ([image(index=-1)], "has the index -1"),
        ([image(index=1)], "no image part has the index 0, so that this one of 'images' would be shown nowhere"),
        ([image(index=0), image()], "1 image part has an index and 1 without a path has none"),
        ([image(index=True)], "content[0].index is True; it must be the number"),
        ([image(index=0, path="a.png")], "has both 'path' and 'index'; one of them must go"),
        ([image(path="a.png"), image(url="b.png")], "2 images in 'images', and each image part already names its own"),
        ([image(image_url="a.png")], "has 'image_url', which a part of type 'image' has not"),
        ([{"type": "text", "text": "q", "image": "a.png"}], "has 'image', which a part of type 'text' has not"),
        ([{"type": "image", "text": "q"}], "has 'text', which a part of type 'image' has not"),
    ],
)
def test_image_parts_that_say_two_things_are_refused(folder, parts, words):
    refused(folder, messages(user(parts), answer(), images=["a.png", "b.png"]), words)


# Keys of records and turns

RECORDS = {
    "tools": [{"name": "f"}], "functions": [{}, {"a": 1}], "tool_calls": [{"id": 1}], "function_call": {"name": "f"},
    "videos": ["a.mp4"], "video": "a.mp4", "audios": ["a.wav"], "audio": "a.wav",
    "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}, "rejected_response": "b", "rejected_messages": [user("q")],
    "history": [["q", "a"]], "label": False, "kto_tag": True, "split": "test", "reasoning_content": "hm",
    "weight": 0, "loss": False, "train": False, "sample_weight": 1, "input_ids": [1], "loss_mask": [0, 1],
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
HARMLESS = {"sample_weight", "source"}


@pytest.mark.parametrize("key", RECORDS)
@pytest.mark.parametrize(
    "record", [messages(user("q"), answer()), conversation(human(), gpt())], ids=["messages", "llava"]
)
def test_a_key_of_a_record_that_changes_what_is_trained_is_refused_by_its_name(folder, key, record):
    if key in HARMLESS:
        assert only(folder, record | {key: RECORDS[key]}).unused_keys == (key,)
    else:
        refused(folder, record | {key: RECORDS[key]}, f"'{key}'")


def test_keys_that_say_nothing_are_as_if_they_were_not_there(folder):
    nothing = {
        "tools": "[]",
        "videos": None,
        "history": [],
        "objects": {"ref": [], "bbox": []},
        "tool_calls": [{"id": None}],
    }
    turn = answer(tool_calls=None, reasoning_content="", function_call={"name": None})
    assert only(folder, messages(user("q"), turn, **nothing)).unused_keys == ()


TURNS = [
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


@pytest.mark.parametrize(("keys", "words"), TURNS)
def test_a_key_of_a_turn_that_changes_what_is_trained_is_refused_by_its_name(folder, keys, words):
    refused(folder, messages(user("q"), answer(**keys)), f"messages[1]{'.' if ' is ' in words else ' '}{words}")
    refused(folder, conversation(human(), gpt(**keys)), f"conversations[1]{'.' if ' is ' in words else ' '}{words}")


def test_a_question_cannot_be_trained_on(folder):
    refused(folder, messages(user("q", loss=True), answer()), "messages[0].loss is True in the user's message")
    assert only(folder, messages(user("q", loss=False), answer(loss=True))).messages[1].supervised


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"train": False}, {"training": 0.0}])
def test_a_turn_that_is_not_trained_on_is_read_and_left_out_of_the_loss(folder, processor, flag):
    for record in (
        messages(user("q"), answer("first", **flag), user("r"), answer("second")),
        conversation(human(), gpt("first", **flag), human("r"), gpt("second")),
    ):
        sample = only(folder, record)
        (encoded,) = processor.encode_sequences(sample)
        (plain,) = processor.encode_sequences(
            only(folder, messages(user("q"), answer("first"), user("r"), answer("second")))
        )
        assert encoded.input_ids.tolist() == plain.input_ids.tolist()
        taught = processor.tokenizer.decode(encoded.input_ids[encoded.supervised].tolist())
        assert "second" in taught and "first" not in taught
        assert 0 < encoded.num_supervised < plain.num_supervised
        assert processor.compute_cost(sample).num_supervised == encoded.num_supervised


def test_turns_behind_the_last_answer_that_is_trained_on_are_left_out_and_named(folder):
    shown = [{"type": "image"}, {"type": "text", "text": "r"}]
    sample = only(folder, messages(user("q"), answer(), user(shown), answer(loss=False), images=["a.png"]))
    assert contents(sample) == [("q",), ("a",)] and sample.images == ()
    assert sample.unused_keys == ("turns behind the last answer that is trained on",)
    refused(folder, messages(user("q"), answer(train=False)), "every answer says that it is not trained on")
    pair = {"prompt": [user("q")], "chosen": [answer("a", weight=0)], "rejected": [answer("b")]}
    refused(folder, pair, "chosen says that it is not trained on")


def test_records_that_differ_in_what_is_trained_have_other_digests(folder, processor):
    turns = lambda **keys: messages(user("q"), answer("first", **keys), user("r"), answer("second"))
    index = build_index([open_(write(folder / "train.jsonl", [turns(), turns(loss=False)]))], processor)
    assert len(set(index.columns["digest"].tolist())) == 2


def test_the_system_column_is_the_system_message_in_every_form(folder):
    rows = [messages(user("q"), answer()), conversation(human(), gpt()), {"image": "a.png", "caption": "c"}]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    for row in rows:
        for key in ("system", "system_prompt"):
            sample = only(folder, row | {key: "Be brief."})
            first = (sample.prompt if hasattr(sample, "prompt") else sample.messages)[0]
            assert (first.role, first.content) == (Role.system, ("Be brief.",)) and not sample.unused_keys
        refused(folder, row | {"system": "s", "system_prompt": "t"}, "both 'system' and 'system_prompt' are given")


def test_records_of_another_split_than_the_sources_are_refused(folder):
    path = write(
        folder / "all.jsonl", [messages(user("q"), answer(), split=split) for split in ("train", "val", "restval")]
    )
    source = open_(path)
    assert [source[index].unused_keys for index in (0, 2)] == [("split",)] * 2
    with pytest.raises(RecordError, match="its 'split' is 'val', and the source is read for 'train'"):
        source[1]
    held_out = open_source("mine", SourceConfig(path=str(path)), max_image_pixels=10**6, held_out=True)
    assert held_out[1].unused_keys == ("split",)


@pytest.mark.parametrize("depth", [600, 900, 5000])
def test_a_deeply_nested_record_is_read_or_is_the_records_own_fault(folder, depth):
    good = json.dumps(messages(user("q"), answer()))
    source = open_(write(folder / "train.jsonl", [good, good[:-1] + f', "m": {"[" * depth + "]" * depth}}}']))
    try:
        assert source[1].unused_keys == ()
    except RecordError as error:
        assert depth > 900 or "nested" in str(error)


@pytest.mark.parametrize(
    "keys",
    [{"Split": "VAL"}, {"SPLIT": "검증"}, {"split": "testA"}, {"phase": "test"}, {"split": ["train"]}, {"split": "held-out"}],
    ids=str,
)  # fmt: skip
def test_a_split_is_known_by_any_spelling_of_its_key(folder, keys):
    (key,) = keys
    refused(folder, messages(user("q"), answer(), **keys), f"'{key}' is ")
    assert only(folder, messages(user("q"), answer(), phase="pretrained", Split="훈련")).unused_keys == (
        "phase",
        "Split",
    )


def test_split_beside_one_file_names_what_its_records_must_say(folder):
    rows = [messages(user("q"), answer(), split=split) for split in ("val", "train")]
    path = write(folder / "val.jsonl", rows)
    with pytest.raises(RecordError, match=r"data\.sources\.mine\.split=val"):
        open_(path)[0]
    source = open_(path, split="val")
    assert source[0].unused_keys == ("split",)
    with pytest.raises(RecordError, match="its 'split' is 'train', and the source is read for 'val'"):
        source[1]


def test_names_of_objects_and_a_word_about_history_are_only_counted(folder):
    plain = {"objects": ["dog", "cat"], "history": "old"}
    for row in ({"image": "a.png", "caption": "c"}, messages(user("q"), answer())):
        assert only(folder, row | plain).unused_keys == ("objects", "history")


MASKS = [{key: [0, 1, 1.0]} for key in ("labels", "mask", "loss_mask", "loss_weights", "prompt_mask", "token_weights")]


@pytest.mark.parametrize(
    "keys", [*MASKS, {"kto_tag": 0}, {"kto_tag": "false"}, {"Loss": False}, {"WEIGHT": 0.5}], ids=str
)
def test_masks_and_flags_of_the_loss_are_refused_by_their_names(folder, keys):
    refused(folder, messages(user("q"), answer(), **keys), f"'{next(iter(keys))}'")
    assert only(folder, messages(user("q"), answer(), labels="flower", label=3)).unused_keys == ("labels", "label")
    assert not only(folder, messages(user("q"), answer(Loss=False), user("r"), answer())).messages[1].supervised


def test_other_keys_are_counted_once_a_source(folder, processor):
    rows = [
        messages(user("q"), answer(f"a{n}", name="bob"), model="m", **({"score": n} if n > 6 else {}))
        for n in range(10)
    ]
    store = folder / "index"
    for _ in range(2):  # read, and out of the store
        index = build_index([open_(write(folder / "train.jsonl", rows))], processor, store=store)
        assert index.unused_keys == {"mine": {"model": 10, "messages[].name": 10, "score": 3}}


def test_keys_that_each_record_has_for_itself_are_counted_together(folder, processor):
    rows = [messages(user("q"), answer(f"a{n}"), **{f"key {n:03}\x1b": 1, "model": "m"}) for n in range(40)]
    (counts,) = build_index([open_(write(folder / "train.jsonl", rows))], processor).unused_keys.values()
    assert len(counts) == 31 and counts["model"] == 40 and counts["11 other keys"] == 11
    assert r"key 000\x1b" in counts


def test_boxes_in_texts_are_counted_where_nobody_said_whether_they_are_markup(folder):
    row = conversation(human(), gpt("<obj>꽃</obj><bbox>0.1, 0.2, 0.5, 0.6</bbox>"))
    assert only(folder, row).unused_keys == ("boxes written in texts, which markup=on would read",)
    assert only(folder, row, markup=Markup.off).unused_keys == only(folder, row, markup=Markup.on).unused_keys == ()


# Other shapes are told what they are


def test_shapes_of_other_trainers_are_told_by_their_keys(folder):
    both = {key: gpt(key) for key in ("chosen", "rejected")}
    refused(
        folder,
        conversation(human(), **both),
        "chosen is an object with the keys 'from', 'value'; it must be text or a list",
    )
    refused(
        folder, conversation(user("q"), answer()), "conversations[0] has 'role' and 'content', and conversations 'from'"
    )
    row = messages(user("q"), answer(), chosen="a", rejected="b")
    refused(folder, row, "it has 'chosen': it makes the record a preference pair", format=Format.messages)


# JSON


TWICE = {
    "key": '{"id": "1", "conversations": [], "id": "2"}',
    "nested": json.dumps(conversation(human(), gpt())).replace('"value": "a"', '"value": "a", "value": "b"'),
}


@pytest.mark.parametrize("shape", TWICE)
@pytest.mark.parametrize("ending", ["jsonl", "json", "tar", "parquet"])
def test_a_key_that_stands_twice_is_refused_wherever_json_is_read(folder, shape, ending):
    good, path = json.dumps(conversation(human(), gpt())), folder / f"train.{ending}"
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
            f"[{json.dumps(human())}, {text}]"
            for text in ('{"from": "gpt", "value": "a", "value": "b"}', json.dumps(gpt()))
        ]
        table = pa.table({"conversations": pa.array(column, pa.json_())})
        parquet.write_table(table, path)
    else:
        write(path, [TWICE[shape], good])
    source = open_(path, format=Format.webdataset if ending == "tar" else Format.llava)
    with pytest.raises(RecordError, match=r"the key '(id|value)' stands twice in one object"):
        source[0]
    assert source[1].messages[1].text == "a"


# Names


def test_half_a_surrogate_pair_in_a_pictures_name_is_the_records_fault(folder):
    write(folder / "train.jsonl", [r'{"image": "r\ud800.png", "caption": "c"}', {"image": "a.png", "caption": "c"}])
    source = open_(folder / "train.jsonl")
    with pytest.raises(RecordError, match=r"image 'r\\ud800.png' is no file name"):
        source[0]
    assert source[1].images[0].size == (10, 20)


EVIL = "a\x1b]0;x\x07\x9b31m\u202eb\u2066c"


def test_control_characters_of_names_and_records_never_reach_a_terminal_or_a_page(folder, capsys):
    from lit_vlm.engine.pages import escape_text
    from lit_vlm.tasks.terminal import say

    path = write(folder / f"{EVIL}.jsonl", ["{bad", conversation(human(), gpt(), **{EVIL: "x"})])
    source = open_(path)
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
