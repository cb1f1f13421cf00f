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
from lit_vlm.curation.journal import IMAGES, Journal, find_day, folder_of
from lit_vlm.curation.maker import PAIR, PairMaker, key_of, summary_of
from lit_vlm.curation.records import Pictures, image_root
from lit_vlm.curation.scorers import Exact, ModelJudge, Scorer, own_scorer
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.plan.lock import DAY
from lit_vlm.engine.exits import INTERRUPTED
from lit_vlm.engine.run_folder import digest_of_sources, parent_of, require_parent, to_plain
from lit_vlm.tasks.finished import Finished, open_finished
from lit_vlm.tasks.stage_data import StageData, make_datamodule, open_sources, settle
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError, counted

LINE_SECONDS = 30.0


def prefer(run: Run) -> None:
    """Generate answers, score them, choose pairs, write the preference pairs.

    An interrupted run resumes where it stopped. A finished run is reported and stays unchanged.

    Raises:
        UserError: a setting is missing, the output was made with other settings, or no pair was found.
    """
    config, output = run.config, Path(run.config.prefer.output)
    require_one_process()
    require_parent(run.init_from)
    model = open_finished(run.init_from, config, find_day(output))
    scorer = Scoring(config)
    stage_data = samples_of(run, model)
    answer_log = Journal.open(output, question_of(run, stage_data.datamodule, scorer), overwrite=config.overwrite)
    if answer_log.finished:
        say(f"{output}: finished already. Start it anew with overwrite=true.")
        return
    settle(stage_data)
    answer_log.start()
    index = stage_data.datamodule.index
    pending = [number for number in range(len(index)) if key_of(index, number) not in answer_log.lines]
    say(
        f"{counted(len(index), 'prompt')}, {len(index) - len(pending):,} of them asked before; the model is {run.init_from}"
    )
    if pending:
        pictures = Pictures(output.parent, answer_log.folder / IMAGES)
        maker = PairMaker(model.load(), model.processor, scorer.load(), config.prefer, pictures, config.seed)
        ask_all(maker, answer_log, stage_data.datamodule, pending)
    ordered_lines = [answer_log.lines[key_of(index, number)] for number in range(len(index))]
    rows = [row for line in ordered_lines for row in line["pairs"]]
    answer_log.finish(rows, summary_of(ordered_lines))
    show(answer_log, rows)


def ask_all(maker: PairMaker, journal: Journal, data: DataModule, waiting: list[int]) -> None:
    """Generate the pairs of all pending prompts. The result of a prompt is on the disk before the next prompts start."""
    started = last_report = time.monotonic()
    tokens, tiles = data.most_tokens, data.most_tiles
    try:
        for count, line in enumerate(maker.lines(data.index, waiting, most_tokens=tokens, most_tiles=tiles), 1):
            journal.add(line)
            if time.monotonic() - last_report > LINE_SECONDS:
                last_report = time.monotonic()
                left = (last_report - started) / count * (len(waiting) - count)
                say(f"{count:,} of {counted(len(waiting), 'prompt')}; {counted(round(left / 60), 'minute')} left")
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on behind {counted(len(journal.lines), 'prompt')}")
        raise SystemExit(INTERRUPTED) from None


def require_one_process() -> None:
    """Raise UserError under torchrun with several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("task=prefer is one process on one device. Start it with python run.py, not with torchrun.")


def samples_of(run: Run, finished: Finished) -> StageData:
    """Index the training samples as prompts for the model. Samples that a stage holds out are held out here as well.

    Raises:
        UserError: a source holds preference pairs.
    """
    data, folder = run.config.data, folder_of(Path(run.config.prefer.output))
    has_validation_sources = bool(data.validation.sources)
    validation = replace(
        data.validation, sources={}, fraction=0.0 if has_validation_sources else data.validation.fraction
    )
    run = replace(run, config=replace(run.config, data=replace(data, validation=validation)), dir=folder)
    sources, _ = open_sources(run)
    datamodule = make_datamodule(run, finished.processor, sources, [], finished.blueprint)
    datamodule.build()
    pair_sources = {
        datamodule.index.sources[n].name for n in set(datamodule.index.source_of[datamodule.index.chosen > 0])
    }
    if pair_sources:
        raise UserError(
            f"data.sources: {', '.join(sorted(pair_sources))}: preference pairs already; task=prefer makes them of conversations. "
            "Choose other data."
        )
    return StageData(run, sources, [], finished.blueprint, datamodule)


class Scoring:
    """Scorer of the answers. The weights of a judge model are read by `load`, when there is an answer to score.

    Raises:
        UserError: prefer.judge is neither a model nor a class.
    """

    def __init__(self, config: RunConfig) -> None:
        self.judge: str | None = config.prefer.judge
        self.exact = config.prefer.scorer is ScorerName.exact
        is_class = self.judge is not None and "/" not in self.judge  # parse made folders absolute; hub ids have a slash
        self.own: Scorer | None = own_scorer(self.judge) if is_class else None
        self.model = None if self.exact or is_class else open_finished(self.judge, config)
        self.caps = (config.data.tokens_per_micro_batch, config.data.tiles_per_micro_batch)

    def load(self) -> Scorer:
        """Return the scorer: exact match, a class of the user, or a judge model with its weights loaded."""
        if self.exact:
            return Exact()
        return self.own or ModelJudge(self.model.load(), self.model.processor, *self.caps)

    def identity(self) -> Any:
        """Return the name of the judge, or the digest of its weights."""
        return self.judge if self.model is None else parent_of(self.judge)["digest"] or self.judge


def question_of(run: Run, data: DataModule, scorer: Scoring) -> dict[str, Any]:
    """Build the request: all settings that change the pairs. Paths of files and batch sizes are no part of them."""
    settings = to_plain(asdict(run.config.prefer))
    del settings["output"], settings["judge"]
    return {
        "init_from": parent_of(run.init_from)["digest"] or run.init_from,
        "the data": [digest_of_sources(data.sources), data.index.digest()],
        "prefer.judge": scorer.identity(),
        "seed": run.config.seed,
        **({DAY: template.day.isoformat()} if (template := data.processor.template).writes_day else {}),
        **{f"prefer.{name}": value for name, value in settings.items()},
    }


def show(journal: Journal, rows: list[dict[str, Any]]) -> None:
    """Show the counts of answers and prompts by result, and the command that trains on the pairs.

    Raises:
        UserError: there are no pairs.
    """
    table = Table(title=f"{journal.output.name}: what became of it", title_justify="left")
    for heading in ("of", "what", "count"):
        table.add_column(heading, justify="right" if heading == "count" else "left")
    for group, counts in summary_of(journal.lines.values()).items():
        title = "answers drawn" if group == "answers" else f"prompts for {group} pairs"
        for number, (result, count) in enumerate(counts.items()):
            table.add_row("" if number else title, result, f"{count:,}")
    console.print(table)
    if not rows:
        raise UserError(
            f"Not one {PAIR} came of it; the table says why, {journal.folder / 'answers.jsonl'} has every answer. Draw more or "
            "bolder answers (prefer.num_samples, prefer.temperature), let the known answer be chosen "
            "(prefer.reference_as_chosen=true), or allow longer ones (prefer.max_new_tokens)."
        )
    root = image_root([path for row in rows for path in row["images"]])
    image_root_override = f" data.sources.mine.image_root={root}" if root else ""
    say(f"{counted(len(rows), 'pair')}: {journal.output}   Every answer: {journal.folder / 'answers.jsonl'}")
    say(f"Train on them with: stage=dpo data=preference data.sources.mine.path={journal.output}{image_root_override}")
