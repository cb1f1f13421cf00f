"""Weight tying of embeddings and head: the checkpoint's files decide between one table and two, not its config.json."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedModel

if TYPE_CHECKING:
    from lit_vlm.model.build import ModelSpec

HEAD = "lm_head.weight"
TABLES = (HEAD, "embed_tokens.weight")


def resolve_weight_tying(
    model: LlavaOnevisionForConditionalGeneration, loaded: PreTrainedModel, spec: ModelSpec, name: str
) -> None:
    """Untie the tables of a model whose files hold two different ones, and add a note to the spec's remarks.

    peft writes such folders: `modules_to_save=["lm_head"]` on a tied model, merged and saved, leaves two tables and a
    `text_config` that ties them.

    Args:
        loaded: the model that was read from `name`: the model itself, or the language model that became a part of it.
            Loading removes a pair of different tables from its `all_tied_weights_keys`.
    """
    tied_by_config = getattr(loaded.config, "tie_word_embeddings", False)
    if not tied_by_config or HEAD not in (loaded._tied_weights_keys or {}) or HEAD in loaded.all_tied_weights_keys:
        return
    untie_embeddings(model)
    spec.config.tie_word_embeddings = spec.config.text_config.tie_word_embeddings = False
    spec.remarks.append(
        f"{name}: its config.json ties head and embeddings, and its files hold two different tables. Both are kept; "
        "what is exported says tie_word_embeddings=false."
    )


def untie_embeddings(model: LlavaOnevisionForConditionalGeneration) -> None:
    """Untie embeddings and head: two tables in memory, and no later step ties them again."""
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop(HEAD, None)  # resizing the tables reads these keys


def describe_missing_table(name: str, missing: Collection[str], tied: bool) -> str | None:
    """Describe the error of files that lack a table; None when they lack other weights."""
    if not missing or not all(key.endswith(TABLES) for key in missing):
        return None
    if tied:
        return f"{name}: its files hold neither embeddings nor head ({', '.join(sorted(missing))}): half of a model."
    missing_table = "head" if any(key.endswith(HEAD) for key in missing) else "embeddings"
    return (
        f"{name}: its files hold no {missing_table} ({', '.join(sorted(missing))}), and its config.json does not tie head and "
        "embeddings. If they are one table, set tie_word_embeddings to true in its config.json (in text_config, too, where "
        "it has one); else the folder holds half of a model."
    )
