"""Inputs of several tests: tiny model specs, noise images, samples of any shape."""

from __future__ import annotations

import re
from html import unescape

import numpy as np

from lit_vlm.anyres import Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.lazy_images import ArrayImage
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.types import ImagePlaceholder, Language, Message, Role, Sample, SampleKind


def blueprint_of(parts: tuple[str, str], tiling: Tiling = Tiling.anyres, **settings) -> ModelSpec:
    tower, language = parts
    return load_model_spec(
        ModelConfig(vision_tower=tower, language_model=language, **{"grid": 3, "max_tiles": 4, **settings}),
        tiling=tiling,
    )


def picture(height: int, width: int, seed: int = 0) -> ArrayImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ArrayImage(pixels, f"picture {seed}")


def sample(question: str, answer: str, *sizes: tuple[int, int], seed: int = 0, name: str = "s") -> Sample:
    """Build a sample of one turn with images of these sizes."""
    images = tuple(picture(*size, seed=seed + i) for i, size in enumerate(sizes))
    slots = tuple(ImagePlaceholder(i) for i in range(len(images)))
    messages = (Message(Role.user, (*slots, question)), Message(Role.assistant, (answer,)))
    return Sample(f"{name}{seed}", "test", f"test:{seed}", SampleKind.other, Language.ko, messages, images)


def builtin(*kinds: str, n: int = 64, language: Language = Language.ko, **options) -> list[BuiltinSource]:
    return [BuiltinSource(kind, kind, language=language, num_samples=n, **options) for kind in kinds]


def list_english(page: str, *known: str) -> list[str]:
    """List the English of a page: three words in a row that are no code, after the texts in `known` are taken away."""
    text = re.sub(r"<(style|code|pre|title)\b.*?</\1>", " ", page, flags=re.DOTALL)
    labels = re.findall(r'(?:alt|aria-label|title|data-label)="([^"]*)"', text)
    text = unescape("\n".join([re.sub(r"<[^>]+>", "\n", text), *labels]))
    for each in known:
        text = text.replace(each, "")
    return re.findall(r"\b[A-Za-z][a-z']+ [a-z']{2,} [a-z']{2,}[^\n]*", text)
