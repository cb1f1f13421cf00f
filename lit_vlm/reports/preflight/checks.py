"""Checks of the preflight facts: failures that would stop the run, warnings, and advice."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.choices import ActivationCheckpointing, OnBadRecord, OnOverlong
from lit_vlm.config.schema import DataConfig, StageConfig
from lit_vlm.data.quarantine import format_unused_keys
from lit_vlm.formatting import format_bytes, format_count, format_percent
from lit_vlm.losses.loss_types import find_sorting_losses
from lit_vlm.reports.preflight.facts import Finding, MemoryFacts, PreflightFacts, Severity, SourceRow
from lit_vlm.types import Fault, ModelPart

MIN_SAMPLES_PER_RANK = 8  # samples of a step that a rank needs, so that packing can balance the work
MIN_BALANCE = 0.97  # below this balance ranks wait noticeably
MAX_PASSES = 4.0  # "Scaling data-constrained language models", arXiv 2305.16264: beyond, repeats teach little
MAX_MEMORY_SHARE = 0.9  # share of a device's memory
ACTIVATION_PARTS = ("activations of text", "activations of images", "logits")  # parts that shrink with the micro-batch
QUARANTINE_REMEDY = "Fix them, or set such records aside with data.on_bad_record=quarantine."


def collect_findings(facts: PreflightFacts, data: DataConfig, stage: StageConfig, precision: str) -> Iterator[Finding]:
    """Collect all findings in reading order: data, mixture, plan, machine.

    Args:
        precision: trainer.precision.
    """
    for row in facts.sources:
        yield from _check_source(row, data)
    yield from _check_all_sources(facts.sources)
    yield from _check_data(facts, data, stage)
    yield from _check_plan(facts, stage)
    yield from _check_machine(facts, precision)


def check_bad_records(row: SourceRow, data: DataConfig) -> Iterator[Finding]:
    """Check the share of bad records of a source: they stop the run or go into quarantine."""
    if not row.set_aside:
        return
    if row.image_root_error:
        yield Finding(Severity.failure, row.image_root_error)
        return
    what = f"{row.name}: {row.set_aside:,}{_format_population(row)} cannot be used ({_format_faults(row.quarantined)})"
    if data.on_bad_record is OnBadRecord.stop:
        yield Finding(Severity.failure, f"{what}, and data.on_bad_record=stop.", QUARANTINE_REMEDY)
    elif row.set_aside > data.max_quarantined * row.looked_at:
        share = row.set_aside / max(row.looked_at, 1)
        what += f", {share:.2%}, and data.max_quarantined={data.max_quarantined:g} allows {data.max_quarantined:.2%}."
        yield Finding(Severity.failure, what, "Fix them, or allow more with data.max_quarantined=<share>.")
    else:
        yield Finding(Severity.warning, f"{what} and will be set aside.", "The page shows the first of each fault.")


def _format_population(row: SourceRow) -> str:
    return f" of {row.looked_at:,} looked at" if row.estimated else f" of {row.records:,}"


def _check_source(row: SourceRow, data: DataConfig) -> Iterator[Finding]:
    yield from check_bad_records(row, data)
    yield from _check_length(row, _format_population(row), data.on_overlong)
    if row.unread:
        yield Finding(
            Severity.advice,
            f"{format_unused_keys(row.name, row.unread)}.",
            "Keys that change what is trained are refused by name.",
        )
    if row.expected is not None and row.expected != row.records:
        what = f"{row.name}: {format_count(row.records, 'record')} on disk where {format_count(row.expected, 'is', 'are')} expected."
        yield Finding(Severity.warning, what, "Look whether the download is complete and of the right version.")


def _check_all_sources(rows: list[SourceRow]) -> Iterator[Finding]:
    """Check problems that several sources may share; each yields one finding for all of them."""
    repeated = [f"{row.duplicates:,}{_format_population(row)} in {row.name}" for row in rows if row.duplicates]
    if repeated:
        what = f"Records that repeat another one of their source word for word, with the same images: {', '.join(repeated)}."
        yield Finding(Severity.warning, what, "They are read as often as all others.")
    oversampled = [f"{row.name} {row.passes:.1f} times" for row in rows if row.passes > MAX_PASSES]
    if oversampled:
        what = f"A sample is read more than {MAX_PASSES:g} times: {', '.join(oversampled)}."
        yield Finding(Severity.warning, what, "Lower its weight or its repeat, or train for fewer steps.")
    changed = [
        f"{row.normalised:,} ({row.normalised / max(row.usable, 1):.1%}) in {row.name}"
        for row in rows
        if row.normalised
    ]
    if changed:
        what = f"Unicode's NFC changes the text of {', '.join(changed)}."
        yield Finding(Severity.advice, what, "Decomposed Hangul is read composed; nothing need be done.")


def _check_length(row: SourceRow, population: str, policy: OnOverlong) -> Iterator[Finding]:
    shortened = row.fewer_tiles + row.fewer_turns
    if shortened:
        how, are = "cut into fewer tiles" if row.fewer_tiles else "cut at a turn", "is" if shortened == 1 else "are"
        what = f"{row.name}: {shortened:,}{population} {are} longer than a micro-batch or data.max_length holds, and {are} {how}."
        yield Finding(
            Severity.warning,
            what,
            "Raise the limit: data.tokens_per_micro_batch, data.tiles_per_micro_batch, data.max_length or the model's own.",
        )
    if row.quarantined.get(Fault.overlong) and policy is OnOverlong.quarantine:
        what = f"{row.name}: {format_count(row.quarantined[Fault.overlong], 'record is', 'records are')} too long, and data.on_overlong=quarantine."
        yield Finding(Severity.advice, what, "data.on_overlong=fewer_tiles or cut_turn would keep most of them.")


def _check_data(facts: PreflightFacts, data: DataConfig, stage: StageConfig) -> Iterator[Finding]:
    usable = sum(row.usable for row in facts.sources)
    yield from _check_batch_size(facts, data)
    if usable and not facts.held_out:
        yield Finding(
            Severity.warning,
            "No sample is held out, so nothing will say whether the model learns more than its training data.",
            "Write data.validation.fraction=0.1, or name data.validation.sources.",
        )
    vision_parts = [part.value for part in stage.trainable if part is not ModelPart.language_model]
    if usable and vision_parts and not any(row.images for row in facts.sources):
        yield Finding(
            Severity.failure,
            f"No sample has an image, and the stage trains {', '.join(vision_parts)}, which would learn nothing.",
            "Add a source with images, or set stage.trainable=[language_model].",
        )


def _check_batch_size(facts: PreflightFacts, data: DataConfig) -> Iterator[Finding]:
    """Check that an optimizer step does not read the same samples several times."""
    training = sum((row.usable - row.held_out) * row.scale for row in facts.sources)
    if facts.plan is None or training < 1 or facts.plan.samples_per_step <= training:
        return
    passes = facts.plan.samples_per_step / training
    size = f"data.global_batch_size={data.global_batch_size}"
    if data.global_batch_tokens:
        size = f"data.global_batch_tokens={data.global_batch_tokens}"
    what = (
        f"{size}: one optimizer step reads {facts.plan.samples_per_step:,.0f} samples, and there are"
        f" {format_count(round(training), 'sample')} to train on: each is read {passes:.1f} times before the weights change."
    )
    yield Finding(Severity.warning, what, "Lower it to at most the number of samples.")


def _check_plan(facts: PreflightFacts, stage: StageConfig) -> Iterator[Finding]:
    plan = facts.plan
    if plan is None:
        return
    per_rank = plan.samples_per_step / plan.world_size
    if plan.world_size > 1 and per_rank < MIN_SAMPLES_PER_RANK:
        yield Finding(
            Severity.advice,
            f"A rank has {per_rank:.1f} samples in a step; with fewer than {MIN_SAMPLES_PER_RANK} their work cannot be made equal "
            f"(here to {format_percent(plan.balance_ranks)}).",
            "Raise data.global_batch_size, or use fewer devices.",
        )
    elif plan.world_size > 1 and plan.balance_ranks < MIN_BALANCE:
        what = f"Ranks are balanced to {format_percent(plan.balance_ranks)}: the longest samples are long beside a rank's share."
        yield Finding(Severity.advice, what, "Raise data.global_batch_size, or shorten the longest samples.")
    if plan.blank > 0.01:
        what = (
            f"{format_percent(plan.blank)} of the micro-batches are blank: some ranks have nothing to do in some steps."
        )
        yield Finding(Severity.warning, what, "Raise data.global_batch_size, or use fewer devices.")
    sorting_losses = find_sorting_losses(stage.preference_losses)
    if sorting_losses and plan.k * plan.world_size > 1:
        yield Finding(
            Severity.failure,
            f"stage.loss_type={sorting_losses[0]} sorts the whole batch, and it is split into {plan.k * plan.world_size} micro-batches.",
            "Lower data.global_batch_size, or raise data.tokens_per_micro_batch and data.tiles_per_micro_batch, on one device.",
        )


def _check_machine(facts: PreflightFacts, precision: str) -> Iterator[Finding]:
    yield from _check_memory(facts, precision)
    needed_by_free_space: dict[float, float] = {}  # folders with equal free space count as one disk
    for disk in facts.disk:
        needed_by_free_space[disk.free] = needed_by_free_space.get(disk.free, 0.0) + disk.bytes
    for free_bytes, needed_bytes in needed_by_free_space.items():
        if needed_bytes > free_bytes:
            folders = ", ".join(sorted({disk.folder for disk in facts.disk if disk.free == free_bytes}))
            what = f"The disk is too small: {format_bytes(needed_bytes)} are needed in {folders}, {format_bytes(free_bytes)} are free."
            yield Finding(Severity.failure, what, "Make room, or set run_dir=... and data.index_dir=... elsewhere.")


def _check_memory(facts: PreflightFacts, precision: str) -> Iterator[Finding]:
    memory = facts.memory
    chosen = next((row for row in memory.rows if row.chosen), None) if memory else None
    if memory is None or chosen is None or not memory.compared:
        return
    if chosen.total > memory.capacity:
        what = f"About {format_bytes(chosen.total)} of memory are needed on each device, and {memory.device} has {format_bytes(memory.capacity)}"
        fixed_bytes = sum(size for name, size in chosen.parts.items() if name not in ACTIVATION_PARTS)
        if fixed_bytes > memory.capacity:
            what += f"; weights, gradients and optimizer alone need {format_bytes(fixed_bytes)}"
        yield Finding(Severity.failure, f"{what}.", _format_memory_remedies(facts, memory, precision, fixed_bytes))
    elif chosen.total > MAX_MEMORY_SHARE * memory.capacity:
        what = f"About {format_bytes(chosen.total)} of the {format_bytes(memory.capacity)} of {memory.device} are needed; that is tight."
        remedy = "" if _is_fully_checkpointed(facts) else ", or set stage.activation_checkpointing to the next level"
        yield Finding(Severity.warning, what, f"Lower data.tokens_per_micro_batch a little{remedy}.")


def _format_memory_remedies(facts: PreflightFacts, memory: MemoryFacts, precision: str, fixed_bytes: float) -> str:
    """Format the remedies for too little memory: another strategy, smaller micro-batches if that is enough, or a smaller
    fixed part (weights, gradients, optimizer states).
    """
    strategy, remedies = facts.strategy, list[str]()
    if strategy and strategy.advised_fits and strategy.advised != strategy.name:
        remedies.append(f"use trainer.strategy={strategy.advised} ({strategy.reason})")
    if fixed_bytes < memory.capacity:
        remedies.append("lower data.tokens_per_micro_batch and data.tiles_per_micro_batch")
        if not _is_fully_checkpointed(facts):
            remedies.append("set stage.activation_checkpointing=full")
    if precision != "bf16-true":
        remedies.append("set trainer.precision=bf16-true (moments in bfloat16 too)")
    remedies.append("train fewer parts (stage.trainable), or with LoRA (stage.parts.<part>.lora.rank)")
    text = ", or ".join(remedies)
    reason = f" {_format_sentence(strategy.reason)}" if strategy and not strategy.advised_fits else ""
    return f"{_format_sentence(text)}{reason}"


def _is_fully_checkpointed(facts: PreflightFacts) -> bool:
    return facts.strategy is not None and facts.strategy.level == ActivationCheckpointing.full.value


def _format_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _format_faults(faults: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {fault.replace('_', ' ')}" for fault, count in faults.items())
