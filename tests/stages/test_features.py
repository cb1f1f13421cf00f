"""Cached features of a frozen vision tower: the same numbers, and no picture is decoded in training."""

import pytest
from fits import export_copy, fit
from support import builtin

from lit_vlm.data.processor import Processor
from lit_vlm.stages import AlignStage, DPOStage, SFTStage
from lit_vlm.types import UserError


@pytest.fixture
def folder(model, processor, tmp_path):
    return export_copy(model, processor, tmp_path / "hf")


def train(stage, processor, store, kinds, precision="32-true"):
    sources = [source for kind in kinds for source in builtin(kind, n=16)]
    options = {"global_batch_size": 4, "max_steps": 6, "tokens_per_micro_batch": 160}
    return fit(stage, processor, sources, store, precision=precision, **options)


@pytest.mark.parametrize(
    ("stage_class", "kinds", "precision"),
    [
        (AlignStage, ("caption", "text"), "32-true"),
        (AlignStage, ("caption",), "bf16-mixed"),
        (DPOStage, ("preference",), "32-true"),
    ],
)
def test_cached_features_train_as_the_tower_does(
    folder, processor, tmp_path, monkeypatch, stage_class, kinds, precision
):
    options = {"learning_rate": 3e-3, "warmup": 0.0}
    plain = train(stage_class(folder, **options), processor, tmp_path / "store", kinds, precision)
    decoded = []
    tiles = Processor.load_tiles
    monkeypatch.setattr(Processor, "load_tiles", lambda self, record: decoded.append(record.id) or tiles(self, record))
    cached = {"cache_features": True, **options}
    first = train(stage_class(folder, **cached), processor, tmp_path / "store", kinds, precision)
    tolerance = 1e-5 if precision == "32-true" else 2e-3  # in bfloat16 a product's rounding depends on its shape
    assert first.losses == pytest.approx(plain.losses, rel=tolerance)
    assert first.metrics["val/loss"] == pytest.approx(plain.metrics["val/loss"], rel=tolerance)
    # each picture is decoded once, in the caching pass
    assert len(decoded) == len(set(decoded)) <= len(first.data.index) + len(first.data.held_out)
    decoded.clear()
    again = train(stage_class(folder, **cached), processor, tmp_path / "store", kinds, precision)
    assert again.losses == first.losses and not decoded


def test_caching_features_of_a_trainable_tower_is_refused(folder, processor, tmp_path):
    with pytest.raises(UserError, match=r"stage\.trainable names it"):
        train(SFTStage(folder, cache_features=True), processor, tmp_path / "store", ("caption",))
