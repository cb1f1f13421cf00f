"""Tests of mixtures set on the command line, by the sample counts in the manifest."""

from pathlib import Path

import pytest
from delivery import label, make_zip, picture
from mixture_cases import build_datamodule, parse_sft_run
from run_helpers import PHOTOS, make_llava_record, open_place, run, save_photos, write_data_choice, write_records

from lit_vlm.tasks.open_run import open_sources
from lit_vlm.types import Language, SampleKind, UserError

SIZES = {"talk_ko": 12, "talk_en": 48, "seen_ko": 24, "read_en": 36}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Text and images in both languages; Korean answers are long."""
    folder = tmp_path_factory.mktemp("files")
    save_photos(folder / "images")
    long = "네, 그렇습니다. 자세히 말씀드리겠습니다. "
    write_records(folder / "talk_ko.jsonl", [make_llava_record(f"{i}번?", long * 3) for i in range(SIZES["talk_ko"])])
    write_records(folder / "talk_en.jsonl", [make_llava_record(f"{i}?", f"Yes {i}.") for i in range(SIZES["talk_en"])])
    for name in ("seen_ko", "read_en"):
        question = "무엇?" if name == "seen_ko" else "Read."
        records = [make_llava_record(f"<image>\n{question}", f"{i}", image=PHOTOS[i % 4]) for i in range(SIZES[name])]
        write_records(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def overrides(files, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    sources = {name: {"path": str(files / f"{name}.jsonl"), "image_root": str(files / "images")} for name in SIZES}
    sources["seen_ko"]["language"] = "ko"
    sources["read_en"] |= {"kind": "ocr", "language": "en"}
    return write_data_choice(tmp_path, sources=sources, validation={"fraction": 0})


def run_mixture(overrides: list[str], *extra: str) -> tuple[dict, dict]:
    """Train one epoch in steps of twelve samples. Return the mixture rows of the manifest by name, and its plan."""
    all_overrides = [
        *overrides,
        "stage=sft",
        "callbacks=[]",
        "data.global_batch_size=12",
        "trainer.max_steps=null",
        "data.tiling=base",
    ]
    manifest = run(*all_overrides, *extra).manifest
    assert manifest["status"] == "finished"
    rows = {row["name"]: row for row in manifest["data"]["mixture"]}
    assert (
        sum(rows[name]["drawn"] for name in SIZES if name in rows)
        == rows["text only"]["drawn"] + rows["with image"]["drawn"]
    )
    return rows, manifest["plan"]


def set_weights(**values: float) -> list[str]:
    return [f"data.sources.{name}.weight={values.get(name, 1)}" for name in SIZES]


def test_without_mixture_settings_each_record_is_sampled_once(overrides):
    rows, plan = run_mixture(overrides)
    assert plan["steps"] == 10 and {name: rows[name]["drawn"] for name in SIZES} == SIZES


def test_weights_are_shares_of_the_samples(overrides):
    rows, plan = run_mixture(overrides, *set_weights(talk_ko=5, read_en=0))
    assert plan["steps"] == 7  # the 36 records of read_en do not count
    assert [rows[name]["drawn"] for name in SIZES] == [60, 12, 12, 0]
    assert rows["talk_ko"]["asked"] == pytest.approx(5 / 7) and rows["talk_ko"]["repeats"] == 5


def test_weights_in_tokens_are_shares_of_the_tokens(overrides):
    rows, _ = run_mixture(overrides, *set_weights(), "data.weights_in=tokens")
    assert [rows[name]["asked_in"] for name in SIZES] == ["tokens"] * 4
    assert all(abs(rows[name]["tokens"] - 0.25) < 0.02 for name in SIZES)
    assert rows["talk_ko"]["drawn"] < rows["talk_en"]["drawn"]  # the answers of talk_en are short


def test_repeats_and_counts_set_the_samples_of_an_epoch(overrides):
    settings = ["data.sources.talk_ko.repeat=3", "data.sources.talk_en.count=12", "data.sources.read_en.repeat=0.5"]
    rows, plan = run_mixture(overrides, *settings, "data.global_batch_size=10")
    assert plan["steps"] == 9 and [rows[name]["drawn"] for name in SIZES] == [36, 12, 24, 18]


def test_a_fraction_is_chosen_before_anything_is_counted(overrides):
    rows, _ = run_mixture(overrides, "data.sources.talk_en.fraction=0.5", "data.sources.read_en.num_samples=6")
    assert 15 <= rows["talk_en"]["size"] <= 33 and rows["read_en"]["size"] == 6
    again, _ = run_mixture(
        overrides, "data.sources.talk_en.fraction=0.5", "data.sources.read_en.num_samples=6", "seed=3"
    )
    assert again["talk_en"]["size"] == rows["talk_en"]["size"]


def test_temperature_flattens_the_sampling_by_size(overrides):
    rows, _ = run_mixture(overrides, "data.temperature=2")
    roots = {name: size**0.5 for name, size in SIZES.items()}
    for name, root in roots.items():
        assert abs(rows[name]["samples"] - root / sum(roots.values())) < 0.01
    rows, _ = run_mixture(overrides, "data.temperature=1000000")
    assert [rows[name]["drawn"] for name in SIZES] == [30] * 4


@pytest.mark.parametrize(
    ("override", "name", "share"),
    [
        ("data.share.ko=0.75", "ko", 0.75),
        ("data.share.text_only=0.25", "text only", 0.25),
        ("data.share.kinds={ocr: 0.2}", "ocr", 0.2),
        ("data.share.kinds.ocr=0.2", "ocr", 0.2),
    ],
)
def test_shares_of_all_samples_are_met(overrides, override, name, share):
    rows, plan = run_mixture(overrides, override)
    assert rows[name]["asked"] == share and plan["steps"] == 10
    assert abs(rows[name]["samples"] - share) <= 1 / 120


def test_shares_are_met_together_and_weights_as_nearly_as_they_allow(overrides):
    settings = ["data.share.ko=0.5", "data.share.text_only=0.4", "data.share.kinds={ocr: 0.3}"]
    rows, _ = run_mixture(overrides, *set_weights(), *settings)
    assert [rows[name]["samples"] for name in ("ko", "text only", "ocr")] == pytest.approx([0.5, 0.4, 0.3], abs=0.01)


def test_a_global_batch_of_tokens_ends_with_the_sample_that_fills_it(overrides):
    overrides = [*overrides, "data.tiling=base"]
    rows, plan = run_mixture(overrides, "data.global_batch_tokens=1500")
    datamodule = build_datamodule(*overrides, "data.global_batch_tokens=1500", "trainer.max_steps=null")
    expected_plan = datamodule.make_plan(1)
    totals = {"global_batch_size": None, "global_batch_tokens": 1500}
    assert plan == {
        "steps": expected_plan.num_steps,
        "k": expected_plan.accumulate_grad_batches,
        "world_size": 1,
        **totals,
    }
    longest = int(datamodule.index.tokens.max())
    for step in range(expected_plan.num_steps):
        tokens = int(datamodule.index.tokens[expected_plan.get_samples(step)].sum())
        assert 1500 <= tokens < 1500 + longest
    assert sum(rows[name]["drawn"] for name in SIZES) >= sum(SIZES.values())


def test_max_tiles_and_prompts_apply_per_source(overrides, files, tmp_path):
    """Captions use the prompts of their source; `max_tiles` applies to its source only."""
    captions = [{"image": PHOTOS[i % 4], "caption": f"Photo {i}"} for i in range(12)]
    write_records(files / "captions.jsonl", captions)
    captions_source = {"path": str(files / "captions.jsonl"), "image_root": str(files / "images"), "format": "caption"}
    whole_source = {"path": str(files / "read_en.jsonl"), "image_root": str(files / "images")}
    choice = write_data_choice(tmp_path, sources={"captions": captions_source, "whole": whole_source})
    overrides = [
        *choice,
        "data.sources.captions.prompts=['What is it?', '뭐예요?']",
        "data.sources.captions.max_tiles=1",
    ]
    datamodule = build_datamodule(*overrides)
    plan = datamodule.make_plan(1)
    captions, whole_source = (plan.index.find_source_samples(number) for number in range(2))
    assert set(plan.index.tiles[captions].tolist()) == {2} and plan.index.tiles[whole_source].max() == 5
    prompts = {plan.index.get_record(sample).messages[0].text.strip() for sample in captions}
    assert prompts == {"What is it?", "뭐예요?"}


CONTRADICTIONS = [
    (["data.sources.talk_ko.weight=1"], ["talk_en, seen_ko, read_en", "have no weight and the others do"]),
    ([*set_weights(), "data.sources.talk_ko.repeat=2"], ["repeat and count", "weights", "talk_ko"]),
    (["data.sources.talk_ko.repeat=2", "data.sources.talk_ko.count=2"], ["data.sources.talk_ko", "repeat and count"]),
    ([*set_weights(), "data.temperature=2"], ["data.temperature", "weights"]),
    (["data.weights_in=tokens"], ["data.weights_in=tokens", "weight"]),
    ([f"data.sources.{name}.weight=0" for name in SIZES], ["every weight is 0"]),
    (["data.share.ko=1.5"], ["data.share.ko"]),
    (["data.share.kinds={ocr: 0.6, text: 0.6}"], ["data.share.kinds", "more than 1"]),
    (["data.share.kinds={orc: 0.2}"], ["no kind orc", "ocr"]),
    (["data.share.kinds={table: 0.2}"], ["data.share.kinds.table=0.2 cannot be met"]),
    (["~data.sources.talk_ko", "~data.sources.seen_ko", "data.share.ko=0.5"], ["data.share.ko=0.5 cannot be met"]),
    (["data.share.text_only=0.9", "data.share.kinds={ocr: 0.5}"], ["data.share.text_only=0.9", "data.share.kinds.ocr=0.5"]),
    (["data.sources.talk_ko.fraction=0.00001"], ["data.sources.talk_ko.fraction", "none of its 12"]),
    (["data.sources.talk_ko.count=-1"], ["data.sources.talk_ko.count"]),
    (["data.global_batch_tokens=0"], ["data.global_batch_tokens"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"), CONTRADICTIONS, ids=[overrides[-1] for overrides, _ in CONTRADICTIONS]
)
def test_contradictory_mixture_settings_are_refused_and_named(overrides, tmp_path, settings, expected):
    with pytest.raises(UserError) as caught:
        run(*overrides, "stage=sft", "run_name=never", *settings)
    text = str(caught.value)
    assert all(part in text for part in expected), text
    assert not (tmp_path / "runs" / "never" / "manifest.json").exists()


# Ready mixtures

READY = ["data=sft_ko_en", "stage=sft"]
WITHOUT_MISSING_SOURCES = ["~data.sources.aihub_144_objects", "~data.sources.aihub_81_glyphs", "~data.sources.mix665k"]


def test_a_missing_named_set_is_reported_with_how_to_obtain_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run(*READY, "run_name=never")
    text = str(caught.value)
    assert "data.sources.kollava_instruct.path=" in text and "no such file or folder" in text
    assert "How to get it: hf download tabtoyou/KoLLaVA-v1.5-Instruct-581k" in text
    assert "https://huggingface.co/datasets/tabtoyou/KoLLaVA-v1.5-Instruct-581k" in text
    assert not (tmp_path / "runs" / "never").exists()


def test_a_ready_mixture_trains_on_the_files_at_its_paths(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_zip(tmp_path / "food" / "구이.zip", [(f"구이/갈비구이/{i}.jpg", picture()) for i in range(6)], "cp949")
    overrides = [*READY, *WITHOUT_MISSING_SOURCES, f"data.sources.kollava_instruct.path={files / 'seen_ko.jsonl'}"]
    overrides += [
        f"data.sources.kollava_instruct.image_root={files / 'images'}",
        f"data.sources.aihub_79_food.path={tmp_path / 'food'}",
    ]
    manifest = run(*overrides, "data.global_batch_size=8", "callbacks=[]", "data.validation.fraction=0").manifest
    rows = {row["name"]: row for row in manifest["data"]["mixture"]}
    assert rows["kollava_instruct"]["asked"] == pytest.approx(0.35 / 0.4)
    assert (rows["kollava_instruct"]["drawn"], rows["aihub_79_food"]["drawn"]) == (21, 3)
    job = parse_sft_run(*overrides)
    found = open_sources(job.config.data, open_place(job), job.config.seed).training
    assert [source[0].messages[1].text for source in found] == ["0", "갈비구이"]
    assert found[1][0].language is Language.ko and found[1][0].kind is SampleKind.instruction


def test_labels_of_a_named_set_are_read_through_its_mapping(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {
        "image": {"identifier": "a.jpg", "imsize": [200, 100]},
        "regions": [{"boxcorners": [50, 20, 150, 80], "class": "탑", "tags": []}],
    }
    make_zip(tmp_path / "set" / "[라벨]건물.zip", [(f"h/{i}.json", label(record)) for i in range(4)], "cp949")
    make_zip(tmp_path / "set" / "[원천]건물.zip", [("h/a.jpg", picture(200, 100))], "cp949")
    others = ["kollava_instruct", "mix665k", "aihub_79_food", "aihub_81_glyphs"]
    overrides = [
        *READY,
        *(f"~data.sources.{name}" for name in others),
        f"data.sources.aihub_144_objects.path={tmp_path / 'set'}",
    ]
    manifest = run(*overrides, "callbacks=[]", "trainer.max_steps=1", "data.validation.fraction=0").manifest
    rows = {row["name"]: row["drawn"] for row in manifest["data"]["mixture"]}
    assert rows["aihub_144_objects"] == rows["grounding"] == rows["ko"] == 4
