"""Trainers of TRL and transformers as contenders: their collators and `training_step`, followed by an optimizer step.

Model, dataset rows and arguments follow the documentation of each trainer. Deviations from defaults are commented where they
are set. The loops around `training_step` are left out, like Lightning's loop on our side.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from transformers import LlavaOnevisionImageProcessorPil
from transformers.image_processing_backends import PilBackend

from benchmarks.compare.cases import HF_SORTED, HF_TUNED, TRL_SHIPPED, TRL_TUNED, Case
from benchmarks.compare.contender import Contender, Placement
from lit_vlm.anyres import Tiling
from lit_vlm.model.parts import freeze_except
from lit_vlm.model.plain_processor import PlainProcessor, make_plain_processor
from lit_vlm.types import ImagePlaceholder, Message, PreferencePair, Record

OPTIONS = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


class BaseViewImageProcessor(LlavaOnevisionImageProcessorPil):
    """Image processor with one view per image, for stages without tiling.

    transformers uses one view only for samples with several images. So the images of a micro-batch are passed as those of
    one sample, and there must be at least two.
    """

    def preprocess(self, images: list[list[Any]], **kwargs: Any) -> Any:
        flat = list(itertools.chain.from_iterable(images))
        assert len(flat) > 1, "transformers tiles a picture that is alone in its micro-batch"
        return PilBackend.preprocess(self, flat, [len(flat)], **kwargs)


def make_processor(case: Case) -> PlainProcessor:
    """Make the Pillow-based processor of transformers, whose pixels equal ours exactly."""
    plain = make_plain_processor(copy.deepcopy(case.processor.tokenizer), case.processor.images)
    if case.tiling is Tiling.base:
        plain.image_processor = BaseViewImageProcessor(**plain.image_processor.to_dict())
    return plain


class HFPeer(Contender):
    """Base class for the trainers of TRL and transformers.

    Args:
        checkpointing: whether activations are recomputed.
        micro_batches: number of micro-batches per optimizer step, with records sorted by length.
    """

    def __init__(
        self, case: Case, placement: Placement, name: str, checkpointing: bool, micro_batches: int = 1
    ) -> None:
        super().__init__(case, placement)
        self.name, self.micro_batches = name, micro_batches
        model = placement.load_model(case)
        freeze_except(model, case.trainable)
        self.trainer = self.make_trainer(model, checkpointing)
        self.models = [self.trainer.model]
        self.trainer.current_gradient_accumulation_steps = micro_batches  # train() sets it
        if checkpointing:  # train() does the same
            options = self.trainer.args.gradient_checkpointing_kwargs
            self.trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self.make_optimizer()

    def make_trainer(self, model: Any, checkpointing: bool) -> Any:
        raise NotImplementedError

    def make_arguments(self, kind: Any, **options: Any) -> Any:
        """Make the training arguments for the device: TRL's default precision is `bf16`, ours on a CPU is float32."""
        folder = Path(gettempdir()) / "compare_trainer"
        precision = {"use_cpu": self.placement.device == "cpu", "bf16": self.placement.mixed}
        return kind(output_dir=str(folder), **OPTIONS, **precision, **options)

    def prepare(self, records: list[Record]) -> list[dict]:
        size = -(-len(records) // self.micro_batches)
        if self.micro_batches > 1:
            records = sorted(records, key=lambda record: self.case.lengths_by_id[record.id])
        rows = [make_row(record) for record in records]
        collated = [self.trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        return [self.trainer._prepare_inputs(dict(inputs)) for inputs in collated]

    def count_tokens(self, inputs: list[dict], records: list[Record]) -> tuple[int, int]:
        masks = [part["attention_mask"] for part in inputs]
        return sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)

    def backward(self, inputs: list[dict]) -> float:
        count = sum((part["labels"][:, 1:] != -100).sum() for part in inputs)
        model = self.trainer.model
        # num_items_in_batch: mean over the tokens of the step, for any number of micro-batches
        return float(sum(self.trainer.training_step(model, dict(part), num_items_in_batch=count) for part in inputs))


class TrlSFT(HFPeer):
    """TRL's SFTTrainer as a contender."""

    def make_trainer(self, model: Any, checkpointing: bool) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        options = self.make_arguments(
            SFTConfig,
            max_length=None,  # the default of 1,024 is too short for tiled images
            gradient_checkpointing=checkpointing,  # true by default
            assistant_only_loss=True,
        )
        dataset = Dataset.from_list([make_row(self.case.batches[0][0])])
        return SFTTrainer(model, options, train_dataset=dataset, processing_class=make_processor(self.case))


class HFTrainer(HFPeer):
    """HF Trainer as a contender, with TRL's collator: transformers has none for conversations with images."""

    def make_trainer(self, model: Any, checkpointing: bool) -> Any:
        from transformers import Trainer, TrainingArguments
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        options = self.make_arguments(
            TrainingArguments, gradient_checkpointing=checkpointing, remove_unused_columns=False
        )
        collator = DataCollatorForVisionLanguageModeling(make_processor(self.case), assistant_only_loss=True)
        return Trainer(model, options, data_collator=collator)


class TrlDPO(HFPeer):
    """TRL's DPOTrainer as a contender.

    The reference model runs at each step, because TRL refuses to precompute it for images.
    """

    def __init__(self, case: Case, placement: Placement, name: str, checkpointing: bool) -> None:
        super().__init__(case, placement, name, checkpointing)
        if self.trainer.ref_model is not None:
            self.models.append(self.trainer.ref_model)

    def make_trainer(self, model: Any, checkpointing: bool) -> Any:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        options = self.make_arguments(DPOConfig, max_length=None, gradient_checkpointing=checkpointing)
        dataset = Dataset.from_list([make_row(self.case.batches[0][0])])
        lora, reference = self.placement.lora, None
        if lora is None:
            reference = self.placement.load_model(self.case).requires_grad_(False).eval()
        else:
            targets = rf".*language_model.*\.({'|'.join(lora.targets)})"
            lora = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        return DPOTrainer(
            model,
            reference,
            options,
            train_dataset=dataset,
            processing_class=make_processor(self.case),
            peft_config=lora,
        )

    def backward(self, inputs: list[dict]) -> float:
        (part,) = inputs
        return float(self.trainer.training_step(self.trainer.model, dict(part)))

    def compute_log_probs(self, record: Record) -> tuple[float, float]:
        (part,) = self.prepare([record])
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            self.trainer.model.train()
            self.trainer.compute_loss(self.trainer.model, dict(part))
        metrics = self.trainer._metrics["train"]
        return metrics["logps/chosen"][-1], metrics["logps/rejected"][-1]


def make_peers(case: Case, placement: Placement) -> dict[str, Callable[[], Contender]]:
    """Make factories for the peers, by name: as shipped by TRL and transformers, and tuned as well as possible."""
    trl = TrlDPO if case.is_preference else TrlSFT
    return {
        TRL_SHIPPED: partial(trl, case, placement, TRL_SHIPPED, checkpointing=True),
        TRL_TUNED: partial(trl, case, placement, TRL_TUNED, checkpointing=False),
        HF_TUNED: partial(HFTrainer, case, placement, HF_TUNED, checkpointing=False),
        HF_SORTED: partial(HFTrainer, case, placement, HF_SORTED, checkpointing=False, micro_batches=2),
    }


def make_row(record: Record) -> dict[str, Any]:
    """Make the dataset row of a record for TRL."""
    images = [image.load() for image in record.images]
    if isinstance(record, PreferencePair):
        turns = {"prompt": list(record.prompt), "chosen": [record.chosen], "rejected": [record.rejected]}
        return {"images": images} | {name: [_make_turn(message) for message in part] for name, part in turns.items()}
    return {"images": images, "messages": [_make_turn(message) for message in record.messages]}


def _make_turn(message: Message) -> dict[str, Any]:
    parts = [
        {"type": "image"} if isinstance(piece, ImagePlaceholder) else {"type": "text", "text": piece}
        for piece in message.content
    ]
    return {"role": message.role.value, "content": parts}
