"""Builds, saves and loads BLIP-2's first-stage model, and reads texts with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Blip2ForImageTextRetrieval,
    Blip2VisionConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from lit_vlm.files import atomic_folder
from lit_vlm.model.hub import disable_transformers_logging, raise_folder_errors
from lit_vlm.model.qformer.pretraining import Blip2ForPretraining, make_blip2_config
from lit_vlm.types import UserError

CAPTION_TOKEN = "[DEC]"  # first token of a caption that is predicted; its name in BLIP and BLIP-2
MAX_TEXT_TOKENS = 32  # of BLIP-2's first stage
IMAGE_FILE = "preprocessor_config.json"
HEADS_FILE = "pretraining_heads.safetensors"  # text head and temperature, beside the files of transformers


def load_caption_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a BERT-like text encoder, and add `[DEC]` as its `bos_token` unless it is there.

    Raises:
        UserError: a token that the first stage needs is missing.
    """
    with raise_folder_errors(folder, "no tokenizer can be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    missing = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
    if missing:
        raise UserError(
            f"{folder}: its tokenizer has no {', '.join(missing)}; texts begin with cls_token, end with sep_token and are "
            "padded with pad_token. Give the folder of a BERT-like text encoder."
        )
    if tokenizer.bos_token != CAPTION_TOKEN:
        tokenizer.add_special_tokens({"bos_token": CAPTION_TOKEN})
    return tokenizer


def tokenize_captions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int = MAX_TEXT_TOKENS
) -> tuple[Tensor, Tensor]:
    """Tokenize texts to ids and mask [B, max_tokens] each, padded to one length so that ranks can exchange them."""
    output = tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
    return output["input_ids"], output["attention_mask"]


def build_blip2(
    text_encoder: str,
    vision_tower: str | Blip2VisionConfig,
    *,
    num_queries: int = 32,
    feature_width: int = 256,
    cross_attention_frequency: int = 2,
    freeze_vision_tower: bool = True,
    seed: int = 0,
) -> tuple[Blip2ForPretraining, PreTrainedTokenizerBase]:
    """Build a first-stage model and its tokenizer from a text encoder and a vision tower.

    Self-attention, feed-forward layers, embeddings and text head start from the text encoder, the feed-forward layers of
    the queries as copies of those of the text. Cross-attention, queries and projections are new.

    Args:
        text_encoder: folder or hub id of a BERT-like masked language model in any language.
        vision_tower: folder or hub id of a BLIP-2 model, whose vision tower is taken, or a config for a new one.
        num_queries, feature_width, cross_attention_frequency: see `make_blip2_config`; the defaults are BLIP-2's.
        freeze_vision_tower: see `Blip2ForPretraining`.
        seed: for new parameters.

    Raises:
        UserError: a folder is not what is needed.
    """
    tokenizer = load_caption_tokenizer(text_encoder)
    encoder = load_text_encoder(text_encoder, len(tokenizer), seed)
    tower = _load_vision_tower(vision_tower) if isinstance(vision_tower, str) else None
    config = make_blip2_config(
        vision_tower if tower is None else tower.config,
        encoder.config,
        num_queries=num_queries,
        feature_width=feature_width,
        cross_attention_frequency=cross_attention_frequency,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        retrieval = Blip2ForImageTextRetrieval(config)
        torch.nn.init.normal_(retrieval.query_tokens, std=encoder.config.initializer_range)
        for layer in (retrieval.vision_projection, retrieval.text_projection, retrieval.itm_head):
            layer.reset_parameters()  # PyTorch's initialisation, as in LAVIS; transformers has another
        model = Blip2ForPretraining(retrieval, tokenizer.bos_token_id, freeze_vision_tower=freeze_vision_tower)
    if tower is not None:
        retrieval.vision_model.load_state_dict(tower.state_dict())
    _copy_text_encoder(model, encoder)
    return model, tokenizer


def require_text_encoder(folder: str) -> Any:
    """Read the config of a text encoder and require that it is a BERT.

    Raises:
        UserError: it is no BERT.
    """
    with disable_transformers_logging(), raise_folder_errors(folder, "no masked language model can be read"):
        config = AutoConfig.from_pretrained(folder)
    if config.model_type != "bert":
        raise UserError(
            f"{folder}: its model type is {config.model_type}, and the text layers of BLIP and BLIP-2 are those of BERT. Give a "
            "folder of model type bert; it may be of any language."
        )
    return config


def load_text_encoder(folder: str, num_tokens: int, seed: int = 0) -> Any:
    """Load a BERT with its head, with rows for at least `num_tokens` tokens.

    Args:
        seed: for new rows.

    Raises:
        UserError: it is no BERT.
    """
    require_text_encoder(folder)
    with disable_transformers_logging(), raise_folder_errors(folder, "no masked language model can be read"):
        encoder = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder.resize_token_embeddings(max(num_tokens, encoder.config.vocab_size), mean_resizing=False)
    return encoder


def _load_vision_tower(folder: str) -> Any:
    with disable_transformers_logging(), raise_folder_errors(folder, "no BLIP-2 model can be read"):
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "blip-2":
            raise UserError(
                f"{folder}: its model type is {config.model_type}, and the exported class has the vision tower of BLIP-2. Give the folder "
                "of a BLIP-2 model, or a Blip2VisionConfig for a new tower."
            )
        return Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).vision_model


@torch.no_grad()
def _copy_text_encoder(model: Blip2ForPretraining, encoder: Any) -> None:
    """Copy embeddings, layers and head of a BERT; it has no weights for images."""
    bert, head = encoder.bert, encoder.cls.predictions
    retrieval, state = model.retrieval, {}
    for name, value in bert.encoder.state_dict().items():
        name = name.replace("attention.self.", "attention.attention.")
        state[name] = value
        for part in ("intermediate", "output"):
            if f".{part}." in name and ".attention." not in name:
                state[name.replace(f".{part}.", f".{part}_query.")] = value
    missing, unexpected = retrieval.qformer.encoder.load_state_dict(state, strict=False)
    assert not unexpected and all(".crossattention." in name for name in missing), (missing[:5], unexpected[:5])
    retrieval.qformer.layernorm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
    for name in ("word_embeddings", "position_embeddings"):
        getattr(retrieval.embeddings, name).weight.copy_(getattr(bert.embeddings, name).weight)
    # The Q-Former has no token types, so BERT's are left out, as in LAVIS
    model.text_head.dense.load_state_dict(head.transform.dense.state_dict())
    model.text_head.layernorm.load_state_dict(head.transform.LayerNorm.state_dict())
    model.text_head.bias.copy_(head.bias)


def save_blip2(model: Blip2ForPretraining, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the model to a folder that transformers loads as `Blip2ForImageTextRetrieval` with the same scores.

    Text head and temperature are in a file of their own, with which `load_blip2` continues the first stage.
    """
    heads = {f"text_head.{name}": value for name, value in model.text_head.state_dict().items()}
    heads["temperature"] = model.temperature.detach().reshape(())
    with atomic_folder(folder, replace=True) as temporary, disable_transformers_logging():
        model.retrieval.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_image_config(temporary, model.retrieval.config.vision_config.image_size)
        save_file({name: value.cpu().contiguous() for name, value in heads.items()}, temporary / HEADS_FILE)


def write_image_config(folder: Path, side: int) -> None:
    """Write the settings of transformers' BlipImageProcessor for the images that `CaptionPairs` makes, `side` pixels wide."""
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
    }
    (folder / IMAGE_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_blip2(
    folder: str | Path, *, freeze_vision_tower: bool = True, needs_heads: bool = True
) -> tuple[Blip2ForPretraining, PreTrainedTokenizerBase]:
    """Load a model that `save_blip2` saved, to continue its first stage.

    Args:
        needs_heads: False: also a folder of transformers, whose text head and temperature are then new; the second stage
            does not use them.

    Raises:
        UserError: the folder cannot be read, or has no text head.
    """
    file = Path(folder) / HEADS_FILE
    if needs_heads and not file.is_file():
        raise UserError(
            f"{folder}: no {HEADS_FILE}, which holds the text head and the temperature of the first stage. Give a folder of "
            "save_blip2; folders of transformers have neither."
        )
    tokenizer = load_caption_tokenizer(str(folder))
    with disable_transformers_logging(), raise_folder_errors(str(folder), "no Blip2ForImageTextRetrieval can be read"):
        retrieval = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
        model = Blip2ForPretraining(retrieval, tokenizer.bos_token_id, freeze_vision_tower=freeze_vision_tower)
        if file.is_file():
            heads = load_file(file)
            heads["temperature"] = heads["temperature"].reshape(1)
            model.load_state_dict(heads, strict=False)
    return model, tokenizer
