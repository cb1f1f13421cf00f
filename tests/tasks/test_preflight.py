"""task=preflight, as a user starts it: exit status, every problem by name, the numbers of the index, and no weight read."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from run_helpers import (
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

from lit_vlm.config import parse
from lit_vlm.data.plan.lock import write_lock
from lit_vlm.tasks.preflight import run_preflight
from lit_vlm.tasks.run_lock import build_mixture_lock
from lit_vlm.tasks.stage_data import build_stage_data, open_sources
from lit_vlm.types import UserError

LOOK = [*(word for word in TINY if word != "task=train"), "task=preflight", "stage=sft", "run_name=look"]


@dataclass
class Look:
    """What preflight said."""

    facts: dict
    page: str
    error: str | None

    def told(self, level: str) -> str:
        return "\n".join(f"{f['what']} {f['remedy']}" for f in self.facts["findings"] if f["level"] == level)

    def source(self, name: str) -> dict:
        return next(row for row in self.facts["sources"] if row["name"] == name)


def look(*words: str) -> Look:
    job, error = parse([*LOOK, *words]), None
    try:
        run_preflight(job)
    except UserError as raised:
        error = str(raised)
    facts = json.loads((job.dir / "preflight.json").read_text(encoding="utf-8"))
    assert facts["would_run"] is (error is None)
    return Look(facts, (job.dir / "preflight.html").read_text(encoding="utf-8"), error)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    claim_disk(monkeypatch, 10**13)  # models of 7 B are looked at
    save_photos(tmp_path / "photos")
    return tmp_path


def five_formats(folder: Path, **data) -> list[str]:
    """Sources in five formats and two languages."""
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


def photos_source(folder: Path, records: list, **source) -> list[str]:
    path = write_records(folder / "mine.jsonl", records)
    return write_data_choice(
        folder,
        sources={"mine": {"path": str(path), "image_root": str(folder / "photos"), **source}},
        validation={"fraction": 0.1},
    )


# ---- it would run


@pytest.mark.slow
def test_a_recipe_stage_passes_before_the_preceding_stage_was_run(tmp_path):
    """Through run.py: exit status 0, verdict on the terminal, a page and its numbers."""
    words = ["task=preflight", "experiment=tiny/2_sft", "trainer.max_steps=20", "preflight.max_samples=20"]
    done = run_process(*words, cwd=tmp_path, base=[])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would run" in done.stdout and "parts in model.*" in done.stdout
    (page,) = (tmp_path / "runs").rglob("preflight.html")
    assert "would run" in page.read_text(encoding="utf-8")
    assert not list(page.parent.glob("hf")) and not list(page.parent.glob("manifest.json"))


def test_five_formats_are_checked_without_loading_weights(here, monkeypatch):
    """The page's numbers are those of index and plan, and the model is never built."""
    words = five_formats(here, share={"ko": 0.5, "text_only": 0.3})
    monkeypatch.setattr("lit_vlm.model.build._load_pretrained", forbidden)
    monkeypatch.setattr("lit_vlm.stages.start.build_model", forbidden)
    monkeypatch.setattr("safetensors.safe_open", forbidden)
    monkeypatch.setattr("torch.load", forbidden)
    seen = look(*words, "preflight.world_size=2")
    assert seen.error is None, seen.told("failure")

    job = parse([*LOOK, *words])
    data = build_stage_data(job, *open_sources(job), job.init_from)
    data.datamodule.build_indexes()
    index, held_out = data.datamodule.index, data.datamodule.held_out
    plan = data.datamodule.make_plan(2)
    for number, source in enumerate(index.sources):
        row, mine, held = (
            seen.source(source.name),
            index.find_source_samples(number),
            held_out.find_source_samples(number),
        )
        assert (row["records"], row["usable"]) == (len(source), len(mine) + len(held))
        assert row["tokens"] == int(index.tokens[mine].sum() + held_out.tokens[held].sum())
        assert f"{row['tokens']:,}" in seen.page and source.name in seen.page
    told = {(row["group"], row["name"]): row for row in seen.facts["shares"]}
    assert told["language", "ko"]["asked"] == 0.5
    assert told["language", "ko"]["samples"] == pytest.approx(0.5, abs=0.1)  # of twelve draws
    assert seen.facts["plan"]["k"] == plan.accumulate_grad_batches and seen.facts["plan"]["steps"] == plan.num_steps
    assert seen.facts["plan"]["tokens"] == int(index.tokens[plan.get_sample_sequence()].sum())
    assert seen.facts["plan"]["balance_ranks"] == plan.measure_balance()["ranks"]["mean"]
    assert len(seen.facts["histograms"]) == 4 and len(seen.facts["samples"]) == 6
    assert "CC BY 4.0" in seen.page and seen.page.count("<mark>") > 6 and "data:image/" in seen.page


def test_the_trained_parts_are_those_that_training_reports(here):
    words = ["data=builtin_sft", "stage.parts.language_model.lora.rank=4", "stage.learning_rate=1e-3"]
    seen = look(*words, "preflight.max_samples=8")
    trained = run(*words, "stage=sft", "run_name=trained", "trainer.max_steps=1", "callbacks=[]").manifest["trained"]
    rows = [{key: row[key] for key in ("part", "parameters", "trainable", "how")} for row in seen.facts["parts"]]
    assert rows == trained
    assert seen.facts["parts"][2]["learning_rate"] == 1e-3


def test_a_sample_is_scaled_up_until_there_is_an_index(here):
    """Without an index a sample is looked at and scaled up; once there is one, all of it is read from there."""
    photos = photos_source(
        here, [make_llava_record(f"<image>\n{i}?", "네. " * (1 + i % 5), image="china.jpg") for i in range(300)]
    )
    part = look(*photos, "preflight.max_samples=50", "trainer.max_steps=null")
    row = part.source("mine")
    assert (row["looked_at"], row["records"]) == (50, 300)
    assert "Looked at 50 of 300 records" in part.page and "~" in part.page
    steps = part.facts["plan"]["steps"]

    job = parse([*LOOK, *photos])
    build_stage_data(job, *open_sources(job), job.init_from).datamodule.build_indexes()
    whole = look(*photos, "preflight.max_samples=50", "trainer.max_steps=null")
    assert whole.source("mine")["looked_at"] == 300 and "Looked at" not in whole.page
    assert whole.source("mine")["tokens"] == pytest.approx(row["tokens"] * 6, rel=0.05)
    assert whole.facts["plan"]["steps"] == pytest.approx(steps, rel=0.05)


def test_pairs_show_both_answers_and_the_reference_model_counts_in_memory(here):
    words = ["stage=dpo", "data=builtin_preference", "preflight.max_samples=30", "preflight.num_shown=2"]
    seen = look(*words)
    assert seen.error is None, seen.told("failure")
    assert [title for title, _ in seen.facts["samples"][0]["segments"]] == ["chosen", "rejected"]
    assert seen.facts["memory"]["rows"][0]["parts"]["reference model"] > 0
    adapted = look(*words, "stage.parts.language_model.lora.rank=4")
    assert adapted.facts["memory"]["rows"][0]["parts"]["reference model"] == 0


# ---- it would fail


def test_all_problems_are_reported_together_with_exit_status_1(tmp_path):
    """A missing file, records that cannot be used, and too little memory: all three, through run.py, exit status 1."""
    save_photos(tmp_path / "photos")
    good = [make_llava_record("<image>\nWhat is it?", f"A photograph {i}.", image="china.jpg") for i in range(20)]
    path = write_records(tmp_path / "mine.jsonl", [*good, make_llava_record("<image>\nq", "a", image="gone.jpg")])
    words = write_data_choice(
        tmp_path,
        sources={
            "mine": {"path": str(path), "image_root": str(tmp_path / "photos")},
            "lost": {"path": str(tmp_path / "lost.jsonl")},
        },
    )
    words += ["trainer.accelerator=gpu", "trainer.extra={}", "preflight.device=rtx4090"]
    words += ["data.tokens_per_micro_batch=300000000", "data.max_length=4096"]
    done = run_process(*words, cwd=tmp_path, base=LOOK)
    assert done.returncode == 1, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "lost.jsonl: no such file" in said
    assert "mine: 1 of 21 cannot be used (1 missing), and data.on_bad_record=stop" in said
    assert "would fail: 2 problems" in said
    assert "Traceback" not in done.stderr and "would fail" in done.stderr


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["data.on_bad_record=stop"], "data.on_bad_record=stop"),
        (["data.on_bad_record=quarantine"], "data.max_quarantined=0.01"),
    ],
)
def test_bad_records_beyond_the_limit_are_a_failure(here, words, what):
    records = [make_llava_record("<image>\nq?", f"a {i}", image="china.jpg") for i in range(10)]
    records += [
        make_llava_record("q", ""),
        make_llava_record("<image>\nq", "a", image="http://x.org/a.jpg"),
        "{",
        make_llava_record("<image><image>\nq", "a", image="china.jpg"),
    ]
    seen = look(*photos_source(here, records), *words)
    assert what in seen.told("failure") and "4 of 14 cannot be used" in seen.told("failure")
    assert seen.source("mine")["quarantined"] == {"no_answer": 1, "url": 1, "malformed": 1, "placeholders": 1}
    assert len(seen.facts["bad"]) == 4 and "mine.jsonl:11" in seen.page
    assert seen.error and "would fail" in seen.error


def test_few_bad_records_are_a_warning(here):
    records = [make_llava_record("<image>\nq?", f"a {i}", image="china.jpg") for i in range(10)] + [
        make_llava_record("q", "")
    ]
    seen = look(*photos_source(here, records), "data.on_bad_record=quarantine", "data.max_quarantined=0.1")
    assert seen.error is None and "1 of 11 cannot be used (1 no answer)" in seen.told("warning")


def pairs(folder: Path) -> list[str]:
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    return photos_source(folder, [pair | {"prompt": f"q{i}"} for i in range(20)], kind=None)


def test_preference_pairs_for_a_conversation_stage_are_a_failure(here):
    assert "preference pairs, which stage=sft cannot use" in look(*pairs(here)).told("failure")


def test_shares_that_cannot_be_met_are_a_failure(here):
    records = [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(20)]
    seen = look(*photos_source(here, records), "data.share.ko=0.5")
    assert "data.share.ko=0.5 cannot be met" in seen.told("failure")
    assert seen.facts["plan"] is None and seen.facts["parts"]  # what does not hang on it is still told


def test_data_without_images_for_a_stage_that_trains_the_projector_is_a_failure(here):
    seen = look(*photos_source(here, [make_llava_record(f"{i}?", f"A {i}") for i in range(20)]))
    assert "No sample has an image" in seen.told("failure")


def test_memory_is_compared_for_a_gpu_only(here):
    words = ["data=builtin_sft", "preflight.max_samples=8", "preflight.device=rtx4090", "trainer.precision=32-true"]
    shape = ["model.vision_tower=tiny", f"model.language_model={large_language_model(here)}"]
    cpu = look(*words, *shape, "trainer.accelerator=cpu")
    assert cpu.error is None and cpu.facts["memory"]["rows"][0]["parts"]["weights"] > 28e9
    gpu = look(*words, *shape, "trainer.accelerator=gpu", "trainer.strategy=single")
    assert "and NVIDIA RTX 4090 has 24.0 GB" in gpu.told("failure") and "LoRA" in gpu.told("failure")
    assert "use trainer.strategy=deepspeed_zero3_offload" in gpu.told("failure").replace("Use", "use")
    assert "devices would do without" in gpu.told("failure")


# ---- how the devices share the work


def shared(here: Path, *words: str) -> Look:
    """A model of 7 B on eight H200 or more."""
    shape = ["model.vision_tower=tiny", f"model.language_model={large_language_model(here)}"]
    gpu = ["trainer.accelerator=gpu", "trainer.devices=8", "trainer.precision=bf16-mixed"]
    one = {"format": "builtin", "path": "caption", "language": "ko", "num_samples": 40}
    data = write_data_choice(here, sources={"made": one}, validation={"fraction": 0.1})
    return look(*data, "preflight.num_shown=0", *shape, *gpu, *words)


def test_the_chosen_strategy_is_shown_with_its_reason(here):
    seen = shared(here)
    strategy = seen.facts["strategy"]
    assert (strategy["name"], strategy["asked"]) == ("fsdp2", False)
    assert "a whole copy needs" in strategy["reason"] and strategy["reason"][2:] in seen.page
    rows = {row["strategy"]: row for row in seen.facts["memory"]["rows"]}
    assert {"ddp", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2"} == set(rows)
    assert [row["strategy"] for row in seen.facts["memory"]["rows"] if row["chosen"]] == ["fsdp2"]
    assert "of each node" in rows["deepspeed_zero3_offload"]["note"]


def test_the_chosen_activation_checkpointing_is_shown_with_its_reason(here):
    seen = shared(here)
    strategy = seen.facts["strategy"]
    assert (strategy["level"], strategy["level_asked"]) == ("none", False)
    assert strategy["level_reason"] in seen.page and "of NVIDIA H200" in strategy["level_reason"]
    names = [row["name"] for row in seen.facts["memory"]["rows"][:3]]
    assert [name.rpartition(" ")[2] for name in names] == ["none", "selective", "full"]
    asked = shared(here, "stage.activation_checkpointing=full")
    assert (asked.facts["strategy"]["level"], asked.facts["strategy"]["level_asked"]) == ("full", True)
    assert asked.facts["time"]["flops"] > 1.2 * seen.facts["time"]["flops"]


def test_copies_that_do_not_fit_are_a_failure_that_names_a_strategy_that_fits(here):
    seen = shared(here, "trainer.strategy=ddp")
    assert seen.error and "Use trainer.strategy=fsdp2" in seen.told("failure")


def test_sharding_frozen_weights_is_a_warning(here):
    seen = shared(here, "stage.trainable=[projector]", "trainer.strategy=deepspeed_zero3")
    assert seen.error is None, seen.told("failure")
    assert "nearly all of them are frozen" in seen.told("warning") and "trainer=ddp" in seen.told("warning")
    assert shared(here, "stage.trainable=[projector]").facts["strategy"]["name"] == "ddp"


def test_offloading_is_a_warning_that_names_the_number_of_devices_to_avoid_it(here):
    seen = shared(here, "trainer.devices=2", "preflight.device=l40s")
    assert seen.facts["strategy"]["name"] == "deepspeed_zero3_offload" and seen.error is None
    assert "4 devices would do without" in seen.told("warning")


def test_a_slow_network_makes_the_run_longer(here):
    """And the page says how much of the time is waiting."""
    words = ["trainer.num_nodes=2", "trainer.strategy=deepspeed_zero3"]
    fast, slow = (shared(here, *words, f"preflight.network={speed}") for speed in (3200, 48))
    assert slow.facts["time"]["seconds"] > 2 * fast.facts["time"]["seconds"]
    assert slow.facts["strategy"]["outside"] == fast.facts["strategy"]["outside"] > 0
    assert "48 Gb/s per node" in slow.page and "of the time is waiting" in slow.page


def large_language_model(folder: Path) -> Path:
    """Qwen2.5-7B's shape and a small tokenizer; no weights."""
    from transformers import Qwen2Config

    from lit_vlm.model.tiny import make_tokenizer

    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    config = Qwen2Config(**sizes, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
    path = folder / "large"
    config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_a_disk_that_is_too_small_is_a_failure(here, monkeypatch):
    claim_disk(monkeypatch, 1_000_000)
    seen = look("data=builtin_sft", "preflight.max_samples=8")
    assert "The disk is too small" in seen.told("failure") and "1.0 MB are free" in seen.told("failure")


def test_a_lock_file_of_other_data_is_a_failure(here):
    words = photos_source(here, [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(20)])
    job = parse([*LOOK, *words])
    data = build_stage_data(job, *open_sources(job), job.init_from)
    data.datamodule.build_indexes()
    write_lock(here / "mixture.lock", build_mixture_lock(data))
    assert look(*words, f"data.lock={here / 'mixture.lock'}").error is None
    words = photos_source(here, [make_llava_record("<image>\nWhat?", f"B {i}", image="china.jpg") for i in range(21)])
    seen = look(*words, f"data.lock={here / 'mixture.lock'}")
    assert "mine: 20 records then, 21 now" in seen.told("failure")


def test_a_missing_model_folder_is_a_failure(here):
    seen = look("data=builtin_sft", f"init_from={here / 'nothing'}")
    assert "nothing" in seen.told("failure") and seen.facts["sources"] == []


def test_a_finished_run_of_the_same_name_is_reported(here):
    words = ["data=builtin_sft", "stage=sft", "trainer.max_steps=1", "callbacks=[]"]
    run(*words, "run_name=look")
    assert "is finished already" in look(*words[:1], "trainer.max_steps=1", "callbacks=[]").told("warning")
    assert "differs from this one in" in look(*words[:1], "trainer.max_steps=2", "callbacks=[]").told("failure")


# ---- warnings and advice


def test_warnings_and_advice_are_reported(here):
    records = [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(10)]
    records += [
        make_llava_record("<image>\nWhat?", "A 0", image="china.jpg"),
        make_llava_record("한글 한글?".encode().decode(), "NFD: \u1112\u1161\u11ab"),
    ]
    words = photos_source(here, records, expected_records=581)
    seen = look(*words, "data.validation.fraction=0", "trainer.max_steps=40", "preflight.world_size=8")
    assert seen.error is None, seen.told("failure")
    warnings, advice = seen.told("warning"), seen.told("advice")
    assert "mine: 12 records on disk where 581 are expected" in warnings
    assert "1 of 12 in mine" in warnings and "word for word" in warnings
    assert "No sample is held out" in warnings
    assert "mine 13.3 times" in warnings  # 40 steps of 4 samples over 12
    assert "Unicode's NFC changes the text of 1 (8.3%) in mine" in advice
    assert "A rank has 0.5 samples in a step" in advice


def test_overlong_samples_are_warnings(here):
    records = [make_llava_record("q?", "word " * 400, *("and?", "more. " * 10)) for _ in range(3)]
    records += [make_llava_record("<image>\nWhat?", f"A {i}", image="china.jpg") for i in range(20)]
    words = [
        *photos_source(here, records),
        "data.max_length=300",
        "data.on_bad_record=quarantine",
        "data.max_quarantined=0.5",
    ]
    assert "3 overlong" in look(*words).told("warning")
    short = look(*words, "data.max_length=80", "data.on_overlong=fewer_tiles")
    assert short.source("mine")["fewer_tiles"] > 0 and "cut into fewer tiles" in short.told("warning")


def test_checkpoints_are_counted_in_disk_use(here):
    """What trains and two moments, in float32: those that are kept, the best, and the one that is being written."""
    seen = look("data=builtin_sft", "preflight.max_samples=8", "checkpoint.keep_last=3", "checkpoint.keep_best=true")
    rows = {row["folder"].rpartition("/")[2]: row for row in seen.facts["disk"]}
    trainable = sum(row["trainable"] for row in seen.facts["parts"])
    assert rows["checkpoints"]["bytes"] == 12 * trainable * 5 and "at most 5 checkpoints" in seen.page
    assert rows["hf"]["bytes"] == 4 * sum(row["parameters"] for row in seen.facts["parts"])


def test_nodes_of_one_device_communicate_over_the_network(here):
    words = ["trainer.devices=1", "trainer.num_nodes=4"]
    assert shared(here, *words).facts["strategy"]["network"] == "400 Gb/s per node"
    planned = shared(here, "trainer.devices=1", "preflight.world_size=4")
    assert planned.facts["strategy"]["network"] == "one node"


def forbidden(*args, **kwargs):
    raise AssertionError("weights were read")


def test_training_uses_the_strategy_that_preflight_chooses(here, monkeypatch, capsys):
    """On GPUs, by their real memory; here their number and memory are claimed."""
    from lit_vlm.tasks.strategy import resolve_auto_strategy
    from lit_vlm.tasks.train import make_stage

    shape = ["model.vision_tower=tiny", f"model.language_model={large_language_model(here)}"]
    one = {"format": "builtin", "path": "caption", "language": "ko", "num_samples": 40}
    gpu = ["trainer.accelerator=gpu", "trainer.devices=8", "trainer.precision=bf16-mixed"]
    job = parse([*LOOK, *write_data_choice(here, sources={"made": one}), *shape, *gpu])
    data = build_stage_data(job, *open_sources(job), job.init_from)
    data.datamodule.build_indexes()
    claim_card(monkeypatch, 80 * 10**9)
    settled = resolve_auto_strategy(data, lambda: make_stage(data.spec, job.config))
    assert settled.trainer.strategy.value == "fsdp2" and job.config.trainer.strategy.value == "auto"
    told = " ".join(capsys.readouterr().out.split())
    assert "strategy: fsdp2: a whole copy needs" in told
    assert settled.stage.activation_checkpointing.value == "none"
    assert "activation checkpointing: none: a device needs about" in told and "of the 80 GB of a card" in told
    make_stage(data.spec, settled)


def test_no_reference_is_loaded_to_choose_a_strategy(here, monkeypatch):
    """It is in each process, and may be as large as the host's memory."""
    from lit_vlm.tasks.strategy import resolve_auto_strategy
    from lit_vlm.tasks.train import make_stage

    own = ["stage=dpo", "data=builtin_preference", "run_name=look", f"stage.reference={here / 'reference'}"]
    job = parse([*LOOK, *own, "trainer.accelerator=gpu", "trainer.devices=2"])
    data = build_stage_data(job, *open_sources(job), job.init_from)
    data.datamodule.build_indexes()
    claim_card(monkeypatch, 80 * 10**9)
    monkeypatch.setattr("lit_vlm.stages.dpo.load_model_spec", forbidden)
    monkeypatch.setattr("lit_vlm.stages.dpo.build_model", forbidden)
    assert resolve_auto_strategy(data, lambda: make_stage(data.spec, job.config)).trainer.strategy.value == "ddp"


def test_devices_of_slightly_different_memory_lead_to_one_choice(monkeypatch):
    from lit_vlm.tasks.strategy import detect_device

    config = parse([*LOOK, "data=builtin_sft", "trainer.accelerator=gpu"]).config
    seen = [
        claim_card(monkeypatch, memory) or detect_device(config).memory_bytes
        for memory in (84_950_000_000, 84_930_000_000)
    ]
    assert seen == [84e9, 84e9]


def claim_disk(monkeypatch, free: int) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("lit_vlm.engine.preflight.model.shutil.disk_usage", lambda path: usage)


def claim_card(monkeypatch, memory: int) -> None:
    there = type("Device", (), {"name": "a card", "total_memory": memory})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: there)
