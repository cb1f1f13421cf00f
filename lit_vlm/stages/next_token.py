"""The three stages that learn from next tokens. They differ in what trains, and in what their data is."""

from __future__ import annotations

from lit_vlm.stages.base import Stage
from lit_vlm.types import Part


class AlignStage(Stage):
    """Stage 1: the projector learns to speak the language model's language; tower and language model are frozen."""

    default_trainable = (Part.projector,)
    default_learning_rate = 1e-3


class SFTStage(Stage):
    """Stage 2: everything trains, on captions, instructions, OCR, grounding, documents and text."""


class HighresStage(Stage):
    """Stage 3: as stage 2, with more tiles and harder text."""
