"""Contamination in preflight: are rows of benchmarks in the records that it looks at?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_vlm.config.choices import Certainty
from lit_vlm.config.curation import CurateConfig
from lit_vlm.config.schema import DataConfig
from lit_vlm.curation.benchmark_features import BenchmarkFeatures, read_benchmarks
from lit_vlm.curation.contamination import search_leaks
from lit_vlm.curation.features import compute_features
from lit_vlm.curation.mixture import CuratedMixture, CurationResult
from lit_vlm.evaluation.benchmarks import BENCHMARKS
from lit_vlm.formatting import format_count
from lit_vlm.reports.curation import show_examples
from lit_vlm.reports.preflight.facts import BenchmarkRow, ContaminationFacts, Finding, PreflightFacts, Severity
from lit_vlm.tasks.terminal import show_progress
from lit_vlm.types import Source


def check_contamination(
    files: Path,
    names: Sequence[str],
    sources: Sequence[Source],
    index_dir: Path,
    data: DataConfig,
    num_shown: int,
    facts: PreflightFacts,
) -> None:
    """Compare the records of sources with benchmarks; fill in the facts, and a finding for what was found.

    The hashes are kept in the index folder, where task=curate finds those of whole sources.

    Args:
        files: evaluate.files.
        names: of the benchmarks; empty: all.
    """
    workers, max_pixels = data.index_workers or os.cpu_count() or 1, data.max_image_pixels
    names = names or list(BENCHMARKS)
    benchmarks = read_benchmarks(names, files, index_dir, max_pixels=max_pixels, workers=workers)
    if not benchmarks.rows:
        facts.contamination = ContaminationFacts(0, [], benchmarks.unchecked)
        message = f"evaluate.files={files}: no benchmark could be read, so the data were compared with none."
        facts.findings.append(Finding(Severity.warning, message, "\n".join(benchmarks.unchecked.values())))
        return
    with show_progress("compare") as on_progress:
        features = compute_features(sources, index_dir, workers=workers, on_progress=on_progress)
        nothing_out = np.zeros(len(features.rows), bool)
        mixture = CuratedMixture(list(sources), [], [None] * len(sources), features, nothing_out)
        settings = CurateConfig(num_shown=num_shown)
        options: dict[str, Any] = {"max_pixels": max_pixels, "workers": workers}
        result = search_leaks(mixture, settings, benchmarks, index_dir, on_progress=on_progress, **options)
    facts.contamination = _summarize(result, benchmarks, len(features.rows))
    if result.left_out:
        facts.findings.append(_make_finding(result, facts.contamination))


def _summarize(result: CurationResult, benchmarks: BenchmarkFeatures, num_records: int) -> ContaminationFacts:
    rows = [
        BenchmarkRow(
            name,
            len(opened),
            benchmarks.num_bad_rows.get(name, 0),
            {one.value: _count(result, name, one) for one in Certainty},
        )
        for name, opened in benchmarks.rows.items()
    ]
    shown = [*result.examples_out, *result.examples_kept]
    return ContaminationFacts(num_records, rows, benchmarks.unchecked, result.lines, show_examples(shown))


def _count(result: CurationResult, benchmark: str, certainty: Certainty) -> int:
    return sum(line["benchmark"] == benchmark and line["certainty"] == certainty.value for line in result.lines)


def _make_finding(result: CurationResult, found: ContaminationFacts) -> Finding:
    names = ", ".join(row.name for row in found.benchmarks if row.num_sure)
    records = format_count(len(result.left_out), "record")
    return Finding(
        Severity.warning,
        f"A picture or a question of a benchmark ({names}) is in {records}, so its scores would count what was trained on.",
        "Leave them out: task=curate curate.method=contamination with the same settings, then data.drop_contaminated=true.",
    )
