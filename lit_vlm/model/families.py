"""Families of language models: those that are exact here, and those that are refused by name with the reason.

transformers' LLaVA classes multiply the last hidden state by the head and do no more, and the flat forward pass replaces
the attention masks of a family by segments. A family that scales its logits has the factor folded into its head once, at
build. One that does something else (soft caps, sinks, states that run through the row) would give other answers than its
own class, so it is refused. `python -m lit_vlm.model.families` writes the table of docs/your-own-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_vlm.model.vocabulary import untie_embeddings
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Family:
    """Row of the table of language models: one class of transformers.

    Attributes:
        class_name: of transformers.
        models: released models of this class, for example.
        note: what is done for exactness beyond the packed attention.
        refusal: reason why the family is refused; None: it is exact.
    """

    class_name: str
    models: str
    note: str = "unchanged"
    refusal: str | None = None


_FACTOR = "factor on the logits folded into the head, which is untied"
_SCALED = "embeddings scaled by the root of the width, rows of new tokens too"
_WINDOWS = "sliding windows inside each segment"
_SINKS = "each head has an attention sink, which the packed attention does not compute"

# By `model_type`. tests/model/test_language_model_families.py holds each exact row against its own class.
FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2.5, A.X 4.0, VARCO-VISION-14B's"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3, VARCO-VISION 2.0's"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3-30B-A3B"),
    "llama": Family(
        "LlamaForCausalLM", "Llama 3, Bllossom, VARCO-8B, Kanana 1.5, SOLAR 10.7B, Mi:dm 2.0, A.X 3.1, SmolLM2"
    ),
    "mistral": Family("MistralForCausalLM", "Mistral 7B", _WINDOWS),
    "hyperclovax": Family("HyperCLOVAXForCausalLM", "HyperCLOVA X SEED", _FACTOR),
    "exaone4": Family("Exaone4ForCausalLM", "EXAONE 4.0", f"{_WINDOWS}, layers without rotary positions"),
    "exaone_moe": Family("ExaoneMoeForCausalLM", "K-EXAONE", f"{_WINDOWS}, layers without rotary positions"),
    "solar_open": Family("SolarOpenForCausalLM", "Solar Open"),
    "axk1": Family("AXK1ForCausalLM", "A.X K1", "latent attention: values padded to the width of the keys"),
    "granite": Family("GraniteForCausalLM", "Granite 3", _FACTOR),
    "granitemoe": Family("GraniteMoeForCausalLM", "Granite 3 MoE", _FACTOR),
    "phi3": Family("Phi3ForCausalLM", "Phi-3 (4k), Phi-4 (14B)", _WINDOWS),
    "gemma": Family("GemmaForCausalLM", "Gemma 1", _SCALED),
    "gemma3_text": Family("Gemma3ForCausalLM", "Gemma 3 270M, 1B", f"{_SCALED}; {_WINDOWS}"),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3", "layers without rotary positions"),
    "cohere": Family("CohereForCausalLM", "Command R, Aya 23", _FACTOR),
    "cohere2": Family("Cohere2ForCausalLM", "Command R7B", f"{_FACTOR}; {_WINDOWS}"),
    "phi": Family("PhiForCausalLM", "Phi-1, Phi-2", refusal="its head has a bias, which LLaVA's classes lack"),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma 2", refusal="it caps its logits and its attention scores"),
    "axk2": Family("AXK2ForCausalLM", "A.X K2", refusal="an indexer selects keys from the mask of the whole row"),
    "gpt_oss": Family("GptOssForCausalLM", "gpt-oss", refusal=_SINKS),
    "granite_swa": Family("GraniteSWAForCausalLM", "Granite with windows", refusal=_SINKS),
    "llama4_text": Family("Llama4ForCausalLM", "Llama 4", refusal="its attention is chunked by positions in the row"),
}

# The factor on a family's logits, from its config.
LOGIT_FACTORS = {
    "hyperclovax": lambda config: config.logits_scaling,  # a multiplier, unlike Granite's
    "granite": lambda config: 1.0 / config.logits_scaling,
    "granitemoe": lambda config: 1.0 / config.logits_scaling,
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
}
SOFTCAPPING_KEYS = ("final_logit_softcapping", "attn_logit_softcapping")
LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
}  # others carry a state through the row, or select keys by its mask
ROPE_TYPES_BY_LENGTH = {"dynamic", "longrope"}  # positions of a short segment would depend on the longest of its row
REMEDY = "Choose Qwen2.5, Qwen3, Llama, Mistral, HyperCLOVA X or another exact one of docs/your-own-model.md."


def check_logits_supported(text_config: Any, name: str) -> None:
    """Check that packed rows of this class have the text logits of the language model's own class.

    Raises:
        UserError: the family is refused; the message has its name and the reason.
    """
    where = f"model.language_model={name} ({text_config.model_type})"
    for setting in SOFTCAPPING_KEYS:
        if getattr(text_config, setting, None):
            raise UserError(
                f"{where} caps its logits ({setting}={getattr(text_config, setting)}), which LLaVA's classes do not do, so its "
                f"answers would differ from the language model's own. {REMEDY}"
            )
    scale = getattr(text_config, "logits_scaling", None) or getattr(text_config, "logit_scale", None)
    if scale not in (None, 1, 1.0) and text_config.model_type not in LOGIT_FACTORS:
        raise UserError(f"{where} scales its logits by {scale} in a way that is not known here. {REMEDY}")
    if (reason := _find_refusal(text_config)) is not None:
        raise UserError(f"{where} cannot be trained exactly: {reason}. {REMEDY}")


def _find_refusal(text_config: Any) -> str | None:
    """Find the reason to refuse a language model, from its family and its config; None: there is none."""
    family = FAMILIES.get(text_config.model_type)
    return family.refusal if family is not None and family.refusal is not None else find_packing_refusal(text_config)


def find_packing_refusal(text_config: Any) -> str | None:
    """Find the reason in a config why samples in one row would not be computed as they are alone; None: there is none."""
    other = sorted(set(getattr(text_config, "layer_types", None) or ()) - LAYER_TYPES)
    if other:
        return f"its layers of type {', '.join(other)} do not separate the samples that are packed into one row"
    if getattr(text_config, "use_bidirectional_attention", False):
        return "its attention is not causal (use_bidirectional_attention)"
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    by_length = sorted({str(one.get("rope_type")) for one in by_layer} & ROPE_TYPES_BY_LENGTH)
    if by_length:
        return f"its rotary positions (rope_type {by_length[0]}) depend on the longest sample of a row"
    return None


def check_head(head: nn.Linear, name: str) -> None:
    """Raise UserError for a head with a bias: LLaVA's classes have none, and would drop it."""
    if head.bias is not None:
        raise UserError(f"model.language_model={name} has a head with a bias, which LLaVA's classes lack. {REMEDY}")


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


NUM_PROBE_TOKENS = (24, 40)


@torch.no_grad()
def probe_packing(model: VisionLanguageModel, name: str) -> str | None:
    """Compare a packed row with the family's own attention, for a family without a row in the table.

    Returns:
        A remark for the user; None for a family that the tests cover.

    Raises:
        UserError: the hidden states of two short random texts differ.
    """
    # late: transformers' attention, which preflight does not need
    from lit_vlm.model.packed_attention import FLAT_ATTENTION, Segments

    config = model.config.text_config
    if config.model_type in FAMILIES:
        return None
    language: Any = model.model.language_model
    ids = torch.randint(
        min(config.vocab_size, 1000), (sum(NUM_PROBE_TOKENS),), generator=torch.Generator().manual_seed(0)
    )
    embeddings = model.get_input_embeddings()(ids)[None]
    positions = torch.cat([torch.arange(length) for length in NUM_PROBE_TOKENS])[None]
    segments = Segments(list(NUM_PROBE_TOKENS), embeddings.device)
    options: dict[str, Any] = {"use_cache": False, "attention_mask": None}
    packed = language(inputs_embeds=embeddings, position_ids=positions, segments=segments, **options).last_hidden_state
    model.set_attn_implementation({"text_config": "eager"})
    try:
        alone = [language(inputs_embeds=one, **options) for one in embeddings.split(NUM_PROBE_TOKENS, dim=1)]
    finally:
        model.set_attn_implementation({"text_config": FLAT_ATTENTION})
    expected = torch.cat([one.last_hidden_state for one in alone], dim=1).float()
    difference = float((packed.float() - expected).norm() / expected.norm())
    if not difference < (1e-3 if packed.dtype is torch.float32 else 0.1):
        raise UserError(
            f"{name} ({config.model_type}) cannot be trained exactly: packed into one row, two texts have other hidden states than "
            f"alone in its own class (relative difference {difference:.2g}). {REMEDY}"
        )
    return (
        f"{name}: language models of type {config.model_type} are not among the tested ones (docs/your-own-model.md). Two short "
        f"random texts have the hidden states of its own class in a packed row (relative difference {difference:.1e})."
    )


TABLE_START, TABLE_END = "<!-- families-table -->", "<!-- /families-table -->"
TABLE_FILE = Path(__file__).parents[2] / "docs" / "your-own-model.md"


def format_table() -> str:
    """Format the table of families for docs/your-own-model.md, with its marks."""
    rows = ["| class of transformers | released models, for example | |", "|---|---|---|"]
    for family in sorted(FAMILIES.values(), key=lambda family: family.refusal is not None):
        text = f"refused: {family.refusal}" if family.refusal else family.note
        rows.append(f"| `{family.class_name}` | {family.models} | {text} |")
    return "\n".join([TABLE_START, *rows, TABLE_END])


def write_table(path: Path = TABLE_FILE) -> None:
    """Write the table of families into a document, between its marks."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE_START)
    path.write_text(before + format_table() + rest.partition(TABLE_END)[2], encoding="utf-8")


if __name__ == "__main__":
    write_table()
