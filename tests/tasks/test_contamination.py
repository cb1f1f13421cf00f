"""Tests of contamination: rows of benchmarks in a mixture, before and in training."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from made_benchmarks import make_rows, write_parquet
from PIL import Image
from run_helpers import make_llava_record, read_lines, run, run_curate, save_photos, write_records
from small_matchers import make_dual_encoder
from test_preflight import run_preflight_with

from lit_vlm.config import ConfigError, parse
from lit_vlm.curation.benchmark_features import cut_options, read_benchmarks
from lit_vlm.curation.contamination import judge_picture
from lit_vlm.curation.duplicates import Evidence
from lit_vlm.model.image_text import load_picture_encoder
from lit_vlm.types import UserError

QUESTION, ANSWER = "<image>\n무엇이 보이나요?", "사진이 보입니다."
SEARCH = ["curate.method=contamination"]


LONG = (
    "다음 표는 2023년 상반기 동안 서울과 부산의 지하철 노선별 하루 평균 이용객 수를 나타낸 것입니다. "
    "부산 2호선의 이용객이 가장 많은 달은 언제이고 서울 9호선과의 차이는 몇 명인가요?"
)
SHORT = "이 그래프에서 초록색 막대가 나타내는 과목은 무엇입니까?"


@pytest.fixture(scope="module")
def leaked(tmp_path_factory):
    """Rows of two benchmarks in their published layout, and a mixture that holds some of them."""
    folder = tmp_path_factory.mktemp("leaked")
    rows = make_rows("k_dtcbench", 8, side=192)
    photos = save_photos(folder / "photos")
    for row, name in zip(rows, ("china.jpg", "flower.png", "astronaut.jpg"), strict=False):
        row["image"] = Image.open(photos / name).convert("RGB")
    rows[3]["question"], rows[4]["question"] = LONG, SHORT
    write_parquet(rows, folder / "benchmarks" / "k_dtcbench" / "test.parquet")
    stream = io.BytesIO()
    rows[0]["image"].save(stream, "PNG")
    (photos / "same_bytes.png").write_bytes(stream.getvalue())
    half = rows[1]["image"]
    half.resize((half.width // 2, half.height // 2)).save(photos / "half.jpg", quality=40)
    records = [
        make_llava_record(QUESTION, ANSWER, id="cat", image="고양이.png"),
        make_llava_record(QUESTION, ANSWER, id="bytes", image="same_bytes.png"),
        make_llava_record(QUESTION, ANSWER, id="view", image="half.jpg"),
        make_llava_record(f"질문입니다.\n{LONG.replace(' 서울', '  서울')}", "6월, 1,200명", id="long question"),
        make_llava_record(SHORT, "국어", id="short question"),
        make_llava_record(rows[5]["question"], "두 개", id="common question"),
    ]
    path = write_records(folder / "rows.json", records)
    overrides = ["data=llava_json", f"data.sources.mine.path={path}", f"data.sources.mine.image_root={photos}"]
    return [*overrides, f"evaluate.files={folder / 'benchmarks'}", "benchmarks=[k_dtcbench,k_viscuit]"]


def test_pictures_and_questions_of_a_benchmark_are_found_with_their_certainty(leaked, tmp_path, capsys):
    output = run_curate(tmp_path, *SEARCH, *leaked)
    lines = read_lines(output / "left_out.jsonl")
    found = [(one["position"], one["row"], one["certainty"], one["picture"], one["left_out"]) for one in lines]
    assert found == [
        (1, 0, "certain", "bytes", True),
        (2, 1, "likely", "view", True),
        (3, 3, "likely", None, True),
        (4, 4, "possible", None, False),
    ]
    assert all(line["benchmark"] == "k_dtcbench" for line in lines)
    assert lines[2]["overlap"] > 0.9
    assert "k_viscuit: not checked: there is no folder" in capsys.readouterr().out
    page = (output / "page.html").read_text("utf-8")
    assert "k_viscuit was not checked" in page
    assert page.count("data:image/") == 2 + 2 + 1 + 1  # a picture of both where the record has one
    selection = json.loads((output / "mine.selection.json").read_text())
    assert selection["left_out"] == [[1, 3]]


@pytest.mark.parametrize(
    ("question", "stem"),
    [
        ("Which is it?\nOptions: A: A suitcase., B: A cat., C: A dog., D: None", "Which is it?"),
        ("무엇인가요?\n옵션: A: 가방, B: 고양이", "무엇인가요?"),
        ("Which is it?\n(A) A suitcase (B) A cat", "Which is it?"),
        ("A. Smith painted it. When?", "A. Smith painted it. When?"),
        ("Is it vitamin a. or b. here?", "Is it vitamin a. or b. here?"),
    ],
)
def test_the_options_of_a_question_are_cut(question, stem):
    assert cut_options(question).rstrip() == stem


def test_a_question_whose_options_were_left_out_is_found(tmp_path):
    question = "Which of the two small red boats that lie at the northern pier of the harbour has the taller mast?"
    rows = make_rows("mmstar", 2)
    rows[0]["question"] = (
        f"{question}\nOptions: A: the left one, B: the right one, C: both are equal, D: neither has any"
    )
    write_parquet(rows, tmp_path / "benchmarks" / "mmstar" / "val.parquet")
    photos = save_photos(tmp_path / "photos")
    records = [
        make_llava_record(f"<image>\nLook closely. {question} Answer shortly.", "Left.", id="leak", image="고양이.png")
    ]
    path = write_records(tmp_path / "rows.json", records)
    overrides = ["data=llava_json", f"data.sources.mine.path={path}", f"data.sources.mine.image_root={photos}"]
    overrides += ["curate.method=contamination", f"evaluate.files={tmp_path / 'benchmarks'}", "benchmarks=[mmstar]"]
    output = run_curate(tmp_path, *overrides)
    lines = read_lines(output / "left_out.jsonl")
    assert [(one["row"], one["certainty"], one["overlap"]) for one in lines] == [(0, "possible", 1.0)]


def test_pictures_that_are_near_in_the_features_of_a_tower_are_possible_leaks(leaked, tmp_path, monkeypatch):
    tower = make_dual_encoder("clip", tmp_path / "clip")
    search = [*SEARCH, *leaked, "curate.pictures=embedding", f"curate.model={tower}"]
    output = run_curate(tmp_path, *search, "curate.min_cosine=-1")
    lines = {line["position"]: line for line in read_lines(output / "left_out.jsonl")}
    plain = read_lines(run_curate(tmp_path, *SEARCH, *leaked, "run_name=plain") / "left_out.jsonl")
    assert [lines[one["position"]] | {"cosine": None} for one in plain] == plain  # what is surer is found as before
    cat = lines[0]  # it is no picture of the benchmark; this tower has random weights
    assert (cat["picture"], cat["certainty"], cat["left_out"]) == ("embedding", "possible", False)
    assert f"picture: near, cosine {cat['cosine']:.3f}" in (output / "page.html").read_text("utf-8")
    places = dict(override.split("=", 1) for override in leaked)
    rows = read_benchmarks(["k_dtcbench"], Path(places["evaluate.files"]), tmp_path, max_pixels=10**8, workers=1)
    picture = Image.open(Path(places["data.sources.mine.image_root"]) / "고양이.png").convert("RGB")
    images = [picture, *(rows.load_picture(number) for number in range(8))]
    own, *others = load_picture_encoder(tower, "curate.model").embed_images(images)
    cosines = [float(own @ other) for other in others]
    assert cat["row"] == int(np.argmax(cosines)) and abs(cat["cosine"] - max(cosines)) < 1e-3
    above = run_curate(tmp_path, *search, f"curate.min_cosine={max(cosines) + 1e-3}", "run_name=above")
    assert all(line["position"] != 0 for line in read_lines(above / "left_out.jsonl"))


@pytest.mark.parametrize(
    ("evidence", "overlap", "certainty"),
    [("bytes", 0.0, "certain"), ("pixels", 0.0, "certain"), ("view", 0.0, "likely"), ("embedding", 0.0, "possible")]
    + [("embedding", 0.9, "likely")],  # near features, and the question of the same row
)
def test_the_certainty_of_a_picture_depends_on_how_it_matches(evidence, overlap, certainty):
    assert judge_picture(Evidence(evidence), overlap).value == certainty


def test_the_least_certainty_decides_what_goes(leaked, tmp_path):
    output = run_curate(tmp_path, *SEARCH, *leaked, "curate.min_certainty=certain", "run_name=certain")
    assert json.loads((output / "mine.selection.json").read_text())["left_out"] == [[1, 1]]
    output = run_curate(tmp_path, *SEARCH, *leaked, "curate.min_certainty=possible", "run_name=possible")
    assert json.loads((output / "mine.selection.json").read_text())["left_out"] == [[1, 4]]


def test_no_benchmark_to_check_against_is_an_error(leaked, tmp_path):
    with pytest.raises(UserError, match="nothing was checked"):
        run_curate(tmp_path, *SEARCH, *leaked, "benchmarks=[k_viscuit]")


# ------------------------------------------------------------------------------------------- before and in training


def test_preflight_compares_the_data_with_benchmarks_and_says_what_was_not_checked(
    leaked, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    looked = run_preflight_with(*leaked, f"run_dir={tmp_path / 'runs'}", "data.index_workers=1")
    found = looked.facts["contamination"]
    assert found["records"] == 6
    assert found["benchmarks"] == [
        {"name": "k_dtcbench", "rows": 8, "bad_rows": 0, "records": {"certain": 1, "likely": 2, "possible": 1}}
    ]
    assert [(line["position"], line["row"], line["certainty"]) for line in found["lines"]] == [
        (1, 0, "certain"),
        (2, 1, "likely"),
        (3, 3, "likely"),
        (4, 4, "possible"),
    ]
    assert "there is no folder" in found["unchecked"]["k_viscuit"]
    assert "A picture or a question of a benchmark (k_dtcbench) is in 3 records" in looked.read_findings("warning")
    assert "k_viscuit: not checked: there is no folder" in capsys.readouterr().out
    assert "k_viscuit was not checked" in looked.page
    assert looked.page.count("likely; picture: same view") == 1
    section = looked.page.partition("Contamination</h2>")[2].partition("</section>")[0]
    assert section.count("data:image/") == 2 + 2 + 1 + 1  # a picture of both where the record has one


def test_preflight_says_that_nothing_was_compared(leaked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without = [one for one in leaked if not one.startswith(("evaluate.files", "benchmarks"))]
    looked = run_preflight_with(*without, f"run_dir={tmp_path / 'runs'}")
    assert looked.facts["contamination"] is None
    assert "Not compared with benchmarks: evaluate.files is not set." in looked.page
    looked = run_preflight_with(*leaked, "evaluate.files=nowhere", f"run_dir={tmp_path / 'runs'}", "overwrite=true")
    assert "no benchmark could be read" in looked.read_findings("warning")
    assert set(looked.facts["contamination"]["unchecked"]) == {"k_dtcbench", "k_viscuit"}


def test_drop_contaminated_trains_without_the_records_of_benchmarks(leaked, tmp_path, capsys):
    own = [one for one in leaked if not one.startswith(("evaluate.files", "benchmarks"))]
    asked = [*own, "stage=sft", f"run_dir={tmp_path / 'runs'}", "trainer.max_steps=1", "data.tiling=base"]
    asked += ["data.drop_contaminated=true", "data.validation.fraction=0", "run_name=clean"]
    with pytest.raises(
        UserError, match=r"there is no .*mine\.selection\.json.*task=curate curate.method=contamination"
    ):
        run(*asked)
    output = run_curate(tmp_path, *SEARCH, *leaked)
    lock = json.loads((run(*asked).dir / "mixture.lock").read_text())
    assert lock["sources"]["mine"]["records"] == 6 - 3
    assert "data.drop_contaminated: mine: 3 records of 6 left out" in capsys.readouterr().out
    other = run_curate(tmp_path, *own)  # duplicates
    selection = f"data.sources.mine.selection={other / 'mine.selection.json'}"
    with pytest.raises(UserError, match="is of another search, so rows of benchmarks are still in it"):
        run(*asked, selection, "run_name=other")
    both = run_curate(tmp_path, *SEARCH, *leaked, selection, "run_name=both")
    assert output != both
    done = run(*asked, f"data.sources.mine.selection={both / 'mine.selection.json'}", "run_name=third")
    assert json.loads((done.dir / "mixture.lock").read_text())["sources"]["mine"]["records"] < 6


def test_drop_contaminated_is_refused_where_all_records_are_looked_at(leaked):
    with pytest.raises(ConfigError, match="data.drop_contaminated: has no effect here"):
        parse(["task=curate", *SEARCH, *leaked, "data.drop_contaminated=true"])
