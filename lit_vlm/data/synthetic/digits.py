"""Source of scikit-learn's 1,797 handwritten digits: real images that need no download.

Source: https://doi.org/10.24432/C50P49 (CC BY 4.0), as bundled with scikit-learn.
"""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from lit_vlm.data.lazy_images import ArrayImage
from lit_vlm.types import ImagePlaceholder, Language, Message, Role, Sample, SampleKind

NUM_HELD_OUT = 297  # the last digits are held out
SIDE_PX = 56  # pixels; 7 times the 8 of the original
_QUESTION = {Language.ko: "이 숫자는 무엇인가요?", Language.en: "What digit is this?"}


class DigitsSource:
    """Source with one question for each digit. `Language.auto` alternates between Korean and English."""

    def __init__(
        self,
        name: str,
        language: Language,
        *,
        kind: SampleKind = SampleKind.digit,
        limit: int | None = None,
        held_out: bool = False,
    ) -> None:
        pictures, answers = _load_images_and_answers()
        num_training = len(answers) - NUM_HELD_OUT
        selected = slice(num_training, None) if held_out else slice(0, num_training)
        self.name, self._language, self._kind = name, language, kind
        self._first = selected.start
        self._pictures, self._answers = pictures[selected][:limit], answers[selected][:limit]
        settings = ("digits", SIDE_PX, str(language), str(kind), self._first, len(self))
        self.digest = hashlib.sha256(repr(settings).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._first + index
        language = self._language
        if language is Language.auto:
            language = (Language.ko, Language.en)[number % 2]
        question = Message(Role.user, (ImagePlaceholder(0), _QUESTION[language]))
        answer = Message(Role.assistant, (str(self._answers[index]),))
        origin = f"digits[{number}]"
        image = ArrayImage(_resize_digit(self._pictures[index]), origin)
        return Sample(f"digit-{number}", self.name, origin, self._kind, language, (question, answer), (image,))


def _load_images_and_answers() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes a second, so other formats do not import it

    digits = load_digits()
    return digits.images, digits.target  # [1797, 8, 8] float, 0 to 16; [1797] int


def _resize_digit(picture: np.ndarray) -> np.ndarray:
    grey = Image.fromarray((picture * (255 / 16)).round().astype(np.uint8))
    return np.asarray(grey.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).convert("RGB"))
