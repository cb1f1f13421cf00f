"""Tests of real input: the formats of the README, on photographs, through the commands that a user types."""

import json
import math

import pytest
import torch
from run_helpers import (
    PHOTOS,
    TINY,
    make_conversations,
    make_llava_record,
    make_turns,
    run,
    run_process,
    save_photos,
    write_data_choice,
    write_records,
)
from support import blueprint_of
from transformers import AutoModelForImageTextToText

from lit_vlm.anyres import Tiling
from lit_vlm.data.processor import Processor


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """Folder of a user: photographs in images/, data files, and one runs/ for the module."""
    folder = tmp_path_factory.mktemp("user")
    save_photos(folder / "images")
    write_records(folder / "train.json", make_conversations())
    write_records(folder / "train.jsonl", make_conversations())
    write_records(folder / "pairs.jsonl", make_pairs())
    return folder


@pytest.fixture(autouse=True)
def current_folder(user_folder, monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.chdir(user_folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def make_pairs():
    """Return pairs with TRL's columns as text and as messages and LLaVA-NeXT's keys, with and without a photograph."""
    return [
        {
            "prompt": "<image>\nWhat is it?",
            "chosen": "A temple.",
            "rejected": "A cat, I think.",
            "images": ["china.jpg"],
        },
        {
            "prompt": "무슨 꽃인가요?",
            "chosen": "달리아",
            "rejected": "모르겠습니다.",
            "image": "flower.png",
        },  # LLaVA-NeXT's key
        {
            "prompt": make_turns("Say yes."),
            "chosen": make_turns("x", "Yes.")[1:],
            "rejected": make_turns("x", "No.")[1:],
        },
        {"chosen": make_turns("안녕?", "안녕하세요."), "rejected": make_turns("안녕?", "싫어요.")},
        {
            "id": "a",
            "prompt": "Who?",
            "answer": "",
            "chosen": "An astronaut.",
            "rejected": "Nobody.",
            "image": "astronaut.jpg",
        },
        {"prompt": "<image>\n무엇인가요?", "chosen": "고양이", "rejected": "개", "images": ["고양이.png"]},
    ]


LLAVA = ["stage=sft", "data=llava_json", "data.sources.mine.path=train.json", "data.sources.mine.image_root=images"]


def check_run(run_output, num_samples, steps=3):
    """Check that the run is finished, its counts are right, its losses finite, and its model loads in transformers."""
    manifest = run_output.manifest
    assert manifest["status"] == "finished"
    assert manifest["data"]["num_samples"] + manifest["data"]["num_held_out"] == num_samples
    assert manifest["plan"]["steps"] == steps
    losses = run_output.read_column("train/loss")
    assert losses and all(map(math.isfinite, losses))
    model = AutoModelForImageTextToText.from_pretrained(run_output.hf)
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (run_output.dir / "report.html").stat().st_size > 1000
    return manifest


def list_sources(manifest) -> list[str]:
    return [row["name"] for row in manifest["data"]["mixture"] if row["group"] == "source"]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava_files_on_photographs_train(name):
    manifest = check_run(run(*LLAVA, f"data.sources.mine.path={name}"), 12)
    rows = manifest["data"]["mixture"]
    assert (rows[0]["name"], rows[0]["size"], rows[0]["drawn"], rows[0]["samples"]) == ("mine", 12, 12, 1.0)
    assert sum(row["drawn"] for row in rows if row["group"] == "language") == 12


def test_the_command_of_the_readme_exits_with_status_0_and_prints_the_model_folder(user_folder):
    result = run_process(*LLAVA, "run_name=readme", "data.num_workers=1", cwd=user_folder)
    assert result.returncode == 0, result.stderr
    assert "12 samples, 0 held out; 3 steps of 4 samples in 1 micro-batch on 1 rank" in result.stdout
    assert f"Model: {user_folder / 'runs' / 'readme' / 'hf'}" in result.stdout
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr, result.stderr


def read_image_bytes(user_folder, name):
    return (user_folder / "images" / name).read_bytes()


@pytest.mark.parametrize("form", ["paths.jsonl", "bytes.parquet", "paths.parquet"])
def test_messages_with_images_as_paths_and_as_bytes_train(user_folder, form):
    records = []
    for i, name in enumerate(PHOTOS * 2):
        question = [
            {"type": "image", "text": None},
            {"type": "text", "text": "설명해 주세요." if i % 2 else "Describe it."},
        ]
        answer = [{"type": "text", "text": "사진" if i % 2 else "A photograph"}]
        image = {"bytes": read_image_bytes(user_folder, name), "path": None} if form.startswith("bytes") else name
        records.append(
            {
                "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                "images": [image],
            }
        )
    if form.endswith("jsonl"):
        records.append({"messages": make_turns("No picture?", "None."), "images": []})
        records[0]["messages"][0]["content"][0].pop("text")
    write_records(user_folder / form, records)
    overrides = ["stage=sft", "data=messages", f"data.sources.mine.path={form}"]
    check_run(
        run(*overrides, *([] if form.startswith("bytes") else ["data.sources.mine.image_root=images"])), len(records)
    )


def test_the_stages_follow_each_other_on_photographs(user_folder):
    """align, sft, highres with tiles of real photographs, dpo: each starts from the model of the preceding one."""
    align = run(*LLAVA, "stage=align", "data.tiling=base", "run_name=chain/align")
    before = [f"init_from={align.hf}", "run_name=chain/sft"]
    sft = run(*LLAVA, *before, "data.tiling=base")
    highres = run(*LLAVA, "stage=highres", f"init_from={sft.hf}", "run_name=chain/highres")
    assert highres.manifest["parent"] == {"path": str(sft.hf), "digest": sft.manifest["weights_digest"]}
    dpo = run(
        *("stage=dpo", "data=preference", "data.sources.mine.path=pairs.jsonl", "data.sources.mine.image_root=images"),
        *(f"init_from={highres.hf}", "run_name=chain/dpo", "trainer.log_every_n_steps=1", "stage.learning_rate=1e-3"),
    )
    manifest = check_run(dpo, 6)
    assert "preference" in [row["name"] for row in manifest["data"]["mixture"]]
    assert dpo.read_column("train/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert dpo.read_column("train/loss")[-1] < math.log(2)
    trained = {row["part"]: row["trainable"] for row in manifest["trained"]}
    assert trained["language_model"] > 0 == trained["vision_tower"] == trained["projector"]
    dpo_weights, parent_weights = dpo.load_weights(), highres.load_weights()
    changed = {key for key in parent_weights if not torch.equal(dpo_weights[key], parent_weights[key])}
    assert changed and not any("vision_tower" in key or "projector" in key for key in changed)


def test_a_photograph_of_640_by_427_is_split_into_tiles(user_folder, parts):
    from lit_vlm.config.choices import Format
    from lit_vlm.config.schema import SourceConfig
    from lit_vlm.data.sources import open_source

    settings = SourceConfig(
        path=str(user_folder / "pairs.jsonl"), image_root=str(user_folder / "images"), format=Format.preference
    )
    record = open_source("mine", settings, max_image_pixels=10**7)[0]
    counts = {}
    for tiling in (Tiling.base, Tiling.anyres):
        blueprint = blueprint_of(parts, tiling, grid=2, max_tiles=4)
        processor = Processor(blueprint.tokenizer, blueprint.images)
        counts[tiling] = processor.compute_cost(record).num_tiles
        assert [len(stack) for stack in processor.load_tiles(record)] == [counts[tiling]]
    assert counts == {Tiling.base: 1, Tiling.anyres: 5}  # 2 x 2 and the whole image


MINE = {"path": "train.json", "image_root": "images", "format": "llava"}


def test_two_sources_are_mixed_by_their_weights(tmp_path):
    digits = {"format": "digits", "num_samples": 30, "language": "ko", "weight": 1.0}
    choice = write_data_choice(tmp_path, sources={"photos": MINE | {"weight": 3.0}, "digits": digits})
    run_output = run(*choice, "stage=sft", "trainer.max_steps=5", "data.global_batch_size=8")
    rows = {row["name"]: row for row in check_run(run_output, 42, steps=5)["data"]["mixture"]}
    assert rows["photos"]["asked"] == 0.75 and rows["digits"]["asked"] == 0.25
    assert (rows["photos"]["drawn"], rows["digits"]["drawn"]) == (30, 10)
    assert (rows["photos"]["size"], rows["digits"]["size"]) == (12, 30)
    assert rows["digit"]["drawn"] == 10


def test_without_weights_sources_are_mixed_by_their_sizes(tmp_path):
    choice = write_data_choice(tmp_path, sources={"photos": MINE, "digits": {"format": "digits", "num_samples": 36}})
    run_output = run(*choice, "stage=sft", "trainer.max_steps=5", "data.global_batch_size=8")
    rows = {row["name"]: row for row in check_run(run_output, 48, steps=5)["data"]["mixture"]}
    assert (rows["photos"]["drawn"], rows["digits"]["drawn"]) == (10, 30)


def test_validation_sources_are_scored_and_never_trained_on(user_folder, tmp_path):
    write_records(user_folder / "held.jsonl", make_conversations(5))
    choice = write_data_choice(
        tmp_path, sources={"mine": MINE}, validation={"sources": {"held": MINE | {"path": "held.jsonl"}}}
    )
    run_output = run(*choice, "stage=sft", "data.validation.every_steps=2", "data.validation.max_samples=1")
    manifest = check_run(run_output, 17)
    assert (manifest["data"]["num_samples"], manifest["data"]["num_held_out"]) == (12, 5)
    assert list_sources(manifest) == ["mine"]
    figures = manifest["figures"]
    assert {"val/loss", "val/loss_ko", "val/loss_en"} <= figures.keys()
    assert set(figures["num_scored"].values()) == {1}  # data.validation.max_samples, of each kind and language
    assert len(run_output.read_column("val/loss")) == 1
    sample_rows = [
        json.loads(line) for line in (run_output.dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {row["source"] for row in sample_rows} == {"held"} and {row["phase"] for row in sample_rows} == {
        "before",
        "after",
    }


def test_a_fraction_is_held_out_of_each_source(user_folder):
    manifest = check_run(run(*LLAVA, "data.validation.fraction=0.25", "data.validation.max_samples=1"), 12)
    assert (manifest["data"]["num_samples"], manifest["data"]["num_held_out"]) == (9, 3)
    assert math.isfinite(manifest["figures"]["val/loss"])


def test_digits_train_in_both_languages_end_to_end():
    overrides = [
        "stage=sft",
        "data=digits",
        "data.sources.digits_ko.num_samples=40",
        "data.sources.digits_en.num_samples=40",
    ]
    run_output = run(*overrides, "data.validation.max_samples=2", "data.tiling=base")
    manifest = check_run(run_output, 80 + 2 * 297)
    # Digits of the test half
    assert (manifest["data"]["num_samples"], manifest["data"]["num_held_out"]) == (
        80,
        2 * 297,
    )
    assert list_sources(manifest) == ["digits_ko", "digits_en"]
    assert set(manifest["figures"]["num_scored"]) == {"digit_ko", "digit_en"}


def test_lora_trains_adapters_and_exports_a_plain_model(user_folder):
    run_output = run(*LLAVA, "stage.parts.language_model.lora.rank=4", "stage.learning_rate=1e-2")
    manifest = check_run(run_output, 12)
    row = next(row for row in manifest["trained"] if row["part"] == "language_model")
    assert row["how"].startswith("LoRA rank 4") and 0 < row["trainable"] < row["parameters"] / 10
    assert not any("lora" in key for key in run_output.load_weights())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_trains_with_clipped_gradients(precision):
    overrides = [*LLAVA, "trainer.log_every_n_steps=1", "stage.learning_rate=1e-3", "trainer.gradient_clip_val=0.5"]
    run_output, exact = run(*overrides, f"trainer.precision={precision}"), run(*overrides)
    check_run(run_output, 12)
    assert run_output.read_column("train/loss") == pytest.approx(exact.read_column("train/loss"), rel=0.05)
    stored = {tensor.dtype for tensor in run_output.load_weights().values()}
    assert stored == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


@pytest.mark.parametrize(("stage", "level"), [("align", "true"), ("sft", "selective")])
def test_activation_checkpointing_changes_no_weight(stage, level):
    overrides = [*LLAVA, f"stage={stage}", "stage.learning_rate=1e-3"]
    plain = run(*overrides)
    checkpointed = run(*overrides, f"stage.activation_checkpointing={level}", f"run_name={stage}_{level}")
    check_run(checkpointed, 12)
    checkpointed_weights = checkpointed.load_weights()
    assert all(
        torch.allclose(tensor, checkpointed_weights[key], atol=1e-6) for key, tensor in plain.load_weights().items()
    )


@pytest.mark.parametrize(("debug", "steps", "samples"), [("fast", 4, 12), ("overfit", 3, 4), ("profile", 3, 12)])
def test_each_debug_mode_exports_a_model(debug, steps, samples):
    run_output = run(*LLAVA, f"debug={debug}")
    check_run(run_output, samples, steps)
    if debug == "profile":
        assert "Where a step's time goes" in (run_output.dir / "profile.html").read_text(encoding="utf-8")


def test_wandb_offline_writes_inside_the_run_folder_only(user_folder, tmp_path):
    import wandb

    before = {path.name for path in user_folder.iterdir()}
    run_output = run(*LLAVA, "logger=wandb", "logger.offline=true", f"run_dir={tmp_path / 'runs'}", "run_name=w/b")
    wandb.finish()
    assert {path.name for path in user_folder.iterdir()} == before
    (folder,) = (tmp_path / "runs" / "w" / "b" / "wandb").glob("offline-run-*")
    run_id = run_output.manifest["tracking"]["wandb"]["id"]
    assert folder.name.endswith(f"-{run_id}") and (folder / f"run-{run_id}.wandb").is_file()


def test_a_single_record_can_be_trained_on(user_folder):
    write_records(user_folder / "one.jsonl", [make_llava_record("<image>\nWhat?", "China.", image="china.jpg")])
    check_run(run(*LLAVA, "data.sources.mine.path=one.jsonl"), 1)


OWN_SOURCE = """
class Photos:
    def __init__(self, name, config):
        self.digest = "version 1"

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index > 9:
            raise RuntimeError("no such photo")
        return {"image": "china.jpg", "question": f"What is it, {index}?", "answer": "A temple."}


class Fails(Photos):
    def __getitem__(self, index):
        raise RuntimeError("no server")
"""


def test_a_source_of_an_own_class_is_checked_trained_on_and_locked_as_others(user_folder, monkeypatch, capsys):
    from lit_vlm.data.packing.mixture_lock import read_lock
    from lit_vlm.types import UserError
    from run import dispatch

    (user_folder / "my_photos.py").write_text(OWN_SOURCE)
    monkeypatch.syspath_prepend(str(user_folder))
    own = ["stage=sft", "data=auto", "data.sources.mine.format=my_photos.Photos", "data.sources.mine.path=images"]
    dispatch([*TINY, *own, "task=preflight", "run_name=own_preflight"])
    assert "would run" in capsys.readouterr().out
    done = run(*own, "trainer.max_steps=1", "run_name=own")
    assert done.manifest["status"] == "finished" and (done.dir / "report.html").is_file()
    locked = read_lock(done.dir / "mixture.lock")["sources"]["mine"]
    assert (locked["format"], locked["records"]) == ("my_photos.Photos", 8)
    with pytest.raises(UserError, match=r"mine\[\d\]: my_photos.Fails raised RuntimeError: no server"):
        run(*own, "data.sources.mine.format=my_photos.Fails", "run_name=own_fails")
    assert not (user_folder / "runs" / "own_fails" / "checkpoints").exists()
