"""Stages of image-text pairs as a user runs them: recipes, exported folders, interrupted runs, ranks, wrong input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_helpers import RUN, save_photos, write_data_choice
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)
from waiting import PATIENCE

from callbacks.samples import score_answer
from lit_vlm.config import ConfigError, parse
from lit_vlm.data.pair_data import PairBatches, PairProcessor
from lit_vlm.evaluation.retrieval import evaluate_retrieval
from lit_vlm.model.qformer.build import load_blip2
from lit_vlm.model.qformer.generation import generate_captions
from lit_vlm.stages.caption_pairs import BlipStage, RepresentStage, RetrievalStage
from lit_vlm.tasks import TASKS
from lit_vlm.tasks.export import export
from lit_vlm.types import SampleKind, UserError

SMALL = [
    "data.num_workers=0",
    "data.global_batch_size=8",
    "trainer.max_steps=6",
    "trainer.log_every_n_steps=1",
    *(f"data.sources.caption_{name}.num_samples=40" for name in ("ko", "en")),
    *(f"data.validation.sources.caption_{name}.num_samples=6" for name in ("ko", "en")),
]
REPRESENT = ["experiment=tiny_blip2/1_represent", *SMALL, "stage.num_queries=4", "stage.num_candidates=3"]
PRETRAIN = ["experiment=tiny_blip/1_pretrain", *SMALL, "stage.queue_size=32", "stage.num_candidates=3"]
RETRIEVAL = ["experiment=tiny_blip/2_retrieval", *SMALL, "stage.queue_size=32", "stage.num_candidates=3"]
GENERATE = ["experiment=tiny_blip2/2_generate", *SMALL]


def run(folder: Path, *overrides: str) -> Path:
    """Run a command line in this process; return the run folder."""
    job = parse([*overrides, f"run_dir={folder}"])
    TASKS[job.config.task](job)
    return job.dir


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_column(folder: Path, name: str) -> list[str]:
    return [row[name] for row in read_rows(folder) if row[name]]


def require_equal_weights(left: Path, right: Path) -> None:
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def first(root) -> Path:
    return run(root, *REPRESENT)


@pytest.fixture(scope="module")
def second(root, first) -> Path:
    return run(root, *GENERATE, f"init_from={first / 'hf'}")


# ---- what a run leaves


def test_the_first_stage_leaves_a_folder_with_the_recalls_that_it_logged(first):
    figures = json.loads((first / "manifest.json").read_text(encoding="utf-8"))["figures"]
    model, tokenizer = load_blip2(first / "hf")
    held_out = parse([*REPRESENT]).config.data.validation.sources
    from lit_vlm.data.index.build import build_index
    from lit_vlm.data.sources import open_source

    sources = [
        open_source(name, source, max_image_pixels=10**6, seed=0, held_out=True, cache=None)
        for name, source in held_out.items()
    ]
    from functools import partial

    from lit_vlm.model.qformer.build import tokenize_captions

    processor = PairProcessor(tokenizer, partial(tokenize_captions, tokenizer, max_tokens=12), 56)
    batches = PairBatches(processor, build_index(sources, processor), [range(12)])
    found = evaluate_retrieval(model.eval(), [batches[0]], num_candidates=3)
    logged = {name.removeprefix("val/"): value for name, value in figures.items() if name.startswith("val/")}
    assert logged == pytest.approx(found) and len(found) == 12
    loaded, report = Blip2ForImageTextRetrieval.from_pretrained(first / "hf", output_loading_info=True)
    assert not report["missing_keys"] and type(loaded) is Blip2ForImageTextRetrieval


def test_the_report_shows_recalls_and_samples_per_second(first):
    page = (first / "report.html").read_text(encoding="utf-8")
    assert "Retrieval among the held-out pairs" in page and "re-ranked by matching" in page and "R@10" in page
    figures = json.loads((first / "manifest.json").read_text(encoding="utf-8"))["figures"]
    assert figures["samples"] == 48 and figures["tokens"] > 48 * 3 and figures["steps"] == 6


def test_the_second_stage_leaves_the_captions_of_transformers(first, second):
    model = Blip2ForConditionalGeneration.from_pretrained(second / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(second / "hf")
    rows = [json.loads(line) for line in (second / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    after = [row for row in rows if row["phase"] == "after"]
    assert {row["language"] for row in after} == {"ko", "en"} and {row["phase"] for row in rows} == {"before", "after"}
    from PIL import Image
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from lit_vlm.data.caption_pairs import load_pixels

    pixels = load_pixels(Image.open(second / after[0]["images"][0]), 56)
    values = (
        torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]
    ) / torch.tensor(OPENAI_CLIP_STD)[:, None, None]
    (caption,) = generate_captions(model, tokenizer, values[None])
    assert caption == after[0]["prediction"]
    figures = json.loads((second / "manifest.json").read_text(encoding="utf-8"))["figures"]
    assert figures["val/loss"] > 0 and {"chrf", "rouge_l"} <= figures["text_scores"]["after"].keys()
    frozen = load_file(first / "hf" / "model.safetensors")["vision_model.encoder.layers.0.self_attn.qkv.weight"]
    name = "vision_model.encoder.layers.0.self_attn.qkv.weight"
    assert torch.equal(load_file(second / "hf" / "model.safetensors")[name], frozen)


def test_a_stage_continues_from_a_folder_of_its_own_kind(root, first, second):
    again = run(root, *REPRESENT, f"init_from={first / 'hf'}", "stage.text_encoder=null", "trainer.max_steps=1")
    assert float(read_column(again, "train/loss")[0]) < float(read_column(first, "train/loss")[0])
    again = run(root, *GENERATE, f"init_from={second / 'hf'}", "trainer.max_steps=1")
    assert float(read_column(again, "train/loss")[0]) < float(read_column(second, "train/loss")[0])


@pytest.fixture(scope="module")
def blip(root) -> Path:
    return run(root, *PRETRAIN)


def test_blips_pretraining_leaves_a_retrieval_model_and_a_captioner(blip):
    for kind, folder in (
        (BlipForImageTextRetrieval, blip / "hf"),
        (BlipForConditionalGeneration, blip / "hf" / "captions"),
    ):
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and type(model) is kind
        assert {"[DEC]", "[ENC]"} <= AutoTokenizer.from_pretrained(folder).get_vocab().keys()
    figures = json.loads((blip / "manifest.json").read_text(encoding="utf-8"))["figures"]
    assert len([name for name in figures if name.startswith("val/")]) == 12


def test_the_fine_tuning_starts_from_the_pretraining_and_leaves_folders_of_transformers(root, blip):
    captions = run(root, "experiment=tiny_blip/2_caption", *SMALL, f"init_from={blip / 'hf'}")
    model, report = BlipForConditionalGeneration.from_pretrained(captions / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    rows = [json.loads(line) for line in (captions / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not any(row["prediction"].startswith("a picture of") for row in rows)
    config = parse(["experiment=tiny_blip/2_caption"])
    assert config.init_from == str(Path("runs/tiny_blip/1_pretrain/hf").absolute())
    config = parse(["experiment=tiny_blip/2_retrieval"])  # not the fine-tuning for captions, which has the same number
    assert config.init_from == str(Path("runs/tiny_blip/1_pretrain/hf").absolute())
    with pytest.raises(UserError, match="holds no captioner. Give the folder of a BlipForConditionalGeneration"):
        copy = root / "retrieval"
        BlipForImageTextRetrieval.from_pretrained(blip / "hf").save_pretrained(copy)
        run(root, "task=preflight", "experiment=tiny_blip/2_caption", *SMALL, f"init_from={copy}")
    with pytest.raises(
        UserError, match="holds BlipForConditionalGeneration. Give the folder of a BlipForImageTextRetrieval"
    ):
        run(root, "task=preflight", *RETRIEVAL, f"init_from={captions / 'hf'}")


def test_an_interrupted_fine_tuning_resumes_with_the_ids_of_its_queue(root, blip, tmp_path, monkeypatch):
    start = f"init_from={blip / 'hf'}"
    whole = run(root, *RETRIEVAL, start)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, RetrievalStage, 5)
        run(tmp_path, *RETRIEVAL, start, "checkpoint.every_steps=2")
    folder = run(tmp_path, *RETRIEVAL, start, "checkpoint.every_steps=2")
    require_equal_weights(folder / "hf", whole / "hf")
    assert read_column(folder, "train/itc") == read_column(whole, "train/itc")
    assert not any("itg" in name for name in read_rows(whole)[0])


# ---- interrupted runs


class StoppedError(Exception):
    pass


def interrupt(monkeypatch, stage: type, step: int) -> None:
    """Make a stage fail before a step, as a crash of the process would."""
    original = stage.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            raise StoppedError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(stage, "training_step", training_step)


def test_an_interrupted_run_resumes_to_the_weights_and_losses_of_an_uninterrupted_one(first, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, RepresentStage, 5)
        run(tmp_path, *REPRESENT, "checkpoint.every_steps=2")
    folder = run(tmp_path, *REPRESENT, "checkpoint.every_steps=2")
    assert folder.name == first.name
    require_equal_weights(folder / "hf", first / "hf")
    for name in ("train/loss", "train/itm", "val/text_to_image_r5", "val/reranked_image_to_text_r1"):
        assert read_column(folder, name) == read_column(first, name)


def test_an_interrupted_pretraining_resumes_with_its_queue_and_momentum_encoders(blip, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, BlipStage, 5)
        run(tmp_path, *PRETRAIN, "checkpoint.every_steps=2")
    folder = run(tmp_path, *PRETRAIN, "checkpoint.every_steps=2")
    require_equal_weights(folder / "hf", blip / "hf")
    require_equal_weights(folder / "hf" / "captions", blip / "hf" / "captions")
    # the queue and the momentum encoders of steps 1 to 4 decide these losses
    assert read_column(folder, "train/itc") == read_column(blip, "train/itc")


def test_a_finished_run_stays_as_it_is(root, first, capsys):
    before = (first / "hf" / "model.safetensors").stat().st_mtime_ns
    run(root, *REPRESENT)
    assert "finished already" in capsys.readouterr().out
    assert (first / "hf" / "model.safetensors").stat().st_mtime_ns == before


def test_an_export_from_the_last_checkpoint_is_the_folder_that_the_run_would_have_left(first, tmp_path):
    folder = run(tmp_path, *REPRESENT, "export=false")
    assert not (folder / "hf").exists()
    export(parse(["task=export", f"init_from={folder}", f"run_dir={tmp_path}"]))
    require_equal_weights(folder / "hf", first / "hf")


@pytest.mark.slow
def test_two_ranks_begin_with_the_contrast_of_one(first, tmp_path):
    ranks = [
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.precision=32-true",
        "trainer.num_threads=1",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(RUN), *REPRESENT, *ranks, f"run_dir={tmp_path}"]
    subprocess.run(command, check=True, timeout=PATIENCE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = tmp_path / first.relative_to(first.parents[1])
    # the tiny parts have no dropout; the negatives of matching are sampled on each rank, so later steps differ
    one, two = (float(read_column(path, "train/itc")[0]) for path in (first, folder))
    assert two == pytest.approx(one, rel=1e-4)
    assert float(read_column(folder, "train/itg")[0]) == pytest.approx(
        float(read_column(first, "train/itg")[0]), rel=0.1
    )
    assert len(read_column(folder, "val/reranked_text_to_image_r1")) == 1


def test_sweeps_jobs_and_the_list_of_runs_know_these_stages(root, first, tmp_path, capsys):
    sweep = tmp_path / "sweep.yaml"
    text = "method: grid\nmetric: {name: NAME, goal: maximize}\nparameters:\n  stage.learning_rate: {values: [0.001, 0.002]}\n"
    sweep.write_text(text.replace("NAME", "val/reranked_text_to_image_r5"), encoding="utf-8")
    run(root, "task=sweep", f"sweep={sweep}", *REPRESENT, "trials.dry_run=true")
    assert "grid, 2 trials, by val/reranked_text_to_image_r5" in capsys.readouterr().out
    sweep.write_text(text.replace("NAME", "val/loss"), encoding="utf-8")
    with pytest.raises(
        UserError, match="val/loss is not logged: these trials train represent, which logs val/image_to_text_r1"
    ):
        run(root, "task=sweep", f"sweep={sweep}", *REPRESENT, "trials.dry_run=true")
    run(tmp_path, "task=submit", *REPRESENT, "submit.dry_run=true")
    assert "experiment=tiny_blip2/1_represent" in capsys.readouterr().out
    run(root, "task=runs")
    assert "represent: " in capsys.readouterr().out


# ---- wrong input

WRONG_SETTINGS = {
    ("experiment=tiny_blip/1_pretrain", "data.global_batch_size=0"): "data.global_batch_size: must be above 0, found 0",
    (
        "experiment=tiny_blip/1_pretrain",
        "trainer.devices=0",
    ): "trainer.devices: must be above 0 and at most 4096, found 0",
    (
        "experiment=tiny_blip/1_pretrain",
        "stage.queue_size=1000",
    ): "1,000 entries cannot be filled with whole steps of 64 pairs",
    ("experiment=tiny_blip/1_pretrain", "init_from=owner/blip"): "stage=blip_pretrain starts from parts",
    (
        "experiment=tiny_blip/1_pretrain",
        "data.global_batch_size=2",
        "trainer.devices=2",
    ): "2 devices need at least 4 pairs",
    (
        "experiment=tiny_blip2/1_represent",
        "stage.text_encoder=null",
    ): "stage.text_encoder is not set: give a BERT-like model",
    ("experiment=tiny_blip2/1_represent", "data.global_batch_size=1"): "matching needs a negative for each pair",
    ("experiment=tiny_blip2/1_represent", "trainer.devices=3"): "64 pairs cannot be divided among 3 devices",
    (
        "experiment=tiny_blip2/1_represent",
        "trainer.extra.accumulate_grad_batches=2",
    ): "a step is never split into micro-batches",
    (
        "experiment=tiny_blip2/1_represent",
        "stage.parts.projector.learning_rate=1",
    ): "stage.parts: has no effect with stage=represent",
    ("experiment=tiny_blip2/1_represent", "data.tiling=base"): "data.tiling: has no effect with stage=represent",
    (
        "experiment=tiny_blip2/1_represent",
        "evaluate.exam_items=5",
    ): "evaluate.exam_items: has no effect with stage=represent",
    ("experiment=tiny_blip2/1_represent", "model.grid=2"): "model.grid: has no effect with stage=represent",
    ("experiment=tiny_blip2/1_represent", "stage.num_queries=0"): "stage.num_queries: must be above 0, found 0",
    (
        "experiment=tiny_blip2/1_represent",
        "checkpoint.keep_best=true",
    ): "checkpoint.best_metric: stage=represent logs val/image_to_text_r1",
    (
        "experiment=tiny_blip2/2_generate",
        "init_from=null",
    ): "init_from is not set: stage=generate starts from the model",
    ("experiment=tiny_blip2/2_generate", "model.language_model=google/flan-t5-xl"): "Flan-T5 is not there",
    (
        "experiment=tiny_blip2/1_represent",
        "task=prepare",
    ): "task=prepare is not there for stage=represent: task=preflight reads",
    ("experiment=tiny_blip2/1_represent", "task=view"): "task=view is not there for stage=represent",
}


@pytest.mark.parametrize(("overrides", "message"), WRONG_SETTINGS.items(), ids=lambda value: "")
def test_a_wrong_setting_is_refused_with_its_reason(overrides, message):
    with pytest.raises(ConfigError) as error:
        parse(list(overrides))
    assert message in str(error.value)


def preflight(folder: Path, *overrides: str) -> None:
    run(folder, "task=preflight", *REPRESENT, *overrides)


def test_preflight_counts_records_and_says_that_the_stage_can_train(root, first, capsys):
    preflight(root)
    shown = capsys.readouterr().out
    assert "6 steps of 8 pairs, 7 others for each pair to compare with, on 1 rank; 12 pairs held out" in shown
    assert "can train" in shown


def test_preflight_and_training_refuse_parts_and_data_that_do_not_fit(root, first, second, tmp_path):
    with pytest.raises(UserError, match=r"data.global_batch_size=100: the sources have 80 usable pairs"):
        preflight(root, "data.global_batch_size=100")
    with pytest.raises(UserError, match=r"stage.max_text_tokens=100: .* has 64 positions"):
        preflight(root, "stage.max_text_tokens=100")
    with pytest.raises(
        UserError, match=r"stage.image_size=112: the vision tower of tiny has positions for images of 56"
    ):
        preflight(root, "stage.image_size=112")
    language_model = next((root / "parts").glob("tiny_qwen2*"))
    with pytest.raises(
        UserError, match="its model type is qwen2, and the text layers of BLIP and BLIP-2 are those of BERT"
    ):
        preflight(root, f"stage.text_encoder={language_model}")
    with pytest.raises(UserError, match="its model type is qwen2, and blip-2 is needed"):
        preflight(root, f"model.vision_tower={language_model}")
    with pytest.raises(UserError, match="its model type is qwen2, and blip-2 is needed"):
        run(root, "task=preflight", *GENERATE, f"init_from={language_model}")


def test_texts_that_the_tokenizer_does_not_know_are_refused_by_the_name_of_their_source(root, first, tmp_path):
    photos = save_photos(tmp_path / "photos")
    rows = [{"image": name.name, "text": "Ünïçödé ẞtraße Ωmega жизнь"} for name in sorted(photos.iterdir())] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"format": "caption", "path": str(tmp_path / "rows.jsonl"), "image_root": str(photos)}
    source["columns"] = {"image": "image", "caption": "text"}
    choice = write_data_choice(tmp_path, sources={"foreign": source})
    overrides = [text for text in REPRESENT if not text.startswith("data.")]
    with pytest.raises(
        UserError, match=r"data.sources.foreign: \d+% of the tokens of its texts are unknown to the tokenizer"
    ):
        run(root, "task=preflight", *choice, *overrides, "data.global_batch_size=2", "data.num_workers=0")


def write_coco(folder: Path) -> tuple[Path, list[str]]:
    """Write four photographs with two captions each, as COCO's file; return the folder of the pictures and their names."""
    photos = save_photos(folder / "photos")
    names = sorted(path.name for path in photos.iterdir())
    labels = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": 10 * number + again, "image_id": number, "caption": f"a photograph {number} {again}"}
            for number in range(len(names))
            for again in range(2)
        ],
    }
    (folder / "captions_train2014.json").write_text(json.dumps(labels), encoding="utf-8")
    return photos, names


def test_cocos_captions_are_several_texts_of_an_image(root, blip, tmp_path, capsys):
    photos, _ = write_coco(tmp_path)
    source = {"format": "coco", "path": str(tmp_path / "captions_train2014.json"), "image_root": str(photos)}
    choice = write_data_choice(tmp_path, sources={"coco": source})
    overrides = [text for text in RETRIEVAL if not text.startswith("data.")]
    start = [f"init_from={blip / 'hf'}", "data.global_batch_size=4", "data.num_workers=0"]
    run(root, "task=preflight", *choice, *overrides, *start)
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 different images; pairs of one image are no negatives of each other" in shown and "can train" in shown


def test_a_caption_has_all_texts_of_its_image_as_references(root, blip, tmp_path):
    photos, _ = write_coco(tmp_path)
    source = {"format": "coco", "path": str(tmp_path / "captions_train2014.json"), "image_root": str(photos)}
    choice = write_data_choice(tmp_path, sources={"coco": source}, validation={"sources": {"coco": source}})
    options = ["data.global_batch_size=4", "data.num_workers=0", "trainer.max_steps=1", f"init_from={blip / 'hf'}"]
    folder = run(tmp_path, *choice, "experiment=tiny_blip/2_caption", *options)
    figures = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["figures"]
    assert figures["num_scored"] == {"caption_en": 4}  # of eight captions
    answer = score_answer(
        SimpleNamespace(messages=[SimpleNamespace(text="one")], kind=SampleKind.caption), "two", ["two"]
    )
    assert answer.score == 1.0 and answer.text_scores["chrf"] == 1.0


def test_a_picture_that_is_lost_while_training_is_entered_and_the_run_goes_on_with_whole_steps(root, blip, tmp_path):
    photos, names = write_coco(tmp_path)
    source = {"format": "coco", "path": str(tmp_path / "captions_train2014.json"), "image_root": str(photos)}
    choice = write_data_choice(tmp_path, sources={"coco": source})
    overrides = [text for text in RETRIEVAL if not text.startswith("data.")]
    options = ["data.global_batch_size=4", "data.num_workers=0", "stage.queue_size=16", f"init_from={blip / 'hf'}"]
    options += ["data.on_bad_record=quarantine", "data.max_quarantined=0.5", "data.validation.fraction=0"]
    run(tmp_path, "task=preflight", *choice, *overrides, *options)
    (photos / names[0]).unlink()  # after it was indexed
    folder = run(tmp_path, *choice, *overrides, *options)
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["source"] for row in rows} == {"coco"} and 1 <= len(rows) <= 2
    figures = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["figures"]
    assert figures["samples"] == 24 and (folder / "hf" / "model.safetensors").is_file()


def test_a_record_that_is_no_pair_is_set_aside_before_training(root, first, tmp_path):
    source = {"format": "builtin", "num_samples": 20}
    choice = write_data_choice(
        tmp_path, sources={"captions": source | {"path": "caption"}, "texts": source | {"path": "text"}}
    )
    overrides = [text for text in REPRESENT if not text.startswith("data.")]
    with pytest.raises(UserError, match="it has 0 images; a caption belongs to one"):
        run(root, "task=preflight", *choice, *overrides, "data.global_batch_size=2", "data.num_workers=0")
