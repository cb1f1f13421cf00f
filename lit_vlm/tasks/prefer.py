"""task=prefer: generate preference pairs (chosen, rejected) from a model's own answers. Read top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_vlm.config import Run
from lit_vlm.config.choices import ScorerName
from lit_vlm.config.schema import ValidationConfig
from lit_vlm.config.task_settings import PreferConfig
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.training_data import TrainingData
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED
from lit_vlm.formatting import format_count
from lit_vlm.preferences.answer_log import IMAGES, AnswerLog, find_template_day, get_log_folder
from lit_vlm.preferences.generator import (
    PAIR,
    PairGenerator,
    PairImages,
    find_image_root,
    get_sample_key,
    summarize_lines,
)
from lit_vlm.preferences.scorers import ExactScorer, ModelJudge, Scorer, load_custom_scorer
from lit_vlm.runs.run_folder import compute_model_digest, compute_sources_digest, require_finished_parent, to_plain
from lit_vlm.tasks.mixture_lock import get_template_date
from lit_vlm.tasks.open_run import RunPlace, open_sources
from lit_vlm.tasks.prepare_data import apply_quarantine, build_indexes, make_training_data
from lit_vlm.tasks.pretrained import PretrainedModel, open_pretrained
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

PROGRESS_SECONDS = 30.0


def generate_preferences(run: Run) -> None:
    """Generate answers, score them, choose pairs, write the preference pairs.

    An interrupted run resumes where it stopped. A finished run is reported and stays unchanged.

    Raises:
        UserError: a setting is missing, the output was made with other settings, or no pair was found.
    """
    config, output, init_from = run.config, Path(run.config.prefer.output), run.init_from
    assert init_from is not None  # a setting of this task is checked with the others
    require_single_process()
    require_finished_parent(init_from)
    open_model = partial(open_pretrained, model=config.model, accelerator=config.trainer.accelerator, seed=config.seed)
    model = open_model(init_from, template_date=find_template_day(output))
    limits = (config.data.tokens_per_micro_batch, config.data.tiles_per_micro_batch)
    scorer = LazyScorer(config.prefer, open_model, limits)
    data = replace(config.data, validation=choose_held_out(config.data.validation))
    place = RunPlace.from_settings(run.name, get_log_folder(output), config.run_dir, data.index_dir)
    training_data = make_training_data(
        place,
        open_sources(data, place, config.seed),
        model.spec,
        model.processor,
        data=data,
        stage=config.stage,
        trainer=config.trainer,
        seed=config.seed,
        debug=config.debug,
    )
    indexes = build_indexes(training_data)
    require_conversations(indexes.training)
    request = build_request(init_from, training_data, indexes.training, scorer, config.prefer, config.seed)
    answer_log = AnswerLog.open(output, request, overwrite=config.overwrite)
    if answer_log.is_finished:
        say(f"{output}: finished already. Start it anew with overwrite=true.")
        return
    apply_quarantine(training_data, indexes, data, place.dir)
    answer_log.start()
    index = indexes.training
    pending = [number for number in range(len(index)) if get_sample_key(index, number) not in answer_log.lines]
    say(
        f"{format_count(len(index), 'prompt')}, {len(index) - len(pending):,} of them answered before; the model is {init_from}"
    )
    if pending:
        pictures = PairImages(output.parent, answer_log.folder / IMAGES)
        maker = PairGenerator(model.load(), model.processor, scorer.load(), config.prefer, pictures, config.seed)
        generate_pairs(maker, answer_log, training_data, index, pending)
    ordered_lines = [answer_log.lines[get_sample_key(index, number)] for number in range(len(index))]
    rows = [row for line in ordered_lines for row in line["pairs"]]
    answer_log.write_output(rows, summarize_lines(ordered_lines))
    show_summary(answer_log, rows)


def generate_pairs(
    maker: PairGenerator, answer_log: AnswerLog, training_data: TrainingData, index: SampleIndex, pending: list[int]
) -> None:
    """Generate the pairs of all pending prompts. The result of a prompt is on the disk before the next prompts start."""
    started = last_report = time.monotonic()
    tokens, tiles = training_data.max_tokens, training_data.max_tiles
    try:
        for count, line in enumerate(maker.generate_lines(index, pending, max_tokens=tokens, max_tiles=tiles), 1):
            answer_log.add(line)
            if time.monotonic() - last_report > PROGRESS_SECONDS:
                last_report = time.monotonic()
                left = (last_report - started) / count * (len(pending) - count)
                say(
                    f"{count:,} of {format_count(len(pending), 'prompt')}; {format_count(round(left / 60), 'minute')} left"
                )
    except KeyboardInterrupt:
        say(f"interrupted; the same command resumes after {format_count(len(answer_log.lines), 'prompt')}")
        raise SystemExit(INTERRUPTED) from None


def require_single_process() -> None:
    """Raise UserError under torchrun with several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("task=prefer is one process on one device. Start it with python run.py, not with torchrun.")


def choose_held_out(validation: ValidationConfig) -> ValidationConfig:
    """Choose what is no prompt: samples that a stage holds out of its training sources are held out here as well."""
    return replace(validation, sources={}, fraction=0.0 if validation.sources else validation.fraction)


def require_conversations(index: SampleIndex) -> None:
    """Require that no source holds preference pairs.

    Raises:
        UserError: with the sources that do.
    """
    pair_sources = {index.sources[n].name for n in set(index.source_ids[index.chosen > 0])}
    if pair_sources:
        raise UserError(
            f"data.sources: {', '.join(sorted(pair_sources))}: preference pairs already; task=prefer makes them of conversations. "
            "Choose other data."
        )


class LazyScorer:
    """Scorer of the answers. The weights of a judge model are read by `load`, when there is an answer to score.

    Args:
        open_judge: opens the judge model.

    Raises:
        UserError: prefer.judge is neither a model nor a class.
    """

    def __init__(
        self,
        prefer: PreferConfig,
        open_judge: Callable[[str], PretrainedModel],
        micro_batch_limits: tuple[int, int],
    ) -> None:
        self.judge, self.micro_batch_limits = prefer.judge, micro_batch_limits
        self.custom_scorer: Scorer | None = None
        self.model: PretrainedModel | None = None
        if prefer.scorer is ScorerName.judge and self.judge is not None:
            if "/" in self.judge:  # parse made folders absolute; hub ids have a slash
                self.model = open_judge(self.judge)
            else:
                self.custom_scorer = load_custom_scorer(self.judge)

    def load(self) -> Scorer:
        """Return the scorer: exact match, a class of the user, or a judge model with its weights loaded."""
        if self.model is not None:
            return ModelJudge(self.model.load(), self.model.processor, *self.micro_batch_limits)
        return self.custom_scorer or ExactScorer()

    def get_identity(self) -> Any:
        """Return the name of the judge, or the digest of its weights."""
        if self.judge is None or self.model is None:
            return self.judge
        return compute_model_digest(self.judge) or self.judge


def build_request(
    init_from: str, training_data: TrainingData, index: SampleIndex, scorer: LazyScorer, prefer: PreferConfig, seed: int
) -> dict[str, Any]:
    """Build the request: all settings that change the pairs. Paths of files and batch sizes are no part of them."""
    settings = to_plain(asdict(prefer))
    del settings["output"], settings["judge"]
    return {
        "init_from": compute_model_digest(init_from) or init_from,
        "the data": [compute_sources_digest(training_data.sources), index.compute_digest()],
        "prefer.judge": scorer.get_identity(),
        "seed": seed,
        **get_template_date(training_data.processor),
        **{f"prefer.{name}": value for name, value in settings.items()},
    }


def show_summary(answer_log: AnswerLog, rows: list[dict[str, Any]]) -> None:
    """Show the counts of answers and prompts by result, and the command that trains on the pairs.

    Raises:
        UserError: there are no pairs.
    """
    table = Table(title=f"{answer_log.output.name}: what became of it", title_justify="left")
    for heading in ("of", "what", "count"):
        table.add_column(heading, justify="right" if heading == "count" else "left")
    for group, counts in summarize_lines(answer_log.lines.values()).items():
        title = "answers sampled" if group == "answers" else f"prompts for {group} pairs"
        for number, (result, count) in enumerate(counts.items()):
            table.add_row("" if number else title, result, f"{count:,}")
    console.print(table)
    if not rows:
        raise UserError(
            f"Not one {PAIR} came of it; the table says why, {answer_log.folder / 'answers.jsonl'} has every answer. Draw more or "
            "bolder answers (prefer.num_samples, prefer.temperature), let the known answer be chosen "
            "(prefer.reference_as_chosen=true), or allow longer ones (prefer.max_new_tokens)."
        )
    root = find_image_root([path for row in rows for path in row["images"]])
    image_root_override = f" data.sources.mine.image_root={root}" if root else ""
    say(f"{format_count(len(rows), 'pair')}: {answer_log.output}   Every answer: {answer_log.folder / 'answers.jsonl'}")
    say(
        f"Train on them with: stage=dpo data=preference data.sources.mine.path={answer_log.output}{image_root_override}"
    )
