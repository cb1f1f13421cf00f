"""task=prefer: generate preference pairs (chosen, rejected) from a model's own answers. Read top to bottom."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_vlm.config import Run, RunConfig
from lit_vlm.config.schema import ScorerName
from lit_vlm.curation.answer_log import IMAGES, AnswerLog, find_template_day, get_log_folder
from lit_vlm.curation.generator import PAIR, PairGenerator, PairImages, find_image_root, get_sample_key, summarize_lines
from lit_vlm.curation.scorers import ExactScorer, ModelJudge, Scorer, load_custom_scorer
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.packing.mixture_lock import TEMPLATE_DATE_KEY
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED
from lit_vlm.formatting import format_count
from lit_vlm.runs.run_folder import compute_sources_digest, describe_parent, require_finished_parent, to_plain
from lit_vlm.tasks.prepare_data import StageData, apply_quarantine, make_datamodule, open_sources
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
    config, output = run.config, Path(run.config.prefer.output)
    require_single_process()
    require_finished_parent(run.init_from)
    model = open_pretrained(run.init_from, config, find_template_day(output))
    scorer = LazyScorer(config)
    stage_data = prepare_prompts(run, model)
    answer_log = AnswerLog.open(output, build_request(run, stage_data.datamodule, scorer), overwrite=config.overwrite)
    if answer_log.is_finished:
        say(f"{output}: finished already. Start it anew with overwrite=true.")
        return
    apply_quarantine(stage_data)
    answer_log.start()
    index = stage_data.datamodule.index
    pending = [number for number in range(len(index)) if get_sample_key(index, number) not in answer_log.lines]
    say(
        f"{format_count(len(index), 'prompt')}, {len(index) - len(pending):,} of them asked before; the model is {run.init_from}"
    )
    if pending:
        pictures = PairImages(output.parent, answer_log.folder / IMAGES)
        maker = PairGenerator(model.load(), model.processor, scorer.load(), config.prefer, pictures, config.seed)
        generate_pairs(maker, answer_log, stage_data.datamodule, pending)
    ordered_lines = [answer_log.lines[get_sample_key(index, number)] for number in range(len(index))]
    rows = [row for line in ordered_lines for row in line["pairs"]]
    answer_log.write_output(rows, summarize_lines(ordered_lines))
    show_summary(answer_log, rows)


def generate_pairs(maker: PairGenerator, answer_log: AnswerLog, datamodule: DataModule, pending: list[int]) -> None:
    """Generate the pairs of all pending prompts. The result of a prompt is on the disk before the next prompts start."""
    started = last_report = time.monotonic()
    tokens, tiles = datamodule.max_tokens, datamodule.max_tiles
    try:
        for count, line in enumerate(
            maker.generate_lines(datamodule.index, pending, max_tokens=tokens, max_tiles=tiles), 1
        ):
            answer_log.add(line)
            if time.monotonic() - last_report > PROGRESS_SECONDS:
                last_report = time.monotonic()
                left = (last_report - started) / count * (len(pending) - count)
                say(
                    f"{count:,} of {format_count(len(pending), 'prompt')}; {format_count(round(left / 60), 'minute')} left"
                )
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on behind {format_count(len(answer_log.lines), 'prompt')}")
        raise SystemExit(INTERRUPTED) from None


def require_single_process() -> None:
    """Raise UserError under torchrun with several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("task=prefer is one process on one device. Start it with python run.py, not with torchrun.")


def prepare_prompts(run: Run, model: PretrainedModel) -> StageData:
    """Index the training samples as prompts for the model. Samples that a stage holds out are held out here as well.

    Raises:
        UserError: a source holds preference pairs.
    """
    data, folder = run.config.data, get_log_folder(Path(run.config.prefer.output))
    has_validation_sources = bool(data.validation.sources)
    validation = replace(
        data.validation, sources={}, fraction=0.0 if has_validation_sources else data.validation.fraction
    )
    run = replace(run, config=replace(run.config, data=replace(data, validation=validation)), dir=folder)
    sources, _ = open_sources(run)
    datamodule = make_datamodule(run, model.processor, sources, [], model.spec)
    datamodule.build_indexes()
    pair_sources = {
        datamodule.index.sources[n].name for n in set(datamodule.index.source_ids[datamodule.index.chosen > 0])
    }
    if pair_sources:
        raise UserError(
            f"data.sources: {', '.join(sorted(pair_sources))}: preference pairs already; task=prefer makes them of conversations. "
            "Choose other data."
        )
    return StageData(run, sources, [], model.spec, datamodule)


class LazyScorer:
    """Scorer of the answers. The weights of a judge model are read by `load`, when there is an answer to score.

    Raises:
        UserError: prefer.judge is neither a model nor a class.
    """

    def __init__(self, config: RunConfig) -> None:
        self.judge: str | None = config.prefer.judge
        self.is_exact = config.prefer.scorer is ScorerName.exact
        is_class = self.judge is not None and "/" not in self.judge  # parse made folders absolute; hub ids have a slash
        self.custom_scorer: Scorer | None = load_custom_scorer(self.judge) if is_class else None
        self.model = None if self.is_exact or is_class else open_pretrained(self.judge, config)
        self.micro_batch_limits = (config.data.tokens_per_micro_batch, config.data.tiles_per_micro_batch)

    def load(self) -> Scorer:
        """Return the scorer: exact match, a class of the user, or a judge model with its weights loaded."""
        if self.is_exact:
            return ExactScorer()
        return self.custom_scorer or ModelJudge(self.model.load(), self.model.processor, *self.micro_batch_limits)

    def get_identity(self) -> Any:
        """Return the name of the judge, or the digest of its weights."""
        return self.judge if self.model is None else describe_parent(self.judge)["digest"] or self.judge


def build_request(run: Run, datamodule: DataModule, scorer: LazyScorer) -> dict[str, Any]:
    """Build the request: all settings that change the pairs. Paths of files and batch sizes are no part of them."""
    settings = to_plain(asdict(run.config.prefer))
    del settings["output"], settings["judge"]
    return {
        "init_from": describe_parent(run.init_from)["digest"] or run.init_from,
        "the data": [compute_sources_digest(datamodule.sources), datamodule.index.compute_digest()],
        "prefer.judge": scorer.get_identity(),
        "seed": run.config.seed,
        **(
            {TEMPLATE_DATE_KEY: template.day.isoformat()}
            if (template := datamodule.processor.template).is_date_dependent
            else {}
        ),
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
        title = "answers drawn" if group == "answers" else f"prompts for {group} pairs"
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
