"""Tied and untied embeddings and head: the files of a checkpoint decide, not its config.json."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import blueprint_of
from test_build import make_language_folder
from test_weights import assert_same_weights
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config

from lit_vlm.config.schema import ModelConfig
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.skeleton import defer_weights
from lit_vlm.model.spec import load_model_spec
from lit_vlm.model.tiny import make_tokenizer
from lit_vlm.types import UserError

IDS = torch.tensor([[5, 17, 300, 42, 8, 99]])
KNOWN = 640  # rows of ordinary tokens; after them come the rows of control tokens, which every build initialises
START_SETTINGS = ["init_from", "model.language_model"]
SUFFIXES = {"head": "lm_head.weight", "embeddings": "embed_tokens.weight"}


def export(model, blueprint, folder: Path) -> Path:
    export_model(model, blueprint.tokenizer, blueprint.images, folder)
    return folder


def make_folder(way: str, parts, folder: Path) -> Path:
    """Return a checkpoint for one way of starting a run: a copy of the tiny language model, or a whole model on top of it."""
    if way == "model.language_model":
        return Path(shutil.copytree(parts[1], folder))
    blueprint = blueprint_of(parts)
    return export(build_model(blueprint), blueprint, folder)


def load_spec(way: str, parts, folder: Path):
    if way == "init_from":
        return load_model_spec(ModelConfig(grid=3, max_tiles=4), init_from=str(folder))
    return blueprint_of((parts[0], str(folder)))


def edit_config(folder: Path, tied: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    for place in (config, config.get("text_config", {})):
        place["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))


def edit_tables(folder: Path, *, without: tuple[str, ...] = (), other_head: bool = False) -> dict[str, torch.Tensor]:
    """Write both tables into the file except those in `without`; return the tensors of the file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (embeddings,) = [key for key in tensors if key.endswith("embed_tokens.weight")]
    head = "language_model.lm_head.weight" if embeddings.startswith("language_model") else "lm_head.weight"
    tensors.setdefault(head, tensors[embeddings].clone())
    if other_head:
        tensors[head] = torch.randn_like(tensors[head])
    tensors = {key: value for key, value in tensors.items() if not key.endswith(tuple(SUFFIXES[n] for n in without))}
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def merge_with_peft(model, folder: Path):
    """Train LoRA and the head, merge and save, as users of peft do it."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    merged = wrapped.merge_and_unload().eval()
    merged.save_pretrained(folder)
    return merged


@pytest.mark.parametrize("way", START_SETTINGS)
@pytest.mark.parametrize("in_shards", [False, True], ids=["whole", "in shards"])
def test_a_head_that_peft_trained_on_a_tied_model_is_loaded_and_exported_as_in_pefts_memory(
    parts, tmp_path, way, in_shards
):
    source = make_folder(way, parts, tmp_path / "source")
    kind = AutoModelForImageTextToText if way == "init_from" else AutoModelForCausalLM
    merged = merge_with_peft(kind.from_pretrained(source), tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    if way == "init_from":
        assert config["text_config"]["tie_word_embeddings"] and not config["tie_word_embeddings"]
    else:
        edit_config(tmp_path / "merged", tied=True)  # peft unties this one; older releases did not
    for path in source.iterdir():
        if not (tmp_path / "merged" / path.name).exists():
            shutil.copy(path, tmp_path / "merged")
    blueprint = load_spec(way, parts, tmp_path / "merged")
    model = build_model(blueprint)
    if in_shards:
        with defer_weights():
            skeleton = build_model(load_spec(way, parts, tmp_path / "merged"))
        assert_same_weights(model, skeleton)
        assert not skeleton.config.tie_word_embeddings
    (warning,) = blueprint.remarks
    assert str(tmp_path / "merged") in warning and "two different tables" in warning and "\n" not in warning
    assert not blueprint.config.tie_word_embeddings
    export(model, blueprint, tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert not written["tie_word_embeddings"] and not written["text_config"]["tie_word_embeddings"]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        theirs, ours = merged(input_ids=IDS).logits, again(input_ids=IDS).logits
    assert torch.equal(theirs[..., :KNOWN], ours[..., :KNOWN])
    assert not torch.equal(again.lm_head.weight[:KNOWN], again.get_input_embeddings().weight[:KNOWN])


@pytest.mark.parametrize("way", START_SETTINGS)
@pytest.mark.parametrize("left_out", ["head", "embeddings", None], ids=["head", "embeddings", "neither"])
def test_a_tied_checkpoint_may_hold_its_table_under_either_name_or_under_both(parts, tmp_path, way, left_out):
    folder = make_folder(way, parts, tmp_path / "folder")
    tensors = edit_tables(folder, without=(left_out,) if left_out else ())
    (table, *_) = [value for key, value in tensors.items() if key.endswith(tuple(SUFFIXES.values()))]
    blueprint = load_spec(way, parts, folder)
    model = build_model(blueprint)
    with defer_weights():
        assert_same_weights(model, build_model(load_spec(way, parts, folder)))
    assert blueprint.remarks == [] and blueprint.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight[:KNOWN], table[:KNOWN])


@pytest.mark.parametrize("way", START_SETTINGS)
@pytest.mark.parametrize(
    ("tied", "left_out", "message"),
    [
        (False, ("head",), r"hold no head \(.*lm_head\.weight\).*tie_word_embeddings to true"),
        (False, ("embeddings",), r"hold no embeddings \(.*embed_tokens\.weight\).*tie_word_embeddings to true"),
        (True, ("head", "embeddings"), r"neither embeddings nor head"),
        (False, ("head", "embeddings"), r"hold no head"),
    ],
)
@pytest.mark.parametrize("in_shards", [False, True], ids=["whole", "in shards"])
def test_files_without_a_table_that_their_config_does_not_tie_are_refused_with_its_name(
    parts, tmp_path, way, tied, left_out, message, in_shards
):
    folder = make_folder(way, parts, tmp_path / "folder")
    edit_tables(folder, without=left_out)
    edit_config(folder, tied)
    with pytest.raises(UserError, match=message) as error:
        if in_shards:
            with defer_weights():
                build_model(load_spec(way, parts, folder))
        else:
            build_model(load_spec(way, parts, folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("way", START_SETTINGS)
def test_two_different_tables_stay_untied_when_new_tokens_extend_them(parts, tmp_path, way):
    full = make_language_folder(
        tmp_path / "full", Qwen2Config, vocab_size=len(make_tokenizer()), tie_word_embeddings=True
    )
    folder = make_folder(way, (parts[0], full), tmp_path / "folder")
    head = edit_tables(folder, other_head=True)
    (head,) = [value for key, value in head.items() if key.endswith("lm_head.weight")]
    settings = ModelConfig(grid=3, max_tiles=4, special_tokens=["<one>", "<two>"])
    if way == "init_from":
        blueprint = load_model_spec(settings, init_from=str(folder))
    else:
        blueprint = blueprint_of((parts[0], str(folder)))
    model = build_model(blueprint)
    assert len(model.lm_head.weight) > len(head) and torch.equal(model.lm_head.weight[: len(head)], head)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    with defer_weights():
        assert_same_weights(
            model,
            build_model(
                load_model_spec(settings, init_from=str(folder))
                if way == "init_from"
                else load_spec(way, parts, folder)
            ),
        )


def test_a_run_reports_in_one_line_that_both_tables_are_kept(parts, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from lit_vlm.tasks import train_steps

    folder = make_folder("model.language_model", parts, tmp_path / "folder")
    edit_tables(folder, other_head=True)
    blueprint = load_spec("model.language_model", parts, folder)
    build_model(blueprint)
    messages: list[str] = []
    monkeypatch.setattr(train_steps, "say", messages.append)
    plan = SimpleNamespace(
        num_steps=1, batch_description="1 sample", accumulate_grad_batches=1, world_size=1, index=[0]
    )
    prepared = SimpleNamespace(stage_data=SimpleNamespace(spec=blueprint), indexes=SimpleNamespace(held_out=[]))
    built = SimpleNamespace(plan=plan, stage=SimpleNamespace(part_summary=[], model=None))
    remarks = train_steps.list_remarks(prepared, built)
    train_steps.show_training_summary(SimpleNamespace(name="run"), None, prepared, built, remarks)
    assert [line for line in messages if "two different tables" in line] == blueprint.remarks and blueprint.remarks
