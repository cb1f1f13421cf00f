"""Forms of data that people have: each is found out from its file and its keys, and read as its trainer reads it."""

import csv
import json
import tarfile

import pytest
from PIL import Image
from source_cases import ANSWER, encode_png, get_contents, open_path, read_record, write

from lit_vlm.config.schema import ColumnsConfig
from lit_vlm.types import ImagePlaceholder, PreferencePair, RecordError, Role, UserError

SLOT = ImagePlaceholder(0)


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (20, 10), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    return tmp_path


def write_table(path, rows, **options):
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as stream:
        csv.writer(stream, **options).writerows(rows)
    return path


def write_parquet(path, columns):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def read_all(source):
    return [source[index] for index in range(len(source))]


def get_turns(sample):
    """Return the texts of the turns, with the images shown as their paths."""
    return [
        "".join(f"[{sample.images[p.index].path}]" if isinstance(p, ImagePlaceholder) else p for p in message.content)
        for message in sample.messages
    ]


def read_user_error(path, **options):
    with pytest.raises(UserError) as caught:
        open_path(path, **options)[0]
    return str(caught.value)


# Rows with a column for each turn


def test_a_row_of_question_and_answer_is_one_turn_with_its_image_first(folder):
    row = {"image": "a.png", "question": "무슨 색?", "answer": "빨강"}
    sample = read_record(folder, row)
    assert get_contents(sample) == [(SLOT, "무슨 색?"), ("빨강",)]
    assert get_turns(read_record(folder, row | {"question": "이 <image>는?"})) == ["이 [a.png]는?", "빨강"]
    assert get_turns(read_record(folder, row | {"answer": ["red", "red"]}))[1] == "red"
    assert get_turns(read_record(folder, row | {"history": [["q", "a"]]})) == ["[a.png]q", "a", "무슨 색?", "빨강"]
    for keys, words in (
        ({"answer": ["red", "blue"]}, "answer is a list of 2 different texts ('red', 'blue'); it must be one answer"),
        ({"answer": 3}, "answer is a number; it must be text"),
        ({"choices": ["a", "b"]}, "it has 'choices', the options of a question, which is not read"),
        ({"context": "text"}, "it has 'context'"),
        ({"history": [["q"]]}, "history[0] is a list of 1; it must be a list of a question and its answer"),
    ):
        with pytest.raises(RecordError) as caught:
            read_record(folder, row | keys)
        assert words in str(caught.value)


def test_alpaca_joins_instruction_and_input_and_trains_on_the_answers_of_the_history(folder):
    row = {"instruction": "Say it.", "input": "in <image>", "output": "red", "images": ["a.png"], "system": "Be brief."}
    sample = read_record(folder, row | {"history": [["q", "a"]]})
    assert get_turns(sample) == ["Be brief.", "q", "a", "Say it.\nin[a.png]".replace("in[", "in ["), "red"]
    assert all(message.supervised for message in sample.messages if message.role is Role.assistant)
    assert get_turns(read_record(folder, {"instruction": "q", "input": "", "output": "a"})) == ["q", "a"]


def test_rows_of_query_and_response_are_read_as_in_ms_swift(folder):
    row = {"system": "s", "query": "<image>q2", "response": "a2", "history": [["q1", "a1"]], "images": ["a.png"]}
    assert get_turns(read_record(folder, row)) == ["s", "q1", "a1", "[a.png]q2", "a2"]


def test_only_the_completion_of_prompt_and_completion_is_trained_on(folder):
    assert get_turns(read_record(folder, {"prompt": "q", "completion": "a", "image": "a.png"})) == ["[a.png]q", "a"]
    prompt = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    sample = read_record(folder, {"prompt": prompt, "completion": [{"role": "assistant", "content": "b"}]})
    assert [message.supervised for message in sample.messages if message.role is Role.assistant] == [False, True]
    with pytest.raises(RecordError, match="completion has 2 messages; it must be one answer"):
        read_record(folder, {"prompt": prompt, "completion": prompt[:2]})


def test_texts_of_the_cauldron_and_conversations_of_ms_swift_are_turns(folder):
    texts = [{"user": "q", "assistant": "a", "source": "vqa"}, {"user": "r", "assistant": "b", "source": "vqa"}]
    sample = read_record(folder, {"images": ["a.png", "b.png"], "texts": texts})
    assert get_turns(sample) == ["[a.png][b.png]q", "a", "r", "b"] and sample.unused_keys == ("texts[].source",)
    pairs = [{"human": "q", "assistant": "a"}]
    assert get_turns(read_record(folder, {"conversation": pairs, "system": "s"})) == ["s", "q", "a"]
    with pytest.raises(RecordError, match=r"texts\[0\].assistant is null; it must be text"):
        read_record(folder, {"texts": [{"user": "q"}]})


def test_minicpm_conversations_have_role_and_content_and_may_name_their_images(folder):
    turns = [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "a"}]
    assert get_turns(read_record(folder, {"image": "a.png", "conversations": turns})) == ["[a.png]q", "a"]
    turns[0] = {"role": "user", "content": "first <image_00>\nand <image_01>?"}
    images = {"<image_00>": "a.png", "<image_01>": "b.png"}
    sample = read_record(folder, {"image": images, "conversations": turns})
    assert get_turns(sample) == ["first [a.png]and [b.png]?", "a"]
    turns[0] = {"role": "user", "content": "<image_01>"}
    with pytest.raises(RecordError, match="no image part has the index 0"):
        read_record(folder, {"image": images, "conversations": turns})


def test_a_picture_that_is_named_in_its_part_and_in_images_is_read_once(folder):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["a.png"]}
    sample = read_record(folder, row)
    assert get_turns(sample)[0] == "[a.png]q" and len(sample.images) == 1
    with pytest.raises(RecordError, match="each image part already names its own; leave one of the two out"):
        read_record(folder, row | {"images": ["b.png"]})


# Preference pairs


PAIRS = {
    "llama_factory_sharegpt": {
        "conversations": [{"from": "human", "value": "<image>q"}],
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "r"},
    },
    "llama_factory_openai": {
        "messages": [{"role": "user", "content": "<image>q"}],
        "chosen": {"role": "assistant", "content": "c"},
        "rejected": {"role": "assistant", "content": "r"},
    },
    "llama_factory_alpaca": {"instruction": "q", "input": "", "chosen": "c", "rejected": "r"},
    "ms_swift_messages": {
        "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "c"}],
        "rejected_response": "r",
    },
    "ms_swift_rejected_messages": {
        "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "c"}],
        "rejected_messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "r"}],
        "rejected_images": ["a.png"],
    },
    "ms_swift_query": {"query": "q", "response": "c", "rejected_response": "r"},
    "rlaif_v": {"question": "q", "chosen": "c", "rejected": "r", "ds_name": "x"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_rows_of_other_trainers_are_the_same_pair(folder, name):
    pair = read_record(folder, PAIRS[name] | {"images": ["a.png"]})
    assert isinstance(pair, PreferencePair) and not pair.has_rejected_images
    assert [message.content for message in (*pair.prompt, pair.chosen, pair.rejected)] == [(SLOT, "q"), ("c",), ("r",)]
    assert [image.path for image in pair.images] == ["a.png"]


def test_rejected_images_of_ms_swift_belong_to_the_rejected_answer(folder):
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "c"}]
    pair = read_record(folder, {"messages": turns, "images": ["a.png"], "rejected_images": ["b.png"]})
    assert pair.chosen == pair.rejected and [image.path for image in pair.images] == ["a.png", "b.png"]
    row = {"messages": turns, "rejected_response": "r", "rejected_messages": turns}
    with pytest.raises(RecordError, match="both 'rejected_messages' and 'rejected_response' are given"):
        read_record(folder, row)


def test_an_empty_list_of_rejected_images_makes_no_pair_of_a_conversation(folder):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]
    assert get_turns(read_record(folder, {"messages": turns, "rejected_images": []})) == ["q", "c"]


# CSV and TSV


ROWS = [
    ["path", "caption"],
    ["a.png", '쉼표, 세미콜론; 그리고 "인용"'],
    ["b.png", "두 줄\n입니다"],
    ["a.png", 'a "quote", a tab\t'],
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
def test_a_csv_is_read_with_its_delimiter_quotes_and_encoding(folder, delimiter, encoding):
    path = write_table(folder / "train.csv", ROWS, delimiter=delimiter, encoding=encoding)
    for cache in (None, folder / "cache", folder / "cache"):
        source = open_path(path, cache=cache)
        assert [get_turns(sample) for sample in read_all(source)] == [[f"[{name}]", text] for name, text in ROWS[1:]]
    assert [source.origin(index) for index in range(3)] == ["train.csv:2", "train.csv:3", "train.csv:5"]


def test_a_tsv_and_a_csv_of_questions_are_read(folder):
    rows = [["image", "question", "answer", "id"], ["a.png", "q, r; s", "a", "7"], ["", "q", "a", ""]]
    for path in (
        write_table(folder / "train.tsv", rows, delimiter="\t", lineterminator="\n"),
        write_table(folder / "a.csv", [*rows, []]),
    ):
        samples = read_all(open_path(path))
        assert [get_turns(sample) for sample in samples] == [["[a.png]q, r; s", "a"], ["q", "a"]]
        assert samples[0].id == "7"


def test_a_wrong_row_of_a_csv_is_a_record_error_with_its_line_and_the_others_are_read(folder):
    lines = ["path,caption", "a.png,good", "a.png,one, two", 'a.png,"he said "hi" there"', "a.png", "b.png,good"]
    (folder / "train.csv").write_text("\n".join(lines))
    source = open_path(folder / "train.csv")
    assert [get_turns(source[index])[1] for index in (0, 4)] == ["good", "good"]
    for index, words in enumerate(
        [
            "train.csv:3: 3 fields and 2 columns; a text with ',' in it must stand in quotes",
            "train.csv:4: not readable as CSV: ',' expected after '\"'; a quote inside a quoted text must be written twice",
            "train.csv:5: 1 field and 2 columns",
        ],
        1,
    ):
        with pytest.raises(RecordError) as caught:
            source[index]
        assert words in str(caught.value)


BAD_TABLES = {
    "another_delimiter": ("path:caption\na.png:red\n", "cannot tell the delimiter from its first line 'path:caption'"),
    "open_quote": ('path,caption\na.png,"red\nb.png,blue\n', "train.csv:2: a quote is opened here and never closed"),
    "column_twice": ("path,caption,path\na.png,red,b.png\n", "the column 'path' stands twice in its first line"),
    "missing_column": ("path,note\na.png,red\n", "cannot tell the format from the keys 'path', 'note'"),
    "no_rows": ("path,caption\n", "no records in it"),
    "no_columns": ("\n\n", "its first line is empty; it must name the columns"),
    "utf_16": ("path,caption\na.png,red\n".encode("utf-16"), "is UTF-16. Save it as UTF-8"),
    "two_columns_of_images": ("path,file_name,caption\na.png,b.png,red\n", "both 'file_name' and 'path' are given"),
    "no_such_image": ("path,caption\nz.png,red\n", "image 'z.png' not found in"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_csv_that_cannot_be_read_gives_one_message(folder, name):
    content, words = BAD_TABLES[name]
    (folder / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        open_path(folder / "train.csv")[0].images[0].load()
    assert words in str(caught.value)


# Folders


def test_pictures_with_a_text_beside_each_are_captions(folder):
    (folder / "set" / "sub").mkdir(parents=True)
    for name in ("1", "sub/2", "sub/3"):
        Image.new("RGB", (8, 8)).save(folder / "set" / f"{name}.jpg")
    (folder / "set" / "1.txt").write_text("\ufeff하나\n")
    (folder / "set" / "sub" / "2.txt").write_text("둘")
    source = open_path(folder / "set")
    assert [get_turns(source[index]) for index in (0, 1)] == [["[1.jpg]", "하나"], ["[sub/2.jpg]", "둘"]]
    with pytest.raises(RecordError, match="sub/3.jpg: a picture without a text 3.txt beside it"):
        source[2]
    digest = source.digest_of(0, 3)
    (folder / "set" / "sub" / "2.txt").write_text("둘!")
    assert open_path(folder / "set").digest_of(0, 3) != digest and open_path(folder / "set").digest != source.digest


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_the_metadata_of_an_imagefolder_names_its_pictures_from_its_own_folder(folder, ending):
    (folder / "set" / "train" / "x").mkdir(parents=True)
    for name in ("1.png", "x/2.png"):
        Image.new("RGB", (8, 8)).save(folder / "set" / "train" / name)
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "x/2.png", "text": "two"}]
    path = folder / "set" / "train" / f"metadata.{ending}"
    if ending == "jsonl":
        write(path, rows)
    elif ending == "csv":
        write_table(path, [list(rows[0]), *(list(row.values()) for row in rows)])
    else:
        write_parquet(path, {key: [row[key] for row in rows] for key in rows[0]})
    for place, prefix in ((folder / "set", "train/"), (folder / "set" / "train", "")):
        samples = read_all(open_path(place))
        assert [get_turns(sample)[0] for sample in samples] == [f"[{prefix}1.png]", f"[{prefix}x/2.png]"]
        assert [sample.images[0].size for sample in samples] == [(8, 8)] * 2


def write_img2dataset(folder, form):
    """Write two shards of two pictures as img2dataset does: files, webdataset or parquet, with its reports beside them."""
    data = encode_png(Image.new("RGB", (8, 8)))
    folder.mkdir()
    for shard in ("00000", "00001"):
        keys = [f"{shard}{number:04}" for number in range(2)]
        (folder / f"{shard}_stats.json").write_text('{"count": 2}')
        columns = {"key": keys, "caption": [f"text {key}" for key in keys], "url": ["http://x"] * 2}
        write_parquet(folder / f"{shard}.parquet", columns | ({"jpg": [data] * 2} if form == "parquet" else {}))
        if form == "parquet":
            continue
        members = folder / shard
        members.mkdir()
        for key in keys:
            (members / f"{key}.jpg").write_bytes(data)
            (members / f"{key}.txt").write_text(f"text {key}")
            (members / f"{key}.json").write_text(json.dumps({"key": key, "caption": f"text {key}", "url": "http://x"}))
        if form == "webdataset":
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for path in sorted(members.iterdir()):
                    tar.add(path, path.name)
                    path.unlink()
            members.rmdir()


@pytest.mark.parametrize("form", ["files", "webdataset", "parquet"])
def test_the_folders_of_img2dataset_are_read_with_all_shards(folder, form):
    write_img2dataset(folder / "set", form)
    samples = read_all(open_path(folder / "set"))
    texts = [f"text 0000{shard}000{number}" for shard in range(2) for number in range(2)]
    assert [sample.messages[-1].text for sample in samples] == texts
    assert all(sample.images[0].size == (8, 8) for sample in samples)


def test_several_files_are_named_by_braces_and_stars(folder):
    for number in range(12):
        write(folder / f"part{number:02}.jsonl", [{"image": "a.png", "caption": f"c{number}"}])
    for pattern, numbers in (("part{00..11}", range(12)), ("part{03,01}", (3, 1)), ("part0*", range(10))):
        source = open_path(folder / f"{pattern}.jsonl")
        assert [sample.messages[-1].text for sample in read_all(source)] == [f"c{number}" for number in numbers]
        assert source[0].images[0].size == (10, 20)
    assert "no such file as" in read_user_error(folder / "part{00..12}.jsonl")
    assert "no such file as" in read_user_error(folder / "q*.jsonl")
    write(folder / "part00.json", [{"image": "a.png", "caption": "c"}])
    assert "files of several endings (.json, .jsonl)" in read_user_error(folder / "part00.*")


def test_two_forms_in_one_folder_are_named_and_none_is_read(folder):
    question = {"image": "a.png", "question": "q", "answer": "a"}
    write(folder / "one.jsonl", [{"image": "a.png", "caption": "c"}])
    write(folder / "two.jsonl", [question])
    message = read_user_error(folder)
    assert "two forms in one source: one.jsonl:1 is caption and two.jsonl:1 is question_answer" in message
    (folder / "two.jsonl").unlink()
    (folder / "a.txt").write_text("text")
    assert "holds two forms, one.jsonl and a.png with a .txt beside it" in read_user_error(folder)
    write_table(folder / "two.csv", [["path", "caption"], ["a.png", "c"]])
    (folder / "a.txt").unlink()
    assert "files of several endings (.csv, .jsonl), e.g. two.csv and one.jsonl" in read_user_error(folder)


# Parquet


def test_a_parquet_of_image_question_and_answer_is_read_with_bytes_or_paths(folder):
    data = encode_png(Image.new("RGB", (8, 6)))
    texts = {"question": ["q", "r"], "answer": ["a", "b"]}
    struct = [{"bytes": data, "path": "x.png"}, {"bytes": None, "path": "a.png"}]
    samples = read_all(open_path(write_parquet(folder / "a.parquet", {"image": struct, **texts})))
    assert [sample.images[0].size for sample in samples] == [(6, 8), (10, 20)]
    samples = read_all(open_path(write_parquet(folder / "b.parquet", {"image": ["a.png", "b.png"], **texts})))
    assert [get_turns(sample) for sample in samples] == [["[a.png]q", "a"], ["[b.png]r", "b"]]
    nowhere = write_parquet(folder / "c.parquet", {"image": ["/nowhere/x.png"] * 2, **texts})
    with pytest.raises(RecordError, match="image '/nowhere/x.png' leads out of"):
        open_path(nowhere)[0].images[0].load()


# Columns of other names


def test_columns_of_other_names_are_mapped_for_rows_of_every_file(folder):
    rows = [{"img_file": "a.png", "질문": "q", "정답": "a", "note": 1, "answer": "other"}]
    columns = ColumnsConfig(image="img_file", question="질문", answer="정답")
    files = [write(folder / "a.jsonl", rows), write(folder / "a.json", rows)]
    files.append(write_table(folder / "a.csv", [list(rows[0]), list(rows[0].values())]))
    files.append(write_parquet(folder / "a.parquet", {key: [value] for key, value in rows[0].items()}))
    for path in files:
        sample = open_path(path, columns=columns)[0]
        assert get_turns(sample) == ["[a.png]q", "a"]
        assert sample.unused_keys == ("note", "answer (another column is mapped to it)")
    pair = [{"q": "q", "good": "c", "bad": "r", "pic": "a.png", "sys": "s"}]
    columns = ColumnsConfig(image="pic", question="q", chosen="good", rejected="bad", system="sys")
    found = open_path(write(folder / "pair.jsonl", pair), columns=columns)[0]
    assert isinstance(found, PreferencePair) and [m.content for m in found.prompt] == [("s",), (SLOT, "q")]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": "image_pth"}, "columns.image=image_pth: a.jsonl:1 has no such column; it has 'image_path', 'text'. Did you mean image_path?"),
        ({"image": "text", "answer": "text"}, "data.sources.mine.columns.image and columns.answer: both name the column 'text'"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_or_is_mapped_twice_gives_one_message(folder, columns, words):
    path = write(folder / "a.jsonl", [{"image_path": "a.png", "text": "t"}])
    assert words in read_user_error(path, columns=ColumnsConfig(**columns))


def test_the_digest_of_a_source_without_new_settings_is_unchanged_by_them(folder):
    path = write(folder / "a.jsonl", [{"image": "a.png", "caption": "c"}])
    described = open_path(path)._settings.describe()
    assert "columns" not in described and "more_image_roots" not in described
    assert open_path(path, columns=ColumnsConfig(caption="caption")).digest != open_path(path).digest


# Folders of images on several disks


def test_image_root_may_be_a_list_and_links_are_followed_into_these_folders_only(folder):
    disks = [folder / "disk1", folder / "disk2", folder / "disk3"]
    for number, disk in enumerate(disks):
        disk.mkdir()
        Image.new("RGB", (8, 4 + number)).save(disk / f"{number}.png")
    (disks[0] / "more").symlink_to(disks[1])
    (disks[0] / "out").symlink_to(disks[2])
    names = ["0.png", "1.png", "more/1.png", str(disks[1] / "1.png"), "out/2.png"]
    path = write(folder / "a.jsonl", [{"image": name, "caption": "c"} for name in names])
    source = open_path(path, image_root=[str(disks[0]), str(disks[1])])
    assert [source[index].images[0].size for index in range(4)] == [(4, 8), (5, 8), (5, 8), (5, 8)]
    with pytest.raises(RecordError, match="image 'out/2.png' leads out of"):
        source[4].images[0].load()


def test_a_name_of_two_different_pictures_below_two_roots_is_refused(folder):
    for name, colour in (("one", "red"), ("two", "red"), ("three", "blue")):
        (folder / name).mkdir()
        Image.new("RGB", (8, 4), colour).save(folder / name / "x.png")
    path = write(folder / "a.jsonl", [{"image": "x.png", "caption": "c"}])
    same = open_path(path, image_root=[str(folder / "one"), str(folder / "two")])
    assert same[0].images[0].size == (4, 8)
    with pytest.raises(RecordError) as caught:
        open_path(path, image_root=[str(folder / "one"), str(folder / "three")])[0].images[0].load()
    assert f"image 'x.png' is two different files, {folder}/one/x.png and {folder}/three/x.png" in str(caught.value)
