"""Checks of the preflight facts: failures that would stop the run, warnings, and advice."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.schema import (
    ActivationCheckpointing,
    DataConfig,
    DPOStageConfig,
    OnBadRecord,
    OnOverlong,
    RunConfig,
)
from lit_vlm.data.quarantine import list_unread
from lit_vlm.engine.preflight.facts import Facts, Finding, Level, MemoryFacts, SourceRow
from lit_vlm.engine.preflight.page import gigabytes, percent
from lit_vlm.losses.preference import SORTS_THE_BATCH
from lit_vlm.types import Fault, Part, counted

FEW_PER_RANK = 8  # samples of a step that a rank needs, so that packing can balance the work
UNEVEN = 0.97  # below this balance ranks wait noticeably
MANY_PASSES = 4.0  # "Scaling data-constrained language models", arXiv 2305.16264: beyond, repeats teach little
NEARLY_FULL = 0.9  # share of a device's memory
ACTIVATIONS = ("activations of text", "activations of images", "logits")  # parts that shrink with the micro-batch
QUARANTINE = "Fix them, or set such records aside with data.on_bad_record=quarantine."


def findings(facts: Facts, config: RunConfig) -> Iterator[Finding]:
    """Collect all findings in reading order: data, mixture, plan, machine."""
    for row in facts.sources:
        yield from _of_source(row, config)
    yield from _of_sources(facts.sources)
    yield from _of_data(facts, config)
    yield from _of_plan(facts, config)
    yield from _of_machine(facts, config)


def of_bad_records(row: SourceRow, data: DataConfig) -> Iterator[Finding]:
    """Check the share of bad records of a source: they stop the run or go into quarantine."""
    if not row.set_aside:
        return
    what = f"{row.name}: {row.set_aside:,}{_seen(row)} cannot be used ({_listed(row.quarantined)})"
    if data.on_bad_record is OnBadRecord.stop:
        yield Finding(Level.failure, f"{what}, and data.on_bad_record=stop.", QUARANTINE)
    elif row.set_aside > data.max_quarantined * row.looked_at:
        share = row.set_aside / max(row.looked_at, 1)
        what += f", {share:.2%}, and data.max_quarantined={data.max_quarantined:g} allows {data.max_quarantined:.2%}."
        yield Finding(Level.failure, what, "Fix them, or allow more with data.max_quarantined=<share>.")
    else:
        yield Finding(Level.warning, f"{what} and will be set aside.", "The page shows the first of each fault.")


def _seen(row: SourceRow) -> str:
    return f" of {row.looked_at:,} looked at" if row.estimated else f" of {row.records:,}"


def _of_source(row: SourceRow, config: RunConfig) -> Iterator[Finding]:
    yield from of_bad_records(row, config.data)
    yield from _of_length(row, _seen(row), config.data.on_overlong)
    if row.unread:
        yield Finding(
            Level.advice,
            f"{list_unread(row.name, row.unread)}.",
            "Keys that change what is trained are refused by name.",
        )
    if row.expected is not None and row.expected != row.records:
        what = (
            f"{row.name}: {counted(row.records, 'record')} on disk where {counted(row.expected, 'is', 'are')} expected."
        )
        yield Finding(Level.warning, what, "Look whether the download is complete and of the right version.")


def _of_sources(rows: list[SourceRow]) -> Iterator[Finding]:
    """Check problems that several sources may share; each yields one finding for all of them."""
    repeated = [f"{row.duplicates:,}{_seen(row)} in {row.name}" for row in rows if row.duplicates]
    if repeated:
        what = f"Records that repeat another one of their source word for word, with the same images: {', '.join(repeated)}."
        yield Finding(Level.warning, what, "They are read as often as all others.")
    oversampled = [f"{row.name} {row.passes:.1f} times" for row in rows if row.passes > MANY_PASSES]
    if oversampled:
        what = f"A sample is read more than {MANY_PASSES:g} times: {', '.join(oversampled)}."
        yield Finding(Level.warning, what, "Lower its weight or its repeat, or train for fewer steps.")
    changed = [
        f"{row.normalised:,} ({row.normalised / max(row.usable, 1):.1%}) in {row.name}"
        for row in rows
        if row.normalised
    ]
    if changed:
        what = f"Unicode's NFC changes the text of {', '.join(changed)}."
        yield Finding(Level.advice, what, "Decomposed Hangul is read composed; nothing need be done.")


def _of_length(row: SourceRow, seen: str, policy: OnOverlong) -> Iterator[Finding]:
    shortened = row.fewer_tiles + row.fewer_turns
    if shortened:
        how, are = "cut into fewer tiles" if row.fewer_tiles else "cut at a turn", "is" if shortened == 1 else "are"
        what = f"{row.name}: {shortened:,}{seen} {are} longer than a micro-batch or data.max_length holds, and {are} {how}."
        yield Finding(
            Level.warning,
            what,
            "Raise the limit: data.tokens_per_micro_batch, data.tiles_per_micro_batch, data.max_length or the model's own.",
        )
    if row.quarantined.get(Fault.overlong) and policy is OnOverlong.quarantine:
        what = f"{row.name}: {counted(row.quarantined[Fault.overlong], 'record is', 'records are')} too long, and data.on_overlong=quarantine."
        yield Finding(Level.advice, what, "data.on_overlong=fewer_tiles or cut_turn would keep most of them.")


def _of_data(facts: Facts, config: RunConfig) -> Iterator[Finding]:
    usable = sum(row.usable for row in facts.sources)
    if usable and not facts.held_out:
        yield Finding(
            Level.warning,
            "No sample is held out, so nothing will say whether the model learns more than its training data.",
            "Raise data.validation.fraction, or name data.validation.sources.",
        )
    vision_parts = [part.value for part in config.stage.trainable if part is not Part.language_model]
    if usable and vision_parts and not any(row.images for row in facts.sources):
        yield Finding(
            Level.failure,
            f"No sample has an image, and the stage trains {', '.join(vision_parts)}, which would learn nothing.",
            "Add a source with images, or set stage.trainable=[language_model].",
        )


def _of_plan(facts: Facts, config: RunConfig) -> Iterator[Finding]:
    plan = facts.plan
    if plan is None:
        return
    per_rank = plan.samples_per_step / plan.world_size
    if plan.world_size > 1 and per_rank < FEW_PER_RANK:
        yield Finding(
            Level.advice,
            f"A rank has {per_rank:.1f} samples in a step; with fewer than {FEW_PER_RANK} their work cannot be made equal "
            f"(here to {percent(plan.balance_ranks)}).",
            "Raise data.global_batch_size, or use fewer devices.",
        )
    elif plan.world_size > 1 and plan.balance_ranks < UNEVEN:
        what = (
            f"Ranks are balanced to {percent(plan.balance_ranks)}: the longest samples are long beside a rank's share."
        )
        yield Finding(Level.advice, what, "Raise data.global_batch_size, or shorten the longest samples.")
    if plan.blank > 0.01:
        what = f"{percent(plan.blank)} of the micro-batches are blank: some ranks have nothing to do in some steps."
        yield Finding(Level.warning, what, "Raise data.global_batch_size, or use fewer devices.")
    if isinstance(config.stage, DPOStageConfig):
        sorting_losses = [name for name in config.stage.loss_type if name in SORTS_THE_BATCH]
        if sorting_losses and plan.k * plan.world_size > 1:
            yield Finding(
                Level.failure,
                f"stage.loss_type={sorting_losses[0]} sorts the whole batch, and it is dealt into {plan.k * plan.world_size} micro-batches.",
                "Lower data.global_batch_size, or raise data.tokens_per_micro_batch and data.tiles_per_micro_batch, on one device.",
            )


def _of_machine(facts: Facts, config: RunConfig) -> Iterator[Finding]:
    yield from _of_memory(facts, config)
    needed_by_free_space: dict[float, float] = {}  # folders with equal free space count as one disk
    for disk in facts.disk:
        needed_by_free_space[disk.free] = needed_by_free_space.get(disk.free, 0.0) + disk.bytes
    for free_bytes, needed_bytes in needed_by_free_space.items():
        if needed_bytes > free_bytes:
            folders = ", ".join(sorted({disk.folder for disk in facts.disk if disk.free == free_bytes}))
            what = f"The disk is too small: {gigabytes(needed_bytes)} are needed in {folders}, {gigabytes(free_bytes)} are free."
            yield Finding(Level.failure, what, "Make room, or set run_dir=... and data.index_dir=... elsewhere.")


def _of_memory(facts: Facts, config: RunConfig) -> Iterator[Finding]:
    memory = facts.memory
    chosen = next((row for row in memory.rows if row.chosen), None) if memory else None
    if memory is None or chosen is None or not memory.compared:
        return
    if chosen.total > memory.capacity:
        what = f"About {gigabytes(chosen.total)} of memory are needed on each device, and {memory.device} has {gigabytes(memory.capacity)}"
        fixed_bytes = sum(size for name, size in chosen.parts.items() if name not in ACTIVATIONS)
        if fixed_bytes > memory.capacity:
            what += f"; weights, gradients and optimizer alone need {gigabytes(fixed_bytes)}"
        yield Finding(Level.failure, f"{what}.", _ways_out(facts, memory, config, fixed_bytes))
    elif chosen.total > NEARLY_FULL * memory.capacity:
        what = f"About {gigabytes(chosen.total)} of the {gigabytes(memory.capacity)} of {memory.device} are needed; that is tight."
        remedy = "" if _saves_most(facts) else ", or set stage.activation_checkpointing to the next level"
        yield Finding(Level.warning, what, f"Lower data.tokens_per_micro_batch a little{remedy}.")


def _ways_out(facts: Facts, memory: MemoryFacts, config: RunConfig, stays: float) -> str:
    """Format the remedies for too little memory: another strategy, smaller micro-batches if that is enough, or a smaller
    fixed part (weights, gradients, optimizer states).
    """
    strategy, remedies = facts.strategy, list[str]()
    if strategy and strategy.advised_fits and strategy.advised != strategy.name:
        remedies.append(f"use trainer.strategy={strategy.advised} ({strategy.reason})")
    if stays < memory.capacity:
        remedies.append("lower data.tokens_per_micro_batch and data.tiles_per_micro_batch")
        if not _saves_most(facts):
            remedies.append("set stage.activation_checkpointing=full")
    if config.trainer.precision != "bf16-true":
        remedies.append("set trainer.precision=bf16-true (moments in bfloat16 too)")
    remedies.append("train fewer parts (stage.trainable), or with LoRA (stage.parts.<part>.lora.rank)")
    text = ", or ".join(remedies)
    reason = f" {_sentence(strategy.reason)}" if strategy and not strategy.advised_fits else ""
    return f"{_sentence(text)}{reason}"


def _saves_most(facts: Facts) -> bool:
    return facts.strategy is not None and facts.strategy.level == ActivationCheckpointing.full.value


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _listed(faults: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {fault.replace('_', ' ')}" for fault, count in faults.items())
