"""What a model says to a sample, as text; for the held-out samples of a run and for a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.generate import generate
from lit_vlm.types import Content, ImageSlot, Message, Role, Sample


def ask(
    model: LlavaOnevisionForConditionalGeneration, processor: Processor, samples: Sequence[Sample], max_new_tokens: int
) -> list[str]:
    """The model's own last answer of each conversation, greedily, control tokens spelled out.

    The samples are one generation: the caller keeps them within the memory. What their last messages say is not read.
    """
    batch = collate(processor, list(samples)).to(next(model.parameters()).device)
    stop = end_of_answer(processor)
    outputs = generate(model, batch, max_new_tokens, eos_token_id=stop)
    return [processor.decode([token for token in ids if token != stop]) for ids in outputs]


def end_of_answer(processor: Processor) -> int:
    """The token that closes an answer in this template: what training teaches, whatever the tokenizer calls its end."""
    turn = processor.template.encode((Message(Role.user, ("?",)), Message(Role.assistant, ("!",))), [])
    return int(turn.input_ids[turn.supervised][-1])


def readable_prompt(messages: Sequence[Message]) -> str:
    """What the model is asked, as a person reads it; of several turns, each with its role."""
    texts = ["".join(_spelled(piece) for piece in message.content).strip() for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{message.role}: {text}" for message, text in zip(messages, texts, strict=True))


def _spelled(piece: Content) -> str:
    if isinstance(piece, ImageSlot):
        return "<image> "
    return piece if isinstance(piece, str) else piece.token
