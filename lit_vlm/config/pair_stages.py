"""Config schema of the stages that learn from pairs of an image and a caption: BLIP-2 and BLIP.

Each has a config class of its own, as stage=dpo has. `find_pair_errors` refuses settings of the other stages, which have no
effect here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from lit_vlm.config.choices import DebugMode, StageName
from lit_vlm.config.ranges import COUNT, COUNT_OR_ZERO, SHARE_ABOVE_0, ranged
from lit_vlm.config.schema import DataConfig, ModelConfig, PartsConfig, RunConfig, StageConfig
from lit_vlm.config.task_settings import EvaluateConfig
from lit_vlm.formatting import format_count
from lit_vlm.types import ModelPart


@dataclass(kw_only=True, slots=True)
class PairStageConfig(StageConfig):
    """Settings that all stages with image-text pairs have."""

    ALLOWED: ClassVar[tuple[str, ...]] = ("weight_decay", "warmup", "min_learning_rate", "adam_betas", "adam_eps")
    HAS_NEGATIVES: ClassVar[bool] = False  # a loss that compares the pairs of a step
    LOCAL_NEGATIVES: ClassVar[bool] = False  # its negatives are pairs of the same device
    WRITES_CAPTIONS: ClassVar[bool] = False  # its model captions images
    NEEDS_MODEL: ClassVar[bool] = False  # it starts from a model at init_from

    trainable: list[ModelPart] = field(default_factory=list)  # empty: each of these stages trains what its paper trains
    image_size: int | None = ranged(None, COUNT)  # height and width in pixels of all images; null: as the vision tower
    max_text_tokens: int = ranged(32, COUNT)  # tokens to which a text is cut, special tokens included
    min_crop_area: float = ranged(
        1.0, SHARE_ABOVE_0
    )  # smallest share of a training image's area that a random crop keeps; 1: no crops
    random_flips: bool = False  # mirror half of the training images; makes captions with left or right false
    rand_augment: bool = False  # change contrast, position and angle of training images as BLIP does, RandAugment(2, 5)

    def list_validation_metrics(self) -> list[str]:
        """List the names of the held-out metrics that the stage logs."""
        if not self.HAS_NEGATIVES:
            return ["val/loss"]
        reranks = bool(getattr(self, "num_candidates", None))
        return [name for name in RECALL_METRICS if reranks or "reranked" not in name]


@dataclass(kw_only=True, slots=True)
class RepresentStageConfig(PairStageConfig):
    """Settings of BLIP-2's first stage; the defaults are those of LAVIS's pretrain_stage1.yaml."""

    MODEL_FIELDS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    HAS_NEGATIVES: ClassVar[bool] = True

    text_encoder: str | None = None  # BERT-like masked language model in any language: hub id, folder, or "tiny"
    num_queries: int = ranged(32, COUNT)  # learnt queries of the Q-Former
    feature_width: int = ranged(256, COUNT)  # width of the features that images and texts share
    cross_attention_frequency: int = ranged(2, COUNT)  # every n-th layer of the Q-Former sees the image
    freeze_vision_tower: bool = True  # train only the vision tower's last norm; false: all of it
    match_equal: bool = (
        True  # pairs with one image or one text are no negatives; false: as published, only the own pair
    )
    num_candidates: int = ranged(
        128, COUNT_OR_ZERO
    )  # best candidates of each held-out query that are re-ranked by matching; 0: none


@dataclass(kw_only=True, slots=True)
class GenerateStageConfig(PairStageConfig):
    """Settings of BLIP-2's second stage; the defaults are those of LAVIS's pretrain_stage2.yaml."""

    NEEDS_MODEL: ClassVar[bool] = True
    WRITES_CAPTIONS: ClassVar[bool] = True


@dataclass(kw_only=True, slots=True)
class BlipPretrainStageConfig(PairStageConfig):
    """Settings of BLIP's pretraining; the defaults are those of its pretrain.yaml."""

    MODEL_FIELDS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    HAS_NEGATIVES: ClassVar[bool] = True
    LOCAL_NEGATIVES: ClassVar[bool] = True

    text_encoder: str | None = None  # BERT-like masked language model in any language: hub id, folder, or "tiny"
    feature_width: int = ranged(256, COUNT)  # width of the features that images and texts share
    queue_size: int = ranged(57_600, COUNT)  # features of earlier steps, a multiple of data.global_batch_size
    match_equal: bool = (
        True  # pairs with one image or one text are no negatives; false: as published, only the own pair
    )
    num_candidates: int = ranged(
        128, COUNT_OR_ZERO
    )  # best candidates of each held-out query that are re-ranked by matching; 0: none


@dataclass(kw_only=True, slots=True)
class BlipCaptionStageConfig(PairStageConfig):
    """Settings of BLIP's fine-tuning for captions; the defaults are those of its caption_coco.yaml."""

    NEEDS_MODEL: ClassVar[bool] = True
    WRITES_CAPTIONS: ClassVar[bool] = True

    prompt: str = "a picture of "  # text before each caption, without a loss
    num_beams: int = ranged(3, COUNT)  # beams of the search for the captions that are scored
    min_caption_tokens: int = ranged(5, COUNT_OR_ZERO)  # minimum tokens of such a text, with its prompt
    max_caption_tokens: int = ranged(20, COUNT)  # maximum tokens of such a text, with its prompt


@dataclass(kw_only=True, slots=True)
class BlipRetrievalStageConfig(PairStageConfig):
    """Settings of BLIP's fine-tuning for retrieval; the defaults are those of its retrieval_coco.yaml."""

    HAS_NEGATIVES: ClassVar[bool] = True
    NEEDS_MODEL: ClassVar[bool] = True

    queue_size: int = ranged(57_600, COUNT)  # features of earlier steps, a multiple of data.global_batch_size
    match_equal: bool = (
        True  # equal texts are right for each other, as equal images are; false: as published, images alone
    )
    num_candidates: int = ranged(
        256, COUNT_OR_ZERO
    )  # best candidates of each held-out query that are re-ranked by matching; 0: none


# Config class of each stage that learns from pairs. `StageConfig.name` selects the functions of its room in TASKS.
PAIR_STAGE_CONFIGS: dict[StageName, type[PairStageConfig]] = {
    StageName.represent: RepresentStageConfig,
    StageName.generate: GenerateStageConfig,
    StageName.blip_pretrain: BlipPretrainStageConfig,
    StageName.blip_caption: BlipCaptionStageConfig,
    StageName.blip_retrieval: BlipRetrievalStageConfig,
}

PAIR_STAGES = tuple(stage.value for stage in PAIR_STAGE_CONFIGS)
RECALL_CUTOFFS = (1, 5, 10)
RECALL_METRICS = tuple(
    f"val/{prefix}{direction}_r{cutoff}"
    for prefix in ("", "reranked_")
    for direction in ("image_to_text", "text_to_image")
    for cutoff in RECALL_CUTOFFS
)
# Settings of a section that these stages read; all others of the section must have their defaults
_MODEL_KEYS = ("vision_tower", "language_model")
# The caps of a micro-batch are no mistake: files of conf/data set them for the stages that have micro-batches
_UNREAD_DATA_KEYS = (
    "lock",
    "verify",
    "global_batch_tokens",
    "max_length",
    "on_overlong",
    "tiling",
    "scaled_decode",
)


def is_pair_stage(stage: StageConfig) -> bool:
    """Return True for a stage that learns from pairs of an image and a caption."""
    return isinstance(stage, PairStageConfig)


def find_pair_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each setting with which a stage of image-text pairs cannot train, or that it does not read."""
    stage = config.stage
    assert isinstance(stage, PairStageConfig)
    name = stage.name.value
    yield from _find_model_errors(config, stage)
    if "accumulate_grad_batches" in config.trainer.extra:
        yield (
            f"trainer.extra.accumulate_grad_batches: a step is never split into micro-batches with stage={name}: its losses compare all"
            " pairs of a step, or divide by the tokens of a batch. Use more devices or smaller images for a larger batch."
        )
    world_size = config.trainer.devices * config.trainer.num_nodes
    yield from _find_batch_errors(stage, config.data.global_batch_size, world_size)
    if config.debug is DebugMode.overfit:
        yield f"debug: overfit is not there for stage={name}; debug=fast is."
    yield from _find_unread_settings(config, stage)


def _find_model_errors(config: RunConfig, stage: PairStageConfig) -> Iterator[str]:
    if stage.NEEDS_MODEL and config.init_from is None:
        yield f"init_from is not set: stage={stage.name.value} starts from the model of the stage before, or of a release."
    if isinstance(stage, BlipPretrainStageConfig) and config.init_from is not None:
        yield (
            "init_from: stage=blip_pretrain starts from parts, stage.text_encoder and model.vision_tower, which may be of a BLIP model."
            " Take it away."
        )
    elif hasattr(stage, "text_encoder"):
        if config.init_from is None and stage.text_encoder is None:
            yield "stage.text_encoder is not set: give a BERT-like model, e.g. google-bert/bert-base-uncased or klue/bert-base."
        elif config.init_from is not None and stage.text_encoder is not None:
            yield "stage.text_encoder: has no effect here (init_from names a model with a text encoder). Take one of them away."
    if isinstance(stage, GenerateStageConfig) and "t5" in config.model.language_model.rpartition("/")[2].lower():
        yield (
            f"model.language_model: {config.model.language_model} has an encoder and a decoder. Flan-T5 is not there; choose a decoder-only"
            " language model, e.g. facebook/opt-2.7b or Qwen/Qwen2.5-1.5B."
        )


def _find_batch_errors(stage: PairStageConfig, global_batch_size: int, world_size: int) -> Iterator[str]:
    if global_batch_size < 1 or world_size < 1:
        return  # their ranges are checked for all tasks
    if global_batch_size % world_size:
        yield (
            f"data.global_batch_size: {global_batch_size:,} pairs cannot be divided among {format_count(world_size, 'device')}, which must"
            f" have equally many. Choose a multiple of {world_size}."
        )
    if stage.HAS_NEGATIVES and global_batch_size < 2:
        yield "data.global_batch_size: matching needs a negative for each pair, so a step needs at least 2 pairs, found 1."
    elif stage.LOCAL_NEGATIVES and global_batch_size < 2 * world_size:
        yield (
            f"data.global_batch_size: matching takes the negatives of a pair from its own device, so {format_count(world_size, 'device')}"
            f" need at least {2 * world_size} pairs, found {global_batch_size:,}."
        )
    queue_size = getattr(stage, "queue_size", global_batch_size)
    if queue_size % global_batch_size:
        yield (
            f"stage.queue_size: {queue_size:,} entries cannot be filled with whole steps of {global_batch_size:,} pairs. Choose a multiple"
            " of data.global_batch_size."
        )


def _find_unread_settings(config: RunConfig, stage: PairStageConfig) -> Iterator[str]:
    """Yield an error message for each setting of the other stages that is not at its default."""
    own = {one.name for kind in type(stage).__mro__ for one in _list_own_fields(kind)}
    read = {"name", "learning_rate", *stage.ALLOWED, *own}
    defaults: dict[str, tuple[Any, Any, set[str]]] = {
        "stage": (stage, StageConfig(name=stage.name, trainable=[], learning_rate=1.0), read - {"trainable"}),
        "model": (config.model, ModelConfig(vision_tower="", language_model=""), set(_MODEL_KEYS)),
        "data": (config.data, DataConfig(), {one.name for one in fields(DataConfig)} - set(_UNREAD_DATA_KEYS)),
        "evaluate": (config.evaluate, EvaluateConfig(), set()),
    }
    for section, (given, default, known) in defaults.items():
        for one in fields(default):
            value = getattr(given, one.name)
            if one.name not in known and value != getattr(default, one.name):
                yield f"{section}.{one.name}: has no effect with stage={stage.name.value}, found {_format(value)}. Take it away."
    if config.benchmarks:
        yield f"benchmarks: answer questions, and the model of stage={stage.name.value} does not. Take it away."


def _list_own_fields(kind: type) -> list[Any]:
    """List the fields of the classes of pair stages, without those of `StageConfig`."""
    is_own = issubclass(kind, PairStageConfig)
    return [one for one in fields(kind) if one.name in kind.__annotations__] if is_own else []


def _format(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return "other values" if isinstance(value, PartsConfig | dict) else str(value)
