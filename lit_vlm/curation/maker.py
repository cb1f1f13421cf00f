"""Generation of preference pairs from a model's own answers: sample, grade, choose, format."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.config.schema import PairKind, PreferConfig
from lit_vlm.curation.choice import Answer, Origin, Pair, Reason, State, control_pair, response_pair
from lit_vlm.curation.control import without_control
from lit_vlm.curation.records import Pictures, pair_row
from lit_vlm.curation.scorers import Scorer, grades_of
from lit_vlm.data.index.columns import Index
from lit_vlm.data.processor import Processor
from lit_vlm.evaluation.answers import Said, alike, draw
from lit_vlm.model.generate import Sampling
from lit_vlm.types import Sample

PAIR = "pair"  # outcome of a prompt that yields a pair
CHOOSE = {PairKind.response: response_pair, PairKind.control: control_pair}
ROOM = 4  # times the micro-batch limits of training: no activations are stored for a backward pass


class PairMaker:
    """Generator of preference pairs: one line for each sample with its answers, their states, and its pairs.

    Args:
        scorer: grades the answers.
        images: resolves and saves the images of pairs.
        seed: each answer's sampling depends on it, the sample's id and the answer's number alone.
    """

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        processor: Processor,
        scorer: Scorer,
        settings: PreferConfig,
        pictures: Pictures,
        seed: int,
    ) -> None:
        self.model, self.processor, self.scorer, self.settings = model, processor, scorer, settings
        self.pictures, self.seed = pictures, seed

    def lines(
        self, index: Index, numbers: Sequence[int], *, most_tokens: int, most_tiles: int
    ) -> Iterator[dict[str, Any]]:
        """Generate the lines of samples of the index, ordered by similar length.

        Args:
            numbers: samples of the index.
            max_tokens, max_tiles: limits of a micro-batch in training. A prompt counts once for each of its answers.
        """
        limits = {"most_tokens": ROOM * most_tokens // self.settings.num_samples, "most_tiles": ROOM * most_tiles}
        for batch in alike(index, numbers, **limits, new_tokens=self.settings.max_new_tokens):
            samples = [record for number in batch if isinstance(record := index.record(number), Sample)]
            for number, sample, answers in zip(batch, samples, self._graded(samples), strict=True):
                yield {"key": key_of(index, number)} | self._line(sample, answers)

    def _graded(self, samples: list[Sample]) -> list[list[Answer]]:
        """Sample and grade all answers of each sample, with the reference if it may be chosen."""
        answers = self._drawn(samples)
        if self.settings.reference_as_chosen:
            for sample, candidates in zip(samples, answers, strict=True):
                candidates.append(Answer(sample.messages[-1].content, Origin.reference, State.graded))
        flat = [(sample, answer) for sample, candidates in zip(samples, answers, strict=True) for answer in candidates]
        requests = [(sample, answer.text) for sample, answer in flat if answer.state is State.graded]
        grades = iter(grades_of(self.scorer, requests))
        return [[_with_grade(answer, grades) for answer in candidates] for candidates in answers]

    def _drawn(self, samples: list[Sample]) -> list[list[Answer]]:
        answers: list[list[Answer]] = [[] for _ in samples]
        uncontrolled = [
            without_control(sample) if PairKind.control in self.settings.kinds else None for sample in samples
        ]
        controlled = [n for n in range(len(samples)) if PairKind.response in self.settings.kinds or uncontrolled[n]]
        for indices, prompts, origin, count in (
            (controlled, [samples[n] for n in controlled], Origin.sample, self.settings.num_samples),
            (
                [n for n, one in enumerate(uncontrolled) if one],
                [one for one in uncontrolled if one],
                Origin.uncontrolled,
                1,
            ),
        ):
            if prompts:
                seeds = [[_seed(self.seed, sample.id, origin, n) for n in range(count)] for sample in prompts]
                sampling = Sampling(seeds, self.settings.temperature, self.settings.top_p)
                completions = draw(self.model, self.processor, prompts, self.settings.max_new_tokens, sampling)
                for n, completed in zip(indices, completions, strict=True):
                    answers[n] += [Answer(one.content, origin, _state(one)) for one in completed]
        return answers

    def _line(self, sample: Sample, answers: list[Answer]) -> dict[str, Any]:
        """Make the log line of a sample. Only samples whose question has a control token get control pairs."""
        outcome: dict[str, str] = {}
        pairs = []
        for kind in self.settings.kinds:
            if kind is PairKind.control and without_control(sample) is None:
                continue
            choice = CHOOSE[kind](answers, self.settings.min_margin)
            outcome[kind.value] = PAIR if isinstance(choice, Pair) else choice.value
            if isinstance(choice, Pair):
                pairs.append(pair_row(sample, choice, kind.value, self.pictures))
        metadata = {"id": sample.id, "kind": sample.kind.value, "language": sample.language.value}
        rows = [
            {"origin": answer.origin.value, "state": answer.state.value, "score": answer.score, "text": answer.text}
            for answer in answers
        ]
        return metadata | {"answers": rows, "outcome": outcome, "pairs": pairs}


def key_of(index: Index, number: int) -> str:
    """Return the key of a sample: source/position, unique among all sources."""
    return f"{index.sources[index.source_of[number]].name}/{int(index.position[number])}"


def summary_of(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Count the model's answers by `AnswerState`, and the prompts of each pair kind by outcome: pair, or `NoPairReason`."""
    answers: Counter[str] = Counter()
    prompts: dict[str, Counter[str]] = {}
    for line in lines:
        answers.update(row["state"] for row in line["answers"] if row["origin"] != Origin.reference)
        for kind, outcome in line["outcome"].items():
            prompts.setdefault(kind, Counter())[outcome] += 1
    ordered = {
        kind: {name: counts[name] for name in (PAIR, *Reason) if counts[name]} for kind, counts in prompts.items()
    }
    return {"answers": {state.value: answers[state] for state in State}} | ordered


def _state(said: Said) -> State:
    if not said.ended:
        return State.cut
    return State.graded if said.text.strip() else State.empty


def _with_grade(answer: Answer, grades: Iterator[float | None]) -> Answer:
    if answer.state is not State.graded:
        return answer
    grade = next(grades)
    return replace(answer, score=grade, state=State.ungraded if grade is None else State.graded)


def _seed(*place: object) -> int:
    """Compute a seed: the first 64 bits of the SHA-256 of the parts."""
    text = repr([str(part) for part in place])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")
