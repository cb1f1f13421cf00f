"""Tests of overlong samples that are shortened: batches match the plan, and packed losses match single samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mixture_cases import parse_sft_run, read_json_lines
from run_helpers import (
    PHOTOS,
    build_data,
    make_job_stage,
    make_llava_record,
    run,
    save_photos,
    write_data_choice,
    write_records,
)

from lit_vlm.data.collate import collate
from lit_vlm.data.micro_batches import TrainMicroBatches
from run import dispatch

CAPS = ["data.max_length=90", "data.tokens_per_micro_batch=220", "data.global_batch_size=6", "trainer.max_steps=4"]


@pytest.fixture
def work_folder(tmp_path, monkeypatch) -> Path:
    """Folder with records of one and several images, long conversations with and without images, and short records."""
    monkeypatch.chdir(tmp_path)
    save_photos(tmp_path / "images")
    talk = [text for turn in range(5) for text in (f"Question {turn} of many?", f"Answer {turn}, at some length.")]
    seen = [make_llava_record("<image>\nWhat is it?", f"A photograph {i}.", image=PHOTOS[i % 4]) for i in range(8)]
    seen += [make_llava_record("<image><image>\nBoth?", f"{i}", image=[PHOTOS[0], PHOTOS[1]]) for i in range(2)]
    write_records(tmp_path / "seen.jsonl", seen)
    talks = [make_llava_record(*talk[: 2 * (2 + i % 4)]) for i in range(8)]
    talks += [
        make_llava_record("<image>\nWhat?", "It.", *talk, "<image>\nAnd that?", "That.", image=[PHOTOS[0], PHOTOS[2]])
        for _ in range(2)
    ]
    write_records(tmp_path / "talks.jsonl", talks)
    return tmp_path


@pytest.fixture
def overrides(work_folder) -> list[str]:
    sources = {
        name: {"path": f"{work_folder / name}.jsonl", "image_root": str(work_folder / "images")}
        for name in ("seen", "talks")
    }
    quarantine = ["data.on_bad_record=quarantine", "data.max_quarantined=1"]
    return [*write_data_choice(work_folder, sources=sources, validation={"fraction": 0}), *CAPS, *quarantine]


def build_stage_and_data(*overrides: str):
    """Return (stage with its model, data module) of a run, in float64 so that the order of sums does not matter."""
    job = parse_sft_run(*overrides)
    data = build_data(job)
    stage = make_job_stage(job, data.spec)
    stage.configure_model()
    return stage.double().eval(), data.training_data


def test_each_policy_shortens_the_samples_that_it_can(overrides):
    fitted = {}
    for policy in ("quarantine", "fewer_tiles", "cut_turn"):
        _, datamodule = build_stage_and_data(*overrides, f"data.on_overlong={policy}")
        datamodule.build_indexes()
        fitted[policy] = dict(datamodule.index.length_policy_counts)
        index = datamodule.index
        assert index.tokens.max() <= 90 and len(index) + len(index.errors) == 20
        assert sum(fitted[policy].values()) == sum(fitted["quarantine"].values())
    assert fitted["fewer_tiles"]["seen", "fewer_tiles"] >= 4 and fitted["cut_turn"]["talks", "cut_turn"] >= 4
    assert set(fitted["quarantine"]) == {("seen", "quarantine"), ("talks", "quarantine")}


@pytest.mark.parametrize("policy", ["fewer_tiles", "cut_turn"])
def test_step_totals_match_the_batches_and_packed_losses_match_single_samples(overrides, policy):
    stage, datamodule = build_stage_and_data(*overrides, f"data.on_overlong={policy}")
    plan = datamodule.make_plan(2)
    index, processor = plan.index, datamodule.processor
    shortened = np.flatnonzero((index.most_tiles >= 0) | (index.turns >= 0))
    assert set(shortened.tolist()) & set(plan.get_sample_sequence().tolist())
    ranks = [TrainMicroBatches(processor, plan, rank) for rank in range(2)]
    for number in range(plan.num_steps):
        batches = [
            rank[number * plan.accumulate_grad_batches + micro]
            for micro in range(plan.accumulate_grad_batches)
            for rank in ranks
        ]
        step = plan.get_step(number)
        assert {batch.step_supervised_tokens for batch in batches} == {step.num_supervised}
        assert sum(batch.num_supervised_tokens for batch in batches) == step.num_supervised
        assert sum(batch.num_tiles for batch in batches) == step.num_tiles == batches[0].step_tiles
        assert all(batch.num_tokens <= 220 for batch in batches)
        with torch.no_grad():
            packed = sum(float(stage.compute_token_losses(batch).sum()) for batch in batches if not batch.dummy)
            alone = [collate(processor, [index.get_record(sample)]) for pack in step.packs for sample in pack]
            single = sum(float(stage.compute_token_losses(batch).sum()) for batch in alone)
        assert packed == pytest.approx(single, rel=1e-5)


@pytest.mark.parametrize("policy", ["fewer_tiles", "cut_turn"])
def test_a_run_trains_on_them_and_counts_the_rest(overrides, policy):
    run_output = run(*overrides, "stage=sft", f"data.on_overlong={policy}", "data.global_batch_size=4")
    data = run_output.manifest["data"]
    assert run_output.manifest["status"] == "finished" and np.isfinite(run_output.read_column("train/loss")).all()
    assert data["num_samples"] + sum(data["quarantined"].values()) == 20
    assert len(read_json_lines(run_output.dir / "quarantine.jsonl")) == sum(data["quarantined"].values())
    assert set(data["quarantined"]) <= {"talks"} if policy == "fewer_tiles" else {"seen"} <= set(data["quarantined"])


def test_max_tiles_of_a_source_reaches_the_model_and_the_model_answers(overrides, work_folder, capsys):
    overrides = [
        *overrides,
        "data.max_length=null",
        "data.tokens_per_micro_batch=2000",
        "data.sources.seen.max_tiles=1",
    ]
    stage, datamodule = build_stage_and_data(*overrides)
    plan = datamodule.make_plan(1)
    batch = TrainMicroBatches(datamodule.processor, plan, 0)[0]
    capped = [
        layout for layout, source in zip(batch.layouts, list_layout_sources(plan, 0), strict=True) if source == "seen"
    ]
    assert capped and all(layout.num_tiles <= 2 for layout in capped)
    assert sum(layout.num_tiles for layout in batch.layouts) == batch.num_tiles
    assert sum(layout.num_tokens for layout in batch.layouts) == int(
        (batch.input_ids == datamodule.processor.image_token_id).sum()
    )
    with torch.no_grad():
        assert torch.isfinite(stage.compute_token_losses(batch)).all()
    run_output = run(*overrides, "stage=sft")
    capsys.readouterr()
    chat_overrides = [
        f"image={work_folder / 'images' / 'china.jpg'}",
        "prompt=What is it?",
        "max_new_tokens=4",
        "trainer=cpu",
    ]
    dispatch(["task=chat", f"init_from={run_output.hf}", *chat_overrides])
    assert capsys.readouterr().out.endswith("\n")


def list_layout_sources(plan, step: int) -> list[str]:
    """Return the source of each image of the step's only pack, in its order."""
    (pack,) = plan.get_step(step).packs
    return [
        plan.index.sources[plan.index.source_ids[sample]].name
        for sample in pack
        for _ in range(plan.index.images[sample])
    ]
