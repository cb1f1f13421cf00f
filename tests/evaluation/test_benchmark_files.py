"""Rows of benchmarks: the published layouts are read, and everything that is wrong with them is named before a model is asked."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from made_benchmarks import MAKERS, encode_images, make_rows, write_parquet, write_tsv
from PIL import Image

from lit_vlm.evaluation.benchmark_files import find_files, format_bad_rows, open_rows, prepare_rows
from lit_vlm.evaluation.benchmarks import BENCHMARKS, JudgeUse, list_harness_tasks, load_published_scores
from lit_vlm.evaluation.harness_environment import find_tasks
from lit_vlm.evaluation.task_pack import __file__ as pack_file
from lit_vlm.types import UserError

datasets.disable_progress_bars()


def prepare(name, folder, limit=None, excluded=frozenset(), max_pixels=10**7):
    rows, root = open_rows(name, BENCHMARKS[name], folder, folder / "cache")
    output = folder / "prepared" / f"{name}.parquet"
    return prepare_rows(
        name, BENCHMARKS[name], rows, root, output, max_pixels=max_pixels, limit=limit, excluded=excluded
    )


def read_prepared(prepared):
    return pq.read_table(prepared.path).to_pylist()


@pytest.mark.parametrize("name", MAKERS)
def test_the_published_layout_of_each_benchmark_is_read(name, tmp_path):
    rows = make_rows(name, 8)
    write_parquet(rows, tmp_path / name / "data" / f"{BENCHMARKS[name].split}-00000-of-00001.parquet")
    prepared = prepare(name, tmp_path)
    kept = [row for row in rows if name != "seed_image" or row["data_type"] == "image"]
    found = read_prepared(prepared)
    assert prepared.bad_rows == [] and len(found) == len(kept) == prepared.num_available
    for row, original in zip(found, kept, strict=True):
        for column in BENCHMARKS[name].columns:
            expected = original.get(column)
            assert row[column] == (encode_images(expected) if column == "image" else expected)
    dataset = datasets.Dataset.from_parquet(str(prepared.path), cache_dir=str(tmp_path / "hf"))
    image = dataset[0]["image"]
    assert isinstance(image[0] if isinstance(image, list) else image, Image.Image)


def test_a_table_with_base64_gives_the_same_rows_as_parquet(tmp_path):
    rows = make_rows("k_dtcbench", 6)
    write_parquet(rows, tmp_path / "a" / "k_dtcbench" / "test.parquet")
    renamed = [
        {{f"choice_{x.lower()}": x for x in "ABCD"}.get(name, name): value for name, value in row.items()}
        for row in rows
    ]
    write_tsv(renamed, tmp_path / "b" / "k_dtcbench" / "K-DTCBench.tsv")
    first, second = (prepare("k_dtcbench", tmp_path / folder) for folder in "ab")
    assert read_prepared(first) == read_prepared(second) and first.digest == second.digest


def test_a_row_may_refer_to_the_image_of_another_one(tmp_path):
    """So VLMEvalKit's files store the image of rotated questions once."""
    rows = make_rows("k_mmbench", 4)
    path = write_tsv(rows, tmp_path / "k_mmbench" / "dev.tsv")
    lines = path.read_text(encoding="utf-8").split("\n")
    place = lines[0].rstrip("\r").split("\t").index("image")
    for number in (2, 3, 4):
        fields = lines[number].split("\t")
        fields[place] = str(rows[0]["index"])
        lines[number] = "\t".join(fields)
    path.write_text("\n".join(lines), encoding="utf-8")
    images = [row["image"]["bytes"] for row in read_prepared(prepare("k_mmbench", tmp_path))]
    assert images == [encode_images(rows[0]["image"])["bytes"]] * 4


def test_images_beside_json_lines_are_read_by_their_paths(tmp_path):
    folder = tmp_path / "k_viscuit"
    (folder / "images").mkdir(parents=True)
    rows = make_rows("k_viscuit", 3)
    with (folder / "annotations.jsonl").open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows):
            row.pop("image").save(folder / "images" / f"{number}.png")
            stream.write(json.dumps(row | {"image_path": f"images/{number}.png"}, ensure_ascii=False) + "\n")
    prepared = prepare("k_viscuit", tmp_path)
    assert prepared.bad_rows == [] and [row["options"] for row in read_prepared(prepared)] == [
        row["options"] for row in rows
    ]


def test_images_in_a_folder_beside_the_rows_are_found_by_their_names(tmp_path):
    """The layout of K-Viscuit's repository: dataset/annotations.jsonl, dataset/images/0.jpg, `"image_path": "0.jpg"`."""
    images = tmp_path / "k_viscuit/dataset/images"
    images.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(images / "0.jpg")
    row = {"question": "Which food?", "options": list("wxyz"), "answer": 1, "image_path": "0.jpg"}
    (images.parent / "annotations.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows, root = open_rows("k_viscuit", BENCHMARKS["k_viscuit"], tmp_path, tmp_path)
    prepared = prepare_rows(
        "k_viscuit", BENCHMARKS["k_viscuit"], rows, root, tmp_path / "out.parquet", max_pixels=10**6
    )
    assert prepared.numbers == [0] and prepared.bad_rows == []


def test_a_missing_file_is_named_with_its_source_and_licence(tmp_path):
    (tmp_path / "k-dtcbench").mkdir()
    with pytest.raises(UserError) as error:
        prepare("k_dtcbench", tmp_path)
    for text in ("Did you mean k-dtcbench?", "NCSOFT/K-DTCBench", "240 rows", "CC BY-NC 4.0", "hf download"):
        assert text in str(error.value)
    with pytest.raises(UserError, match="rrc.cvc.uab.es"):
        open_rows("icdar2015_popeval", BENCHMARKS["icdar2015_popeval"], None, tmp_path)


def test_missing_columns_are_named_with_those_that_are_there(tmp_path):
    rows = [
        {name: value for name, value in row.items() if name not in ("choice_b", "answer")}
        for row in make_rows("k_dtcbench", 3)
    ]
    write_parquet(rows, tmp_path / "k_dtcbench" / "test.parquet")
    with pytest.raises(UserError, match=r"lacks 2 columns, choice_b, answer\. It has 'index, question"):
        prepare("k_dtcbench", tmp_path)


def test_a_table_whose_options_the_task_would_not_show_is_refused(tmp_path):
    """VLMEvalKit's MMStar.tsv is such a table; lmms-eval's task reads the options from the question."""
    rows = [row | {letter: "1" for letter in "ABCD"} for row in make_rows("mmstar", 2)]
    write_tsv(rows, tmp_path / "mmstar" / "MMStar.tsv")
    assert len(prepare("mmstar", tmp_path).numbers) == 2
    write_tsv([row | {"question": "How many?"} for row in rows], tmp_path / "mmstar" / "MMStar.tsv")
    with pytest.raises(UserError, match=r"options are in columns of their own.*Lin-Chen/MMStar"):
        prepare("mmstar", tmp_path)


def test_files_without_rows_are_named(tmp_path):
    write_parquet(make_rows("k_dtcbench", 1), tmp_path / "k_dtcbench" / "test.parquet")
    table = pq.read_table(tmp_path / "k_dtcbench" / "test.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "k_dtcbench" / "test.parquet")
    with pytest.raises(UserError, match="the files have no rows"):
        prepare("k_dtcbench", tmp_path)


FAULTS = {
    "cut": lambda row: {"image": {"bytes": row["image"]["bytes"][:300], "path": None}},
    "no image": lambda _: {"image": {"bytes": b"<html>", "path": None}},
    "empty": lambda _: {"question": " "},
    "answer": lambda _: {"answer": "E"},
    "index": lambda _: {"index": "one"},
}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("cut", "its image"),
        ("no image", "a web page"),
        ("empty", "question is empty"),
        ("answer", "answer is 'E', and one of A, B, C, D is needed"),
        ("index", "index is 'one', and a whole number is needed"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_reason(tmp_path, fault, reason):
    rows = [
        row | {"image": encode_images(row["image"]), "index": str(row["index"])} for row in make_rows("k_dtcbench", 4)
    ]
    rows[2] |= FAULTS[fault](rows[2])
    path = tmp_path / "k_dtcbench" / "test.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(path)
    prepared = prepare("k_dtcbench", tmp_path)
    (bad,) = prepared.bad_rows
    assert (bad.number, bad.origin) == (2, "test.parquet[2]") and reason in bad.reason
    assert prepared.numbers == [0, 1, 3] and prepared.num_available == 4
    message = format_bad_rows("k_dtcbench", prepared.bad_rows)
    assert "1 row cannot be used" in message and "test.parquet[2]" in message and "evaluate.leave_out=true" in message


def test_bad_base64_is_named_by_its_line(tmp_path):
    path = write_tsv(make_rows("k_dtcbench", 3), tmp_path / "k_dtcbench" / "test.tsv")
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[2] = lines[2].replace("iVBOR", "i*BOR")
    path.write_text("\n".join(lines), encoding="utf-8")
    (bad,) = prepare("k_dtcbench", tmp_path).bad_rows
    assert bad.origin == "test.tsv:3" and "image is no base64" in bad.reason


def test_an_image_above_the_limit_of_pixels_is_a_bad_row(tmp_path):
    rows = make_rows("k_dtcbench", 2)
    rows[1]["image"] = Image.new("RGB", (400, 400))
    write_parquet(rows, tmp_path / "k_dtcbench" / "test.parquet")
    (bad,) = prepare("k_dtcbench", tmp_path, max_pixels=100_000).bad_rows
    assert bad.number == 1 and "pixels" in bad.reason


def test_limit_and_left_out_rows_keep_questions_with_all_their_rotations(tmp_path):
    rows = make_rows("mmbench", 16)  # four questions
    rows.sort(key=lambda row: row["index"] // 1_000_000)  # all first rotations, then all second ones
    write_parquet(rows, tmp_path / "mmbench" / "dev.parquet")
    limited = prepare("mmbench", tmp_path, limit=2)
    assert sorted(row["index"] % 1_000_000 for row in read_prepared(limited)) == [0] * 4 + [1] * 4
    assert [len(group) for group in limited.groups] == [4, 4]
    without = prepare("mmbench", tmp_path, excluded=frozenset({5}))  # the second rotation of question 1
    assert {row["index"] % 1_000_000 for row in read_prepared(without)} == {0, 2, 3}


def test_korean_seed_rows_count_as_images_whatever_their_dimension(tmp_path):
    write_parquet(make_rows("k_seed", 3), tmp_path / "k_seed" / "test.parquet")
    assert {row["data_type"] for row in read_prepared(prepare("k_seed", tmp_path))} == {"image"}


def test_of_several_splits_that_of_the_benchmark_is_read(tmp_path):
    for name in ("dev-00000-of-00001.parquet", "test-00000-of-00001.parquet", ".cache/dev.parquet"):
        write_parquet(make_rows("k_mmbench", 1), tmp_path / name)
    assert [path.name for path in find_files(tmp_path, "dev")] == ["dev-00000-of-00001.parquet"]
    assert len(find_files(tmp_path, "val")) == 2


def test_every_benchmark_names_a_task_that_exists():
    pack = find_tasks(Path(pack_file).parent)
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.task in (pack if benchmark.in_task_pack else list_harness_tasks()), name
        assert benchmark.hub or benchmark.obtain, name
        assert benchmark.judge is not JudgeUse.none or not benchmark.rule_overrides, name
        assert any(kind.value.startswith("image") for kind in benchmark.columns.values()), name


def test_published_scores_name_benchmarks_with_their_sources():
    scores = load_published_scores()
    assert set(scores) - set(BENCHMARKS) == {"mmmu_val"} and "mmmu_val" in list_harness_tasks()
    first = scores["k_dtcbench"][0]
    assert (first.model, first.score, first.source) == (
        "VARCO-VISION-14B",
        84.58,
        "VARCO-VISION (NCSOFT, 2024), table 1",
    )
    assert all(score.source and 0 <= score.score <= 1000 for rows in scores.values() for score in rows)
