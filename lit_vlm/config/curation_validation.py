"""Validation of the settings of task=curate."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.choices import BalanceGroup, CurationMethod, DuplicateKind, PictureMatch
from lit_vlm.config.curation import METHOD_SETTINGS, BalanceConfig, CurateConfig
from lit_vlm.config.schema import RunConfig
from lit_vlm.config.slurm_options import find_submit_errors
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.types import Language, SampleKind, find_nearest, format_suggestion

HASHING_METHODS = (CurationMethod.duplicates, CurationMethod.contamination)


def find_curate_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of task=curate."""
    curate = config.curate
    if not config.data.sources:
        yield "data.sources: is empty; task=curate reads the sources of a mixture, e.g. data=own with data.sources."
    if config.data.drop_contaminated:
        yield "data.drop_contaminated: has no effect here, task=curate looks at all records. It belongs to the run that trains."
    yield from _find_slurm_errors(config)
    defaults = CurateConfig()
    for method, names in METHOD_SETTINGS.items():
        for name in names:
            if name == "pictures" and curate.method is CurationMethod.contamination:
                continue
            if method is not curate.method and getattr(curate, name) != getattr(defaults, name):
                yield f"curate.{name}: is read with curate.method={method.value} only, and the method is {curate.method.value}."
    is_other_search = curate.method is CurationMethod.duplicates and curate.duplicates is not DuplicateKind.texts
    if is_other_search and curate.min_similarity != defaults.min_similarity:
        yield "curate.min_similarity: compares texts, so it is read with curate.duplicates=texts only."
    if curate.method is CurationMethod.contamination:
        if curate.pictures in (PictureMatch.bytes, PictureMatch.pixels):
            yield (
                f"curate.pictures={curate.pictures.value}: curate.method=contamination always compares bytes, pixels and views. Leave it "
                "out, or set embedding to compare the features of a tower too."
            )
        if config.evaluate.files is None:
            yield "evaluate.files is not set: curate.method=contamination reads benchmarks from local files, <files>/<benchmark>/."
        for name in config.benchmarks:
            if name not in BENCHMARKS:
                suggestion = format_suggestion(find_nearest(name, BENCHMARKS))
                yield f"benchmarks: there is no {name}; there are {', '.join(BENCHMARKS)}.{suggestion}"
    elif config.benchmarks:
        yield f"benchmarks: is read with curate.method=contamination only, and the method is {curate.method.value}."
    if curate.method is CurationMethod.balance:
        yield from find_balance_errors(curate.balance)
    if curate.method is CurationMethod.prune:
        yield from _find_prune_errors(curate)
    elif curate.method is CurationMethod.capfilt:
        yield from _find_capfilt_errors(config)
    elif curate.method is CurationMethod.labels:
        yield from _find_label_errors(curate)
    else:
        yield from _find_embedding_errors(curate)


def _find_slurm_errors(config: RunConfig) -> Iterator[str]:
    curate = config.curate
    if curate.slurm is None:
        if curate.worker is not None:
            yield "curate.worker: is one of curate.slurm=<jobs>, which is not set."
        return
    if curate.method not in HASHING_METHODS:
        yield f"curate.slurm: shares the hashing of pictures, and curate.method={curate.method.value} hashes none. Take it away."
    if curate.worker is not None and curate.worker >= curate.slurm:
        yield f"curate.worker={curate.worker}: there are curate.slurm={curate.slurm} jobs, numbered from 0."
    if config.submit.container is not None:
        yield "submit.container: the jobs of curate.slurm start on the node itself; leave it out."
    yield from find_submit_errors(config)


def find_balance_errors(balance: BalanceConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of curate.method=balance."""
    key = "curate.balance"
    if not balance.by or len(set(balance.by)) != len(balance.by):
        yield f"{key}.by: must name some of {', '.join(BalanceGroup.__members__)}, each once."
    if BalanceGroup.concept in balance.by:
        if len(balance.by) > 1:
            yield f"{key}.by: concept stands alone, because a record has several concepts. Balance by the others in a second search."
        if balance.concepts is None:
            yield f"{key}.concepts is not set: by=[concept] needs a text file with one concept a line."
        for name in ("shares", "max_per_group"):
            if getattr(balance, name):
                yield f"{key}.{name}: has no effect with by=[concept]; {key}.max_per_concept is its limit."
        return
    for name, default in (("concepts", None), ("max_per_concept", 20_000), ("keep_unmatched", False)):
        if getattr(balance, name) != default:
            yield f"{key}.{name}: is read with {key}.by=[concept] only."
    if not balance.shares and balance.max_per_group is None:
        yield f"{key}: nothing is asked. Set {key}.shares={{<group>: <share>}} or {key}.max_per_group=<records>."
    if sum(balance.shares.values()) > 1 + 1e-6:
        yield f"{key}.shares: sum to {sum(balance.shares.values()):g}, and the whole is 1."
    if balance.lengths != sorted(set(balance.lengths)):
        yield f"{key}.lengths: must ascend, found {balance.lengths}."
    yield from _find_group_errors(balance)


def _find_embedding_errors(curate: CurateConfig) -> Iterator[str]:
    """Yield an error message for each setting of pictures=embedding that is missing, or that has no effect."""
    is_embedding = curate.pictures is PictureMatch.embedding
    if is_embedding and curate.method not in HASHING_METHODS:
        return  # refused as a setting of another method
    for name, needed in (("model", "<folder of a vision tower>"), ("min_cosine", "<cosine>, e.g. 0.95")):
        value = getattr(curate, name)
        if is_embedding and value is None:
            yield f"curate.{name} is not set: curate.pictures=embedding needs it. Set curate.{name}={needed}."
        elif not is_embedding and value is not None:
            readers = "curate.method=prune, capfilt or labels, and with " if name == "model" else ""
            yield f"curate.{name}: is read with {readers}curate.pictures=embedding only."


def _find_prune_errors(curate: CurateConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of curate.method=prune."""
    prune, key = curate.prune, "curate.prune"
    if curate.model is None and not prune.rules:
        yield f"{key}: nothing is asked. Set curate.model=<folder>, or name rules in {key}.rules."
    for name in ("min_score", "lowest_share"):
        if getattr(prune, name) is not None and curate.model is None:
            yield f"{key}.{name}: needs the scores of a model, and curate.model is not set."
    if prune.min_score is not None and prune.lowest_share is not None:
        yield f"{key}: min_score and lowest_share are two thresholds for one score. Take one of them away."
    yield from _find_kind_errors(f"{key}.kinds", prune.kinds)


def _find_capfilt_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of curate.method=capfilt."""
    if config.curate.model is None:
        yield "curate.model is not set: curate.method=capfilt filters by a local folder of a BlipForImageTextRetrieval."
    for name, source in config.data.sources.items():
        if source.generated is not None:
            yield f"data.sources.{name}.generated: curate.method=capfilt writes such a file from the records' own turns. Leave it out."
    yield from _find_kind_errors("curate.capfilt.kinds", config.curate.capfilt.kinds)


def _find_label_errors(curate: CurateConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of curate.method=labels."""
    if curate.model is None:
        yield (
            "curate.model is not set: curate.method=labels compares pictures by the features of a tower. Set curate.model=<folder of a "
            "vision tower>."
        )
    if curate.min_cosine is not None:
        yield "curate.min_cosine: is read with curate.pictures=embedding only."


def _find_kind_errors(setting: str, kinds: list[str]) -> Iterator[str]:
    for name in kinds:
        if name not in list(SampleKind):
            suggestion = format_suggestion(find_nearest(name, list(SampleKind)))
            yield f"{setting}: there is no kind {name}; there are {', '.join(SampleKind)}.{suggestion}"


def _find_group_errors(balance: BalanceConfig) -> Iterator[str]:
    """Yield an error message for each share of a group that cannot be."""
    known: dict[BalanceGroup, list[str]] = {
        BalanceGroup.kind: list(SampleKind),
        BalanceGroup.language: [Language.ko, Language.en],
    }
    for group in balance.shares:
        parts = group.split("/")
        if len(parts) != len(balance.by):
            example = "/".join(by.value for by in balance.by)
            yield f"curate.balance.shares: {group} names {len(parts)} of {len(balance.by)} properties; write <{example}>."
            continue
        for by, part in zip(balance.by, parts, strict=True):
            if by in known and part not in known[by]:
                suggestion = format_suggestion(find_nearest(part, known[by]))
                yield f"curate.balance.shares: there is no {by.value} {part}; there are {', '.join(known[by])}.{suggestion}"
