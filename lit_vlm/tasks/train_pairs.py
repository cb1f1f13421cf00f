"""Training of a stage that learns from image-text pairs (BLIP-2, BLIP), from the settings to a model folder, and its preflight.

Run folder, sources, mixture, checkpoints, callbacks and reports are those of the other stages; a step is never split into
micro-batches. Read top to bottom.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from lit_vlm.config import Run
from lit_vlm.distributed.ranks import is_restarted
from lit_vlm.fault_tolerance.run_lock import RunLock
from lit_vlm.loggers.tracker import RunTracker
from lit_vlm.runs.run_folder import require_finished_parent, to_plain
from lit_vlm.tasks.open_run import RunPlace, choose_start_point, open_run, open_sources, report_finished
from lit_vlm.tasks.restarts import run_with_restarts
from lit_vlm.tasks.terminal import say


def train_pairs(run: Run) -> None:
    """Train one stage. An interrupted run resumes from its last checkpoint; a finished run is reported and stays unchanged."""
    is_requeued = is_restarted()
    tracker = RunTracker(run.config.logger, run.dir, run.experiment, say=lambda text: say(f"{run.name}: {text}"))
    with RunLock(run.dir) as run_lock, tracker:
        run_with_restarts(lambda again: train_pairs_once(run, run_lock, tracker, is_restart=again or is_requeued))


def train_pairs_once(run: Run, run_lock: RunLock, tracker: RunTracker, *, is_restart: bool) -> None:
    """Run one start of the stage; the arguments are those of `train_once`, whose steps these are."""
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

    from lit_vlm.tasks import pair_steps, train_steps  # late: torch and Lightning, which a finished run does not need

    chosen = train_steps.select_callbacks(
        config.callbacks, config.trainer, config.debug, config.evaluate, [], export=config.export
    )
    parts = pair_steps.resolve_pair_parts(place.parts_dir, config.stage, config.model, run.init_from, seed)
    data = pair_steps.prepare_pair_data(
        place, sources, parts, config.data, config.stage, config.trainer, seed=seed, debug=config.debug
    )
    model = pair_steps.build_pair_stage(parts, data, config.stage, config.trainer, seed=seed)
    callbacks = train_steps.build_callbacks(
        place,
        data,
        pair_steps.make_pair_fingerprint(folder, parts, data),
        start,
        pair_steps.drop_chat_callbacks(chosen),
        checkpoint=config.checkpoint,
        guard=replace(config.guard, max_oom_retries=0),
        trainer=config.trainer,
        validation=config.data.validation,
        evaluate=config.evaluate,
        benchmarks=[],
        max_image_pixels=config.data.max_image_pixels,
        debug=config.debug,
        metric=config.logger.metric,
        special_boxes=config.special_boxes,
    )
    max_captions = pair_steps.get_max_captions(chosen, config.stage, config.data.validation, config.debug)
    callbacks = pair_steps.add_pair_callbacks(callbacks, place, model, max_captions=max_captions, export=config.export)
    built = train_steps.BuiltStage(model.stage, config.trainer)
    trainer = train_steps.build_trainer(built, data, tracker, callbacks, config.data.validation.every_steps)
    train_steps.show_training_summary(place, run.init_from, data, trainer, pair_steps.list_pair_remarks(data, parts))
    train_steps.claim_run_folder(place, folder, run_lock, start)  # until here an error leaves an older run unchanged
    train_steps.record_start(place, folder, data, trainer, tracker, settings, {})
    train_steps.fit(place, data, trainer, tracker, settings, data=config.data, max_oom_retries=0)
    train_steps.finish(place, folder, data, trainer, tracker, config.stage)


def preflight_pairs(run: Run) -> None:
    """Check the settings, the parts and the data of a stage, and show what it would train on. Reads no weights, writes no run.

    Raises:
        UserError: a check that training makes fails.
    """
    from lit_vlm.tasks import pair_steps

    config, seed = run.config, run.config.seed
    place = RunPlace.from_settings(run.name, run.dir, config.run_dir, config.data.index_dir)
    require_finished_parent(run.init_from)
    sources = open_sources(config.data, place, seed)
    parts = pair_steps.resolve_pair_parts(place.parts_dir, config.stage, config.model, run.init_from, seed)
    data = pair_steps.prepare_pair_data(
        place, sources, parts, config.data, config.stage, config.trainer, seed=seed, debug=config.debug
    )
    pair_steps.show_preflight(place, data, parts, config.stage, config.trainer)
