"""Tests of a full disk: the folder that cannot be written is named, and no partial file is left."""

import pytest
import torch
from run_helpers import run
from safetensors import SafetensorError
from transformers import SiglipVisionModel

from lit_vlm.config import parse
from lit_vlm.model.tensor_files import raise_os_errors
from lit_vlm.stages import caches
from lit_vlm.stages.caches import ReferenceLogProbCache
from lit_vlm.tasks.prepare_data import resolve_tiny_parts
from lit_vlm.types import UserError

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"  # message of safetensors


def raise_disk_full(*_, **__):
    raise SafetensorError(FULL)


def test_a_full_disk_for_the_tiny_model_is_named(tmp_path, monkeypatch):
    model, parts = parse(["task=train", "experiment=tiny/1_align"]).config.model, tmp_path / "runs" / "parts"
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(SiglipVisionModel, "save_pretrained", raise_disk_full)
        resolve_tiny_parts(model, parts, 0)
    assert str(caught.value) == (
        f"The tiny model's parts cannot be kept in {parts}: No space left on device. Make room or change its rights, or set "
        "run_dir to another folder."
    )
    assert not list(parts.iterdir())
    assert resolve_tiny_parts(model, parts, 0).vision_tower.startswith(str(parts))


def test_a_folder_that_cannot_be_created_for_the_tiny_model_is_named(tmp_path):
    (tmp_path / "parts").write_text("in the way")
    model = parse(["task=train", "experiment=tiny/1_align"]).config.model
    with pytest.raises(UserError, match=r"parts cannot be kept in .*parts: .*set run_dir to another folder"):
        resolve_tiny_parts(model, tmp_path / "parts", 0)


def test_a_full_disk_for_the_reference_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "save_file", raise_disk_full)
    reference = ReferenceLogProbCache(tmp_path / "reference")
    reference.add(1, 0, [1, 1], torch.zeros(2))
    with pytest.raises(UserError, match=r"reference cannot be kept in .*reference: No space left.*data\.index_dir"):
        reference.write()
    assert not list((tmp_path / "reference").iterdir())


def test_a_full_disk_at_export_is_named_and_the_run_resumes(tmp_path, monkeypatch):
    overrides = [
        f"run_dir={tmp_path}",
        "run_name=r",
        "callbacks=[export]",
        "checkpoint.every_steps=2",
        "checkpoint.asynchronous=false",
    ]
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot be written to .*hf: No space left on"):
        patch.setattr("lit_vlm.model.export.write_index", raise_disk_full)
        run(*overrides)
    assert run(*overrides).manifest["status"] == "finished"


def test_only_errors_of_the_system_become_os_errors():
    with pytest.raises(OSError, match="No space left on device"), raise_os_errors():
        raise_disk_full()
    with pytest.raises(SafetensorError, match="header too large"), raise_os_errors():
        raise SafetensorError("header too large")
