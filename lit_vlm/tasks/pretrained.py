"""Pretrained models for the tasks that generate answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging as transformers_logging

from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.processor import Processor
from lit_vlm.data.template_date import parse_day
from lit_vlm.distributed.trainer import disable_library_warnings
from lit_vlm.model.build import build_model
from lit_vlm.model.spec import ModelSpec, load_model_spec, read_tiling

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class PretrainedModel:
    """Model from a folder or hub id: its processor now, its weights when `load` is called.

    Attributes:
        name: the folder or hub id.
    """

    name: str
    spec: ModelSpec
    processor: Processor
    on_gpu: bool
    seed: int

    def load(self) -> VisionLanguageModel:
        """Load the model onto its device: bfloat16 on a GPU, float32 on a CPU."""
        model = build_model(self.spec, torch.bfloat16 if self.on_gpu else torch.float32, self.seed)
        return model.to("cuda" if self.on_gpu else "cpu").eval()


def open_pretrained(
    init_from: str, model: ModelConfig, accelerator: str, seed: int, template_date: str | None = None
) -> PretrainedModel:
    """Open a model with its own special tokens, grid and tiling; the settings for these are ignored. Reads no weights.

    Args:
        init_from: model folder or hub id.
        accelerator: trainer.accelerator.
        template_date: YYYY-MM-DD, for a chat template that writes today's date; None: as set, else today.
    """
    disable_library_warnings()
    transformers_logging.disable_progress_bar()
    model_config = replace(model, special_tokens=[], new_tokens_from=None, grid=None, max_tiles=None)
    spec = load_model_spec(model_config, init_from, read_tiling(init_from))
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    template_date = model.template_date or template_date
    parsed_date = parse_day(template_date, "model.template_date") if template_date else None
    processor = Processor(spec.tokenizer, spec.images, day=parsed_date)
    return PretrainedModel(init_from, spec, processor, on_gpu, seed)
