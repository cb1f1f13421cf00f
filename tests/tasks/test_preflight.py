"""Tests of task=preflight: exit status, every problem by name, the numbers of the index, and no weights loaded."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from run_helpers import (
    TINY,
    build_data,
    make_conversations,
    make_job_stage,
    make_llava_record,
    make_turns,
    run,
    run_process,
    save_photos,
    write_data_choice,
    write_records,
)

from lit_vlm.config import parse
from lit_vlm.data.packing.mixture_lock import write_lock
from lit_vlm.tasks.build_stage import detect_device, resolve_auto_strategy
from lit_vlm.tasks.measure_model import measure_model
from lit_vlm.tasks.mixture_lock import build_mixture_lock
from lit_vlm.tasks.preflight import run_preflight
from lit_vlm.types import UserError

PREFLIGHT = [*(word for word in TINY if word != "task=train"), "task=preflight", "stage=sft", "run_name=look"]


@dataclass
class PreflightOutput:
    """Output of preflight."""

    facts: dict
    page: str
    error: str | None

    def read_findings(self, level: str) -> str:
        return "\n".join(f"{f['what']} {f['remedy']}" for f in self.facts["findings"] if f["level"] == level)

    def get_source(self, name: str) -> dict:
        return next(row for row in self.facts["sources"] if row["name"] == name)


def run_preflight_with(*overrides: str) -> PreflightOutput:
    job, error = parse([*PREFLIGHT, *overrides]), None
    try:
        run_preflight(job)
    except UserError as raised:
        error = str(raised)
    facts = json.loads((job.dir / "preflight.json").read_text(encoding="utf-8"))
    assert facts["would_run"] is (error is None)
    return PreflightOutput(facts, (job.dir / "preflight.html").read_text(encoding="utf-8"), error)


@pytest.fixture
def work_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    set_free_disk(monkeypatch, 10**13)  # for models of 7 B
    save_photos(tmp_path / "photos")
    return tmp_path


def write_five_formats(folder: Path, **data) -> list[str]:
    """Write sources in five formats and two languages. Return their overrides."""
    photo = (folder / "photos" / "china.jpg").read_bytes()
    sees = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "무엇인가요?"}]}
    says = {"role": "assistant", "content": [{"type": "text", "text": "탑입니다."}]}
    write_records(folder / "llava.json", make_conversations(24))
    write_records(folder / "messages.jsonl", [{"messages": make_turns(f"{i}?", "네, 그렇습니다.")} for i in range(20)])
    write_records(
        folder / "bytes.parquet", [{"messages": [sees, says], "images": [{"bytes": photo, "path": None}]}] * 9
    )
    write_records(folder / "sharegpt.jsonl", [make_llava_record(f"What is {i}?", f"It is {i}.") for i in range(30)])
    photos = str(folder / "photos")
    sources = {
        "llava": {"path": str(folder / "llava.json"), "image_root": photos, "weight": 4, "licence": "CC BY 4.0"},
        "messages": {"path": str(folder / "messages.jsonl"), "weight": 1},
        "bytes": {"path": str(folder / "bytes.parquet"), "weight": 1},
        "sharegpt": {"path": str(folder / "sharegpt.jsonl"), "format": "sharegpt", "weight": 2},
        "made": {"format": "builtin", "path": "grounding", "language": "ko", "num_samples": 40, "weight": 2},
    }
    return write_data_choice(folder, sources=sources, validation={"fraction": 0.1}, **data)


def write_photo_source(folder: Path, records: list, **source) -> list[str]:
    path = write_records(folder / "mine.jsonl", records)
    return write_data_choice(
        folder,
        sources={"mine": {"path": str(path), "image_root": str(folder / "photos"), **source}},
        validation={"fraction": 0.1},
    )


# ---- runs that would succeed


@pytest.mark.slow
def test_a_recipe_stage_passes_before_the_preceding_stage_was_run(tmp_path):
    """Through run.py: exit status 0, the result on the terminal, and a page."""
    overrides = ["task=preflight", "experiment=tiny/2_sft", "trainer.max_steps=20", "preflight.max_samples=20"]
    result = run_process(*overrides, cwd=tmp_path, base=[])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "would run" in result.stdout and "parts in model.*" in result.stdout
    (page,) = (tmp_path / "runs").rglob("preflight.html")
    assert "would run" in page.read_text(encoding="utf-8")
    assert not list(page.parent.glob("hf")) and not list(page.parent.glob("manifest.json"))


def test_five_formats_are_checked_without_loading_weights(work_folder, monkeypatch):
    """The numbers of the page are those of index and plan, and the model is never built."""
    overrides = write_five_formats(work_folder, share={"ko": 0.5, "text_only": 0.3})
    monkeypatch.setattr("lit_vlm.model.build.load_pretrained", fail_on_use)
    monkeypatch.setattr("lit_vlm.stages.model_init.build_model", fail_on_use)
    monkeypatch.setattr("safetensors.safe_open", fail_on_use)
    monkeypatch.setattr("torch.load", fail_on_use)
    output = run_preflight_with(*overrides, "preflight.world_size=2")
    assert output.error is None, output.read_findings("failure")

    job = parse([*PREFLIGHT, *overrides])
    data = build_data(job, job.init_from)
    data.training_data.build_indexes()
    index, held_out = data.training_data.index, data.training_data.held_out
    plan = data.training_data.make_plan(2)
    for number, source in enumerate(index.sources):
        row, training_samples, held_out_samples = (
            output.get_source(source.name),
            index.find_source_samples(number),
            held_out.find_source_samples(number),
        )
        assert (row["records"], row["usable"]) == (len(source), len(training_samples) + len(held_out_samples))
        assert row["tokens"] == int(index.tokens[training_samples].sum() + held_out.tokens[held_out_samples].sum())
        assert f"{row['tokens']:,}" in output.page and source.name in output.page
    shares = {(row["group"], row["name"]): row for row in output.facts["shares"]}
    assert shares["language", "ko"]["asked"] == 0.5
    assert shares["language", "ko"]["samples"] == pytest.approx(0.5, abs=0.1)  # of twelve samples
    assert output.facts["plan"]["k"] == plan.accumulate_grad_batches and output.facts["plan"]["steps"] == plan.num_steps
    assert output.facts["plan"]["tokens"] == int(index.tokens[plan.get_sample_sequence()].sum())
    assert output.facts["plan"]["balance_ranks"] == plan.measure_balance()["ranks"]["mean"]
    assert len(output.facts["histograms"]) == 4 and len(output.facts["samples"]) == 6
    assert "CC BY 4.0" in output.page and output.page.count("<mark>") > 6 and "data:image/" in output.page


def test_the_trained_parts_are_those_that_training_reports(work_folder):
    overrides = ["data=builtin_sft", "stage.parts.language_model.lora.rank=4", "stage.learning_rate=1e-3"]
    output = run_preflight_with(*overrides, "preflight.max_samples=8")
    trained = run(*overrides, "stage=sft", "run_name=trained", "trainer.max_steps=1", "callbacks=[]").manifest[
        "trained"
    ]
    rows = [{key: row[key] for key in ("part", "parameters", "trainable", "how")} for row in output.facts["parts"]]
    assert rows == trained
    assert output.facts["parts"][2]["learning_rate"] == 1e-3


def test_a_sample_is_scaled_up_until_there_is_an_index(work_folder):
    """Without an index, a subset is read and scaled up. With an index, all numbers come from it."""
    photos = write_photo_source(
        work_folder, [make_llava_record(f"<image>\n{i}?", "네. " * (1 + i % 5), image="china.jpg") for i in range(300)]
    )
    part = run_preflight_with(*photos, "preflight.max_samples=50", "trainer.max_steps=null")
    row = part.get_source("mine")
    assert (row["looked_at"], row["records"]) == (50, 300)
    assert "Looked at 50 of 300 records" in part.page and "~" in part.page
    steps = part.facts["plan"]["steps"]

    job = parse([*PREFLIGHT, *photos])
    build_data(job, job.init_from).training_data.build_indexes()
    whole = run_preflight_with(*photos, "preflight.max_samples=50", "trainer.max_steps=null")
    assert whole.get_source("mine")["looked_at"] == 300 and "Looked at" not in whole.page
    assert whole.get_source("mine")["tokens"] == pytest.approx(row["tokens"] * 6, rel=0.05)
    assert whole.facts["plan"]["steps"] == pytest.approx(steps, rel=0.05)


def test_pairs_show_both_answers_and_the_reference_model_counts_in_memory(work_folder):
    overrides = ["stage=dpo", "data=builtin_preference", "preflight.max_samples=30", "preflight.num_shown=2"]
    output = run_preflight_with(*overrides)
    assert output.error is None, output.read_findings("failure")
    assert [title for title, _ in output.facts["samples"][0]["segments"]] == ["chosen", "rejected"]
    assert output.facts["memory"]["rows"][0]["parts"]["reference model"] > 0
    adapted = run_preflight_with(*overrides, "stage.parts.language_model.lora.rank=4")
    assert adapted.facts["memory"]["rows"][0]["parts"]["reference model"] == 0


# ---- runs that would fail


def test_all_problems_are_reported_together_with_exit_status_1(tmp_path):
    """A missing file and records that cannot be used are both reported, through run.py, with exit status 1."""
    save_photos(tmp_path / "photos")
    good = [make_llava_record("<image>\nWhat is it?", f"A photograph {i}.", image="china.jpg") for i in range(20)]
    path = write_records(tmp_path / "mine.jsonl", [*good, make_llava_record("<image>\nq", "a", image="gone.jpg")])
    overrides = write_data_choice(
        tmp_path,
        sources={
            "mine": {"path": str(path), "image_root": str(tmp_path / "photos")},
            "lost": {"path": str(tmp_path / "lost.jsonl")},
        },
    )
    overrides += ["trainer.accelerator=gpu", "trainer.extra={}", "preflight.device=rtx4090"]
    overrides += ["data.tokens_per_micro_batch=300000000", "data.max_length=4096"]
    result = run_process(*overrides, cwd=tmp_path, base=PREFLIGHT)
    assert result.returncode == 1, result.stdout + result.stderr
    terminal = " ".join(result.stdout.split())
    assert "lost.jsonl: no such file" in terminal
    assert "mine: 1 of 21 cannot be used (1 missing), and data.on_bad_record=stop" in terminal
    assert "would fail: 2 problems" in terminal
    assert "Traceback" not in result.stderr and "would fail" in result.stderr


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["data.on_bad_record=stop"], "data.on_bad_record=stop"),
        (["data.on_bad_record=quarantine"], "data.max_quarantined=0.01"),
    ],
)
def test_bad_records_beyond_the_limit_are_a_failure(work_folder, overrides, what):
    records = [make_llava_record("<image>\nq?", f"a {i}", image="china.jpg") for i in range(10)]
    records += [
        make_llava_record("q", ""),
        make_llava_record("<image>\nq", "a", image="http://x.org/a.jpg"),
        "{",
        make_llava_record("<image><image>\nq", "a", image="china.jpg"),
    ]
    output = run_preflight_with(*write_photo_source(work_folder, records), *overrides)
    assert what in output.read_findings("failure") and "4 of 14 cannot be used" in output.read_findings("failure")
    assert output.get_source("mine")["quarantined"] == {"no_answer": 1, "url": 1, "malformed": 1, "placeholders": 1}
    assert len(output.facts["bad"]) == 4 and "mine.jsonl:11" in output.page
    assert output.error and "would fail" in output.error


def test_few_bad_records_are_a_warning(work_folder):
    records = [make_llava_record("<image>\nq?", f"a {i}", image="china.jpg") for i in range(10)] + [
        make_llava_record("q", "")
    ]
    output = run_preflight_with(
        *write_photo_source(work_folder, records), "data.on_bad_record=quarantine", "data.max_quarantined=0.1"
    )
    assert output.error is None and "1 of 11 cannot be used (1 no answer)" in output.read_findings("warning")


def write_pairs_source(folder: Path) -> list[str]:
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    return write_photo_source(folder, [pair | {"prompt": f"q{i}"} for i in range(20)], kind=None)


def test_preference_pairs_for_a_conversation_stage_are_a_failure(work_folder):
    assert "preference pairs, which stage=sft cannot use" in run_preflight_with(
        *write_pairs_source(work_folder)
    ).read_findings("failure")


def test_shares_that_cannot_be_met_are_a_failure(work_folder):
    records = [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(20)]
    output = run_preflight_with(*write_photo_source(work_folder, records), "data.share.ko=0.5")
    assert "data.share.ko=0.5 cannot be met" in output.read_findings("failure")
    assert output.facts["plan"] is None and output.facts["parts"]  # what does not depend on the plan is still reported


def test_data_without_images_for_a_stage_that_trains_the_projector_is_a_failure(work_folder):
    output = run_preflight_with(
        *write_photo_source(work_folder, [make_llava_record(f"{i}?", f"A {i}") for i in range(20)])
    )
    assert "No sample has an image" in output.read_findings("failure")


def test_memory_is_compared_for_a_gpu_only(work_folder):
    overrides = ["data=builtin_sft", "preflight.max_samples=8", "preflight.device=rtx4090", "trainer.precision=32-true"]
    shape = ["model.vision_tower=tiny", f"model.language_model={write_large_language_model(work_folder)}"]
    cpu = run_preflight_with(*overrides, *shape, "trainer.accelerator=cpu")
    assert cpu.error is None and cpu.facts["memory"]["rows"][0]["parts"]["weights"] > 28e9
    gpu = run_preflight_with(*overrides, *shape, "trainer.accelerator=gpu", "trainer.strategy=single")
    assert "and NVIDIA RTX 4090 has 24.0 GB" in gpu.read_findings("failure") and "LoRA" in gpu.read_findings("failure")
    assert "use trainer.strategy=deepspeed_zero3_offload" in gpu.read_findings("failure").replace("Use", "use")
    assert "devices would do without" in gpu.read_findings("failure")


# ---- strategies


def run_preflight_on_8_gpus(work_folder: Path, *overrides: str) -> PreflightOutput:
    """Run preflight of a 7 B model on eight H200, or as `overrides` set."""
    shape = ["model.vision_tower=tiny", f"model.language_model={write_large_language_model(work_folder)}"]
    gpu = ["trainer.accelerator=gpu", "trainer.devices=8", "trainer.precision=bf16-mixed"]
    one = {"format": "builtin", "path": "caption", "language": "ko", "num_samples": 40}
    data = write_data_choice(work_folder, sources={"made": one}, validation={"fraction": 0.1})
    return run_preflight_with(*data, "preflight.num_shown=0", *shape, *gpu, *overrides)


def test_the_chosen_strategy_is_shown_with_its_reason(work_folder):
    output = run_preflight_on_8_gpus(work_folder)
    strategy = output.facts["strategy"]
    assert (strategy["name"], strategy["asked"]) == ("fsdp2", False)
    assert "a whole copy needs" in strategy["reason"] and strategy["reason"][2:] in output.page
    rows = {row["strategy"]: row for row in output.facts["memory"]["rows"]}
    assert {"ddp", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2"} == set(rows)
    assert [row["strategy"] for row in output.facts["memory"]["rows"] if row["chosen"]] == ["fsdp2"]
    assert "of each node" in rows["deepspeed_zero3_offload"]["note"]


def test_the_chosen_activation_checkpointing_is_shown_with_its_reason(work_folder):
    output = run_preflight_on_8_gpus(work_folder)
    strategy = output.facts["strategy"]
    assert (strategy["level"], strategy["level_asked"]) == ("none", False)
    assert strategy["level_reason"] in output.page and "of NVIDIA H200" in strategy["level_reason"]
    names = [row["name"] for row in output.facts["memory"]["rows"][:3]]
    assert [name.rpartition(" ")[2] for name in names] == ["none", "selective", "full"]
    asked = run_preflight_on_8_gpus(work_folder, "stage.activation_checkpointing=full")
    assert (asked.facts["strategy"]["level"], asked.facts["strategy"]["level_asked"]) == ("full", True)
    assert asked.facts["time"]["flops"] > 1.2 * output.facts["time"]["flops"]


def test_copies_that_do_not_fit_are_a_failure_that_names_a_strategy_that_fits(work_folder):
    output = run_preflight_on_8_gpus(work_folder, "trainer.strategy=ddp")
    assert output.error and "Use trainer.strategy=fsdp2" in output.read_findings("failure")


def test_sharding_frozen_weights_is_a_warning(work_folder):
    output = run_preflight_on_8_gpus(work_folder, "stage.trainable=[projector]", "trainer.strategy=deepspeed_zero3")
    assert output.error is None, output.read_findings("failure")
    assert "nearly all of them are frozen" in output.read_findings("warning") and "trainer=ddp" in output.read_findings(
        "warning"
    )
    assert run_preflight_on_8_gpus(work_folder, "stage.trainable=[projector]").facts["strategy"]["name"] == "ddp"


def test_offloading_is_a_warning_that_names_the_number_of_devices_to_avoid_it(work_folder):
    output = run_preflight_on_8_gpus(work_folder, "trainer.devices=2", "preflight.device=l40s")
    assert output.facts["strategy"]["name"] == "deepspeed_zero3_offload" and output.error is None
    assert "4 devices would do without" in output.read_findings("warning")


def test_a_slow_network_makes_the_run_longer(work_folder):
    """The page also shows the share of time spent waiting."""
    overrides = ["trainer.num_nodes=2", "trainer.strategy=deepspeed_zero3"]
    fast, slow = (
        run_preflight_on_8_gpus(work_folder, *overrides, f"preflight.network={speed}") for speed in (3200, 48)
    )
    assert slow.facts["time"]["seconds"] > 2 * fast.facts["time"]["seconds"]
    assert slow.facts["strategy"]["outside"] == fast.facts["strategy"]["outside"] > 0
    assert "48 Gb/s per node" in slow.page and "of the time is waiting" in slow.page


def write_large_language_model(folder: Path) -> Path:
    """Write a config of Qwen2.5-7B's shape and a small tokenizer, without weights."""
    from transformers import Qwen2Config

    from lit_vlm.model.tiny import make_tokenizer

    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    config = Qwen2Config(**sizes, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
    path = folder / "large"
    config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_a_disk_that_is_too_small_is_a_failure(work_folder, monkeypatch):
    set_free_disk(monkeypatch, 1_000_000)
    output = run_preflight_with("data=builtin_sft", "preflight.max_samples=8")
    assert "The disk is too small" in output.read_findings("failure") and "1.0 MB are free" in output.read_findings(
        "failure"
    )


def test_a_lock_file_of_other_data_is_a_failure(work_folder):
    overrides = write_photo_source(
        work_folder, [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(20)]
    )
    job = parse([*PREFLIGHT, *overrides])
    data = build_data(job, job.init_from)
    data.training_data.build_indexes()
    lock = build_mixture_lock(data, data.training_data.index, job.config.data, job.config.seed)
    write_lock(work_folder / "mixture.lock", lock)
    assert run_preflight_with(*overrides, f"data.lock={work_folder / 'mixture.lock'}").error is None
    overrides = write_photo_source(
        work_folder, [make_llava_record("<image>\nWhat?", f"B {i}", image="china.jpg") for i in range(21)]
    )
    output = run_preflight_with(*overrides, f"data.lock={work_folder / 'mixture.lock'}")
    assert "mine: 20 records then, 21 now" in output.read_findings("failure")


def test_a_missing_model_folder_is_a_failure(work_folder):
    output = run_preflight_with("data=builtin_sft", f"init_from={work_folder / 'nothing'}")
    assert "nothing" in output.read_findings("failure") and output.facts["sources"] == []


def test_a_finished_run_of_the_same_name_is_reported(work_folder):
    overrides = ["data=builtin_sft", "stage=sft", "trainer.max_steps=1", "callbacks=[]"]
    run(*overrides, "run_name=look")
    assert "is finished already" in run_preflight_with(
        *overrides[:1], "trainer.max_steps=1", "callbacks=[]"
    ).read_findings("warning")
    assert "differs from this one in" in run_preflight_with(
        *overrides[:1], "trainer.max_steps=2", "callbacks=[]"
    ).read_findings("failure")


# ---- warnings and advice


def test_warnings_and_advice_are_reported(work_folder):
    records = [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(10)]
    records += [
        make_llava_record("<image>\nWhat?", "A 0", image="china.jpg"),
        make_llava_record("한글 한글?".encode().decode(), "NFD: \u1112\u1161\u11ab"),
    ]
    overrides = write_photo_source(work_folder, records, expected_records=581)
    output = run_preflight_with(
        *overrides, "data.validation.fraction=0", "trainer.max_steps=40", "preflight.world_size=8"
    )
    assert output.error is None, output.read_findings("failure")
    warnings, advice = output.read_findings("warning"), output.read_findings("advice")
    assert "mine: 12 records on disk where 581 are expected" in warnings
    assert "1 of 12 in mine" in warnings and "word for word" in warnings
    assert "No sample is held out" in warnings
    assert "mine 13.3 times" in warnings  # 40 steps of 4 samples over 12
    assert "Unicode's NFC changes the text of 1 (8.3%) in mine" in advice
    assert "A rank has 0.5 samples in a step" in advice
    assert "one optimizer step reads" not in warnings
    assert output.facts["memory"]["device"] == output.facts["time"]["device"] == "this machine's CPU"
    assert "H200" not in output.page and output.facts["time"]["devices"] == 1


def test_a_batch_of_many_passes_over_few_records_is_a_warning(work_folder):
    records = [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(2)]
    overrides = [*write_photo_source(work_folder, records), "data.global_batch_size=128", "trainer.max_steps=1"]
    warnings = run_preflight_with(*overrides, "preflight.num_shown=0").read_findings("warning")
    assert "data.global_batch_size=128: one optimizer step reads 128 samples, and there are 2 samples" in warnings
    assert "each is read 64.0 times before the weights change" in warnings


def test_overlong_samples_are_warnings(work_folder):
    records = [make_llava_record("q?", "word " * 400, *("and?", "more. " * 10)) for _ in range(3)]
    records += [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(20)]
    overrides = [
        *write_photo_source(work_folder, records),
        "data.max_length=300",
        "data.on_bad_record=quarantine",
        "data.max_quarantined=0.5",
    ]
    assert "3 overlong" in run_preflight_with(*overrides).read_findings("warning")
    short = run_preflight_with(*overrides, "data.max_length=80", "data.on_overlong=fewer_tiles")
    assert short.get_source("mine")["fewer_tiles"] > 0 and "cut into fewer tiles" in short.read_findings("warning")


def test_checkpoints_are_counted_in_disk_use(work_folder):
    """Each holds trained weights and two moments in float32: those kept, the best, and the one being written."""
    output = run_preflight_with(
        "data=builtin_sft", "preflight.max_samples=8", "checkpoint.keep_last=3", "checkpoint.keep_best=true"
    )
    rows = {row["folder"].rpartition("/")[2]: row for row in output.facts["disk"]}
    trainable = sum(row["trainable"] for row in output.facts["parts"])
    assert rows["checkpoints"]["bytes"] == 12 * trainable * 5 and "at most 5 checkpoints" in output.page
    assert rows["hf"]["bytes"] == 4 * sum(row["parameters"] for row in output.facts["parts"])


def test_nodes_of_one_device_communicate_over_the_network(work_folder):
    overrides = ["trainer.devices=1", "trainer.num_nodes=4"]
    assert run_preflight_on_8_gpus(work_folder, *overrides).facts["strategy"]["network"] == "400 Gb/s per node"
    planned = run_preflight_on_8_gpus(work_folder, "trainer.devices=1", "preflight.world_size=4")
    assert planned.facts["strategy"]["network"] == "one node"


def fail_on_use(*args, **kwargs):
    raise AssertionError("weights were read")


def resolve_strategy(job, data):
    """Return the stage and trainer settings that training uses."""
    config = job.config
    return resolve_auto_strategy(
        data.training_data,
        lambda: measure_model(data.spec, config.stage, seed=config.seed),
        stage=config.stage,
        trainer=config.trainer,
        preflight=config.preflight,
    )


def test_training_uses_the_strategy_that_preflight_chooses(work_folder, monkeypatch, capsys):
    """On GPUs, their real memory counts. Here number and memory of the GPUs are simulated."""
    shape = ["model.vision_tower=tiny", f"model.language_model={write_large_language_model(work_folder)}"]
    one = {"format": "builtin", "path": "caption", "language": "ko", "num_samples": 40}
    gpu = ["trainer.accelerator=gpu", "trainer.devices=8", "trainer.precision=bf16-mixed"]
    job = parse([*PREFLIGHT, *write_data_choice(work_folder, sources={"made": one}), *shape, *gpu])
    data = build_data(job, job.init_from)
    data.training_data.build_indexes()
    set_gpu_memory(monkeypatch, 80 * 10**9)
    stage, trainer = resolve_strategy(job, data)
    assert trainer.strategy.value == "fsdp2" and job.config.trainer.strategy.value == "auto"
    printed = " ".join(capsys.readouterr().out.split())
    assert "strategy: fsdp2: a whole copy needs" in printed
    assert stage.activation_checkpointing.value == "none"
    assert "activation checkpointing: none: a device needs about" in printed and "of the 80.0 GB of a card" in printed
    make_job_stage(replace(job, config=replace(job.config, stage=stage)), data.spec)


def test_no_reference_is_loaded_to_choose_a_strategy(work_folder, monkeypatch):
    """Each process would load it, and it can be as large as the memory of the host."""
    overrides = [
        "stage=dpo",
        "data=builtin_preference",
        "run_name=look",
        f"stage.reference={work_folder / 'reference'}",
    ]
    job = parse([*PREFLIGHT, *overrides, "trainer.accelerator=gpu", "trainer.devices=2"])
    data = build_data(job, job.init_from)
    data.training_data.build_indexes()
    set_gpu_memory(monkeypatch, 80 * 10**9)
    monkeypatch.setattr("lit_vlm.stages.dpo.load_model_spec", fail_on_use)
    monkeypatch.setattr("lit_vlm.stages.dpo.build_model", fail_on_use)
    _, trainer = resolve_strategy(job, data)
    assert trainer.strategy.value == "ddp"


def test_devices_of_slightly_different_memory_lead_to_one_choice(monkeypatch):
    config = parse([*PREFLIGHT, "data=builtin_sft", "trainer.accelerator=gpu"]).config
    memories = [
        set_gpu_memory(monkeypatch, memory)
        or detect_device(config.trainer.accelerator, config.preflight.device).memory_bytes
        for memory in (84_950_000_000, 84_930_000_000)
    ]
    assert memories == [84e9, 84e9]


def set_free_disk(monkeypatch, free: int) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("lit_vlm.reports.preflight.estimates.shutil.disk_usage", lambda path: usage)


def set_gpu_memory(monkeypatch, memory: int) -> None:
    device = type("Device", (), {"name": "a card", "total_memory": memory})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: device)
