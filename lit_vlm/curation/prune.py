"""Pruning: captions that do not fit their picture by a model's score, and captions of poor text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lit_vlm.config.curation import PruneConfig
from lit_vlm.curation.features import OnProgress, hash_content
from lit_vlm.curation.ledger import ModelLedger
from lit_vlm.curation.mixture import (
    CuratedMixture,
    CurationResult,
    Example,
    ScoreDistribution,
    choose_examples,
    iterate_batches,
    map_records,
    read_images,
)
from lit_vlm.curation.text_hashes import normalise_text
from lit_vlm.curation.text_quality import find_text_faults, is_hangul
from lit_vlm.model.image_text import ImageTextScorer
from lit_vlm.types import Language, LazyImage, PreferencePair, Record, RecordError, Role, Source

SCORES = "match"  # name of the ledger


@dataclass(frozen=True, slots=True)
class Caption:
    """Caption of a record: the answers of its turns.

    Attributes:
        language: of the text itself: Korean if it has Hangul.
        num_images: pictures of the record.
    """

    text: str
    language: Language
    num_images: int


@dataclass(frozen=True, slots=True)
class ReadCaptions:
    """Captions of all records, None for records of other kinds and those that cannot be read, and the messages of these."""

    captions: list[Caption | None]
    errors: dict[int, str]


def read_captions(
    sources: Sequence[Source], kinds: Sequence[str], *, workers: int, on_progress: OnProgress | None = None
) -> ReadCaptions:
    """Read the captions of the records of some kinds; no picture is read."""

    def read(record: Record) -> Caption | None:
        return read_answers(record) if record.kind.value in kinds else None

    found, errors = map_records(sources, read, workers=workers, on_progress=on_progress)
    return ReadCaptions(found, errors)


def read_answers(record: Record) -> Caption | None:
    """Read the answers of a record as one text; None for a preference pair."""
    if isinstance(record, PreferencePair):
        return None
    answers = [message.text for message in record.messages if message.role is Role.assistant]
    text = normalise_text(" ".join(answers))
    return Caption(text, Language.ko if any(map(is_hangul, text)) else Language.en, len(record.images))


def score_captions(
    sources: Sequence[Source],
    places: Sequence[tuple[int, int]],
    texts: Sequence[str],
    scorer: ImageTextScorer,
    index_dir: Path,
    *,
    batch_size: int,
    workers: int,
    on_progress: OnProgress | None = None,
) -> tuple[list[float | None], dict[int, str]]:
    """Score the pictures of records with a text each; of several pictures the best one counts.

    Args:
        places: (number of the source, position) of each record.
        texts: of the records.
        index_dir: folder of the ledger.
        batch_size: pictures that the model sees at once.
        workers: threads that decode.

    Returns:
        Scores, None for records whose pictures cannot be read, and the messages of these by number.
    """
    ledger, errors = ModelLedger(index_dir, SCORES, scorer.digest), dict[int, str]()
    scores: list[float | None] = [None] * len(places)

    def look_up(number: int, images: tuple[LazyImage, ...] | str) -> tuple[int, list[tuple[str, LazyImage]], str]:
        try:
            if isinstance(images, str):
                return number, [], images
            return number, [(make_score_key(hash_content(image), texts[number]), image) for image in images], ""
        except RecordError as error:
            return number, [], str(error)

    with ThreadPoolExecutor(workers) as pool:
        for numbers in iterate_batches(range(len(places)), batch_size):
            read = read_images(sources, [places[number] for number in numbers])
            found = list(pool.map(look_up, numbers, read))
            missing = {
                key: (image, texts[number]) for number, keyed, _ in found for key, image in keyed if key not in ledger
            }
            broken = _score_missing(missing, ledger, scorer, pool, batch_size)
            for number, keyed, message in found:
                messages = [message] if message else [broken[key] for key, _ in keyed if key in broken]
                if messages:
                    errors[number] = messages[0]
                elif keyed:
                    scores[number] = max(ledger[key] for key, _ in keyed)
            if on_progress:
                on_progress("pictures", numbers[-1] + 1, len(places))
    return scores, errors


def make_score_key(content: bytes, text: str) -> str:
    """Make the key of a score: picture and text, whatever their file or record."""
    return xxhash.xxh3_128_hexdigest(content + text.encode("utf-8", "surrogatepass"))


def _score_missing(
    missing: dict[str, tuple[LazyImage, str]],
    ledger: ModelLedger,
    scorer: ImageTextScorer,
    pool: ThreadPoolExecutor,
    batch_size: int,
) -> dict[str, str]:
    """Score pictures with texts by key, and write the scores. Returns the messages of pictures that cannot be decoded."""
    broken: dict[str, str] = {}
    for keys in iterate_batches(missing, batch_size):
        loaded = dict(zip(keys, pool.map(load_picture, (missing[key][0] for key in keys)), strict=True))
        broken |= {key: image for key, image in loaded.items() if isinstance(image, str)}
        usable = {key: image for key, image in loaded.items() if not isinstance(image, str)}
        if usable:
            values = scorer.score(list(usable.values()), [missing[key][1] for key in usable])
            ledger.add(dict(zip(usable, map(float, values), strict=True)))
    return broken


def load_picture(image: LazyImage) -> Any:
    """Decode a picture; or return the message of its error."""
    try:
        return image.load()
    except RecordError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------------- result


def prune_captions(
    mixture: CuratedMixture,
    captions: Sequence[Caption | None],
    scores: Sequence[float | None],
    settings: PruneConfig,
    languages: Sequence[Language],
    score_name: str,
    num_shown: int,
) -> CurationResult:
    """Choose the records that leave: their caption breaks a rule, or their score is too low.

    Args:
        captions, scores: of all records.
        languages: that each source declares.
        score_name: what the score is; "" without a model.
    """
    bad = mixture.features.rows["is_bad"] > 0
    records = [
        record for record, caption in enumerate(captions) if caption and not bad[record] and not mixture.is_out[record]
    ]
    scored = {record: score for record in records if (score := scores[record]) is not None}
    threshold = find_threshold(list(scored.values()), settings)
    reasons: dict[int, list[str]] = {}
    for record in records:
        caption = captions[record]
        assert caption is not None
        language = languages[mixture.features.source_ids[record]]
        faults = [rule.value for rule in find_text_faults(caption.text, language) if rule in settings.rules]
        if threshold is not None and scored.get(record, threshold) < threshold:
            faults.append("low_score")
        if faults:
            reasons[record] = faults
    counts = [("captions that were looked at", len(records))]
    numbers = Counter(reason for found in reasons.values() for reason in found)
    counts += [(name.replace("_", " "), number) for name, number in numbers.most_common()]
    lines = [
        mixture.describe(record) | {"reasons": found, "score": _round_score(scored.get(record))}
        for record, found in reasons.items()
    ]
    return CurationResult(
        list(reasons),
        lines,
        counts,
        list(_show_left_out(mixture, reasons, scored, num_shown)),
        list(_show_lowest(mixture, reasons, scored, num_shown)),
        notes=list(_describe_missing(records, captions, scored, threshold, score_name)),
        scores=_make_distribution(captions, scored, threshold, score_name),
    )


def find_threshold(scores: Sequence[float], settings: PruneConfig) -> float | None:
    """Find the score below which records leave: that of the settings, or that of the lowest share. None: no record leaves."""
    if settings.min_score is not None:
        return settings.min_score
    if settings.lowest_share is None or not scores:
        return None
    ordered = np.sort(np.array(scores))
    return float(ordered[min(int(settings.lowest_share * len(ordered)), len(ordered) - 1)])


def _round_score(score: float | None) -> float | None:
    return None if score is None else round(score, 4)


def _show_left_out(
    mixture: CuratedMixture, reasons: dict[int, list[str]], scored: dict[int, float], count: int
) -> Iterator[Example]:
    chosen = choose_examples(list(reasons), [found[0] for found in reasons.values()], count)
    for record in chosen:
        text = ", ".join(reason.replace("_", " ") for reason in reasons[record])
        yield Example(_add_score(text, scored.get(record)), (mixture.show("left out", record),))


def _show_lowest(
    mixture: CuratedMixture, reasons: dict[int, list[str]], scored: dict[int, float], count: int
) -> Iterator[Example]:
    """Show records that stay, spread over their scores from the lowest on."""
    kept = sorted((record for record in scored if record not in reasons), key=lambda record: scored[record])
    for record in choose_examples(kept, [""] * len(kept), count):
        yield Example(_add_score("", scored[record]), (mixture.show("stays", record),))


def _add_score(text: str, score: float | None) -> str:
    shown = "" if score is None else f"score {score:.3f}"
    return "; ".join(filter(None, (text, shown)))


def _describe_missing(
    records: Sequence[int],
    captions: Sequence[Caption | None],
    scored: dict[int, float],
    threshold: float | None,
    score_name: str,
) -> Iterator[str]:
    if num_others := sum(caption is None for caption in captions):
        yield f"Records of other kinds, or that cannot be read, which were not looked at (curate.prune.kinds): {num_others:,}."
    if not score_name:
        yield "No picture was compared with its text: curate.model names no model."
        return
    if len(scored) < len(records):
        yield f"Captions without a picture, and so without a score: {len(records) - len(scored):,}."
    if threshold is None:
        yield (
            "No record leaves by its score. Read a threshold off the histogram, and set curate.prune.min_score or "
            "curate.prune.lowest_share; the scores are kept."
        )


def _make_distribution(
    captions: Sequence[Caption | None], scored: dict[int, float], threshold: float | None, score_name: str
) -> list[ScoreDistribution]:
    by_language: dict[str, list[float]] = {}
    for record, score in scored.items():
        caption = captions[record]
        assert caption is not None
        by_language.setdefault(caption.language.value, []).append(score)
    return [ScoreDistribution(score_name, by_language, threshold)] if scored else []
