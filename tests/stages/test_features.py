"""What a frozen tower sees, kept: the same numbers, and no picture is decoded in training."""

import copy

import lightning as L
import pytest
from support import builtin

from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.model.export import export_model
from lit_vlm.stages import AlignStage, DPOStage, SFTStage
from lit_vlm.types import UserError


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


@pytest.fixture
def folder(model, processor, tmp_path):
    export_model(copy.deepcopy(model), processor.tokenizer, processor.images, tmp_path / "hf")
    return tmp_path / "hf"


def fit(stage, processor, store, kinds, precision="32-true"):
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[losses],
    )
    sources = [source for kind in kinds for source in builtin(kind, n=16)]
    data = DataModule(
        processor,
        sources,
        0.25,
        global_batch_size=4,
        max_steps=6,
        store=store,
        num_workers=0,
        tokens_per_micro_batch=160,
    )
    trainer.fit(stage, data)
    return losses.losses, float(trainer.callback_metrics["val/loss"]), data


@pytest.mark.parametrize(
    ("stage_class", "kinds", "precision"),
    [
        (AlignStage, ("caption", "text"), "32-true"),
        (AlignStage, ("caption",), "bf16-mixed"),
        (DPOStage, ("preference",), "32-true"),
    ],
)
def test_kept_features_train_as_the_tower_does(folder, processor, tmp_path, monkeypatch, stage_class, kinds, precision):
    options = {"learning_rate": 3e-3, "warmup": 0.0}
    plain, held_out, _ = fit(stage_class(folder, **options), processor, tmp_path / "store", kinds, precision)
    decoded = []
    tiles = Processor.tiles
    monkeypatch.setattr(Processor, "tiles", lambda self, record: decoded.append(record.id) or tiles(self, record))
    kept = {"cache_features": True, **options}
    losses, other, data = fit(stage_class(folder, **kept), processor, tmp_path / "store", kinds, precision)
    exact = 1e-5 if precision == "32-true" else 2e-3  # in bfloat16 a product's rounding depends on its shape
    assert losses == pytest.approx(plain, rel=exact) and other == pytest.approx(held_out, rel=exact)
    assert len(decoded) == len(set(decoded)) <= len(data.index) + len(data.held_out)  # once, in the pass
    decoded.clear()
    again, _, _ = fit(stage_class(folder, **kept), processor, tmp_path / "store", kinds, precision)
    assert again == losses and not decoded


def test_the_features_of_a_tower_that_trains_are_refused(folder, processor, tmp_path):
    with pytest.raises(UserError, match=r"stage\.trainable names it"):
        fit(SFTStage(folder, cache_features=True), processor, tmp_path / "store", ("caption",))
