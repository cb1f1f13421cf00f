"""Training of one stage: from the settings to a model folder that plain transformers loads. Read top to bottom."""

from __future__ import annotations

from dataclasses import asdict, replace

from lit_vlm.config import Run
from lit_vlm.distributed.ranks import is_restarted
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.imports import pause_collector
from lit_vlm.loggers.tracker import RunTracker
from lit_vlm.runs.run_folder import require_finished_parent, to_plain
from lit_vlm.tasks.open_run import RunPlace, choose_start_point, open_run, open_sources, report_finished
from lit_vlm.tasks.restarts import run_with_restarts
from lit_vlm.tasks.terminal import say


def train(run: Run) -> None:
    """Train one stage. An interrupted run resumes from its last checkpoint; a finished run is reported and stays unchanged."""
    is_requeued = is_restarted()  # its overrides may hold resume_from=none, which was meant for the first start
    tracker = RunTracker(run.config.logger, run.dir, run.experiment, say=lambda text: say(f"{run.name}: {text}"))
    with RunLock(run.dir) as run_lock, tracker:
        run_with_restarts(lambda again: train_once(run, run_lock, tracker, is_restart=again or is_requeued))


def train_once(run: Run, run_lock: RunLock, tracker: RunTracker, *, is_restart: bool) -> None:
    """Run one start of the stage: open the run, prepare the data, build stage and trainer, claim the run folder, fit, finish.

    Args:
        run_lock: lock of the run folder.
        tracker: the run's loggers.
        is_restart: the same command started this run before, so it resumes from the last checkpoint.
    """
    config, seed = run.config, run.config.seed
    place = RunPlace.from_settings(run.name, run.dir, config.run_dir, config.data.index_dir)
    require_finished_parent(run.init_from)
    sources = open_sources(config.data, place, seed)
    settings = to_plain(asdict(config))
    folder = open_run(place, settings, sources, run.init_from, run_lock, overwrite=config.overwrite)
    if folder.is_finished:
        report_finished(place, folder, tracker)
        return
    tracker.check(folder)
    start = choose_start_point(place, folder, config.resume_from, is_restart=is_restart)

    with pause_collector():
        from lit_vlm.tasks import train_steps as steps  # late: torch and Lightning, which a finished run does not need

    chosen = steps.select_callbacks(
        config.callbacks, config.trainer, config.debug, config.evaluate, config.benchmarks, export=config.export
    )
    model = steps.resolve_model(place, config.model, config.data.tiling, run.init_from, seed)
    settings = to_plain(asdict(replace(config, model=model.settings)))
    data = steps.prepare_data(
        place, sources, model, start, config.data, config.stage, config.trainer, seed=seed, debug=config.debug
    )
    tiling = config.data.tiling.value
    stage = steps.build_stage(place, data, config.stage, config.trainer, config.preflight, tiling=tiling, seed=seed)
    callbacks = steps.build_callbacks(
        place,
        data,
        steps.make_fingerprint(folder, data),
        start,
        chosen,
        checkpoint=config.checkpoint,
        guard=config.guard,
        trainer=config.trainer,
        validation=config.data.validation,
        evaluate=config.evaluate,
        benchmarks=config.benchmarks,
        max_image_pixels=config.data.max_image_pixels,
        debug=config.debug,
        metric=config.logger.metric,
        special_boxes=config.special_boxes,
    )
    trainer = steps.build_trainer(stage, data, tracker, callbacks, config.data.validation.every_steps)
    steps.show_training_summary(place, run.init_from, data, trainer, steps.list_remarks(data, trainer))
    lock = steps.build_mixture_lock(data.stage_data, trainer.plan.index, config.data, seed)
    steps.check_mixture_lock(lock, config.data.lock, place.dir, overwrite=config.overwrite)
    steps.claim_run_folder(place, folder, run_lock, start)  # until here an error leaves an older run unchanged
    steps.record_start(place, folder, data, trainer, tracker, settings, steps.collect_text_facts(data))
    steps.fit(place, data, trainer, tracker, settings, data=config.data, max_oom_retries=config.guard.max_oom_retries)
    steps.finish(place, folder, data, trainer, tracker, config.stage)
