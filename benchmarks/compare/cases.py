"""The stages that are compared: what trains, on which records, against which bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from benchmarks.compare.records import Maker, size_of
from benchmarks.compare.sizes import SIZES, ModelSize, make_chat_tokenizer
from benchmarks.flops_bound import Recipe, Size
from lit_vlm.anyres import Tiling
from lit_vlm.data.processor import Processor
from lit_vlm.stages import AlignStage, DPOStage, SFTStage
from lit_vlm.stages.base import Stage
from lit_vlm.types import Part, Record

OURS = "lit_vlm"
CACHED = "lit_vlm, reference kept over 3 epochs"
TRL_SHIPPED, TRL_TUNED = "TRL as shipped", "TRL tuned"
HF_TUNED, HF_SORTED = "HF Trainer tuned", "HF Trainer tuned, two sorted micro-batches"
EPOCHS = 3


@dataclass(frozen=True, slots=True)
class Bar:
    """`peer` must take at least so many times the time of `ours`. Of several peers the fastest stands for them."""

    peers: tuple[str, ...]
    at_least: float
    ours: str = OURS


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        batch: records of an optimizer step.
        steps: of a repeat, each on records of its own.
        bars: against peers, where a bound of arithmetic does not lower them.
    """

    stage: str
    size: str
    records: str
    stage_class: type[Stage]
    tiling: Tiling
    batch: int
    steps: int
    contenders: tuple[str, ...]
    bars: tuple[Bar, ...] = ()
    tiles: int | None = None  # dpo: of a pair's picture
    seed: int = 0
    options: dict = field(default_factory=dict)  # of the stage

    @property
    def name(self) -> str:
        """As in the names of result files."""
        return f"{self.stage}{'' if self.tiles is None else f'_{self.tiles}tile'}_{self.size}"

    @property
    def model_size(self) -> ModelSize:
        return SIZES[self.size]

    @property
    def trainable(self) -> tuple[Part, ...]:
        return self.stage_class.default_trainable

    @property
    def prefers(self) -> bool:
        return self.stage == "dpo"

    @cached_property
    def processor(self) -> Processor:
        return Processor(make_chat_tokenizer(), self.model_size.images(self.tiling))

    @cached_property
    def batches(self) -> list[list[Record]]:
        maker = Maker(self.processor, self.records, self.seed)
        return [maker.records(self.batch) for _ in range(self.steps)]

    @cached_property
    def sizes(self) -> list[list[Size]]:
        return [[size_of(self.processor, record) for record in batch] for batch in self.batches]

    @cached_property
    def length_of(self) -> dict[str, int]:
        """By record id, as a data set's column of lengths would say it."""
        return {record.id: max(size.lengths) for record, size in self._pairs}

    @cached_property
    def tokens_of(self) -> dict[str, int]:
        """By record id, of all its sequences."""
        return {record.id: sum(size.lengths) for record, size in self._pairs}

    @property
    def _pairs(self) -> list[tuple[Record, Size]]:
        steps = zip(self.batches, self.sizes, strict=True)
        return [pair for records, sizes in steps for pair in zip(records, sizes, strict=True)]

    @property
    def ideal(self) -> Recipe:
        """The least exact work of a step."""
        return Recipe(
            trains_tower=Part.vision_tower in self.trainable,
            trains_projector=Part.projector in self.trainable,
            trains_language_model=Part.language_model in self.trainable,
            reference=1.0 if self.prefers else 0.0,
            prunes_last_layer=True,
        )

    def goal(self, contender: str = OURS) -> Recipe:
        """The least exact work of what a contender of this library does."""
        return replace(self.ideal, reference=1 / EPOCHS) if contender == CACHED else self.ideal

    def recipe(self, contender: str) -> Recipe:
        """What a contender does. TRL scores every position where there is no Triton, and makes logits twice."""
        if contender == OURS:
            return self.goal(contender)
        if contender == CACHED:  # the pass that keeps the scores looks at the pictures once more
            return replace(self.goal(contender), tower_passes=1 + 1 / EPOCHS)
        base = replace(
            self.ideal,
            head_on_all_rows=True,
            pads=True,
            dense_mask=True,
            shares_prompt=False,
            tower_passes=4 if self.prefers else 1,
            prunes_last_layer=False,
        )
        if contender == HF_SORTED:
            return replace(base, micro_batches=2)
        if contender == HF_TUNED:
            return base
        return replace(base, head_recomputes=True, recomputes=contender == TRL_SHIPPED)


def on_a_gpu(recipe: Recipe, contender: str) -> Recipe:
    """There TRL's head scores supervised rows alone; attention is counted as causal, mask or not."""
    return replace(recipe, dense_mask=False, head_on_all_rows=recipe.head_on_all_rows and "TRL" not in contender)


TRL = (TRL_SHIPPED, TRL_TUNED)
LARGE = 12  # samples of about 350 tokens. With 16,384 the logits and their gradients would take 30 GB and more
FOR_SFT = (OURS, *TRL, HF_TUNED, HF_SORTED)


def make_case(stage: str, size: str = "twin7b", tiles: int = 5) -> Case:
    """The comparison of a stage; bars are those of the 7B twin. "memory" is one large micro-batch, for peak memory alone."""
    grouped = (HF_TUNED, HF_SORTED)
    if stage == "align":
        bars = Bar((TRL_SHIPPED,), 1.4), Bar((HF_TUNED,), 1.1)
        return Case(stage, size, "captions", AlignStage, Tiling.base, 16, 3, (OURS, *TRL, HF_TUNED), bars)
    if stage == "sft":
        bars = Bar((TRL_SHIPPED,), 1.8), Bar(grouped, 1.1)
        return Case(stage, size, "mixture", SFTStage, Tiling.base, 8, 5, FOR_SFT, bars)
    if stage == "anyres":
        bars = Bar((TRL_SHIPPED,), 2.2), Bar((HF_TUNED,), 1.7)
        return Case(stage, size, "anyres", SFTStage, Tiling.anyres, 4, 2, FOR_SFT, bars)
    if stage == "memory":
        return Case(stage, size, "even", SFTStage, Tiling.base, LARGE, 1, (OURS, HF_TUNED))
    assert stage == "dpo" and tiles in (1, 5)
    bars = (Bar((TRL_TUNED,), 1.5),)
    if tiles == 5:
        bars = Bar((TRL_TUNED,), 1.7), Bar((TRL_SHIPPED,), 2.1), Bar((TRL_SHIPPED,), 2.5, CACHED)
    tiling, batch = (Tiling.base, 8) if tiles == 1 else (Tiling.anyres, 4)
    contenders = (OURS, CACHED, *TRL)
    return Case(stage, size, f"pairs_{tiles}", DPOStage, tiling, batch, 2, contenders, bars, tiles)


def smaller(case: Case, batch: int, steps: int) -> Case:
    return replace(case, batch=batch, steps=steps)


def lengths(sizes: Sequence[Sequence[Size]]) -> dict[str, float]:
    """Of all steps: what the throughput columns divide."""
    flat = [size for step in sizes for size in step]
    return {
        "records": len(flat),
        "tokens": sum(sum(size.lengths) for size in flat),
        "supervised": sum(sum(size.supervised) for size in flat),
        "tiles": sum(size.tiles for size in flat),
    }
