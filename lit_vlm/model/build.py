"""Build a vision-language model with its weights, from a vision tower, a projector and a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_vlm.model import families
from lit_vlm.model.adapters import check_base, find_export_base, merge_adapter
from lit_vlm.model.classes import get_model_class
from lit_vlm.model.hub import disable_transformers_logging, get_first_line, raise_folder_errors
from lit_vlm.model.packed_forward import use_flat_forward
from lit_vlm.model.skeleton import (
    build_on_meta,
    fill_skeleton,
    init_projector,
    is_deferring_weights,
    make_skeleton,
    share_config,
)
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.vocabulary import extend_embeddings, find_turn_end_token
from lit_vlm.model.weights import require_all_weights, resolve_weight_tying
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel


def build_model(spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> VisionLanguageModel:
    """Build the model with its weights, patched for the flat forward pass. New parameters are initialised from `seed`.

    Inside `defer_weights` the model has no weights yet, see `skeleton.py`.
    """
    name = spec.whole or f"{spec.vision_tower} and {spec.language_model}"
    with raise_folder_errors(name, "its weights could not be loaded"):
        model = make_skeleton(spec, dtype, seed) if is_deferring_weights() else _load_with_weights(spec, dtype, seed)
    model.generation_config.eos_token_id = _collect_eos_token_ids(model, spec.tokenizer)
    model.config.dtype = dtype
    spec.config.text_config.vocab_size = model.config.text_config.vocab_size
    use_flat_forward(model, spec.images)
    model.adapter_base = find_export_base(spec)
    if not is_deferring_weights() and (remark := families.probe_packing(model, spec.language_model or name)):
        spec.remarks.append(remark)
    return model


def _load_with_weights(spec: ModelSpec, dtype: torch.dtype, seed: int) -> VisionLanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.is_original:
            model = make_skeleton(spec, dtype, seed)
            fill_skeleton(model, dtype)
            del model.weights
            return model
        if spec.whole:
            model = load_pretrained(get_model_class(spec.config), spec.whole, spec.config, dtype, spec.hub_options)
            resolve_weight_tying(model, model, spec, spec.whole)
            if spec.adapter is not None:
                check_base(spec.adapter, spec.revision)
                merge_adapter(model, spec.adapter)
        else:
            model = _build_from_parts(spec, dtype, seed)
        extend_embeddings(model, spec.tokenizer, spec.new_tokens, spec.text_tokens.pieces)
    return model


def _build_from_parts(spec: ModelSpec, dtype: torch.dtype, seed: int) -> VisionLanguageModel:
    """Build the model from its parts; projector and newline are initialised from `seed`."""
    assert spec.vision_tower is not None and spec.language_model is not None
    model = build_on_meta(spec.config)
    config, source = spec.config, spec.hub_options
    tower = load_pretrained(type(model.model.vision_tower), spec.vision_tower, config.vision_config, dtype, source)
    language = load_pretrained(AutoModelForCausalLM, spec.language_model, config.text_config, dtype, source)
    families.check_head(language.lm_head, spec.language_model)
    share_config(tower, spec.config.vision_config)
    share_config(language.model, spec.config.text_config)
    model.model.vision_tower, model.model.language_model, model.lm_head = tower, language.model, language.lm_head
    resolve_weight_tying(model, language, spec, spec.language_model)
    families.fold_logit_scale(model)
    model.model.multi_modal_projector, newline = init_projector(config, dtype, seed, spec.projector_weights)
    if hasattr(model.model, "image_newline"):
        model.model.image_newline = nn.Parameter(newline)
    model.generation_config = language.generation_config
    model.tie_weights()
    return model


def load_pretrained(model_class: Any, name: str, config: Any, dtype: torch.dtype, hub_options: dict[str, Any]) -> Any:
    """Load weights with from_pretrained, and raise for missing ones.

    Weights that were left out on purpose (layers, heads, a text model) are not reported.

    Raises:
        UserError: weights are missing or have another shape; transformers would initialise them at random.
    """
    try:
        with disable_transformers_logging():
            # mismatched sizes are reported, and raised below with our own message
            options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, report = model_class.from_pretrained(name, config=config, **options, **hub_options)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{name}: its weights could not be loaded: {get_first_line(error)}") from None
    require_all_weights(name, report["missing_keys"], [entry[0] for entry in report["mismatched_keys"]], config)
    return model


def _collect_eos_token_ids(model: VisionLanguageModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Collect the token ids that end generation: the language model's own, and the one that closes an answer here."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return sorted(
        {token for token in (*eos, find_turn_end_token(tokenizer), tokenizer.eos_token_id) if token is not None}
    )
