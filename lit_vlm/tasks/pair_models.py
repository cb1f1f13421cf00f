"""Models of the stages that learn from image-text pairs: from the settings to tokenizer, model, stage and exported folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from lit_vlm.config.choices import StageName
from lit_vlm.config.pair_stages import (
    BlipCaptionStageConfig,
    BlipPretrainStageConfig,
    BlipRetrievalStageConfig,
    GenerateStageConfig,
    PairStageConfig,
    RepresentStageConfig,
)
from lit_vlm.config.schema import ModelConfig, StageConfig
from lit_vlm.data.caption_pairs import Tokenize
from lit_vlm.files import handle_write_errors
from lit_vlm.model.blip import build_blip, load_blip_tokenizer, save_blip_part, save_blip_run
from lit_vlm.model.blip_parts import (
    build_blip_retrieval,
    count_prompt_tokens,
    load_blip_vision,
    load_captioner,
    make_blip_vision_config,
    tokenize_with_prompt,
)
from lit_vlm.model.hub import disable_transformers_logging, raise_folder_errors
from lit_vlm.model.qformer.build import (
    build_blip2,
    load_blip2,
    load_caption_tokenizer,
    require_text_encoder,
    save_blip2,
    tokenize_captions,
)
from lit_vlm.model.qformer.generation import (
    build_blip2_generator,
    load_blip2_generator,
    load_prompt_tokenizer,
    save_blip2_generator,
    tokenize_prompted,
)
from lit_vlm.model.tiny import make_tiny_blip2_vision, make_tiny_blip_vision, make_tiny_parts, make_tiny_text_encoder
from lit_vlm.runs.run_folder import compute_parts_digest
from lit_vlm.stages.caption_pairs import (
    BlipStage,
    CaptionStage,
    GenerateStage,
    PairStage,
    RepresentStage,
    RetrievalStage,
)
from lit_vlm.types import UserError

TINY = "tiny"


@dataclass(frozen=True, slots=True)
class PairParts:
    """Folders of the parts of a model, and what its data need. Reads no weights.

    Attributes:
        whole: model that the stage starts from; None: it is built from parts.
        vision_tower, text_encoder, language_model: folders or hub ids; None: not read.
        tokenizer: of the texts.
        tokenize: texts to ids and mask.
        image_size: height and width of the images in pixels.
    """

    whole: str | None
    vision_tower: str | None
    text_encoder: str | None
    language_model: str | None
    tokenizer: PreTrainedTokenizerBase
    tokenize: Tokenize
    image_size: int

    def compute_parent_digest(self, digest: str) -> str:
        """Compute a digest of all parts, whose frozen weights a checkpoint does not hold.

        Args:
            digest: of the model that the stage starts from, see `describe_parent`; "" without one.
        """
        folders = compute_parts_digest(self.whole, self.vision_tower, self.text_encoder, self.language_model)
        return hashlib.sha256(f"{digest}\0{folders}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PairModel:
    """A built stage, and the function that saves its model, or a copy of it, to a folder."""

    stage: PairStage
    save: Callable[[Any, Path], None]


def resolve_pair_parts(
    parts_dir: Path, stage: StageConfig, model: ModelConfig, init_from: str | None, seed: int
) -> PairParts:
    """Make the tiny parts that the settings name, read configs and tokenizer, and check that the parts fit together.

    Args:
        parts_dir: folder of the tiny parts.

    Raises:
        UserError: a folder cannot be read, is of another kind, or does not fit the settings.
    """
    assert isinstance(stage, PairStageConfig)
    with handle_write_errors(parts_dir, "The tiny model's parts", "run_dir"):
        folders = _resolve_folders(parts_dir, stage, model, init_from, seed)
    return RESOLVERS[stage.name](stage, folders)


def _resolve_folders(
    parts_dir: Path, stage: PairStageConfig, model: ModelConfig, init_from: str | None, seed: int
) -> dict[str, str | None]:
    """Resolve the folder of each part; None for one that the stage does not read."""
    text_encoder = getattr(stage, "text_encoder", None)
    if text_encoder == TINY:
        text_encoder = make_tiny_text_encoder(parts_dir, seed)
    language_model: str | None = None
    if isinstance(stage, GenerateStageConfig):
        language_model = make_tiny_parts(parts_dir, seed)[1] if model.language_model == TINY else model.language_model
    vision_tower = None if init_from else model.vision_tower
    return {
        "whole": init_from,
        "vision_tower": vision_tower,
        "text_encoder": text_encoder,
        "language_model": language_model,
    }


def build_pair_model(
    parts: PairParts,
    stage: PairStageConfig,
    num_steps: int,
    global_batch_size: int,
    steps_per_epoch: int,
    seed: int,
) -> PairModel:
    """Build the stage with the weights of its parts.

    Args:
        num_steps: optimizer steps of the run.
        global_batch_size: pairs of a step over all ranks.
        steps_per_epoch: optimizer steps of a pass over the mixture.
    """
    optimizer = make_optimizer_settings(stage, num_steps)
    options = {"batch": global_batch_size, "steps_per_epoch": steps_per_epoch, "seed": seed}
    return BUILDERS[stage.name](parts, stage, optimizer=optimizer, **options)


def make_optimizer_settings(stage: PairStageConfig, num_steps: int) -> dict[str, Any]:
    """Make the arguments of `PairStage` for optimizer and schedule. A warm-up below 1 is a share of the steps."""
    warmup = stage.warmup * num_steps if stage.warmup < 1 else stage.warmup
    return {
        "learning_rate": stage.learning_rate,
        "min_learning_rate": stage.min_learning_rate * stage.learning_rate,
        "warmup_steps": round(warmup),
        "weight_decay": stage.weight_decay,
        "adam_betas": tuple(stage.adam_betas),
        "adam_eps": stage.adam_eps,
    }


def read_config(folder: str) -> Any:
    """Read the config of a model folder or hub id."""
    with disable_transformers_logging(), raise_folder_errors(folder, "no model can be read"):
        return AutoConfig.from_pretrained(folder)


def require_model_type(folder: str, setting: str, *kinds: str) -> Any:
    """Read the config of a model and require its type.

    Raises:
        UserError: it is of another type.
    """
    config = read_config(folder)
    if config.model_type not in kinds:
        raise UserError(
            f"{setting}={folder}: its model type is {config.model_type}, and {' or '.join(kinds)} is needed. Give the folder of such a model."
        )
    return config


def resolve_image_size(setting: int | None, size: int, folder: str) -> int:
    """Return the image size of a vision tower.

    Raises:
        UserError: stage.image_size is another one.
    """
    if setting not in (None, size):
        raise UserError(
            f"stage.image_size={setting}: the vision tower of {folder} has positions for images of {size} pixels. Leave it out."
        )
    return size


def require_positions(stage: PairStageConfig, positions: int, folder: str) -> None:
    """Require that the text encoder has a position for each token.

    Raises:
        UserError: stage.max_text_tokens is larger.
    """
    if stage.max_text_tokens > positions:
        raise UserError(
            f"stage.max_text_tokens={stage.max_text_tokens}: {folder} has {positions} positions. Set it to {positions} or less."
        )


# ---- BLIP-2, first stage


def _resolve_represent(stage: PairStageConfig, folders: dict[str, Any]) -> PairParts:
    if whole := folders["whole"]:
        config = require_model_type(whole, "init_from", "blip-2")
        encoder, vision, source = config.qformer_config, config.vision_config, whole
    else:
        encoder, source = require_text_encoder(folders["text_encoder"]), folders["vision_tower"]
        vision = make_tiny_blip2_vision() if source == TINY else _get_blip2_vision(source)
    texts = whole or folders["text_encoder"]
    require_positions(stage, encoder.max_position_embeddings, texts)
    tokenizer = load_caption_tokenizer(texts)
    tokenize = partial(tokenize_captions, tokenizer, max_tokens=stage.max_text_tokens)
    size = resolve_image_size(stage.image_size, vision.image_size, source)
    return PairParts(**folders, tokenizer=tokenizer, tokenize=tokenize, image_size=size)


def _get_blip2_vision(folder: str) -> Any:
    return require_model_type(folder, "model.vision_tower", "blip-2").vision_config


def _build_represent(parts: PairParts, stage: Any, *, optimizer: dict[str, Any], seed: int, **_: int) -> PairModel:
    assert isinstance(stage, RepresentStageConfig)
    if parts.whole:
        model, tokenizer = load_blip2(parts.whole, freeze_vision_tower=stage.freeze_vision_tower)
    else:
        assert parts.text_encoder is not None and parts.vision_tower is not None
        model, tokenizer = build_blip2(
            parts.text_encoder,
            make_tiny_blip2_vision() if parts.vision_tower == TINY else parts.vision_tower,
            num_queries=stage.num_queries,
            feature_width=stage.feature_width,
            cross_attention_frequency=stage.cross_attention_frequency,
            freeze_vision_tower=stage.freeze_vision_tower,
            seed=seed,
        )
    optimizer |= {"num_candidates": stage.num_candidates, "seed": seed}
    built = RepresentStage(model, match_equal=stage.match_equal, **optimizer)
    return PairModel(built, lambda model, folder: save_blip2(model, tokenizer, folder))


# ---- BLIP-2, second stage


def _resolve_generate(stage: PairStageConfig, folders: dict[str, Any]) -> PairParts:
    whole: Any = folders["whole"]
    config = require_model_type(whole, "init_from", "blip-2")
    is_second = is_generator(config)
    language_model: Any = None if is_second else folders["language_model"]
    tokenizer = load_prompt_tokenizer(whole if is_second else language_model)
    tokenize = partial(
        tokenize_prompted, tokenizer, num_queries=config.num_query_tokens, max_tokens=stage.max_text_tokens
    )
    size = resolve_image_size(stage.image_size, config.vision_config.image_size, whole)
    return PairParts(
        **folders | {"language_model": language_model}, tokenizer=tokenizer, tokenize=tokenize, image_size=size
    )


def is_generator(config: Any) -> bool:
    """Return True for a model of BLIP-2's second stage, which has a language model."""
    return "Blip2ForConditionalGeneration" in (config.architectures or [])


def _build_generate(parts: PairParts, stage: Any, *, optimizer: dict[str, Any], seed: int, **_: int) -> PairModel:
    assert parts.whole is not None
    if parts.language_model is None:
        model, tokenizer = load_blip2_generator(parts.whole)
    else:
        first_stage, _ = load_blip2(parts.whole, needs_heads=False)
        model, tokenizer = build_blip2_generator(first_stage, parts.language_model, seed=seed)
    built = GenerateStage(model, tokenizer, seed=seed, **optimizer)
    return PairModel(built, lambda model, folder: save_blip2_generator(model, tokenizer, folder))


# ---- BLIP


def _resolve_blip_pretrain(stage: PairStageConfig, folders: dict[str, Any]) -> PairParts:
    texts, tower = folders["text_encoder"], folders["vision_tower"]
    require_positions(stage, require_text_encoder(texts).max_position_embeddings, texts)
    if tower == TINY:
        size = resolve_image_size(stage.image_size, make_tiny_blip_vision().image_size, tower)
    else:
        size = make_blip_vision_config(tower, stage.image_size).image_size
    tokenizer = load_blip_tokenizer(texts)
    tokenize = partial(tokenize_captions, tokenizer, max_tokens=stage.max_text_tokens)
    return PairParts(**folders, tokenizer=tokenizer, tokenize=tokenize, image_size=size)


def _build_blip_pretrain(
    parts: PairParts, stage: Any, *, optimizer: dict[str, Any], batch: int, steps_per_epoch: int, seed: int
) -> PairModel:
    assert isinstance(stage, BlipPretrainStageConfig) and parts.text_encoder and parts.vision_tower
    tiny = parts.vision_tower == TINY
    model, tokenizer = build_blip(
        parts.text_encoder,
        make_tiny_blip_vision() if tiny else load_blip_vision(parts.vision_tower, stage.image_size),
        global_batch_size=batch,
        queue_size=stage.queue_size,
        feature_width=stage.feature_width,
        seed=seed,
    )
    optimizer |= {"num_candidates": stage.num_candidates, "seed": seed}
    built = BlipStage(model, steps_per_epoch, match_equal=stage.match_equal, **optimizer)
    return PairModel(built, lambda model, folder: save_blip_run(model, tokenizer, folder))


def _resolve_blip_caption(stage: PairStageConfig, folders: dict[str, Any]) -> PairParts:
    assert isinstance(stage, BlipCaptionStageConfig)
    whole = find_captioner(folders["whole"])
    config = require_model_type(whole, "init_from", "blip")
    require_positions(stage, config.text_config.max_position_embeddings, whole)
    tokenizer = load_blip_tokenizer(whole)
    num_prompt_tokens = count_prompt_tokens(tokenizer, stage.prompt)
    for name in ("max_text_tokens", "max_caption_tokens"):
        if getattr(stage, name) <= num_prompt_tokens + 1:
            raise UserError(
                f"stage.{name}={getattr(stage, name)}: the prompt {stage.prompt!r} has {num_prompt_tokens} tokens, which leaves none for"
                " the caption. Raise it, or shorten stage.prompt."
            )
    tokenize = partial(tokenize_with_prompt, tokenizer, prompt=stage.prompt, max_tokens=stage.max_text_tokens)
    size = make_blip_vision_config(whole, stage.image_size).image_size
    return PairParts(**folders | {"whole": whole}, tokenizer=tokenizer, tokenize=tokenize, image_size=size)


def find_captioner(folder: str) -> str:
    """Return the folder of a captioner: the one given, or `captions` in the folder of a pretraining.

    Raises:
        UserError: it is a retrieval model alone.
    """
    if "BlipForConditionalGeneration" in (read_config(folder).architectures or []):
        return folder
    captions = Path(folder) / "captions"
    if captions.is_dir():
        return str(captions)
    raise UserError(
        f"init_from={folder}: holds no captioner. Give the folder of a BlipForConditionalGeneration, such as"
        " Salesforce/blip-image-captioning-base, or of a run of stage=blip_pretrain."
    )


def _build_blip_caption(parts: PairParts, stage: Any, *, optimizer: dict[str, Any], seed: int, **_: int) -> PairModel:
    assert isinstance(stage, BlipCaptionStageConfig) and parts.whole
    model, tokenizer = load_captioner(parts.whole, parts.image_size)
    lengths = {"min_length": stage.min_caption_tokens, "max_length": stage.max_caption_tokens}
    options = optimizer | {"generation": {"num_beams": stage.num_beams, **lengths}, "seed": seed}
    built = CaptionStage(model, tokenizer, prompt=stage.prompt, **options)
    return PairModel(built, lambda model, folder: save_blip_part(model, tokenizer, folder))


def _resolve_blip_retrieval(stage: PairStageConfig, folders: dict[str, Any]) -> PairParts:
    whole: Any = folders["whole"]
    config = require_model_type(whole, "init_from", "blip")
    if "BlipForImageTextRetrieval" not in (config.architectures or []):
        raise UserError(
            f"init_from={whole}: holds {', '.join(config.architectures or ['no named model'])}. Give the folder of a"
            " BlipForImageTextRetrieval, such as Salesforce/blip-itm-base-coco, or of a run of stage=blip_pretrain."
        )
    require_positions(stage, config.text_config.max_position_embeddings, whole)
    tokenizer = load_blip_tokenizer(whole)
    tokenize = partial(tokenize_captions, tokenizer, max_tokens=stage.max_text_tokens)
    size = make_blip_vision_config(whole, stage.image_size).image_size
    return PairParts(**folders, tokenizer=tokenizer, tokenize=tokenize, image_size=size)


def _build_blip_retrieval(
    parts: PairParts, stage: Any, *, optimizer: dict[str, Any], batch: int, steps_per_epoch: int, seed: int
) -> PairModel:
    assert isinstance(stage, BlipRetrievalStageConfig) and parts.whole
    sizes = {"global_batch_size": batch, "queue_size": stage.queue_size, "image_size": parts.image_size}
    model, tokenizer = build_blip_retrieval(parts.whole, **sizes, seed=seed)
    optimizer |= {"num_candidates": stage.num_candidates, "seed": seed}
    built = RetrievalStage(model, steps_per_epoch, match_equal=stage.match_equal, **optimizer)
    return PairModel(built, lambda model, folder: save_blip_part(model.retrieval, tokenizer, folder))


RESOLVERS: dict[StageName, Callable[[PairStageConfig, dict[str, Any]], PairParts]] = {
    StageName.represent: _resolve_represent,
    StageName.generate: _resolve_generate,
    StageName.blip_pretrain: _resolve_blip_pretrain,
    StageName.blip_caption: _resolve_blip_caption,
    StageName.blip_retrieval: _resolve_blip_retrieval,
}
BUILDERS: dict[StageName, Callable[..., PairModel]] = {
    StageName.represent: _build_represent,
    StageName.generate: _build_generate,
    StageName.blip_pretrain: _build_blip_pretrain,
    StageName.blip_caption: _build_blip_caption,
    StageName.blip_retrieval: _build_blip_retrieval,
}
