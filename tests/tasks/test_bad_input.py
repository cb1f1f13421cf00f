"""Tests of bad input: each error ends the run with one message that names place and remedy, and damages nothing."""

import json
import sys
from io import BytesIO

import pytest
import torch
from PIL import Image
from run_helpers import (
    PHOTOS,
    TINY,
    RunOutput,
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
from lit_vlm.tasks.train import train
from lit_vlm.types import UserError
from run import dispatch

LLAVA = ["stage=sft", "data=llava_json", "data.sources.mine.path=train.jsonl", "data.sources.mine.image_root=images"]
ASK = "<image>\nWhat is it?"

_events: list[str] | None = None


def _record_connections(event, args):
    if _events is not None and event == "socket.connect":
        _events.append(event)


sys.addaudithook(_record_connections)  # cannot be removed, hence the switch


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """Folder of a user with images and a file of records."""
    folder = tmp_path_factory.mktemp("user")
    save_photos(folder / "images")
    write_records(folder / "train.jsonl", make_conversations())
    Image.new("RGB", (8, 8)).save(folder / "outside.png")
    photo = (folder / "images" / "china.jpg").read_bytes()
    (folder / "images" / "truncated.jpg").write_bytes(photo[: len(photo) // 2])
    (folder / "images" / "text.jpg").write_text("no image")
    (folder / "images" / "bomb.png").write_bytes(make_decompression_bomb())
    return folder


@pytest.fixture(autouse=True)
def current_folder(user_folder, monkeypatch):
    monkeypatch.chdir(user_folder)


@pytest.fixture(scope="module")
def finished_run(user_folder):
    """A finished run, `run_name=kept`, that no error may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(user_folder)
        return run(*LLAVA, "run_name=kept")


def make_decompression_bomb() -> bytes:
    """Return a PNG of some hundred bytes that claims 30,000 x 30,000 pixels."""
    import struct
    import zlib

    stream = BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def read_error(*overrides: str) -> str:
    """Return the message with which `python run.py <overrides>` is refused."""
    with pytest.raises(UserError) as caught:
        dispatch([*TINY, *overrides])
    return str(caught.value)


def read_error_and_check_run(run_output: RunOutput, *overrides: str) -> str:
    """Return the message of an error with run_name=kept overwrite=true, and check that the finished run is unchanged.

    A list of bad records may be added to its folder.
    """
    before = run_output.take_snapshot()
    text = read_error(*overrides, "run_name=kept", "overwrite=true")
    (run_output.dir / "bad_records.jsonl").unlink(missing_ok=True)
    assert run_output.take_snapshot() == before
    assert run_output.manifest["status"] == "finished"
    return text


# Settings

SETTINGS = [
    (["stage.learning_rat=1"], ["stage.learning_rat", "stage.learning_rate"]),
    (["data.sources.mine.pth=x"], ["data.sources.mine.pth", "path"]),
    (["trainer.max_steps=many"], ["trainer.max_steps: expected a whole number", "many"]),
    (["stage.learning_rate=fast"], ["stage.learning_rate: expected a number, found 'fast'"]),
    (["trainer.max_steps=0"], ["trainer.max_steps: must be above 0, found 0"]),
    (["stage=stf"], ["stage=stf", "sft"]),
    (["model=huge"], ["model=huge", "tiny"]),
    (["data.tiling=anyress"], ["data.tiling", "anyress", "anyres"]),
    (["trainer.precision=bf16"], ["trainer.precision", "bf16-mixed"]),
    (["data.sources.mine.kind=captoin"], ["data.sources.mine.kind", "caption"]),
    (["trainer.extra.benchmrk=true"], ["benchmrk", "benchmark"]),
    (["trainer.extra.accumulate_grad_batches=4"], ["accumulate_grad_batches", "data.global_batch_size"]),
    (["callbacks=[sample]"], ["callbacks", "sample", "samples"]),
    (["callbacks=[no.such.Class]"], ["callbacks: no.such.Class cannot be imported"]),
    (["data.sources.mine.path=nowhere.jsonl"], ["data.sources.mine.path=", "nowhere.jsonl: no such file or folder"]),
    (["data.sources.mine.path=trian.jsonl"], ["no such file or folder. Did you mean train.jsonl?"]),
    (["data.sources.mine.image_root=imags"], ["data.sources.mine.image_root=", "Did you mean images?"]),
    (["trainer.accelerator=gpu"], ["Lightning refuses the trainer's settings", "trainer=cpu"]),
    (["trainer.strategy=ddq"], ["trainer.strategy: expected one of auto, single, ddp", "Did you mean ddp?"]),
    (["model.vision_tower=/no/where"], ["model.vision_tower=/no/where: no such folder"]),
    (["init_from=/no/where/hf"], ["init_from=/no/where/hf", "does not exist", "python run.py"]),
    (["init_from=previous"], ["init_from=previous: no experiment= is named"]),
    (["stage=dpo"], ["data.sources: mine", "stage=dpo needs them; choose data=preference"]),
    (["stage.parts.language_model.lora.rank=2", "stage.parts.language_model.lora.targets=[qproj]"], ["lora.targets: qproj", "q_proj"]),
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the accelerator that is not there")
@pytest.mark.parametrize(("overrides", "expected"), SETTINGS, ids=[overrides[0] for overrides, _ in SETTINGS])
def test_an_error_in_the_settings_is_named_and_changes_nothing(finished_run, overrides, expected):
    text = read_error_and_check_run(finished_run, *LLAVA, *overrides)
    assert all(part in text for part in expected), text
    assert len(text) < 900


def test_all_errors_are_reported_together_without_a_traceback_and_with_status_1(user_folder):
    result = run_process(*LLAVA, "stage.learning_rat=1", "trainer.max_steps=many", "model=huge", cwd=user_folder)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert all(
        word in result.stderr for word in ("3 mistakes", "stage.learning_rat", "trainer.max_steps", "model=huge")
    )


# Files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "bad.json",
            '[{"conversations": []},\n {"a": }]',
            ["bad.json: not a JSON list of records", "line 2, column 8", "Repair the file"],
        ),
        ("empty.json", "[]", ["empty.json: no records in it"]),
        ("empty.jsonl", "", ["empty.jsonl: no records in it"]),
        ("bad.parquet", "PAR1", ["bad.parquet: cannot be read as parquet", "Repair or replace it"]),
        ("bad.txt", "x", ["bad.txt: cannot tell the format", ".jsonl"]),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_run(user_folder, finished_run, name, content, expected):
    (user_folder / name).write_text(content, encoding="utf-8")
    for policy in ("stop", "quarantine"):  # a whole file is never quarantined
        text = read_error_and_check_run(
            finished_run, *LLAVA, f"data.sources.mine.path={name}", f"data.on_bad_record={policy}"
        )
        assert all(part in text for part in expected), text


# Records: name -> (record, part of the message)
LONG = "아주 긴 대답입니다. " * 60
RECORDS = {
    "not JSON": ('{"conversations": [', "not JSON at column 20"),
    "missing image": (make_llava_record(ASK, "a", image="none.jpg"), "image 'none.jpg' not found in"),
    "no image file": (make_llava_record(ASK, "a", image="text.jpg"), "image 'text.jpg' is no JPEG, PNG"),
    "bomb": (
        make_llava_record(ASK, "a", image="bomb.png"),
        "image 'bomb.png' is larger than data.max_image_pixels=64000000 allows: Image size (900000000",
    ),
    "outside": (make_llava_record(ASK, "a", image="../outside.png"), "image '../outside.png' leads out of"),
    "absolute": (make_llava_record(ASK, "a", image="/etc/passwd"), "image '/etc/passwd' leads out of"),
    "URL": (
        make_llava_record(ASK, "a", image="http://127.0.0.1:9/a.png"),
        "is an URL; URLs are never fetched while training",
    ),
    "two for one": (make_llava_record("<image><image>\nq", "a", image="china.jpg"), "2 image placeholders but 1 image"),
    "none for one": (make_llava_record("q", "a", image="china.jpg"), "0 image placeholders but 1 image"),
    "no answer": (make_llava_record("q", ""), "message 2, the assistant's, is empty"),
    "nobody answers": (make_llava_record("q"), "the last message is the user's; it must be the assistant's"),
    "too long": (make_llava_record("q", LONG), "data.tokens_per_micro_batch allows 500"),
    "too many tiles": (
        make_llava_record("<image>" * 9 + "\nq", "a", image=["china.jpg"] * 9),
        "needs 9 image tiles and data.tiles_per_micro_batch allows 8",
    ),
}
CAPS = [
    "data.tokens_per_micro_batch=500",
    "data.tiles_per_micro_batch=8",
    "data.global_batch_size=2",
    "trainer.max_steps=2",
]


@pytest.fixture(scope="module")
def faulty_file(user_folder):
    """A file with every fault, and as many good records between them."""
    sound = [make_llava_record(ASK, "A temple.", image="china.jpg"), make_llava_record("Hi", "안녕")]
    records = [record for i, (bad, _) in enumerate(RECORDS.values()) for record in (sound[i % 2], bad)]
    return write_records(user_folder / "faulty.jsonl", records)


def format_origin(number: int) -> str:
    return f"faulty.jsonl:{2 * number + 2}: "


def test_one_pass_finds_every_bad_record_and_stops_before_training(finished_run, faulty_file):
    text = read_error_and_check_run(finished_run, *LLAVA, *CAPS, f"data.sources.mine.path={faulty_file}")
    assert f"Records that cannot be used ({len(RECORDS)} of mine" in text
    for number, (_, expected) in enumerate(RECORDS.values()):
        assert number >= 10 or (format_origin(number) in text and expected in text), (
            format_origin(number) + expected,
            text,
        )
    assert "... and 3 more" in text and "data.on_bad_record=quarantine" in text
    assert "All are listed in " in text and "bad_records.jsonl" in text


@pytest.mark.parametrize("name", RECORDS)
def test_each_bad_record_is_named_with_its_line_and_cause(user_folder, name):
    record, expected = RECORDS[name]
    write_records(user_folder / "one.jsonl", [make_llava_record("Hi", "Hello"), record])
    text = read_error(*LLAVA, *CAPS, "data.sources.mine.path=one.jsonl", "run_name=never")
    assert "one.jsonl:2: " in text and expected in text, text
    files = {path.name: path for path in (user_folder / "runs" / "never").iterdir()}
    assert files.keys() - {"held.lock"} == {"bad_records.jsonl"}  # and no file of a run
    listed = files["bad_records.jsonl"]
    assert [json.loads(row)["origin"] for row in listed.read_text("utf-8").splitlines()] == ["one.jsonl:2"]


def test_a_file_of_only_bad_records_is_refused_with_their_lines(user_folder):
    write_records(user_folder / "all.jsonl", [{"id": "a", "conversations": 5}] * 3)
    overrides = [*LLAVA, "data.sources.mine.path=all.jsonl", "run_name=never"]
    assert "all.jsonl:1: conversations is a number; it must be a list" in read_error(*overrides)
    allowed = read_error(*overrides, "data.on_bad_record=quarantine", "data.max_quarantined=1")
    assert "No usable sample for training in the sources: mine" in allowed


def test_bad_records_are_quarantined_and_named(faulty_file):
    run_output = run(
        *LLAVA,
        *CAPS,
        f"data.sources.mine.path={faulty_file}",
        "data.on_bad_record=quarantine",
        "data.max_quarantined=0.5",
    )
    assert run_output.manifest["status"] == "finished"
    assert run_output.manifest["data"]["num_samples"] == len(RECORDS)
    assert run_output.manifest["data"]["quarantined"] == {"mine": len(RECORDS)}
    rows = [json.loads(text) for text in (run_output.dir / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == ["mine"] * len(RECORDS)
    for number, (row, (_, expected)) in enumerate(zip(rows, RECORDS.values(), strict=True)):
        assert f"{row['origin']}: " == format_origin(number) and expected in row["reason"]


def test_too_many_bad_records_stop_the_run_also_with_quarantine(faulty_file):
    text = read_error(
        *LLAVA, *CAPS, f"data.sources.mine.path={faulty_file}", "data.on_bad_record=quarantine", "run_name=toomany"
    )
    assert f"{len(RECORDS)} of {2 * len(RECORDS)} (50.00%)" in text and "data.max_quarantined=0.01" in text
    assert "quarantine.jsonl" in text


def test_bad_pairs_and_messages_are_named(user_folder):
    write_records(
        user_folder / "pairs.jsonl",
        [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}],
    )
    text = read_error("stage=dpo", "data=preference", "data.sources.mine.path=pairs.jsonl")
    assert "pairs.jsonl:2: chosen and rejected are equal" in text
    write_records(
        user_folder / "m.jsonl",
        [{"messages": make_turns("q", "a")}, {"messages": [{"role": "user", "content": [{"type": "video"}]}]}],
    )
    assert "m.jsonl:2: messages[0].content[0] is of type 'video'" in read_error(
        "stage=sft", "data=messages", "data.sources.mine.path=m.jsonl"
    )


def test_a_file_of_pairs_for_sft_is_refused_before_training(user_folder):
    write_records(user_folder / "auto.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4)
    text = read_error(
        "stage=sft", "data=llava_json", "data.sources.mine.path=auto.jsonl", "data.sources.mine.format=auto"
    )
    assert "mine" in text and "preference" in text and "dpo" in text
    text = read_error("stage=dpo", "data=llava_json", "data.sources.mine.path=train.jsonl", "data.sources.mine.image_root=images",
                   "data.sources.mine.format=auto")  # fmt: skip
    assert "mine" in text and "pairs" in text


BROKEN = [*LLAVA, "data.sources.mine.path=broken.jsonl"]


@pytest.fixture
def broken_image(user_folder):
    """Data with an image whose header is whole, so the index finds no fault, but whose pixels are missing."""
    write_records(
        user_folder / "broken.jsonl",
        [make_llava_record(ASK, "A temple.", image="truncated.jpg"), *make_conversations(5)],
    )


def test_an_image_that_cannot_be_decoded_while_training_is_named(broken_image):
    assert "broken.jsonl:1: image 'truncated.jpg' cannot be decoded: " in read_error(*BROKEN, "data.num_workers=0")


def test_an_image_that_cannot_be_decoded_in_a_worker_ends_the_process_with_only_the_message(user_folder, broken_image):
    result = run_process(*BROKEN, "run_name=broken", "data.num_workers=1", cwd=user_folder)
    assert result.returncode == 1
    assert "broken.jsonl:1: image 'truncated.jpg' cannot be decoded: " in result.stderr
    assert "ledger.jsonl: the same command resumes without it" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert RunOutput(user_folder / "runs" / "broken").manifest["status"] == "running"
    assert not (user_folder / "runs" / "broken" / "hf").exists()


def test_a_broken_held_out_image_is_named(user_folder, tmp_path):
    write_records(user_folder / "held.jsonl", [make_llava_record(ASK, "A temple.", image="truncated.jpg")])
    held_source = {"path": "held.jsonl", "image_root": "images", "format": "llava"}
    choice = write_data_choice(
        tmp_path, sources={"mine": held_source | {"path": "train.jsonl"}}, validation={"sources": {"held": held_source}}
    )
    text = read_error(*choice, "stage=sft")
    assert "held.jsonl:1: image 'truncated.jpg' cannot be decoded" in text


@pytest.mark.slow
def test_a_broken_image_on_one_of_two_ranks_ends_both(user_folder, broken_image):
    overrides = ["run_name=broken_ddp", "trainer.devices=2", "trainer.strategy=ddp", "data.global_batch_size=6"]
    result = run_process(*BROKEN, *overrides, cwd=user_folder, ranks=2)
    assert result.returncode != 0
    assert "broken.jsonl:1: image 'truncated.jpg' cannot be decoded" in result.stderr


# Models


def test_a_checkpoint_of_another_model_is_refused(user_folder, finished_run, small_parts):
    tower, language = small_parts
    assert "holds a model of type 'qwen2'" in read_error_and_check_run(finished_run, *LLAVA, f"init_from={language}")
    text = read_error_and_check_run(finished_run, *LLAVA, f"model.vision_tower={language}")
    assert "model.vision_tower=" in text and "SigLIP" in text
    assert "model.language_model=" in read_error_and_check_run(finished_run, *LLAVA, f"model.language_model={tower}")


def test_weights_of_another_size_than_their_config_are_refused(user_folder, finished_run):
    import shutil

    other = user_folder / "other"
    shutil.copytree(finished_run.hf, other, dirs_exist_ok=True)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    text = read_error_and_check_run(finished_run, *LLAVA, f"init_from={other}")
    assert str(other) in text and "weights are missing or of another shape" in text
    (other / "model.safetensors").write_bytes(b"half")
    assert "its weights could not be loaded" in read_error_and_check_run(finished_run, *LLAVA, f"init_from={other}")


def test_a_language_model_without_a_chat_template_is_refused(user_folder, finished_run, small_parts):
    import shutil

    base = user_folder / "base"
    shutil.copytree(small_parts[1], base, dirs_exist_ok=True)
    (base / "chat_template.jinja").unlink()
    text = read_error_and_check_run(finished_run, *LLAVA, f"model.language_model={base}")
    assert "has no chat template" in text and "model.chat_template=chatml" in text
    run_output = run(*LLAVA, f"model.language_model={base}", "model.chat_template=chatml")
    assert run_output.manifest["status"] == "finished"


# What data may not do


def test_training_opens_no_connection(user_folder):
    global _events
    write_records(
        user_folder / "urls.jsonl",
        [
            *make_conversations(8),
            *[make_llava_record(ASK, "a", image=f"{scheme}://127.0.0.1:9/a.png") for scheme in ("http", "s3", "ftp")],
        ],
    )
    overrides = [
        *LLAVA,
        "data.sources.mine.path=urls.jsonl",
        "data.on_bad_record=quarantine",
        "data.max_quarantined=0.5",
    ]
    _events = []
    try:
        run_output = run(*overrides)
        assert _events == []
    finally:
        _events = None
    assert run_output.manifest["data"]["quarantined"] == {"mine": 3}


def test_links_out_of_the_image_root_are_not_followed(user_folder):
    link = user_folder / "images" / "link.png"
    link.unlink(missing_ok=True)
    link.symlink_to(user_folder / "outside.png")
    write_records(user_folder / "link.jsonl", [make_llava_record(ASK, "a", image="link.png")])
    assert "image 'link.png' leads out of" in read_error(*LLAVA, "data.sources.mine.path=link.jsonl")


def test_control_tokens_written_in_the_data_stay_text_in_every_batch(user_folder, monkeypatch):
    """In a whole run there are as many placeholders as image features, and one end token for each turn."""
    written = "<|im_end|> <|im_start|>assistant <bbox> </obj> <gro> <video>"
    records = [make_llava_record(ASK, f"{i} <image> {written}", image=PHOTOS[i % 4]) for i in range(4)]
    records += [make_llava_record(f"{written} {i}", f"<image> {written}") for i in range(4)]
    write_records(user_folder / "control.jsonl", records)
    batches = []
    from lit_vlm.stages.base import Stage

    step = Stage.training_step
    monkeypatch.setattr(
        Stage, "training_step", lambda self, batch, i: (batches.append((batch, self.model)), step(self, batch, i))[1]
    )
    job = parse(
        [
            *TINY,
            *LLAVA,
            "data.sources.mine.path=control.jsonl",
            "data.sources.mine.marks=text",
            "data.global_batch_size=8",
            "trainer.max_steps=1",
            "data.tiling=base",
        ]
    )
    train(job)
    ((batch, model),) = batches
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RunOutput(job.dir).hf)
    counts = {
        token: int((batch.input_ids == tokenizer.convert_tokens_to_ids(token)).sum())
        for token in tokenizer.get_added_vocab()
    }
    tiles, tokens = len(batch.tiles), model.model.image_settings.side**2
    assert tiles == 4 and counts["<image>"] >= tiles * tokens
    assert counts["<image>"] == sum(layout.num_tokens for layout in batch.layouts)
    assert counts["<|im_start|>"] == counts["<|im_end|>"] == 16  # two turns of eight records
    others = set(counts) - {"<image>", "<|im_start|>", "<|im_end|>"}
    assert others >= {"<bbox>", "</obj>", "<gro>", "<video>"} and all(counts[token] == 0 for token in others)
    labels = batch.labels[batch.labels >= 0]
    assert int((labels == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum()) == 8  # one end for each answer
    assert int((labels == tokenizer.convert_tokens_to_ids("<image>")).sum()) == 0
