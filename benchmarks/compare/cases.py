"""Comparison cases: trained parts, records, contenders and goals of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from benchmarks.compare.records import RecordGenerator, measure_record
from benchmarks.compare.sizes import SIZES, ModelSize, make_chat_tokenizer
from benchmarks.flops_bound import Recipe, RecordSize
from lit_vlm.anyres import Tiling
from lit_vlm.data.processor import Processor
from lit_vlm.stages import AlignStage, DPOStage, SFTStage
from lit_vlm.stages.base import Stage
from lit_vlm.types import ModelPart, Record

OURS = "lit_vlm"
OURS_CACHED = "lit_vlm, reference kept over 3 epochs"
TRL_SHIPPED, TRL_TUNED = "TRL as shipped", "TRL tuned"
HF_TUNED, HF_SORTED = "HF Trainer tuned", "HF Trainer tuned, two sorted micro-batches"
NUM_EPOCHS = 3


@dataclass(frozen=True, slots=True)
class Goal:
    """Goal: minimum ratio of the time of a peer to the time of `ours`. Of several peers the fastest counts."""

    peers: tuple[str, ...]
    min_ratio: float
    ours: str = OURS


@dataclass(frozen=True)
class Case:
    """Comparison case of one stage.

    Attributes:
        batch: records per optimizer step.
        steps: steps per repeat, each on different records.
        goals: minimum ratios against peers, unless the analytical bound is lower.
    """

    stage: str
    size: str
    records: str
    stage_class: type[Stage]
    tiling: Tiling
    batch: int
    steps: int
    contenders: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    tiles: int | None = None  # dpo: tiles of the image of a pair
    seed: int = 0
    options: dict = field(default_factory=dict)  # options of the stage

    @property
    def name(self) -> str:
        """Name as in the names of result files."""
        return f"{self.stage}{'' if self.tiles is None else f'_{self.tiles}tile'}_{self.size}"

    @property
    def model_size(self) -> ModelSize:
        return SIZES[self.size]

    @property
    def trainable(self) -> tuple[ModelPart, ...]:
        return self.stage_class.default_trainable

    @property
    def is_preference(self) -> bool:
        return self.stage == "dpo"

    @cached_property
    def processor(self) -> Processor:
        return Processor(make_chat_tokenizer(), self.model_size.make_image_settings(self.tiling))

    @cached_property
    def batches(self) -> list[list[Record]]:
        maker = RecordGenerator(self.processor, self.records, self.seed)
        return [maker.generate_batch(self.batch) for _ in range(self.steps)]

    @cached_property
    def sizes(self) -> list[list[RecordSize]]:
        return [[measure_record(self.processor, record) for record in batch] for batch in self.batches]

    @cached_property
    def lengths_by_id(self) -> dict[str, int]:
        """Longest sequence of each record in tokens, by record id, like a length column of a data set."""
        return {record.id: max(size.lengths) for record, size in self._pairs}

    @cached_property
    def tokens_by_id(self) -> dict[str, int]:
        """Tokens of all sequences of each record, by record id."""
        return {record.id: sum(size.lengths) for record, size in self._pairs}

    @property
    def _pairs(self) -> list[tuple[Record, RecordSize]]:
        steps = zip(self.batches, self.sizes, strict=True)
        return [pair for records, sizes in steps for pair in zip(records, sizes, strict=True)]

    @property
    def ideal_recipe(self) -> Recipe:
        """Recipe of the minimum exact work of a step."""
        return Recipe(
            trains_tower=ModelPart.vision_tower in self.trainable,
            trains_projector=ModelPart.projector in self.trainable,
            trains_language_model=ModelPart.language_model in self.trainable,
            reference=1.0 if self.is_preference else 0.0,
            prunes_last_layer=True,
        )

    def make_ideal_recipe(self, contender: str = OURS) -> Recipe:
        """Make the recipe of the minimum exact work for a contender of this library."""
        return replace(self.ideal_recipe, reference=1 / NUM_EPOCHS) if contender == OURS_CACHED else self.ideal_recipe

    def make_recipe(self, contender: str) -> Recipe:
        """Make the recipe of a contender. Without Triton, TRL scores all positions; it computes logits twice."""
        if contender == OURS:
            return self.make_ideal_recipe(contender)
        if contender == OURS_CACHED:  # the pass that fills the cache encodes the images once more
            return replace(self.make_ideal_recipe(contender), tower_passes=1 + 1 / NUM_EPOCHS)
        base = replace(
            self.ideal_recipe,
            head_on_all_rows=True,
            pads=True,
            dense_mask=True,
            shares_prompt=False,
            tower_passes=4 if self.is_preference else 1,
            prunes_last_layer=False,
        )
        if contender == HF_SORTED:
            return replace(base, micro_batches=2)
        if contender == HF_TUNED:
            return base
        return replace(base, head_recomputes=True, recomputes=contender == TRL_SHIPPED)


def convert_to_gpu_recipe(recipe: Recipe, contender: str) -> Recipe:
    """Convert a recipe to a GPU. There TRL's head scores only supervised rows, and attention always counts as causal."""
    return replace(recipe, dense_mask=False, head_on_all_rows=recipe.head_on_all_rows and "TRL" not in contender)


TRL = (TRL_SHIPPED, TRL_TUNED)
# samples of about 350 tokens: 6,000 tokens, which HF Trainer's logits allow, and 16,000, which they do not
LARGE_BATCH, LONG_BATCH = 17, 47
SFT_CONTENDERS = (OURS, *TRL, HF_TUNED, HF_SORTED)


def make_case(stage: str, size: str = "twin7b", tiles: int = 5) -> Case:
    """Make the case of a stage, with the goals of the 7B twin. "memory" is one large micro-batch, for peak memory only."""
    grouped = (HF_TUNED, HF_SORTED)
    if stage == "align":
        bars = Goal((TRL_SHIPPED,), 1.4), Goal((HF_TUNED,), 1.1)
        return Case(stage, size, "captions", AlignStage, Tiling.base, 16, 3, (OURS, *TRL, HF_TUNED), bars)
    if stage == "sft":
        bars = Goal((TRL_SHIPPED,), 1.8), Goal(grouped, 1.1)
        return Case(stage, size, "mixture", SFTStage, Tiling.base, 8, 5, SFT_CONTENDERS, bars)
    if stage == "anyres":
        bars = Goal((TRL_SHIPPED,), 2.2), Goal((HF_TUNED,), 1.7)
        return Case(stage, size, "anyres", SFTStage, Tiling.anyres, 4, 2, SFT_CONTENDERS, bars)
    if stage == "memory":
        return Case(stage, size, "even", SFTStage, Tiling.base, LARGE_BATCH, 1, (OURS, HF_TUNED))
    assert stage == "dpo" and tiles in (1, 5)
    bars = (Goal((TRL_TUNED,), 1.5),)
    if tiles == 5:
        bars = Goal((TRL_TUNED,), 1.7), Goal((TRL_SHIPPED,), 2.1), Goal((TRL_SHIPPED,), 2.5, OURS_CACHED)
    tiling, batch = (Tiling.base, 8) if tiles == 1 else (Tiling.anyres, 4)
    contenders = (OURS, OURS_CACHED, *TRL)
    return Case(stage, size, f"pairs_{tiles}", DPOStage, tiling, batch, 2, contenders, bars, tiles)


def resize_case(case: Case, batch: int, steps: int) -> Case:
    """Return the case with another batch size and number of steps."""
    return replace(case, batch=batch, steps=steps)


def count_lengths(sizes: Sequence[Sequence[RecordSize]]) -> dict[str, float]:
    """Count records, tokens, supervised tokens and tiles of all steps, for the throughput columns."""
    flat = [size for step in sizes for size in step]
    return {
        "records": len(flat),
        "tokens": sum(sum(size.lengths) for size in flat),
        "supervised": sum(sum(size.supervised) for size in flat),
        "tiles": sum(size.tiles for size in flat),
    }
