"""Language-model families whose own `ForCausalLM` does more with its logits than multiply by the head's matrix.

transformers' LLaVA classes multiply the last hidden state by the head and do no more. For a family that
scales its logits, the factor is folded into the head once, at build. A family that transforms them non-linearly (soft
capping) cannot be supported, and is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lit_vlm.model.vocabulary import untie_embeddings
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

# The factor on a family's logits, from its config.
LOGIT_FACTORS = {
    "hyperclovax": lambda config: config.logits_scaling,  # a multiplier, unlike Granite's
    "granite": lambda config: 1.0 / config.logits_scaling,
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
}
SOFTCAPPING_KEYS = ("final_logit_softcapping", "attn_logit_softcapping")


def check_logits_supported(text_config: Any, name: str) -> None:
    """Check that this class computes the text logits of a language model correctly.

    Raises:
        UserError: the family caps its logits, or scales them in an unknown way.
    """
    for setting in SOFTCAPPING_KEYS:
        if getattr(text_config, setting, None):
            raise UserError(
                f"model.language_model={name} ({text_config.model_type}) caps its logits ({setting}={getattr(text_config, setting)}), which "
                "LLaVA's classes do not do, so its answers would differ from the language model's own. Choose Qwen2.5, Qwen3, "
                "Llama, Mistral, HyperCLOVA X or Granite."
            )
    scale = getattr(text_config, "logits_scaling", None) or getattr(text_config, "logit_scale", None)
    if scale not in (None, 1, 1.0) and text_config.model_type not in LOGIT_FACTORS:
        raise UserError(
            f"model.language_model={name} ({text_config.model_type}) scales its logits by {scale} in a way that is not known here. "
            "Choose Qwen2.5, Qwen3, Llama, Mistral, HyperCLOVA X or Granite."
        )


def get_logit_factor(text_config: Any) -> float:
    """Return the factor on the family's logits; 1.0 for most families."""
    factor = LOGIT_FACTORS.get(text_config.model_type)
    return float(factor(text_config)) if factor else 1.0


def fold_logit_scale(model: VisionLanguageModel) -> None:
    """Fold the family's logit factor into the head and reset it in the config. Unties head and embeddings."""
    text = model.config.text_config
    factor = get_logit_factor(text)
    if factor == 1.0:
        return
    untie_embeddings(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * factor)
    for name in ("logits_scaling", "logit_scale"):
        if hasattr(text, name):
            setattr(text, name, 1.0)
