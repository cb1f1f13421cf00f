"""Built-in synthetic data: generated images with exact ground truth, unlimited, in Korean and English.

A sample is a pure function of the settings of the source and its index. So workers, ranks and resumed runs get the same
samples without files on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from lit_vlm.data.synthetic import image_tasks, preference, text_tasks
from lit_vlm.data.synthetic.scenes import GENERATOR_VERSION, Picture, Scene, SceneRng
from lit_vlm.types import (
    ContentPart,
    ImagePlaceholder,
    Language,
    Message,
    PreferencePair,
    Record,
    Role,
    Sample,
    SampleKind,
    UserError,
)

__all__ = ["GENERATOR_VERSION", "PATHS", "BuiltinSource", "Picture", "generate_corpus"]

TASKS: dict[SampleKind, Callable[[SceneRng], Scene]] = {
    SampleKind.caption: image_tasks.make_caption,
    SampleKind.word: text_tasks.make_word,
    SampleKind.number: text_tasks.make_number,
    SampleKind.grounding: image_tasks.make_grounding,
    SampleKind.ocr: text_tasks.make_ocr,
    SampleKind.referring: image_tasks.make_referring,
    SampleKind.instruction: image_tasks.make_instruction,
    SampleKind.document: text_tasks.make_document,
    SampleKind.table: image_tasks.make_table,
    SampleKind.chart: image_tasks.make_chart,
    SampleKind.arithmetic: text_tasks.make_arithmetic,
    SampleKind.text: text_tasks.make_text,
    SampleKind.image_only: image_tasks.make_image_only,
    SampleKind.multi_image: image_tasks.make_multi_image,
}
PATHS = (*TASKS, SampleKind.preference)
_PATH_NUMBERS = {kind: number for number, kind in enumerate(PATHS)}
_SLOTS = (ImagePlaceholder(0), ImagePlaceholder(1))


class BuiltinSource:
    """Source of synthetic samples of one kind, or of preference pairs (see types.Source).

    Args:
        path: one of `PATHS`.
        language: of every sample; `auto` alternates between Korean and English.
        num_samples: length of the source; sample i does not depend on it.
        hard: images of several tiles, with smaller text or more shapes.
        seed: not negative; another seed gives other samples.
        held_out: use seeds that no training source uses; texts without an image come from a part of their closed world
            that is never used in training.
    """

    def __init__(
        self,
        name: str,
        path: str,
        *,
        language: Language,
        num_samples: int,
        hard: bool = False,
        seed: int = 0,
        held_out: bool = False,
    ) -> None:
        if path not in _PATH_NUMBERS:
            raise UserError(
                f"data.sources.{name}.path: {path!r} is no built-in data; choose one of {', '.join(PATHS)}."
            )
        if num_samples < 1 or seed < 0:
            found = f"num_samples={num_samples}, seed={seed}"
            raise UserError(
                f"data.sources.{name}: {found}; built-in data need num_samples of 1 or more and a seed of 0 or more."
            )
        self.name, self.path, self.language = name, SampleKind(path), Language(language)
        self.num_samples, self.hard, self.seed, self.held_out = num_samples, bool(hard), seed, bool(held_out)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        language = self.language
        if language is Language.auto:
            language = Language.en if index % 2 else Language.ko
        rng = SceneRng(self._compute_seed(index, language), language, self.hard, self.held_out)
        return self._build_pair(index, rng) if self.path is SampleKind.preference else self._build_sample(index, rng)

    @property
    def digest(self) -> str:
        """Digest of the settings and the generator version."""
        settings = (GENERATOR_VERSION, self.path, self.language, self.num_samples, self.hard, self.seed, self.held_out)
        return hashlib.blake2b("|".join(map(str, settings)).encode(), digest_size=16).hexdigest()

    def _build_sample(self, index: int, rng: SceneRng) -> Sample:
        scene = TASKS[self.path](rng)
        messages: list[Message] = []
        for question, answer in scene.turns:
            messages += (_build_question(scene, question, first=not messages), Message(Role.assistant, answer))
        return Sample(
            self._format_id(index, rng),
            self.name,
            self._format_origin(index),
            self.path,
            rng.language,
            tuple(messages),
            scene.pictures,
        )

    def _build_pair(self, index: int, rng: SceneRng) -> PreferencePair:
        kind, scene, wrong = preference.make_pair(rng)
        ((question, answer),) = scene.turns
        return PreferencePair(
            self._format_id(index, rng),
            self.name,
            self._format_origin(index),
            kind,
            rng.language,
            prompt=(_build_question(scene, question, first=True),),
            chosen=Message(Role.assistant, answer),
            rejected=Message(Role.assistant, wrong),
            images=scene.pictures,
        )

    def _compute_seed(self, index: int, language: Language) -> int:
        """Compute a seed that is unique over all built-in samples: each part has its own bits."""
        assert index < 1 << 48
        task = _PATH_NUMBERS[self.path] << 2 | (language is Language.en) << 1 | self.hard
        return ((self.seed << 1 | self.held_out) << 48 | index) << 8 | task

    def _format_id(self, index: int, rng: SceneRng) -> str:
        part = "held_out" if self.held_out else "train"
        return f"{self.path}-{rng.language}{'-hard' if self.hard else ''}-{part}-{self.seed}-{index}"

    def _format_origin(self, index: int) -> str:
        return f"builtin:{self.path}:{index}"


def generate_corpus(seed: int = 0, per_task: int = 40) -> Iterator[str]:
    """Generate the texts of all tasks in both languages, to train a tokenizer: one string for each piece of text.

    Images and control tokens are left out: control tokens have their own ids and must not influence the merges.
    """
    for path in PATHS:
        for language in (Language.ko, Language.en):
            for hard in (False, True):
                source = BuiltinSource("corpus", path, language=language, num_samples=per_task, hard=hard, seed=seed)
                for index in range(len(source)):
                    for message in _get_messages(source[index]):
                        yield from (piece for piece in message.content if isinstance(piece, str))


def _build_question(scene: Scene, question: tuple[ContentPart, ...], *, first: bool) -> Message:
    """Build the turn of the user; the first one begins with the images."""
    return Message(Role.user, (*_SLOTS[: len(scene.pictures)], *question) if first else question)


def _get_messages(record: Record) -> tuple[Message, ...]:
    if isinstance(record, Sample):
        return record.messages
    return (*record.prompt, record.chosen, record.rejected)
