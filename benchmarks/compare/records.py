"""Synthetic samples and preference pairs from seeds, with the length distributions of real data sets.

Lengths are assumed, not counted: medians and spreads of the captions of LCS-558K, of LLaVA's 665K mixture and of an anyres
mixture. They are in Qwen2.5 text tokens, next to 729 tokens per tile, and are scaled by the tile's patches over 729. Images
are generated beforehand and kept in memory at the size of their grid, so no contender reads or decodes a file in a step.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from benchmarks.flops_bound import RecordSize
from lit_vlm.data.processor import Processor
from lit_vlm.model.tiny import CORPUS_FILE
from lit_vlm.types import ImagePlaceholder, Language, Message, PreferencePair, Record, Role, Sample, SampleKind

SUPERVISED_SHARE = 0.48  # supervised share of the text of a dialogue: 120 of 250 tokens
# grids (rows, columns) of an anyres mixture and their frequencies; two to ten tiles with the base view
GRIDS = {(1, 1): 2, (1, 2): 6, (3, 1): 3, (2, 2): 8, (1, 5): 1, (2, 3): 5, (4, 2): 2, (3, 3): 4}


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """Image that is already decoded."""

    image: Image.Image = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    def load(self) -> Image.Image:
        return self.image


class RecordGenerator:
    """Generator of synthetic records for one model size, from a seed.

    Args:
        processor: processor that counts tokens.
        shape: name of the distribution: "captions", "mixture", "anyres", "pairs_1" or "pairs_5" (tiles of the image), or
            "even" for dialogues of equal length.
        seed: seed of the generator.
    """

    def __init__(self, processor: Processor, shape: str, seed: int = 0) -> None:
        self.processor, self.shape = processor, shape
        self.rng = random.Random(f"{shape} {seed}")
        self.tile = processor.images.tile_size
        self.scale = processor.images.side**2 / 729
        self.words = sorted({word for word in CORPUS_FILE.read_text(encoding="utf-8").split() if word.isalnum()})
        self.number = 0

    def generate_batch(self, count: int) -> list[Record]:
        """Generate a batch of records."""
        return [self.generate() for _ in range(count)]

    def generate(self) -> Record:
        """Generate the next record."""
        self.number += 1
        if self.shape.startswith("pairs"):
            grid = (1, 1) if self.shape == "pairs_1" else (2, 2)
            prompt, chosen, rejected = (
                self._sample_length(*length) for length in ((100, 0.3, 10, 400),) + ((150, 0.3, 10, 600),) * 2
            )
            return self._make_pair(prompt, chosen, rejected, self._make_image(*grid))
        if self.shape == "captions":
            return self._make_sample(0, self._sample_length(13, 0.4, 5, 77), self._make_image(1, 1))
        if self.shape == "even":
            return self._make_dialogue(round(250 * self.scale), self._make_image(1, 1))
        draw = self.rng.random()
        if draw < (0.06 if self.shape == "mixture" else 0.15):
            return self._make_dialogue(self._sample_length(700, 0.8, 40, 2048))
        if self.shape == "mixture":
            return self._make_dialogue(self._sample_length(150, 0.8, 20, 1300), self._make_image(1, 1))
        # plain transformers tiles each single image, so the minimum is two tiles: 15 % of the samples have that
        grid = (1, 1) if draw < 0.30 else self.rng.choices(list(GRIDS), list(GRIDS.values()))[0]
        return self._make_dialogue(self._sample_length(180, 0.8, 20, 1500), self._make_image(*grid))

    def _sample_length(self, median: float, sigma: float, low: int, high: int) -> int:
        length = median * math.exp(sigma * self.rng.gauss(0, 1))
        return max(1, round(min(high, max(low, length)) * self.scale))

    def _make_dialogue(self, tokens: int, *images: DecodedImage) -> Sample:
        answer = max(1, round(SUPERVISED_SHARE * tokens))
        return self._make_sample(max(1, tokens - answer), answer, *images)

    def _make_sample(self, question: int, answer: int, *images: DecodedImage) -> Sample:
        messages = (self._make_question(question, images), Message(Role.assistant, (self._make_text(answer),)))
        return Sample(*self._names, SampleKind.other, Language.en, messages, images)

    def _make_pair(self, prompt: int, chosen: int, rejected: int, *images: DecodedImage) -> PreferencePair:
        answers = (Message(Role.assistant, (self._make_text(length),)) for length in (chosen, rejected))
        prompt_messages = (self._make_question(prompt, images),)
        return PreferencePair(*self._names, SampleKind.preference, Language.en, prompt_messages, *answers, images)

    @property
    def _names(self) -> tuple[str, str, str]:
        return f"{self.number}", self.shape, f"{self.shape}:{self.number}"

    def _make_question(self, tokens: int, images: tuple[DecodedImage, ...]) -> Message:
        text = (self._make_text(tokens),) if tokens else ()
        return Message(Role.user, (*(ImagePlaceholder(i) for i in range(len(images))), *text))

    def _make_text(self, tokens: int) -> str:
        """Make a text of at least `tokens` tokens, and only slightly more."""
        words: list[str] = []
        count = 0
        while count < tokens:
            words.append(self.rng.choice(self.words))
            count += len(self.processor.template.plain_tokenizer.encode(" " + words[-1], add_special_tokens=False))
        return " ".join(words)

    def _make_image(self, rows: int, columns: int) -> DecodedImage:
        """Make an image of smoothed coarse noise. It has the size of its tile grid, so only the base view is resized."""
        seed = self.rng.getrandbits(32)
        coarse = np.random.default_rng(seed).integers(0, 256, (4 * rows, 4 * columns, 3), dtype=np.uint8)
        return DecodedImage(
            Image.fromarray(coarse).resize((columns * self.tile, rows * self.tile), Image.Resampling.BILINEAR)
        )


def measure_record(processor: Processor, record: Record) -> RecordSize:
    """Measure the token counts of a record for the FLOP formulas."""
    layouts = processor.compute_layouts(record)
    sequences = processor.encode_sequences(record, layouts)
    prompt = int(np.argmax(sequences[0].supervised))
    return RecordSize(
        prompt,
        tuple(sequence.num_tokens - prompt for sequence in sequences),
        tuple(sequence.num_supervised for sequence in sequences),
        sum(layout.num_tiles for layout in layouts),
    )
