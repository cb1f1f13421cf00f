"""Stages with next-token loss (cross-entropy): align, sft and highres. They differ in what trains and in their data."""

from __future__ import annotations

from lit_vlm.config.choices import StageName
from lit_vlm.stages.base import Stage
from lit_vlm.types import ModelPart


class AlignStage(Stage):
    """Stage 1: the projector learns to map image features into the language model's input space; the rest is frozen."""

    name = StageName.align
    default_trainable = (ModelPart.projector,)
    default_learning_rate = 1e-3


class SFTStage(Stage):
    """Stage 2: all parts train, on captions, instructions, OCR, grounding, documents and text."""


class HighresStage(Stage):
    """Stage 3: as stage 2, with more tiles and harder text."""

    name = StageName.highres
