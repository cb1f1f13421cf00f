"""Tests of curate.method=balance: groups and concepts of a small mixture, asked beside achieved."""

import json

import pytest
from run_helpers import make_llava_record, read_lines, run_curate, save_photos, write_data_choice, write_records

from lit_vlm.config import ConfigError, parse
from lit_vlm.types import UserError

NUM_KOREAN, NUM_ENGLISH = 20, 60


@pytest.fixture
def mixture(tmp_path):
    """Two sources: short Korean questions of text, and English ones of two lengths. Returns their folder and overrides."""
    korean = [
        make_llava_record(f"{number}번째 수도는?", "서울입니다.", id=f"k{number}") for number in range(NUM_KOREAN)
    ]
    english = [
        make_llava_record(f"What is number {number}?", "A dog. " * (1 if number % 3 else 30), id=f"e{number}")
        for number in range(NUM_ENGLISH)
    ]
    sources = {
        name: {"path": str(write_records(tmp_path / f"{name}.json", rows))}
        for name, rows in (("korean", korean), ("english", english))
    }
    return tmp_path, [*write_data_choice(tmp_path, sources=sources, validation={"fraction": 0}), BALANCE]


BALANCE = "curate.method=balance"


def read_table(output, title="Groups"):
    return json.loads((output / "summary.json").read_text("utf-8"))["tables"][title]


def test_a_share_is_reached_by_leaving_out_as_few_records_as_possible(mixture, capsys):
    folder, overrides = mixture
    asked = ["curate.balance.by=[language]", "curate.balance.shares={ko: 0.4}"]
    output = run_curate(folder, *overrides, *asked)
    assert [(row["group"], row["asked"], row["kept"], row["achieved"]) for row in read_table(output)] == [
        ("en", "", "30", "60.0%"),
        ("ko", "40.0%", "20", "40.0%"),
    ]
    lines = read_lines(output / "left_out.jsonl")
    assert len(lines) == 30 and {(line["source"], line["group"]) for line in lines} == {("english", "en")}
    selection = json.loads((output / "english.selection.json").read_text())
    assert sum(last - first + 1 for first, last in selection["left_out"]) == 30 and selection["passes"] == ["balance"]
    assert json.loads((output / "korean.selection.json").read_text())["left_out"] == []
    printed, page = capsys.readouterr().out, (output / "page.html").read_text("utf-8")
    assert "60.0%" in printed and "data.sources.english.selection=" in printed
    assert all(text in page for text in ("<h2>Groups</h2>", "40.0%", "<h2>Stays</h2>"))
    assert (
        read_lines(run_curate(folder, *overrides, *asked, "run_name=again", "data.index_workers=2") / "left_out.jsonl")
        == lines
    )
    other = run_curate(folder, *overrides, *asked, "run_name=other", "seed=1")
    assert len(read_lines(other / "left_out.jsonl")) == 30 and read_lines(other / "left_out.jsonl") != lines


def test_a_share_that_cannot_be_reached_is_said_and_shown_beside_what_was_achieved(mixture, capsys):
    folder, overrides = mixture
    asked = ["curate.balance.by=[language]", "curate.balance.shares={ko: 0.9}"]
    output = run_curate(folder, *overrides, *asked)
    assert [(row["group"], row["asked"], row["kept"], row["achieved"]) for row in read_table(output)] == [
        ("en", "", "20", "50.0%"),
        ("ko", "90.0%", "20", "50.0%"),
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert "The asked share of ko is not reached: it would leave out more than 50% of the records" in said
    output = run_curate(folder, *overrides, "curate.balance.shares={chart: 0.5}", "run_name=empty")
    assert read_table(output)[-1] == {
        "group": "chart", "records": "0", "share": "0.0%", "asked": "50.0%", "kept": "0", "achieved": "0.0%",
    }  # fmt: skip
    assert "chart: no record is in this group" in capsys.readouterr().out


def test_lengths_and_combinations_have_a_cap(mixture):
    folder, overrides = mixture
    by = ["curate.balance.by=[language,length]", "curate.balance.lengths=[100]", "curate.balance.max_per_group=15"]
    output = run_curate(folder, *overrides, *by)
    assert [(row["group"], row["records"], row["kept"]) for row in read_table(output)] == [
        ("en/0-99", "40", "15"),
        ("en/100-", "20", "15"),
        ("ko/0-99", "20", "15"),
    ]


def test_tiles_are_those_that_onevision_cuts(tmp_path):
    photos = save_photos(tmp_path / "photos")
    rows = [make_llava_record("<image>\n무엇인가요?", "사진", id=str(n), image="china.jpg") for n in range(3)]
    rows += [make_llava_record("무엇인가요?", "글", id="text"), make_llava_record("<image>?", "없음", image="none.jpg")]
    path = write_records(tmp_path / "rows.json", rows)
    mine = ["data=llava_json", f"data.sources.mine.path={path}", f"data.sources.mine.image_root={photos}"]
    asked = [BALANCE, "curate.balance.by=[tiles]", "curate.balance.max_per_group=2", "curate.balance.tile_size=320"]
    output = run_curate(tmp_path, *mine, *asked)
    # 427 x 640 pixels: the whole picture, and 2 x 2 tiles of 320 pixels; a picture that is missing cannot be counted
    assert [(row["group"], row["records"], row["kept"]) for row in read_table(output)] == [
        ("0", "1", "1"),
        ("5", "3", "2"),
    ]
    assert json.loads((output / "summary.json").read_text())["sources"][0]["num_bad"] == 1


def test_concepts_are_balanced_by_metaclips_rule(mixture):
    folder, overrides = mixture
    (folder / "concepts.txt").write_text("dog\n서울\nnumber 7\n고양이\n", "utf-8")
    asked = ["curate.balance.by=[concept]", f"curate.balance.concepts={folder / 'concepts.txt'}"]
    output = run_curate(folder, *overrides, *asked, "curate.balance.max_per_concept=25")
    dog, seoul, number = read_table(output, "Concepts")
    assert (dog["concept"], dog["records"], dog["probability"], dog["asked"]) == ("dog", "60", "0.417", "25")
    assert 15 <= int(dog["kept"]) <= 36  # 3 standard deviations around 25
    assert (seoul["records"], seoul["kept"], number["records"], number["kept"]) == ("20", "20", "1", "1")
    lines = read_lines(output / "left_out.jsonl")
    assert len(lines) == 60 - int(dog["kept"]) and all(line["concepts"] == ["dog"] for line in lines)
    (folder / "concepts.txt").write_text("서울\n", "utf-8")
    with pytest.raises(UserError, match="another search: it differs in curate.balance.concepts"):
        run_curate(folder, *overrides, *asked, "curate.balance.max_per_concept=25")
    output = run_curate(folder, *overrides, *asked, "run_name=unmatched")
    assert len(read_lines(output / "left_out.jsonl")) == NUM_ENGLISH
    output = run_curate(folder, *overrides, *asked, "run_name=kept", "curate.balance.keep_unmatched=true")
    assert read_lines(output / "left_out.jsonl") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "nothing is asked"),
        (["curate.balance.by=[concept]"], "concepts is not set"),
        (["curate.balance.by=[concept,kind]", "curate.balance.concepts=x"], "concept stands alone"),
        (["curate.balance.shares={captoin: 0.5}"], "Did you mean caption"),
        (["curate.balance.shares={caption: 0.7, ocr: 0.5}"], "sum to 1.2"),
        (["curate.balance.by=[kind,language]", "curate.balance.shares={ko: 0.5}"], "names 1 of 2 properties"),
        (["curate.balance.shares={ocr: 0.5}", "curate.balance.concepts=x"], "concepts: is read with"),
        (["curate.balance.shares={ocr: 0.5}", "curate.method=duplicates"], "curate.method=balance only"),
    ],
)
def test_settings_of_balance_are_checked_before_anything_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(["task=curate", "data=llava_json", "data.sources.mine.path=x.json", BALANCE, *overrides])
