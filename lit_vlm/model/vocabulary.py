"""Vocabulary of a model: special tokens, chat template, and the rows of new tokens in embeddings and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lit_vlm.losses.next_token import TokenScores, compute_token_log_probs
from lit_vlm.types import IMAGE_TOKEN, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

HEAD = "lm_head.weight"


def untie_embeddings(model: VisionLanguageModel) -> None:
    """Untie embeddings and head: two tables in memory, and no later step ties them again."""
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.all_tied_weights_keys.pop(HEAD, None)  # resizing the tables reads these keys


VIDEO_TOKEN = "<video>"  # OneVision's class needs one; no sample of ours contains it

CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

# Language models' own templates expect strings. This prefix turns contents given as parts into strings, and an image
# into its placeholder.
FLATTEN_CONTENT_PARTS = (
    "{%- set parts = namespace(messages=[]) -%}{%- for message in messages -%}{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{%- set text.value = text.value + '<image>\\n' -%}"
    "{%- elif part['type'] == 'video' -%}{%- set text.value = text.value + '<video>\\n' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set text.value = text.value + part['text'] -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set parts.messages = parts.messages + [dict(message, content=text.value)] -%}{%- endfor -%}"
    "{%- set messages = parts.messages -%}"
)


# A template that can think (Qwen3, EXAONE 4) writes empty thoughts before an answer without thoughts. With this prefix its
# generation prompt ends with them unless thoughts are asked for: training, answers here and the exported model agree.
NO_THOUGHTS_BY_DEFAULT = "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"


def add_special_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: list[str], placeholders: Sequence[str] = (IMAGE_TOKEN, VIDEO_TOKEN)
) -> list[str]:
    """Add the placeholders and the control tokens to the tokenizer; return the new ones.

    A token that the vocabulary has keeps its id and its row, also where it was no added token.

    Raises:
        UserError: a token is not one id afterwards.
    """
    added, known = tokenizer.get_added_vocab(), tokenizer.get_vocab()
    missing = [token for token in (*placeholders, *tokens) if token not in added]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    for token in (IMAGE_TOKEN, *tokens):
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise UserError(
                f"The special token {token} is not one id in this tokenizer. Remove it from model.special_tokens, or rename it."
            )
    return [token for token in missing if token not in known]


def wrap_chat_template(template: str | None) -> str | None:
    """Wrap a chat template so that it also takes contents as parts, with `<image>` and a newline for an image.

    A template that knows `enable_thinking` gets false as its default.
    """
    if template is None or IMAGE_TOKEN in template:
        return template
    thoughts = NO_THOUGHTS_BY_DEFAULT if "enable_thinking" in template else ""
    return thoughts + FLATTEN_CONTENT_PARTS + template


def find_turn_end_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Find the id of the control token with which the chat template ends an assistant turn; None: it has none.

    This is the token that training teaches. The tokenizer's end token may be another one (a base model with `chatml`
    ends texts with another token).
    """
    turns = [("user", "?"), ("assistant", "!!")]
    try:
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        suffix = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("!!")[2]
    except Exception:  # a template may raise any error; the data side reports it in full
        return None
    known = tokenizer.get_added_vocab()
    positions = {suffix.find(token): known[token] for token in known if token in suffix}
    return positions[min(positions)] if positions else None


def extend_embeddings(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    new_tokens: list[str],
    pieces: Mapping[int, list[int]],
) -> dict[int, list[int]]:
    """Extend embeddings and head by the new tokens.

    Each new row is the mean of the rows of its spelling ("<", "b", "box", ">"). Tables that are padded beyond the
    tokenizer (Qwen2.5) keep their size.

    Args:
        pieces: new text token -> the old tokens that it replaces.

    Returns:
        new row -> the rows of its spelling.
    """
    if not new_tokens:
        return {}
    embedding = model.get_input_embeddings()
    if len(tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    mean_rows = {}
    for token in new_tokens:
        row = tokenizer.convert_tokens_to_ids(token)
        spelling = [row] if row in pieces else _tokenize_spelling(tokenizer, token)
        mean_rows[row] = [old for i in spelling for old in pieces.get(i, [i])]
    with torch.no_grad():
        for table in tables:
            for row, ids in mean_rows.items():
                table[row] = table[ids].float().mean(dim=0).to(table.dtype)
    return mean_rows


def _tokenize_spelling(tokenizer: PreTrainedTokenizerFast, token: str) -> list[int]:
    """Tokenize the spelling of a token: its ids as plain text."""
    from tokenizers import Tokenizer

    plain = Tokenizer(tokenizer.backend_tokenizer.model)  # without added tokens
    plain.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    return plain.encode(token, add_special_tokens=False).ids


class TrainableTokens(nn.Module):
    """Trainable rows for a few tokens of a frozen vocabulary, as peft's trainable tokens.

    The tables stay unchanged; hooks replace their rows, in training and in generation. An export merges the rows into
    the tables. They cost 2 * n * D parameters, where training the tables would cost 2 * V * D and their optimizer
    states.

    Args:
        model: its embeddings and head are frozen; the rows start as copies of theirs.
        ids: of the n tokens.
    """

    ids: Tensor
    lookup: Tensor  # [V]: row index of each token; -1 for tokens that use the tables

    def __init__(self, model: VisionLanguageModel, ids: list[int]) -> None:
        super().__init__()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self.tied = embedding.weight is head.weight
        self.embed_scale: Tensor | float = getattr(embedding, "embed_scale", 1.0)  # Gemma multiplies what it looks up
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.embedding = nn.Parameter(embedding.weight[ids].detach().clone())
        self.head = None if self.tied else nn.Parameter(head.weight[ids].detach().clone())
        lookup = torch.full((embedding.num_embeddings,), -1)
        lookup[ids] = torch.arange(len(ids))
        self.register_buffer("lookup", lookup, persistent=False)
        embedding.register_forward_hook(self._on_embedding_forward)
        head.register_forward_hook(self._on_head_forward)
        object.__setattr__(head, "new_tokens", self)  # an attribute of the head, but no submodule of it

    def forward(self, inputs: Tensor, output: Tensor, mode: str = "embed", *more: Any) -> Any:
        """Replace the rows of these tokens in the output of a table.

        It is a call of this module, so that hooks that gather sharded parameters (ZeRO-3) gather the rows.

        Args:
            inputs: token ids for the embeddings, or the hidden states [..., D] that the head reads.
            output: for "embed" [..., D], for "logits" [..., V], for "score" the head's matrix [V, D].
            mode: "embed", "logits" or "score".
        """
        if mode == "score":
            return compute_token_log_probs(
                inputs, output, more[0], token_ids=self.ids, token_rows=self._head_rows, statistics=more[1]
            )
        return self._replace_logits(inputs, output) if mode == "logits" else self._replace_embeddings(inputs, output)

    def compute_log_probs(self, hidden: Tensor, matrix: Tensor, targets: Tensor, statistics: bool) -> TokenScores:
        """Compute token log-probabilities for hidden [R, D] and the head's matrix [V, D], with these rows replaced."""
        return self(hidden, matrix, "score", targets, statistics)

    def _on_embedding_forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self(args[0], output)

    def _on_head_forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        return self(args[0], output, "logits") if isinstance(output, Tensor) else output

    @property
    def _head_rows(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def _replace_embeddings(self, ids: Tensor, output: Tensor) -> Tensor:
        rows = self.lookup[ids]
        replaced = nn.functional.embedding(rows.clamp(min=0), self.embedding).to(output.dtype)
        scale = self.embed_scale
        replaced = replaced * (scale.to(output) if isinstance(scale, Tensor) else scale)
        return torch.where((rows >= 0)[..., None], replaced, output)

    def _replace_logits(self, hidden: Tensor, output: Tensor) -> Tensor:
        rows = nn.functional.linear(hidden, self._head_rows.to(hidden.dtype))
        return output.index_copy(-1, self.ids, rows.to(output.dtype))
