"""Our SFT stage beside TRL's SFTTrainer, the trainer of Hugging Face's example: one batch, one loss, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from float64 import Float64, restore_pixels
from support import blueprint_of, sample
from torch import nn

from benchmarks.compare.peers import OPTIONS, make_row
from benchmarks.compare.sizes import TEMPLATE
from lit_vlm.anyres import ModelClass, Tiling
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.plain_processor import make_plain_processor
from lit_vlm.stages import SFTStage
from lit_vlm.types import Record

QUESTIONS = (
    ("What is in it?", "A red circle."),
    ("무엇이 보이나요?", "빨간 원과 파란 네모가 보입니다."),
    ("색은?", "빨강"),
)


def make_trl_trainer(model: nn.Module, processor: Processor, records: list[Record], folder: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = SFTConfig(
        str(folder), **OPTIONS, use_cpu=True, bf16=False, max_length=None, assistant_only_loss=True, loss_type="nll"
    )
    plain = make_plain_processor(processor.tokenizer, processor.images)
    dataset = Dataset.from_list([make_row(records[0])])
    return SFTTrainer(model, options, train_dataset=dataset, processing_class=plain)


@pytest.mark.slow
@pytest.mark.parametrize("several_turns", [False, True])
def test_our_sft_stage_and_trls_give_one_loss_and_the_same_gradients_on_a_llava_batch(
    small_parts, mixed, tmp_path, several_turns
):
    spec = blueprint_of(small_parts, Tiling.base, model_class=ModelClass.llava, grid=None, max_tiles=None)
    spec.tokenizer.chat_template = TEMPLATE  # TRL finds the answers by its generation tags, we by the texts
    processor = Processor(spec.tokenizer, spec.images)
    records: list[Record] = [sample(*texts, (40 + 9 * i, 56), seed=i) for i, texts in enumerate(QUESTIONS)]
    if several_turns:  # no text alone: transformers counts the pictures of a batch by its placeholders
        records += [record for record in mixed if record.images]
    stage = SFTStage(build_model(spec).double())
    stage.configure_model()
    theirs = build_model(spec).double().train()
    trainer = make_trl_trainer(theirs, processor, records, tmp_path)
    with Float64():
        losses = stage.compute_token_losses(collate(processor, records))
        (losses.sum() / len(losses)).backward()
        inputs = trainer._prepare_inputs(trainer.data_collator([make_row(record) for record in records]))
        mean, std = (torch.tensor(values)[:, None, None].double() for values in (spec.images.mean, spec.images.std))
        inputs["pixel_values"] = restore_pixels(inputs["pixel_values"], mean, std)
        count = (inputs["labels"][:, 1:] != -100).sum()
        assert int(count) == len(losses)
        loss = trainer.compute_loss(theirs, inputs, num_items_in_batch=count)
        loss.backward()
    assert float(losses.mean()) == pytest.approx(float(loss), rel=1e-9)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in stage.model.named_parameters() if parameter.grad is not None}
    assert len(found) > 40 and found.keys() <= expected.keys()
    for name in expected.keys() - found.keys():  # parameters that nothing reads
        assert not expected[name].any(), name
    torch.testing.assert_close(found, {name: expected[name] for name in found}, atol=1e-9, rtol=1e-6)
