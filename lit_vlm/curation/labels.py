"""Labels: answers that are classes, and those of them that are probably wrong, by confident learning.

Confident learning (Northcutt et al., arXiv 1911.00068) is that of cleanlab. Its probabilities are out of sample: a linear classifier on
the features of a tower, cross-validated.

Shapes: N records of a source, C classes, E width of the features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lit_vlm.config.curation import LabelsConfig
from lit_vlm.curation.embeddings import BLOCK_RECORDS, EmbeddingStore, PictureEncoder, join_embeddings, list_images
from lit_vlm.curation.features import Features, OnProgress
from lit_vlm.curation.mixture import (
    CuratedMixture,
    CurationResult,
    Example,
    ResultTable,
    ScoreDistribution,
    choose_examples,
    iterate_batches,
    map_records,
)
from lit_vlm.curation.text_hashes import normalise_text
from lit_vlm.types import PreferencePair, Record, Role, Source, UserError

FOLDS = 5  # parts of the cross-validation
MAX_LENGTH = 40  # characters of an answer that may be a class
MAX_PAIRS = 10  # rows of the table of given and suggested labels
CHANCE_ERRORS = 2  # standard errors by which the classifier must be better than always naming the largest class


def require_packages() -> None:
    """Raise UserError if cleanlab is missing."""
    if find_spec("cleanlab") is None:
        raise UserError("curate.method=labels needs cleanlab: pip install -e '.[curate]' -c constraints.txt")


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """Question and answer of a record with one picture and one short answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class ClassSource:
    """Records of a source whose answers are classes.

    Attributes:
        records: their numbers in the mixture, [N].
        labels: class of each, [N].
        names: of the classes, [C].
        rare: number of records of the classes that have too few pictures, which are not among the records, by their name.
    """

    name: str
    records: np.ndarray
    labels: np.ndarray
    names: list[str]
    rare: dict[str, int]


@dataclass(frozen=True, slots=True)
class LabelCheck:
    """Labels of a source beside what the other records say.

    Attributes:
        suggested: most probable class of each record, [N].
        qualities: probability of the given label, [N].
        is_suspect: labels that confident learning holds for wrong, [N] bool.
        accuracy: share of the records whose most probable class is the given one, out of sample.
        largest: share of the largest class.
    """

    source: ClassSource
    suggested: np.ndarray
    qualities: np.ndarray
    is_suspect: np.ndarray
    accuracy: float
    largest: float

    @property
    def tells_classes(self) -> bool:
        """True if the classifier is better than naming the largest class always, by more than chance."""
        error = np.sqrt(self.largest * (1 - self.largest) / len(self.suggested))
        return self.accuracy > self.largest + CHANCE_ERRORS * error


# ------------------------------------------------------------------------------------------------------- classes


def read_labelled_answers(
    sources: Sequence[Source], *, workers: int, on_progress: OnProgress | None = None
) -> list[LabelledAnswer | None]:
    """Read the answers of all records; None for those that have not one picture and one short answer, or cannot be read."""
    return map_records(sources, read_labelled_answer, workers=workers, on_progress=on_progress)[0]


def read_labelled_answer(record: Record) -> LabelledAnswer | None:
    """Read question and answer of a record with one picture and one short answer; None for others."""
    if isinstance(record, PreferencePair) or len(record.images) != 1:
        return None
    answers = [message.text for message in record.messages if message.role is Role.assistant]
    answer = normalise_text(answers[0]) if len(answers) == 1 else ""
    if not 0 < len(answer) <= MAX_LENGTH:
        return None
    questions = (message.text for message in record.messages if message.role is not Role.assistant)
    return LabelledAnswer(normalise_text(" ".join(questions)), answer)


def make_class_key(answer: str) -> str:
    """Make the key of a class: its answers differ in capitals and a full stop only."""
    return answer.casefold().rstrip(".。! ") or answer


def find_classes(
    sources: Sequence[Source],
    answers: Sequence[LabelledAnswer | None],
    settings: LabelsConfig,
    contents: np.ndarray | None = None,
) -> tuple[list[ClassSource], dict[str, str]]:
    """Find the sources whose answers are classes.

    Args:
        answers: of all records.
        contents: digest of each record's picture, [R]; None: each record counts as a picture of its own.

    Returns:
        The sources with classes, and for each other one why it has none.
    """
    found, reasons, first = list[ClassSource](), dict[str, str](), 0
    for source in sources:
        records = range(first, first + len(source))
        first += len(source)
        own = {record: answer.answer for record in records if (answer := answers[record]) is not None}
        result = _find_source_classes(source.name, own, settings, contents)
        if isinstance(result, str):
            reasons[source.name] = result
        else:
            found.append(result)
    return found, reasons


def get_picture_digests(features: Features) -> np.ndarray:
    """Return the digest of the first picture of each record, [R] uint64; 0 for records without one."""
    digests = np.zeros(len(features.rows), np.uint64)
    records = np.flatnonzero(features.rows["num_images"])
    digests[records] = features.images["content"][features.first_images[records], 0]
    return digests


def _find_source_classes(
    name: str, answers: dict[int, str], settings: LabelsConfig, contents: np.ndarray | None
) -> ClassSource | str:
    """Find the classes of a source, or say why it has none."""
    if not answers:
        return f"no record has one picture and one answer of at most {MAX_LENGTH} characters"
    spellings, pictures = dict[str, Counter[str]](), dict[str, set]()
    for record, answer in answers.items():
        key = make_class_key(answer)
        spellings.setdefault(key, Counter())[answer] += 1
        pictures.setdefault(key, set()).add(record if contents is None else int(contents[record]))
    if len(spellings) > settings.max_classes:
        return (
            f"{len(spellings):,} different answers in {len(answers):,} records with a short one are more than "
            f"curate.labels.max_classes={settings.max_classes}"
        )
    names = {key: counter.most_common(1)[0][0] for key, counter in sorted(spellings.items())}
    frequent = [key for key in names if len(pictures[key]) >= settings.min_pictures]
    rare = {names[key]: spellings[key].total() for key in names if key not in set(frequent)}
    if len(frequent) < 2:
        return (
            f"of {len(names):,} different answers {len(frequent)} have curate.labels.min_pictures={settings.min_pictures} pictures, and "
            "two are needed"
        )
    numbers = {key: number for number, key in enumerate(frequent)}
    labels = {record: numbers[key] for record, answer in answers.items() if (key := make_class_key(answer)) in numbers}
    return ClassSource(
        name, np.array(list(labels)), np.array(list(labels.values())), [names[key] for key in frequent], rare
    )


def require_checkable(found: Sequence[object], reasons: dict[str, str]) -> None:
    """Raise UserError if no source can be checked."""
    if not found:
        listed = "\n".join(f"- {name}: {reason}" for name, reason in reasons.items())
        raise UserError(
            f"curate.method=labels: no source has answers that are classes, such as yes and no, and that can be checked:\n{listed}"
        )


# ------------------------------------------------------------------------------------------------------ features


def embed_answers(
    mixture: CuratedMixture,
    answers: Sequence[LabelledAnswer | None],
    source: ClassSource,
    encoder: PictureEncoder,
    index_dir: Path,
    *,
    batch_size: int,
    workers: int,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Compute the features of the records of a source, or read those that are there: [N, E] float32.

    They are those of the picture, and of the question behind them if the source asks several and the model reads texts.

    Args:
        batch_size: pictures or questions that the model sees at once.
        workers: threads that decode.

    Raises:
        RecordError: a picture cannot be decoded any more.
    """
    features, pictures, texts = mixture.features, list[np.ndarray](), list[np.ndarray]()
    chosen = [answer for record in source.records.tolist() if (answer := answers[record]) is not None]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(one.question for one in chosen))}
    with ThreadPoolExecutor(workers) as pool:
        store = EmbeddingStore(encoder, index_dir, batch_size, pool)
        for records in iterate_batches(source.records.tolist(), BLOCK_RECORDS):
            contents = features.images["content"][features.first_images[records]]
            pictures.append(store.embed(contents, partial(list_images, mixture.sources, features, records)))
            if on_progress:
                on_progress(source.name, sum(map(len, pictures)), len(source.records))
        if len(numbers) > 1 and store.reads_texts:
            texts = [store.embed_texts(some) for some in iterate_batches(numbers, BLOCK_RECORDS)]
    joined = join_embeddings(pictures)
    if texts:
        joined = np.concatenate([joined, join_embeddings(texts)[[numbers[one.question] for one in chosen]]], 1)
    return joined.astype(np.float32)


# --------------------------------------------------------------------------------------------------------- check


def check_labels(source: ClassSource, features: np.ndarray, pictures: np.ndarray, seed: int) -> LabelCheck:
    """Check the labels of a source by the features of its records.

    Args:
        features: [N, E].
        pictures: digest of each record's picture, [N]; records of one picture are in one part of the cross-validation.
        seed: of the parts.
    """
    from cleanlab.filter import find_label_issues  # an extra, and slow to import
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = source.labels
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    probabilities = cross_val_predict(classifier, features, labels, groups=pictures, cv=folds, method="predict_proba")
    suggested = probabilities.argmax(1)
    return LabelCheck(
        source,
        suggested,
        get_label_quality_scores(labels, probabilities),
        find_label_issues(labels, probabilities, n_jobs=1),
        float((suggested == labels).mean()),
        float(np.bincount(labels).max() / len(labels)),
    )


@dataclass(frozen=True, slots=True)
class Suspect:
    """Record whose label is probably wrong.

    Attributes:
        quality: probability of the given label.
    """

    record: int
    source: str
    given: str
    suggested: str
    quality: float


def list_suspects(checks: Sequence[LabelCheck]) -> list[Suspect]:
    """List the suspected records, those of the lowest quality first."""
    found = [
        Suspect(
            int(check.source.records[row]),
            check.source.name,
            check.source.names[check.source.labels[row]],
            check.source.names[check.suggested[row]],
            float(check.qualities[row]),
        )
        for check in checks
        for row in np.flatnonzero(check.is_suspect)
    ]
    return sorted(found, key=lambda suspect: (suspect.quality, suspect.record))


def collect_suspects(
    mixture: CuratedMixture,
    checks: Sequence[LabelCheck],
    reasons: dict[str, str],
    settings: LabelsConfig,
    num_shown: int,
) -> CurationResult:
    """Collect the suspected records, those of the lowest quality first; which of them leave is for the settings to say.

    Args:
        checks: of the sources that were checked.
        reasons: why the others were not.
    """
    suspects, limit = list_suspects(checks), settings.min_quality
    leaving = [suspect for suspect in suspects if limit is not None and suspect.quality < limit]
    staying = [suspect for suspect in suspects if limit is None or suspect.quality >= limit]
    lines = [
        mixture.describe(one.record)
        | {
            "given": one.given,
            "suggested": one.suggested,
            "quality": round(one.quality, 4),
            "left_out": limit is not None and one.quality < limit,
        }
        for one in suspects
    ]
    counts = [
        ("records whose label was checked", sum(len(check.suggested) for check in checks)),
        ("suspected labels", len(suspects)),
    ]
    return CurationResult(
        [one.record for one in leaving],
        lines,
        counts,
        list(_show_suspects(mixture, leaving, num_shown)),
        list(_show_suspects(mixture, staying, num_shown)),
        notes=list(_describe_unchecked(checks, reasons, settings)),
        tables=_make_tables(checks, suspects),
        scores=[_make_distribution(checks, limit)],
    )


def describe_chance(check: LabelCheck) -> str:
    """Say why a source is not checked whose classes the features do not tell apart."""
    return (
        f"the features do not tell its classes apart: the accuracy is {check.accuracy:.1%}, and the largest class has {check.largest:.1%} of "
        "the records"
    )


def _show_suspects(mixture: CuratedMixture, suspects: Sequence[Suspect], count: int) -> Iterator[Example]:
    """Show suspects of each pair of labels, spread from the lowest quality on."""
    pairs = [f"{one.source} {one.given} {one.suggested}" for one in suspects]
    for one in sorted(choose_examples(suspects, pairs, count), key=lambda suspect: suspect.quality):
        reason = f"given {one.given}, suggested {one.suggested}, quality {one.quality:.3f}"
        yield Example(reason, (mixture.show("suspected", one.record),))


def _describe_unchecked(checks: Sequence[LabelCheck], reasons: dict[str, str], settings: LabelsConfig) -> Iterator[str]:
    for name, reason in reasons.items():
        yield f"{name} was not checked: {reason}."
    for check in checks:
        if rare := check.source.rare:
            named = ", ".join(list(rare)[:MAX_PAIRS]) + (", ..." if len(rare) > MAX_PAIRS else "")
            yield (
                f"{check.source.name}: labels of fewer than curate.labels.min_pictures={settings.min_pictures} pictures, which were not "
                f"checked ({sum(rare.values()):,} records): {named}."
            )
    if settings.min_quality is None:
        yield (
            "No record leaves by its label. Look at the suspected ones, and set curate.labels.min_quality=<probability>, or 1 for all of "
            "them; the features are kept."
        )


def _make_tables(checks: Sequence[LabelCheck], suspects: Sequence[Suspect]) -> list[ResultTable]:
    """Make the tables of sources, and of given and suggested labels."""
    rows = [
        (
            check.source.name,
            f"{len(check.suggested):,}",
            f"{len(check.source.names):,}",
            f"{check.largest:.1%}",
            f"{check.accuracy:.1%}",
            f"{int(check.is_suspect.sum()):,}",
        )
        for check in checks
    ]
    headings = ("source", "records", "classes", "largest class", "accuracy", "suspected")
    tables = [ResultTable("Classes", headings, rows)]
    if suspects:
        pairs = Counter((one.source, one.given, one.suggested) for one in suspects).most_common(MAX_PAIRS)
        shown = [(f"{source}: {given} → {suggested}", f"{count:,}") for (source, given, suggested), count in pairs]
        tables.append(ResultTable("Given and suggested label", ("given → suggested", "records"), shown))
    return tables


def _make_distribution(checks: Sequence[LabelCheck], threshold: float | None) -> ScoreDistribution:
    series: dict[str, list[float]] = {"suspected": [], "others": []}
    for check in checks:
        for quality, is_suspect in zip(check.qualities.tolist(), check.is_suspect.tolist(), strict=True):
            series["suspected" if is_suspect else "others"].append(quality)
    return ScoreDistribution(
        "probability of the given label", {name: found for name, found in series.items() if found}, threshold
    )
