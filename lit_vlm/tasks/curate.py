"""task=curate: find duplicates, rows of benchmarks or personal data in a mixture, and select the other records. Read top to bottom."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lit_vlm.config import Run
from lit_vlm.config.choices import BalanceGroup, CurationMethod, Format
from lit_vlm.config.curation import METHOD_SETTINGS, CurateConfig
from lit_vlm.config.schema import DataConfig
from lit_vlm.curation.balance import CONCEPTS_KEY, balance_concepts, balance_groups, match_records, read_groups
from lit_vlm.curation.benchmark_features import read_benchmarks
from lit_vlm.curation.capfilt import (
    SYNTHETIC,
    WEB,
    PictureText,
    caption_records,
    filter_texts,
    read_web_texts,
)
from lit_vlm.curation.concepts import read_concepts
from lit_vlm.curation.contamination import find_near_pictures, search_leaks
from lit_vlm.curation.duplicates import search_duplicates
from lit_vlm.curation.embeddings import embed_pictures
from lit_vlm.curation.features import FEATURES_FOLDER, Features, compute_features, hash_share, make_text_features
from lit_vlm.curation.labels import (
    LabelCheck,
    check_labels,
    collect_suspects,
    describe_chance,
    embed_answers,
    find_classes,
    get_picture_digests,
    read_labelled_answers,
    require_checkable,
)
from lit_vlm.curation.labels import require_packages as require_label_packages
from lit_vlm.curation.mixture import CuratedMixture, CurationResult, mark_left_out, require_readable
from lit_vlm.curation.personal_data import collect_personal_data, require_packages, search_sources
from lit_vlm.curation.picture_hashes import HASH_VERSION
from lit_vlm.curation.prune import prune_captions, read_captions, score_captions
from lit_vlm.data.index.shard_cache import hash_parts
from lit_vlm.data.selection import (
    RowsIdentity,
    Selection,
    check_selection,
    identify_rows,
    read_selection,
)
from lit_vlm.data.sources import choose_all_records, open_source
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.formatting import format_count
from lit_vlm.model.image_text import load_blip_matcher, load_captioner, load_picture_encoder, load_scorer
from lit_vlm.runs.run_folder import to_plain
from lit_vlm.tasks.curate_results import OUTPUT_KEY, require_same_request, show_results, write_results
from lit_vlm.tasks.submit import make_hashing_job, submit_curation
from lit_vlm.tasks.terminal import say, show_progress
from lit_vlm.types import Source, UserError, flatten

MODEL_KEY, CAPTIONER_KEY = "curate.model", "curate.capfilt.captioner"


@dataclass(frozen=True, slots=True)
class CurationInputs:
    """What a search reads: all records of the sources, and settings.

    Attributes:
        identities: of the records of each source.
        selections: that the sources had already.
        index_dir: folder in which features are kept.
        workers: processes that read.
        seed: of what is drawn.
    """

    settings: CurateConfig
    data: DataConfig
    benchmarks: list[str]
    benchmark_files: str | None
    sources: list[Source]
    identities: list[RowsIdentity]
    selections: list[Selection | None]
    index_dir: Path
    workers: int
    seed: int

    def make_mixture(self, features: Features) -> CuratedMixture:
        """Make the mixture from the features of its records.

        Raises:
            UserError: no record can be read.
        """
        is_out = mark_left_out(features, self.selections)
        mixture = CuratedMixture(self.sources, self.identities, self.selections, features, is_out)
        require_readable(mixture)
        return mixture

    def hash_records(self) -> CuratedMixture:
        """Hash texts and pictures of all records, or read the hashes that are there."""
        with show_progress("hash") as on_progress:
            features = compute_features(self.sources, self.index_dir, workers=self.workers, on_progress=on_progress)
        if features.num_outdated:
            say(
                f"{self.index_dir / FEATURES_FOLDER}: the hashes of {format_count(features.num_outdated, 'block')} of records are of an older "
                f"version than {HASH_VERSION} and were not read; their pictures were hashed anew."
            )
        return self.make_mixture(features)


def curate(run: Run) -> None:
    """Curate the sources of a mixture; write a selection for each source, lists, a summary and a page.

    Raises:
        UserError: a source cannot be read, nothing could be compared, or the output belongs to another search.
    """
    config, settings = run.config, run.config.curate
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "task=curate is one process, which starts workers. Start it with python run.py, not with torchrun."
        )
    output = Path(settings.output) if settings.output else run.dir / settings.method.value
    index_dir = Path(config.data.index_dir or Path(config.run_dir) / "index")
    sources = open_whole_sources(config.data, index_dir, config.seed)
    inputs = CurationInputs(
        settings,
        config.data,
        config.benchmarks,
        config.evaluate.files,
        sources,
        [identify_rows(source) for source in sources],
        read_selections(config.data, sources),
        index_dir,
        config.data.index_workers or os.cpu_count() or 1,
        config.seed,
    )
    if settings.worker is not None:
        hash_own_share(inputs)
        return
    request = make_request(inputs)
    if settings.slurm is not None:
        require_same_request(output, request, overwrite=config.overwrite)
        submit_curation(
            make_hashing_job(
                f"{run.name}/{settings.method.value}",
                output,
                run.overrides,
                config.submit,
                config.trainer,
                config.data,
                config.run_dir,
                settings.slurm,
            )
        )
        return
    with RunLock(output, f"Wait for it, or write elsewhere with {OUTPUT_KEY}=...") as run_lock:
        run_lock.acquire()
        require_same_request(output, request, overwrite=config.overwrite)
        mixture, result = SEARCHES[settings.method](inputs)
        write_results(output, mixture, result, settings, request)
    show_results(output, mixture, result, settings)


def hash_own_share(inputs: CurationInputs) -> None:
    """Hash the share of the records that is that of this job of the array."""
    settings = inputs.settings
    assert settings.worker is not None and settings.slurm is not None
    with show_progress("hash") as on_progress:
        options: dict[str, Any] = {"workers": inputs.workers, "on_progress": on_progress}
        own, total = hash_share(inputs.sources, inputs.index_dir, settings.worker, settings.slurm, **options)
    say(f"job {settings.worker} of {settings.slurm}: hashed {own} of {format_count(total, 'block')} of records")


def curate_duplicates(inputs: CurationInputs) -> tuple[CuratedMixture, CurationResult]:
    """Search for duplicates within and across the sources."""
    settings, embeddings = inputs.settings, None
    encoder = load_picture_encoder(Path(settings.model), MODEL_KEY) if settings.model else None
    mixture = inputs.hash_records()
    if encoder is not None:
        with show_progress("encode") as on_progress:
            options: dict[str, Any] = {"batch_size": settings.batch_size, "workers": inputs.workers}
            embeddings = embed_pictures(
                inputs.sources, mixture.features, encoder, inputs.index_dir, on_progress=on_progress, **options
            )
    return mixture, search_duplicates(mixture, settings, embeddings, workers=inputs.workers)


def curate_contamination(inputs: CurationInputs) -> tuple[CuratedMixture, CurationResult]:
    """Search for the pictures and questions of benchmarks.

    Raises:
        UserError: no benchmark could be read.
    """
    settings, files = inputs.settings, Path(inputs.benchmark_files or "")
    encoder = load_picture_encoder(Path(settings.model), MODEL_KEY) if settings.model else None
    mixture = inputs.hash_records()
    names, max_pixels = inputs.benchmarks or list(BENCHMARKS), inputs.data.max_image_pixels
    benchmarks = read_benchmarks(names, files, inputs.index_dir, max_pixels=max_pixels, workers=inputs.workers)
    for name, reason in benchmarks.unchecked.items():
        say(f"{name}: not checked: {reason}")
    if not benchmarks.rows:
        raise UserError(
            f"evaluate.files={files}: no benchmark could be read, so nothing was checked; see the reasons above."
        )
    near = None
    if encoder is not None:
        with show_progress("encode") as on_progress:
            options: dict[str, Any] = {"batch_size": settings.batch_size, "workers": inputs.workers}
            asked = (
                inputs.sources,
                mixture.features,
                benchmarks,
                encoder,
                inputs.index_dir,
                settings.min_cosine or 1.0,
            )
            near = find_near_pictures(*asked, on_progress=on_progress, **options)
    with show_progress("search") as on_progress:
        options = {"max_pixels": max_pixels, "workers": inputs.workers, "on_progress": on_progress}
        return mixture, search_leaks(mixture, settings, benchmarks, inputs.index_dir, near=near, **options)


def curate_personal(inputs: CurationInputs) -> tuple[CuratedMixture, CurationResult]:
    """Search for personal data in texts; pictures are not read."""
    require_packages()
    with show_progress("read") as on_progress:
        personal = search_sources(inputs.sources, workers=inputs.workers, on_progress=on_progress)
    mixture = inputs.make_mixture(make_text_features(inputs.sources, personal.errors))
    return mixture, collect_personal_data(mixture, personal, inputs.settings)


def curate_balance(inputs: CurationInputs) -> tuple[CuratedMixture, CurationResult]:
    """Choose records so that groups or concepts are balanced; pictures are not decoded."""
    settings, options = inputs.settings.balance, {"seed": inputs.seed, "num_shown": inputs.settings.num_shown}
    with show_progress("read") as on_progress:
        if BalanceGroup.concept in settings.by:
            concepts = match_records(inputs.sources, settings, workers=inputs.workers, on_progress=on_progress)
            mixture = inputs.make_mixture(make_text_features(inputs.sources, concepts.errors))
            return mixture, balance_concepts(mixture, concepts, settings, **options)
        groups = read_groups(inputs.sources, settings, workers=inputs.workers, on_progress=on_progress)
        mixture = inputs.make_mixture(make_text_features(inputs.sources, groups.errors))
        return mixture, balance_groups(mixture, groups, settings, **options)


def curate_prune(inputs: CurationInputs) -> tuple[CuratedMixture, CurationResult]:
    """Choose records whose caption fits the picture, by a model, and is no poor text.

    Raises:
        UserError: the model cannot be used, or there is nothing to look at.
    """
    settings = inputs.settings
    scorer = load_scorer(Path(settings.model), MODEL_KEY) if settings.model else None
    with show_progress("read") as on_progress:
        read = read_captions(inputs.sources, settings.prune.kinds, workers=inputs.workers, on_progress=on_progress)
    captions, errors, score_name = read.captions, read.errors, ""
    if not any(captions):
        raise UserError(
            f"curate.prune.kinds: no record that can be read is of the kinds {', '.join(settings.prune.kinds)}, so there is nothing to "
            "look at. Name other kinds whose answers are captions."
        )
    scores: list[float | None] = [None] * len(captions)
    if scorer is not None:
        score_name = scorer.score_name
        numbers = [number for number, caption in enumerate(captions) if caption and caption.num_images]
        if not numbers:
            raise UserError(
                f"{MODEL_KEY}: no record of the kinds {', '.join(settings.prune.kinds)} has a picture, so nothing can be scored. Name "
                "other kinds with curate.prune.kinds=[...], or leave the model out."
            )
        places = list_places(inputs.sources)
        with show_progress("score") as on_progress:
            found, broken = score_captions(
                inputs.sources,
                [places[number] for number in numbers],
                [captions[number].text for number in numbers],  # type: ignore[union-attr]
                scorer,
                inputs.index_dir,
                batch_size=settings.batch_size,
                workers=inputs.workers,
                on_progress=on_progress,
            )
        for number, score in zip(numbers, found, strict=True):
            scores[number] = score
        errors |= {numbers[number]: message for number, message in broken.items()}
    mixture = inputs.make_mixture(make_text_features(inputs.sources, errors))
    languages = [source.language for source in inputs.data.sources.values()]
    return mixture, prune_captions(mixture, captions, scores, settings.prune, languages, score_name, settings.num_shown)


def list_places(sources: Sequence[Source]) -> list[tuple[int, int]]:
    """List (number of the source, position) of all records."""
    return [(number, position) for number, source in enumerate(sources) for position in range(len(source))]


def curate_capfilt(inputs: CurationInputs) -> tuple[CuratedMixture, CurationResult]:
    """Write captions, and keep those and the records' own texts that match their picture.

    Raises:
        UserError: a model cannot be used, or no record has one picture and one answer.
    """
    settings = inputs.settings.capfilt
    matcher = load_blip_matcher(Path(inputs.settings.model or ""), MODEL_KEY)
    captioner = load_captioner(Path(settings.captioner), CAPTIONER_KEY) if settings.captioner else None
    with show_progress("read") as on_progress:
        web, errors = read_web_texts(inputs.sources, settings.kinds, workers=inputs.workers, on_progress=on_progress)
    numbers = [number for number, text in enumerate(web) if text is not None]
    if not numbers:
        raise UserError(
            f"curate.capfilt.kinds: no record of the kinds {', '.join(settings.kinds)} has one picture and one answer, so there is "
            "nothing to filter."
        )
    places = list_places(inputs.sources)
    options: dict[str, Any] = {"batch_size": inputs.settings.batch_size, "workers": inputs.workers}
    texts = [PictureText(number, WEB, web[number] or "") for number in numbers]
    if captioner is not None:
        at = [places[number] for number in numbers]
        with show_progress("caption") as on_progress:
            captions, broken = caption_records(
                inputs.sources, at, captioner, inputs.index_dir, inputs.seed, on_progress=on_progress, **options
            )
        errors |= {numbers[number]: message for number, message in broken.items()}
        made = zip(numbers, captions, strict=True)
        texts += [PictureText(number, SYNTHETIC, caption) for number, caption in made if caption]
    at = [places[one.record] for one in texts]
    with show_progress("filter") as on_progress:
        scores, broken = score_captions(
            inputs.sources,
            at,
            [one.text for one in texts],
            matcher,
            inputs.index_dir,
            on_progress=on_progress,
            **options,
        )
    errors |= {texts[number].record: message for number, message in broken.items()}
    mixture = inputs.make_mixture(make_text_features(inputs.sources, errors))
    scored = [replace(one, score=score) for one, score in zip(texts, scores, strict=True)]
    return mixture, filter_texts(
        mixture,
        scored,
        min_score=settings.min_score,
        num_shown=inputs.settings.num_shown,
        num_others=len(web) - len(numbers),
    )


def curate_labels(inputs: CurationInputs) -> tuple[CuratedMixture, CurationResult]:
    """Check the answers that are classes by the features of a tower.

    Raises:
        UserError: cleanlab is missing, the model cannot be used, or no source can be checked.
    """
    require_label_packages()
    settings, labels, sources = inputs.settings, inputs.settings.labels, inputs.sources
    encoder = load_picture_encoder(Path(settings.model or ""), MODEL_KEY)
    with show_progress("read") as on_progress:
        answers = read_labelled_answers(sources, workers=inputs.workers, on_progress=on_progress)
    require_checkable(*find_classes(sources, answers, labels))  # before pictures are hashed
    mixture = inputs.hash_records()
    features = mixture.features
    is_unused = (features.rows["is_bad"] > 0) | mixture.is_out
    answers = [None if unused else answer for answer, unused in zip(answers, is_unused, strict=True)]
    pictures = get_picture_digests(features)
    found, reasons = find_classes(sources, answers, labels, pictures)
    checks = list[LabelCheck]()
    with show_progress("encode") as on_progress:
        options: dict[str, Any] = {"batch_size": settings.batch_size, "workers": inputs.workers}
        for one in found:
            embedded = embed_answers(
                mixture, answers, one, encoder, inputs.index_dir, on_progress=on_progress, **options
            )
            check = check_labels(one, embedded, pictures[one.records], inputs.seed)
            if check.tells_classes:
                checks.append(check)
            else:
                reasons[one.name] = describe_chance(check)
    require_checkable(checks, reasons)
    return mixture, collect_suspects(mixture, checks, reasons, labels, settings.num_shown)


SEARCHES: dict[CurationMethod, Callable[[CurationInputs], tuple[CuratedMixture, CurationResult]]] = {
    CurationMethod.duplicates: curate_duplicates,
    CurationMethod.contamination: curate_contamination,
    CurationMethod.personal: curate_personal,
    CurationMethod.balance: curate_balance,
    CurationMethod.prune: curate_prune,
    CurationMethod.capfilt: curate_capfilt,
    CurationMethod.labels: curate_labels,
}


def open_whole_sources(data: DataConfig, index_dir: Path, seed: int) -> list[Source]:
    """Open all records of each source: selections, fractions and numbers of samples apply to training only."""
    for name, source in data.sources.items():
        limit = None if source.format == Format.builtin else source.num_samples
        if source.fraction is not None or limit is not None:
            say(
                f"data.sources.{name}: all of its records are looked at, so that the selection holds for any share of them"
            )
    return [
        open_source(
            name, choose_all_records(source), max_image_pixels=data.max_image_pixels, seed=seed, cache=index_dir
        )
        for name, source in data.sources.items()
    ]


def read_selections(data: DataConfig, sources: Sequence[Source]) -> list[Selection | None]:
    """Read the selections that the sources have already, and check that they belong to these records."""
    selections: list[Selection | None] = []
    for (name, config), source in zip(data.sources.items(), sources, strict=True):
        if config.selection is None:
            selections.append(None)
            continue
        setting = f"data.sources.{name}.selection"
        selection = read_selection(Path(config.selection), setting)
        check_selection(selection, source, setting)
        selections.append(selection)
    return selections


def make_request(inputs: CurationInputs) -> dict[str, Any]:
    """Make the description of a search: its settings, and the digests of all that it reads, as JSON values."""
    used, method = to_plain(asdict(inputs.settings)), inputs.settings.method
    names = ["method", *METHOD_SETTINGS.get(method, ())]
    names += [name for name in ("model", "min_cosine") if used[name] is not None]
    request: dict[str, Any] = {"curate": flatten({name: used[name] for name in names})}
    if method is CurationMethod.contamination:
        request |= {"evaluate.files": inputs.benchmark_files, "benchmarks": list(inputs.benchmarks)}
    if method in (CurationMethod.balance, CurationMethod.capfilt, CurationMethod.labels):
        request["seed"] = inputs.seed
    if method is CurationMethod.balance and (concepts := inputs.settings.balance.concepts):
        request[CONCEPTS_KEY] = hash_parts(*read_concepts(Path(concepts), CONCEPTS_KEY))
    request["sources"] = [
        {"name": source.name, **asdict(identity), "left_out": selection.left_out if selection else []}
        for source, identity, selection in zip(inputs.sources, inputs.identities, inputs.selections, strict=True)
    ]
    return json.loads(json.dumps(request))
