"""New text tokens: what becomes one token, which rows train, and what plain transformers makes of the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_helpers import RunOutput, make_llava_record
from stages.fits import fit
from support import blueprint_of, builtin
from transformers import AutoTokenizer

from lit_vlm.anyres import Tiling
from lit_vlm.config import parse
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.export import MergedStateDict, export_model
from lit_vlm.model.new_tokens import compute_tokens_per_syllable
from lit_vlm.model.skeleton import defer_weights, fill_skeleton
from lit_vlm.model.spec import load_model_spec
from lit_vlm.stages import AlignStage, SFTStage
from lit_vlm.tasks.train import train
from lit_vlm.types import UserError

LISTED = ["안녕하세요", " 그림에는", "무엇이", "고양이", "고양이가"]
TEXTS = [
    "안녕하세요, 그림에는 무엇이 있나요?",
    "고양이가 있어요. 고양이 두 마리가 보여요.",
    "그림에는 고양이가 있어요. 무엇이 보여요?",
] * 4
OTHER = ["A red circle, <bbox> and 12 boxes.", "가나다라 마바사", "print(1)\n\n  x"]


@pytest.fixture
def listed(tmp_path) -> str:
    (tmp_path / "tokens.txt").write_text("\n".join(LISTED) + "\n", encoding="utf-8")
    return str(tmp_path / "tokens.txt")


@pytest.fixture
def corpus(tmp_path) -> str:
    records = [make_llava_record("<image>\n" + text, text) for text in TEXTS]
    (tmp_path / "llava.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return str(tmp_path / "llava.json")


def encode_plain(spec, text: str) -> list[int]:
    return Processor(spec.tokenizer, spec.images).template.plain_tokenizer.encode(text, add_special_tokens=False).ids


def test_each_listed_text_becomes_one_token_and_texts_without_them_keep_their_ids(small_parts, listed):
    before, spec = blueprint_of(small_parts), blueprint_of(small_parts, new_tokens_from=listed)
    for token in LISTED:
        assert len(encode_plain(spec, token)) == 1 < len(encode_plain(before, token))
        assert spec.tokenizer.decode(encode_plain(spec, token)) == token
    assert len(encode_plain(spec, "고양이는 안녕하세요 라고")) < len(encode_plain(before, "고양이는 안녕하세요 라고"))
    for text in OTHER:
        assert encode_plain(spec, text) == encode_plain(before, text)


def test_rows_of_new_tokens_start_as_the_mean_of_the_rows_that_they_replace(small_parts, listed):
    spec = blueprint_of(small_parts, new_tokens_from=listed)
    model, old = build_model(spec), build_model(blueprint_of(small_parts))
    for token in LISTED:
        (row,) = encode_plain(spec, token)
        replaced = spec.text_tokens.before.encode(token, add_special_tokens=False).ids
        for table, old_table in (
            (model.get_input_embeddings(), old.get_input_embeddings()),
            (model.lm_head, old.lm_head),
        ):
            assert torch.equal(table.weight[row], old_table.weight[replaced].mean(0)), token
    with defer_weights():
        skeleton = build_model(blueprint_of(small_parts, new_tokens_from=listed))
    fill_skeleton(skeleton, torch.float32)
    for name, value in skeleton.named_parameters():
        assert torch.equal(value, dict(model.named_parameters())[name]), name


def test_learnt_tokens_shorten_korean_and_a_later_stage_adds_none_twice(small_parts, corpus, tmp_path):
    settings = {"new_tokens_from": corpus, "num_new_tokens": 20}
    spec = blueprint_of(small_parts, **settings)
    assert 0 < len(spec.text_tokens.pieces) <= 20
    plain = Processor(spec.tokenizer, spec.images).template.plain_tokenizer
    assert compute_tokens_per_syllable(TEXTS, plain) < 0.8 * compute_tokens_per_syllable(TEXTS, spec.text_tokens.before)
    again = blueprint_of(small_parts, **settings)
    assert again.tokenizer.get_vocab() == spec.tokenizer.get_vocab()
    export_model(build_model(spec), spec.tokenizer, spec.images, tmp_path / "hf")
    later = load_model_spec(ModelConfig(**settings), init_from=str(tmp_path / "hf"))
    assert later.new_tokens == [] and later.text_tokens.names == spec.text_tokens.names
    assert later.tokenizer.get_vocab() == spec.tokenizer.get_vocab()
    assert build_model(later).get_input_embeddings().num_embeddings == len(spec.tokenizer)


@pytest.mark.parametrize("count", [None, 20])
def test_plain_transformers_loads_the_exported_tokenizer_and_gives_the_same_ids(
    small_parts, listed, corpus, tmp_path, count
):
    spec = blueprint_of(small_parts, new_tokens_from=corpus if count else listed, num_new_tokens=count)
    export_model(build_model(spec), spec.tokenizer, spec.images, tmp_path / "hf")
    plain = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*LISTED, *TEXTS[:3], *(text for text in OTHER if "<" not in text)):
        assert plain.encode(text, add_special_tokens=False) == encode_plain(spec, text), text
    for name in ("<image>", "<bbox>", "<|im_end|>"):
        assert plain.convert_tokens_to_ids(name) == spec.tokenizer.convert_tokens_to_ids(name)


def merge_weights(model) -> dict[str, torch.Tensor]:
    merged = MergedStateDict(model)
    return {name: merged.compute_value(name).detach().clone() for name in merged.tensors}


def find_changed_rows(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set((before != after).any(1).nonzero().flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["rows alone", "LoRA"])
def test_only_the_new_rows_change_in_100_steps_and_after_the_merge_of_adapters(small_parts, listed, tmp_path, lora):
    spec = blueprint_of(small_parts, Tiling.base, new_tokens_from=listed)
    parts = {"language_model": {"lora": {"rank": 2}}}
    options = {"trainable": ["language_model"], "parts": parts} if lora else {"trainable": []}
    stage = (SFTStage if lora else AlignStage)(spec, learning_rate=1e-2, **options)
    before = merge_weights(build_model(blueprint_of(small_parts, Tiling.base, new_tokens_from=listed)))
    fit(
        stage,
        Processor(spec.tokenizer, spec.images),
        builtin("caption", n=64),
        tmp_path,
        max_steps=100,
        global_batch_size=4,
    )
    after = merge_weights(stage.model)
    rows = set(spec.tokenizer.convert_tokens_to_ids([*spec.new_tokens, *spec.special_tokens]))
    tables = [name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(tables) == 2
    for name in before:
        if name in tables:
            changed = find_changed_rows(before[name], after[name])
            assert changed and changed <= rows
        elif not lora or "_proj" not in name or "vision" in name:
            assert torch.equal(before[name], after[name]), name
    assert not lora or any(not torch.equal(before[name], after[name]) for name in before if "q_proj" in name)


@pytest.mark.slow
def test_a_run_prints_and_stores_the_tokens_per_syllable_before_and_after(small_parts, corpus, tmp_path, capsys):
    tower, language_model = small_parts
    records = [make_llava_record(text, text, id=str(i)) for i, text in enumerate(TEXTS)]
    (tmp_path / "text.json").write_text(json.dumps(records), encoding="utf-8")
    overrides = [
        "task=train", "data=llava_json", f"data.sources.mine.path={tmp_path / 'text.json'}", "stage=align",
        f"model.vision_tower={tower}", f"model.language_model={language_model}", "trainer=tiny", "trainer.devices=1",
        "trainer.max_steps=2", "data.global_batch_size=4", "data.num_workers=0", "stage.trainable=[]",
        f"model.new_tokens_from={corpus}", "model.num_new_tokens=15", f"run_dir={tmp_path / 'runs'}", "run_name=korean",
    ]  # fmt: skip
    job = parse(overrides)
    train(job)
    entry = RunOutput(job.dir).manifest["new_text_tokens"]
    assert entry["added"] == 15 and entry["after"] < entry["before"]
    line = f"15 new text tokens: {entry['before']:.2f} tokens per Korean syllable before, {entry['after']:.2f} after"
    assert line in " ".join(capsys.readouterr().out.split())
    assert {part["how"] for part in RunOutput(job.dir).manifest["trained"]} == {"frozen", "rows of 26 tokens"}


@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        ("", None, "lists no token"),
        ("두 마리", None, "is no single word"),
        ("only English", 5, "has no text with Hangul"),
        ("가나", 5, "too little text"),
    ],
)
def test_a_file_that_gives_no_tokens_is_refused_with_the_reason(small_parts, tmp_path, content, count, message):
    (tmp_path / "file.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        blueprint_of(small_parts, new_tokens_from=str(tmp_path / "file.txt"), num_new_tokens=count)
    with pytest.raises(UserError, match="cannot be read"):
        blueprint_of(small_parts, new_tokens_from=str(Path(tmp_path, "none.txt")))
