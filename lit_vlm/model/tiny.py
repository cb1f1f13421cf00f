"""Tiny vision tower and language model in the hub's layout, made locally: every path runs on a CPU in seconds.

They are ordinary folders: the code that reads Qwen2.5 and SigLIP from disk reads these.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lit_vlm.files import atomic_folder
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.tensor_files import raise_os_errors
from lit_vlm.model.vocabulary import CHATML

if TYPE_CHECKING:
    from transformers import BertTokenizer, Blip2VisionConfig, BlipVisionConfig, Qwen2Tokenizer

CORPUS_FILE = Path(__file__).with_name("tiny_corpus.txt")
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WORDPIECE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NUM_HEADS = 3  # of width 32, which all kernels support: vLLM's attention for CPUs does not support 24
# Of BLIP-2 and BLIP; a model of these parts learns retrieval in a minute (docs/qformer.md)
_TINY_TOWER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": NUM_HEADS,
    "image_size": 56,
    "patch_size": 8,
}
_TINY_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VERSION = "2"  # part of the folder's name: increase it when the content changes


def make_tiny_parts(folder: Path, seed: int = 0) -> tuple[str, str]:
    """Make the folders of a vision tower (56-pixel tiles of 16 patches) and a language model, unless they exist.

    Raises:
        OSError: they cannot be written.
    """
    tower, language = folder / f"tiny_siglip-v{VERSION}-seed{seed}", folder / f"tiny_qwen2-v{VERSION}-seed{seed}"
    _make_once(tower, lambda path: make_vision_tower(path, seed, num_attention_heads=NUM_HEADS))
    _make_once(
        language,
        lambda path: make_language_model(path, seed, num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_HEADS),
    )
    return str(tower), str(language)


def make_tiny_text_encoder(folder: Path, seed: int = 0) -> str:
    """Make the folder of a BERT for image-text pairs, unless it exists.

    Raises:
        OSError: it cannot be written.
    """
    encoder = folder / f"tiny_bert-v{VERSION}-seed{seed}"
    _make_once(encoder, lambda path: make_text_encoder(path, seed, **_TINY_ENCODER))
    return str(encoder)


def make_tiny_blip2_vision() -> Blip2VisionConfig:
    """Make the config of a tiny vision tower of BLIP-2."""
    from transformers import Blip2VisionConfig

    return Blip2VisionConfig(**_TINY_TOWER)


def make_tiny_blip_vision() -> BlipVisionConfig:
    """Make the config of a tiny vision tower of BLIP."""
    from transformers import BlipVisionConfig

    return BlipVisionConfig(**_TINY_TOWER)


def make_vision_tower(path: Path, seed: int = 0, **changes: int) -> None:
    """Make a SigLIP tower with three layers; the last but one feeds the projector, as in the released towers."""
    from transformers import (  # late: a run that finds the parts needs no model class
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = SiglipVisionConfig(**{**shape, "image_size": 56, "patch_size": 14, "vision_use_head": False, **changes})
    with disable_transformers_logging():
        _call_with_seed(seed, lambda: SiglipVisionModel(config)).save_pretrained(path)
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def make_language_model(path: Path, seed: int = 0, corpus: Iterable[str] | None = None, **changes: int | bool) -> None:
    """Make a Qwen2 language model with three layers, and its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(corpus)
    shape = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen2Config(
        **{
            **shape,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer) + 16,  # spare rows, as Qwen's tables have
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )
    with disable_transformers_logging():
        _call_with_seed(seed, lambda: Qwen2ForCausalLM(config)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_text_encoder(path: Path, seed: int = 0, corpus: Iterable[str] | None = None, **changes: int | float) -> None:
    """Make a BERT with three layers and its WordPiece tokenizer, the text encoder of BLIP-2's first stage."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = make_wordpiece_tokenizer(corpus)
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(
        **{
            **shape,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "pad_token_id": tokenizer.pad_token_id,
            **changes,
        }
    )
    with disable_transformers_logging():
        _call_with_seed(seed, lambda: BertForMaskedLM(config)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_wordpiece_tokenizer(corpus: Iterable[str] | None = None, vocab_size: int = 800) -> BertTokenizer:
    """Make a cased WordPiece tokenizer: lower case would split Hangul syllables into letters.

    The vocabulary is all characters, then beginnings and rests of words by frequency. The trainer of tokenizers is not
    used: it gives another vocabulary at each call.
    """
    from transformers import BertTokenizer

    normalizer, splitter = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer()
    lines = corpus or CORPUS_FILE.read_text(encoding="utf-8").splitlines()
    words = Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)))
    characters = sorted({character for word in words for character in word})
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for position in range(1, len(word)):
            pieces[word[: position + 1]] += count * position  # tokens that the piece saves in these words
            pieces[f"##{word[position:]}"] += count * (len(word) - position - 1)
    by_use = sorted(pieces, key=lambda piece: (-pieces[piece], piece))
    names = [*WORDPIECE_TOKENS, *characters, *(f"##{character}" for character in characters), *by_use]
    vocab = {piece: number for number, piece in enumerate(list(dict.fromkeys(names))[:vocab_size])}
    return BertTokenizer(vocab=vocab, do_lower_case=False)


def make_tokenizer(corpus: Iterable[str] | None = None, vocab_size: int = 640) -> Qwen2Tokenizer:
    """Make a byte-level BPE tokenizer with Qwen2's pre-tokenizer: any Korean or English text survives a round trip."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus or CORPUS_FILE.read_text(encoding="utf-8").splitlines(), trainer)
    state = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        unk_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _call_with_seed(seed: int, make: Callable):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a folder atomically, unless it exists.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_dir():
        return
    with atomic_folder(path) as temporary, raise_os_errors():
        make(temporary)
