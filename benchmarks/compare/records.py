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

from benchmarks.flops_bound import Size
from lit_vlm.data.processor import Processor
from lit_vlm.model.tiny import CORPUS
from lit_vlm.types import ImageSlot, Kind, Language, Message, PreferencePair, Record, Role, Sample

SUPERVISED = 0.48  # supervised share of the text of a dialogue: 120 of 250 tokens
# grids (rows, columns) of an anyres mixture and their frequencies; two to ten tiles with the base view
GRIDS = {(1, 1): 2, (1, 2): 6, (3, 1): 3, (2, 2): 8, (1, 5): 1, (2, 3): 5, (4, 2): 2, (3, 3): 4}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Image that is already decoded."""

    image: Image.Image = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    def load(self) -> Image.Image:
        return self.image


class Maker:
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
        self.words = sorted({word for word in CORPUS.read_text(encoding="utf-8").split() if word.isalnum()})
        self.number = 0

    def records(self, count: int) -> list[Record]:
        """Generate a batch of records."""
        return [self.record() for _ in range(count)]

    def record(self) -> Record:
        """Generate the next record."""
        self.number += 1
        if self.shape.startswith("pairs"):
            grid = (1, 1) if self.shape == "pairs_1" else (2, 2)
            prompt, chosen, rejected = (
                self._length(*length) for length in ((100, 0.3, 10, 400),) + ((150, 0.3, 10, 600),) * 2
            )
            return self._pair(prompt, chosen, rejected, self._picture(*grid))
        if self.shape == "captions":
            return self._sample(0, self._length(13, 0.4, 5, 77), self._picture(1, 1))
        if self.shape == "even":
            return self._dialogue(round(250 * self.scale), self._picture(1, 1))
        draw = self.rng.random()
        if draw < (0.06 if self.shape == "mixture" else 0.15):
            return self._dialogue(self._length(700, 0.8, 40, 2048))
        if self.shape == "mixture":
            return self._dialogue(self._length(150, 0.8, 20, 1300), self._picture(1, 1))
        # plain transformers tiles each single image, so the minimum is two tiles: 15 % of the samples have that
        grid = (1, 1) if draw < 0.30 else self.rng.choices(list(GRIDS), list(GRIDS.values()))[0]
        return self._dialogue(self._length(180, 0.8, 20, 1500), self._picture(*grid))

    def _length(self, median: float, sigma: float, low: int, high: int) -> int:
        length = median * math.exp(sigma * self.rng.gauss(0, 1))
        return max(1, round(min(high, max(low, length)) * self.scale))

    def _dialogue(self, tokens: int, *pictures: Picture) -> Sample:
        answer = max(1, round(SUPERVISED * tokens))
        return self._sample(max(1, tokens - answer), answer, *pictures)

    def _sample(self, question: int, answer: int, *pictures: Picture) -> Sample:
        messages = (self._asked(question, pictures), Message(Role.assistant, (self._text(answer),)))
        return Sample(*self._names, Kind.other, Language.en, messages, pictures)

    def _pair(self, prompt: int, chosen: int, rejected: int, *pictures: Picture) -> PreferencePair:
        answers = (Message(Role.assistant, (self._text(length),)) for length in (chosen, rejected))
        prompt_messages = (self._asked(prompt, pictures),)
        return PreferencePair(*self._names, Kind.preference, Language.en, prompt_messages, *answers, pictures)

    @property
    def _names(self) -> tuple[str, str, str]:
        return f"{self.number}", self.shape, f"{self.shape}:{self.number}"

    def _asked(self, tokens: int, pictures: tuple[Picture, ...]) -> Message:
        text = (self._text(tokens),) if tokens else ()
        return Message(Role.user, (*(ImageSlot(i) for i in range(len(pictures))), *text))

    def _text(self, tokens: int) -> str:
        """Make a text of at least `tokens` tokens, and only slightly more."""
        words: list[str] = []
        count = 0
        while count < tokens:
            words.append(self.rng.choice(self.words))
            count += len(self.processor.template.ordinary_ids(" " + words[-1]))
        return " ".join(words)

    def _picture(self, rows: int, columns: int) -> Picture:
        """Make an image of smoothed coarse noise. It has the size of its tile grid, so only the base view is resized."""
        seed = self.rng.getrandbits(32)
        coarse = np.random.default_rng(seed).integers(0, 256, (4 * rows, 4 * columns, 3), dtype=np.uint8)
        return Picture(
            Image.fromarray(coarse).resize((columns * self.tile, rows * self.tile), Image.Resampling.BILINEAR)
        )


def size_of(processor: Processor, record: Record) -> Size:
    """Measure the token counts of a record for the FLOP formulas."""
    layouts = processor.layouts(record)
    sequences = processor.sequences(record, layouts)
    prompt = int(np.argmax(sequences[0].supervised))
    return Size(
        prompt,
        tuple(sequence.num_tokens - prompt for sequence in sequences),
        tuple(sequence.num_supervised for sequence in sequences),
        sum(layout.num_tiles for layout in layouts),
    )
