"""Preference pairs as JSONL rows that `data=preference` reads, and the files of their images."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_vlm.config.choices import PairKind
from lit_vlm.config.task_settings import PreferConfig
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.lazy_images import EncodedImage, FileImage, resolve_image_path
from lit_vlm.data.processor import Processor
from lit_vlm.data.staging import resolve_original_path
from lit_vlm.evaluation.generation import Completion, batch_by_length, sample_answers
from lit_vlm.files import atomic_write
from lit_vlm.model.generate import SamplingParams
from lit_vlm.preferences.pairs import (
    AnswerOrigin,
    AnswerPair,
    AnswerState,
    CandidateAnswer,
    NoPairReason,
    choose_control_pair,
    choose_response_pair,
    remove_control_token,
)
from lit_vlm.preferences.scorers import Scorer, compute_grades
from lit_vlm.types import ContentPart, ControlToken, ImagePlaceholder, LazyImage, Message, Role, Sample

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel


def build_pair_row(sample: Sample, pair: AnswerPair, pair_kind: str, images: PairImages) -> dict[str, Any]:
    """Build the JSONL row of a pair. Its images are on disk when this returns.

    Control tokens are separate parts of the content, so that a reader cannot take text for a control token.

    Args:
        pair_kind: "response" or "control".
        images: resolves and saves the images.
    """
    prompt = sample.messages[:-1]
    slots = [piece.index for message in prompt for piece in message.content if isinstance(piece, ImagePlaceholder)]
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "id": f"{sample.source}/{sample.id}/{pair_kind}",
        "pair": pair_kind,
        "kind": sample.kind.value,
        "language": sample.language.value,
        "prompt": [_convert_message(message) for message in prompt],
        "chosen": [_convert_message(Message(Role.assistant, chosen.content))],
        "rejected": [_convert_message(Message(Role.assistant, rejected.content))],
        "images": [images.resolve_path(sample.images[slot], sample.origin) for slot in slots],
        "scores": {"chosen": chosen.score, "rejected": rejected.score},
        "answers": {"chosen": chosen.origin.value, "rejected": rejected.origin.value},
        "origin": sample.origin,
        "marks": "text",  # control tokens and images are separate parts
    }


def _convert_message(message: Message) -> dict[str, Any]:
    """Convert a message: text alone becomes a string, other content a list of parts."""
    content = message.content
    if all(isinstance(piece, str) for piece in content):
        return {"role": message.role.value, "content": message.text}
    return {"role": message.role.value, "content": [_convert_part(piece) for piece in content]}


def _convert_part(piece: ContentPart) -> dict[str, str]:
    if isinstance(piece, ImagePlaceholder):
        return {"type": "image"}
    return (
        {"type": "control", "token": piece.token}
        if isinstance(piece, ControlToken)
        else {"type": "text", "text": piece}
    )


class PairImages:
    """Paths of images, relative to the folder of the pairs. An image without a file of its own is saved in `folder` first.

    Args:
        root: folder of the file of pairs, base of its relative paths.
        folder: folder below `root` for saved images; made when needed.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root.resolve(), folder
        self.outside: set[str] = set()  # folders of files that are not below `root`

    def resolve_path(self, image: LazyImage, origin: str) -> str:
        """Return the path of an image, relative to `root` where possible. An image without a file is saved first."""
        if isinstance(image, FileImage):
            location = resolve_original_path(resolve_image_path(image.path, image.root, origin, image.more_roots))
            if location.is_relative_to(self.root):
                return location.relative_to(self.root).as_posix()
            return location.as_posix()
        data, ending = _encode_image(image)
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{ending}"
        if not path.is_file():
            with atomic_write(path, "The pictures", "prefer.output") as draft:
                draft.write_bytes(data)
        return path.resolve().relative_to(self.root).as_posix()


def find_image_root(paths: Sequence[str]) -> str | None:
    """Find the common folder of all images outside the folder of the pairs; None if there are none."""
    outside = [os.path.dirname(path) for path in paths if os.path.isabs(path)]
    return os.path.commonpath(outside) if outside else None


def _encode_image(image: LazyImage) -> tuple[bytes, str]:
    """Return the encoded bytes of an image and its file ending; raw pixels are encoded as PNG."""
    if isinstance(image, EncodedImage):
        return image.read_encoded()
    stream = io.BytesIO()
    image.load().save(stream, format="PNG")
    return stream.getvalue(), "png"


PAIR = "pair"  # outcome of a prompt that yields a pair
PAIR_CHOOSERS = {PairKind.response: choose_response_pair, PairKind.control: choose_control_pair}
LIMIT_FACTOR = 4  # times the micro-batch limits of training: no activations are stored for a backward pass


class PairGenerator:
    """Generator of preference pairs: one line for each sample with its answers, their states, and its pairs.

    Args:
        scorer: grades the answers.
        images: resolves and saves the images of pairs.
        seed: each answer's sampling depends on it, the sample's id and the answer's number alone.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        scorer: Scorer,
        settings: PreferConfig,
        images: PairImages,
        seed: int,
    ) -> None:
        self.model, self.processor, self.scorer, self.settings = model, processor, scorer, settings
        self.images, self.seed = images, seed

    def generate_lines(
        self, index: SampleIndex, numbers: Sequence[int], *, max_tokens: int, max_tiles: int
    ) -> Iterator[dict[str, Any]]:
        """Generate the lines of samples of the index, ordered by similar length.

        Args:
            numbers: samples of the index.
            max_tokens, max_tiles: limits of a micro-batch in training. A prompt counts once for each of its answers.
        """
        limits = {
            "max_tokens": LIMIT_FACTOR * max_tokens // self.settings.num_samples,
            "max_tiles": LIMIT_FACTOR * max_tiles,
        }
        for batch in batch_by_length(index, numbers, **limits, new_tokens=self.settings.max_new_tokens):
            samples = [record for number in batch if isinstance(record := index.get_record(number), Sample)]
            for number, sample, answers in zip(batch, samples, self._grade_answers(samples), strict=True):
                yield {"key": get_sample_key(index, number)} | self._make_line(sample, answers)

    def _grade_answers(self, samples: list[Sample]) -> list[list[CandidateAnswer]]:
        """Sample and grade all answers of each sample, with the reference if it may be chosen."""
        answers = self._sample_answers(samples)
        if self.settings.reference_as_chosen:
            for sample, candidates in zip(samples, answers, strict=True):
                candidates.append(
                    CandidateAnswer(sample.messages[-1].content, AnswerOrigin.reference, AnswerState.graded)
                )
        flat = [(sample, answer) for sample, candidates in zip(samples, answers, strict=True) for answer in candidates]
        requests = [(sample, answer.text) for sample, answer in flat if answer.state is AnswerState.graded]
        grades = iter(compute_grades(self.scorer, requests))
        return [[_apply_grade(answer, grades) for answer in candidates] for candidates in answers]

    def _sample_answers(self, samples: list[Sample]) -> list[list[CandidateAnswer]]:
        answers: list[list[CandidateAnswer]] = [[] for _ in samples]
        uncontrolled = [
            remove_control_token(sample) if PairKind.control in self.settings.kinds else None for sample in samples
        ]
        controlled = [n for n in range(len(samples)) if PairKind.response in self.settings.kinds or uncontrolled[n]]
        for indices, prompts, origin, count in (
            (controlled, [samples[n] for n in controlled], AnswerOrigin.sample, self.settings.num_samples),
            (
                [n for n, one in enumerate(uncontrolled) if one],
                [one for one in uncontrolled if one],
                AnswerOrigin.uncontrolled,
                1,
            ),
        ):
            if prompts:
                seeds = [[_compute_seed(self.seed, sample.id, origin, n) for n in range(count)] for sample in prompts]
                sampling = SamplingParams(seeds, self.settings.temperature, self.settings.top_p)
                completions = sample_answers(
                    self.model, self.processor, prompts, self.settings.max_new_tokens, sampling
                )
                for n, completed in zip(indices, completions, strict=True):
                    answers[n] += [CandidateAnswer(one.content, origin, _get_state(one)) for one in completed]
        return answers

    def _make_line(self, sample: Sample, answers: list[CandidateAnswer]) -> dict[str, Any]:
        """Make the log line of a sample. Only samples whose question has a control token get control pairs."""
        outcome: dict[str, str] = {}
        pairs = []
        for kind in self.settings.kinds:
            if kind is PairKind.control and remove_control_token(sample) is None:
                continue
            choice = PAIR_CHOOSERS[kind](answers, self.settings.min_margin)
            outcome[kind.value] = PAIR if isinstance(choice, AnswerPair) else choice.value
            if isinstance(choice, AnswerPair):
                pairs.append(build_pair_row(sample, choice, kind.value, self.images))
        metadata = {"id": sample.id, "kind": sample.kind.value, "language": sample.language.value}
        rows = [
            {"origin": answer.origin.value, "state": answer.state.value, "score": answer.score, "text": answer.text}
            for answer in answers
        ]
        return metadata | {"answers": rows, "outcome": outcome, "pairs": pairs}


def get_sample_key(index: SampleIndex, number: int) -> str:
    """Return the key of a sample: source/position, unique among all sources."""
    return f"{index.sources[index.source_ids[number]].name}/{int(index.position[number])}"


def summarize_lines(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Count the model's answers by `AnswerState`, and the prompts of each pair kind by outcome: pair, or `NoPairReason`."""
    answers: Counter[str] = Counter()
    prompts: dict[str, Counter[str]] = {}
    for line in lines:
        answers.update(row["state"] for row in line["answers"] if row["origin"] != AnswerOrigin.reference)
        for kind, outcome in line["outcome"].items():
            prompts.setdefault(kind, Counter())[outcome] += 1
    ordered = {
        kind: {name: counts[name] for name in (PAIR, *NoPairReason) if counts[name]} for kind, counts in prompts.items()
    }
    return {"answers": {state.value: answers[state] for state in AnswerState}} | ordered


def _get_state(completion: Completion) -> AnswerState:
    if not completion.is_complete:
        return AnswerState.cut
    return AnswerState.graded if completion.text.strip() else AnswerState.empty


def _apply_grade(answer: CandidateAnswer, grades: Iterator[float | None]) -> CandidateAnswer:
    if answer.state is not AnswerState.graded:
        return answer
    grade = next(grades)
    return replace(answer, score=grade, state=AnswerState.ungraded if grade is None else AnswerState.graded)


def _compute_seed(*parts: object) -> int:
    """Compute a seed: the first 64 bits of the SHA-256 of the parts."""
    text = repr([str(part) for part in parts])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")
