"""BLIP-2's second stage: the Q-Former's outputs are soft prompts of a frozen language model that continues with the caption.

The model is transformers' `Blip2ForConditionalGeneration`. A text is as many `<image>` tokens as there are queries, then the
language model's own tokens of the caption and a line break, as LAVIS 1.0.2 trains OPT; the loss is on the caption.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from lit_vlm.files import atomic_folder
from lit_vlm.model.hub import disable_transformers_logging, raise_folder_errors
from lit_vlm.model.qformer.build import write_image_config
from lit_vlm.model.qformer.pretraining import Blip2ForPretraining
from lit_vlm.types import IGNORE_INDEX, IMAGE_TOKEN, UserError

CAPTION_END = "\n"  # ends each caption in BLIP-2's second stage, and generation


def build_blip2_generator(
    first_stage: Blip2ForPretraining, language_model: str, *, seed: int = 0
) -> tuple[Blip2ForConditionalGeneration, PreTrainedTokenizerBase]:
    """Build the second stage's model from the first stage's and a decoder-only language model, such as OPT or Qwen.

    Vision tower, queries and Q-Former are copied, without what only texts need; the projection to the language model is
    new. All but the tower's layers and the language model trains.

    Args:
        language_model: folder or hub id of a language model, or of a LLaVA-like model, whose language model is taken.
        seed: for new parameters.

    Raises:
        UserError: the language model is not decoder-only, or the folder cannot be read.
    """
    tokenizer = load_prompt_tokenizer(language_model)
    with disable_transformers_logging(), raise_folder_errors(language_model, "no language model can be read"):
        decoder = load_decoder(language_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if len(tokenizer) > decoder.config.vocab_size:
            decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        model = Blip2ForConditionalGeneration(_make_config(first_stage, decoder.config, image_token_id))
        model.language_projection.reset_parameters()  # PyTorch's initialisation, as in LAVIS; transformers has another
    model.language_model.load_state_dict(decoder.state_dict())
    model.generation_config = copy.deepcopy(decoder.generation_config)
    _copy_first_stage(model, first_stage)
    _freeze(model)
    return model, tokenizer


def load_decoder(folder: str) -> Any:
    """Load a decoder-only language model in float32, alone or as the language model of a LLaVA-like model."""
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "text_config"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    embeddings, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    text_config = whole.config.text_config
    text_config.tie_word_embeddings = embeddings.weight is head.weight
    decoder = AutoModelForCausalLM.from_config(text_config, dtype=torch.float32)
    decoder.base_model.load_state_dict(whole.base_model.language_model.state_dict())
    decoder.get_output_embeddings().load_state_dict(head.state_dict())
    decoder.generation_config = whole.generation_config
    return decoder


def _freeze(model: Blip2ForConditionalGeneration) -> None:
    """Freeze the tower, without its last norm, and the language model."""
    for name, parameter in model.named_parameters():
        is_frozen_tower = name.startswith("vision_model.") and ".post_layernorm." not in name
        parameter.requires_grad = not (is_frozen_tower or name.startswith("language_model."))


def load_prompt_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a decoder-only language model, or of a saved second stage, and add `<image>` unless it is there.

    Raises:
        UserError: the language model is not decoder-only, or the folder cannot be read.
    """
    with disable_transformers_logging(), raise_folder_errors(folder, "no language model can be read"):
        config = AutoConfig.from_pretrained(folder)
        config = getattr(config, "text_config", config)
        if config.is_encoder_decoder:
            raise UserError(
                f"{folder}: {config.model_type} has an encoder and a decoder; this stage trains soft prompts of decoder-only "
                "language models (OPT, Qwen). BLIP-2's Flan-T5 models are not supported."
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_blip2_generator(folder: str | Path) -> tuple[Blip2ForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load a model of the second stage, ours or a release, to continue it.

    Raises:
        UserError: its language model is not decoder-only, or the folder cannot be read.
    """
    tokenizer = load_prompt_tokenizer(str(folder))
    with disable_transformers_logging(), raise_folder_errors(str(folder), "no second stage of BLIP-2 can be read"):
        model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if image_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.image_token_index = image_token_id
    _freeze(model)
    return model, tokenizer


def _make_config(first_stage: Blip2ForPretraining, text_config: Any, image_token_id: int) -> Blip2Config:
    config = first_stage.retrieval.config
    return Blip2Config(
        vision_config=config.vision_config.to_dict(),
        qformer_config=config.qformer_config.to_dict() | {"use_qformer_text_input": False},
        text_config=text_config.to_dict(),
        num_query_tokens=config.num_query_tokens,
        image_text_hidden_size=config.image_text_hidden_size,
        image_token_index=image_token_id,
    )


@torch.no_grad()
def _copy_first_stage(model: Blip2ForConditionalGeneration, first_stage: Blip2ForPretraining) -> None:
    source = first_stage.retrieval
    model.vision_model.load_state_dict(source.vision_model.state_dict())
    model.query_tokens.copy_(source.query_tokens)
    needed = model.qformer.state_dict().keys()
    model.qformer.load_state_dict({n: value for n, value in source.qformer.state_dict().items() if n in needed})


def tokenize_prompted(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, num_queries: int, max_tokens: int = 32
) -> tuple[Tensor, Tensor]:
    """Tokenize captions after the places of the soft prompts, to ids and mask [B, num_queries + T] each, padded on the right.

    Args:
        max_tokens: maximum tokens of a caption, as in LAVIS.
    """
    texts = [IMAGE_TOKEN * num_queries + text + CAPTION_END for text in texts]
    side, tokenizer.padding_side = tokenizer.padding_side, "right"
    tokens = [_put_prompts_first(tokenizer, ids) for ids in tokenizer(texts)["input_ids"]]
    output = tokenizer.pad({"input_ids": [ids[: num_queries + max_tokens] for ids in tokens]}, return_tensors="pt")
    tokenizer.padding_side = side
    return output["input_ids"], output["attention_mask"]


def _put_prompts_first(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Move a token that the tokenizer puts at the beginning (OPT's `</s>`) behind the soft prompts, as in BLIP-2."""
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    prompts = [token for token in ids if token == image_token_id]
    return prompts + [token for token in ids if token != image_token_id]


def make_caption_labels(input_ids: Tensor, attention_mask: Tensor, image_token_id: int) -> Tensor:
    """Make the labels [B, T], not shifted: soft prompts and padding have no loss."""
    return input_ids.masked_fill((attention_mask == 0) | (input_ids == image_token_id), IGNORE_INDEX)


@torch.no_grad()
def generate_captions(
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    pixel_values: Tensor,
    *,
    max_new_tokens: int = 30,
    **options: Any,
) -> list[str]:
    """Generate a caption of each image [B, 3, H, W], up to the first line break; greedily without options of `generate`."""
    start = tokenize_start(tokenizer, model.config.num_query_tokens)
    input_ids = torch.tensor([start] * len(pixel_values), device=pixel_values.device)
    ends = [tokenizer.encode(CAPTION_END, add_special_tokens=False)[-1], tokenizer.eos_token_id]
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends} | options
    output = model.generate(pixel_values, input_ids=input_ids, max_new_tokens=max_new_tokens, **options)
    texts = tokenizer.batch_decode(output[:, len(start) :], skip_special_tokens=True)
    return [text.partition(CAPTION_END)[0].strip() for text in texts]


def tokenize_start(tokenizer: PreTrainedTokenizerBase, num_queries: int) -> list[int]:
    """Tokenize the soft prompts with which a caption begins, and the token that the tokenizer puts before each text."""
    return _put_prompts_first(tokenizer, tokenizer(IMAGE_TOKEN * num_queries)["input_ids"])


def save_blip2_generator(
    model: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save the model to a folder that transformers loads as `Blip2ForConditionalGeneration`, with tokenizer and image settings."""
    with atomic_folder(folder, replace=True) as temporary, disable_transformers_logging():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_image_config(temporary, model.config.vision_config.image_size)
