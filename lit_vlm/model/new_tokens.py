"""New text tokens for a byte-level BPE vocabulary: a list of them, or merges that continue the tokenizer on a Korean corpus.

They are tokens of the BPE model and not added tokens, so that a text is cut into them as into its other tokens, and only the
template and the markup make control tokens. Their merges come after all old ones: a text without them keeps its ids.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_vlm.formatting import format_count
from lit_vlm.types import UserError

TOKENS_KEY = (
    "new_text_tokens"  # of tokenizer_config.json: digest of the source -> tokens, so that a later stage adds none twice
)
MAX_CORPUS_CHARS = 20_000_000  # read of a corpus to learn from
FIRST_CHAR = 0x10000  # of the alphabet that stands for token ids while new merges are learnt
JSON_SUFFIXES = (".json", ".jsonl")
_SYLLABLE = re.compile("[\uac00-\ud7a3]")

Merge = tuple[str, str]  # names of two tokens that become one


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Text tokens of `model.new_tokens_from`.

    Attributes:
        names: as in the vocabulary (byte-level).
        pieces: id of a token that this run adds -> ids of the old tokens that it replaces.
        before: plain tokenizer without them; None if this run adds none.
    """

    names: list[str]
    pieces: dict[int, list[int]]
    before: Tokenizer | None = None


def add_text_tokens(
    tokenizer: PreTrainedTokenizerFast, source: str, count: int | None
) -> tuple[PreTrainedTokenizerFast, TextTokens]:
    """Add text tokens to a tokenizer. Returns a new one, or the same if it has them.

    Args:
        source: file with one token per line, or with `count` a text, JSON or JSON lines file to learn from.
        count: number of tokens to learn; None: `source` lists them.

    Raises:
        UserError: the file cannot be used, or the tokenizer is no byte-level BPE.
    """
    where = f"model.new_tokens_from={source}"
    texts = _read_tokens(Path(source), where) if count is None else _read_corpus(Path(source), where)
    digest = hashlib.sha256(json.dumps([texts, count]).encode()).hexdigest()[:16]
    known: dict[str, list[str]] = dict(tokenizer.init_kwargs.get(TOKENS_KEY) or {})
    if digest in known:
        return tokenizer, TextTokens(known[digest], {})
    plain = _make_plain_tokenizer(tokenizer, where)
    merges = _chain_merges(plain, texts, where) if count is None else _learn_merges(plain, texts, count, where)
    vocab = tokenizer.get_vocab()
    added = list(dict.fromkeys(name for pair in merges if (name := "".join(pair)) not in vocab))
    first = len(vocab)
    if max(vocab.values()) + 1 != first:
        raise UserError(
            f"{where}: the ids of the tokenizer have gaps, so new ones have no place. Choose another model."
        )
    ids = vocab | {name: first + number for number, name in enumerate(added)}
    listed = [] if count is not None else _list_names(plain, texts)
    names = list(dict.fromkeys((*listed, *added)))  # with the tokens in between that the merges of listed ones make
    tokenizer = _extend_tokenizer(tokenizer, ids, merges, known | {digest: names})
    if count is None:
        _require_single_tokens(tokenizer, texts, where)
    pieces = {ids[name]: _find_pieces(name, merges, vocab) for name in added}
    return tokenizer, TextTokens(names, pieces, plain if added else None)


def compute_tokens_per_syllable(texts: Iterable[str], tokenizer: Tokenizer) -> float | None:
    """Compute the tokens of all words with Hangul, divided by their syllables; None without Hangul."""
    words = Counter(word for text in texts for word in _split_korean_words(tokenizer, text))
    syllables = sum(len(_SYLLABLE.findall(word)) * count for word, count in words.items())
    encoded = tokenizer.encode_batch(list(words), add_special_tokens=False)
    tokens = sum(len(each.ids) * count for each, count in zip(encoded, words.values(), strict=True))
    return tokens / syllables if syllables else None


def _read_tokens(path: Path, where: str) -> list[str]:
    """Read one token per line; a space at the start of a line belongs to the token."""
    lines = _read_text(path, where).splitlines()
    tokens = list(dict.fromkeys(line.rstrip() for line in lines if line.strip()))
    if not tokens:
        raise UserError(f"{where}: lists no token. Write one per line, or learn them: model.num_new_tokens=1000.")
    return tokens


def _read_corpus(path: Path, where: str) -> list[str]:
    """Read the texts with Hangul: lines of a text file, or all strings of a JSON file, up to `MAX_CORPUS_CHARS`."""
    content, texts, size = _read_text(path, where), list[str](), 0
    lines: Iterable[str] = content.splitlines()
    if path.suffix in JSON_SUFFIXES:
        documents = [content] if path.suffix == ".json" else [line for line in lines if line.strip()]
        try:
            lines = [text for document in documents for text in _iterate_strings(json.loads(document))]
        except ValueError as error:
            raise UserError(f"{where}: is no valid JSON ({error}). Give a text, JSON or JSON lines file.") from None
    for text in lines:
        if size < MAX_CORPUS_CHARS and _SYLLABLE.search(text):
            texts.append(text)
            size += len(text)
    if not texts:
        raise UserError(f"{where}: has no text with Hangul to learn tokens from.")
    return texts


def _read_text(path: Path, where: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"{where}: cannot be read ({reason}). Give a text, JSON or JSON lines file.") from None


def _iterate_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iterate_strings(item)


def _make_plain_tokenizer(tokenizer: PreTrainedTokenizerFast, where: str) -> Tokenizer:
    """Copy the tokenizer without added tokens and post-processor.

    Raises:
        UserError: it is no byte-level BPE.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        raise UserError(
            f"{where}: new tokens need a byte-level BPE tokenizer (Qwen2.5, Qwen3, Llama 3, HyperCLOVA X, ...), and this one is "
            f"{state['model']['type']}. Choose another language model, or leave model.new_tokens_from out."
        )
    state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(state))


def _split_words(plain: Tokenizer, text: str) -> list[str]:
    """Split a text into the words that BPE never crosses, as normalised text."""
    text = plain.normalizer.normalize_str(text) if plain.normalizer else text
    return [text[start:stop] for _, (start, stop) in plain.pre_tokenizer.pre_tokenize_str(text)]


def _split_korean_words(plain: Tokenizer, text: str) -> list[str]:
    return [word for word in _split_words(plain, text) if _SYLLABLE.search(word)]


def _learn_merges(plain: Tokenizer, texts: list[str], count: int, where: str) -> list[Merge]:
    """Learn merges of the most frequent pairs of tokens in words with Hangul, as BPE would have gone on to learn."""
    words = Counter(word for text in texts for word in _split_korean_words(plain, text))
    spelled = [each.ids for each in plain.encode_batch(list(words), add_special_tokens=False)]
    coded = ["".join(chr(FIRST_CHAR + number) for number in ids) for ids in spelled]
    alphabet = sorted({char for text in coded for char in text})
    bpe = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    repeated = ([text] * number for text, number in zip(coded, words.values(), strict=True))
    bpe.train_from_iterator(repeated, trainer)
    learnt = json.loads(bpe.to_str())["model"]["merges"]
    if not learnt:
        raise UserError(f"{where}: too little text to learn a token: no pair of tokens occurs twice.")

    def name(text: str) -> str:
        return "".join(str(plain.id_to_token(ord(char) - FIRST_CHAR)) for char in text)

    return [(name(left), name(right)) for left, right in islice(learnt, count)]


def _chain_merges(plain: Tokenizer, tokens: list[str], where: str) -> list[Merge]:
    """Make merges that turn each listed text into one token: of its first two pieces until one is left."""
    merges: dict[Merge, int] = {}
    for token in tokens:
        if len(_split_words(plain, token)) != 1:
            raise UserError(
                f"{where}: {token!r} is no single word: the tokenizer cuts a text at spaces and punctuation first, so it would never "
                "become one token. Remove the line."
            )
        while len(pieces := _apply_merges(plain.encode(token, add_special_tokens=False).tokens, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    return list(merges)


def _apply_merges(pieces: list[str], merges: dict[Merge, int]) -> list[str]:
    """Apply merges to a word's pieces, the earliest first, as BPE does."""
    while known := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in merges]:
        left, right = min(known, key=merges.__getitem__)
        merged, position = list[str](), 0
        while position < len(pieces):
            is_pair = pieces[position : position + 2] == [left, right]
            merged.append(left + right if is_pair else pieces[position])
            position += 2 if is_pair else 1
        pieces = merged
    return pieces


def _list_names(plain: Tokenizer, tokens: list[str]) -> list[str]:
    return ["".join(plain.encode(token, add_special_tokens=False).tokens) for token in tokens]


def _find_pieces(name: str, merges: list[Merge], vocab: dict[str, int]) -> list[int]:
    """Find the ids of the old tokens that a new token is merged from."""
    if name in vocab:
        return [vocab[name]]
    left, right = next(pair for pair in merges if "".join(pair) == name)
    return _find_pieces(left, merges, vocab) + _find_pieces(right, merges, vocab)


def _extend_tokenizer(
    tokenizer: PreTrainedTokenizerFast, ids: dict[str, int], merges: list[Merge], known: dict[str, list[str]]
) -> PreTrainedTokenizerFast:
    """Write the tokenizer with further merges and load it again, as a finished model will be loaded.

    Added tokens keep their ids as entries of the BPE model, which no merge makes: the new ids follow theirs without a gap.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file, config_file = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
        state = json.loads(file.read_text(encoding="utf-8"))
        state["model"]["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
        state["model"]["merges"] += [list(pair) for pair in merges]
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config_file.write_text(json.dumps(config | {TOKENS_KEY: known}, ensure_ascii=False), encoding="utf-8")
        extended: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    wrong = [name for name, number in ids.items() if extended.convert_tokens_to_ids(name) != number]
    if wrong:
        raise UserError(
            f"model.new_tokens_from: the tokenizer of {tokenizer.name_or_path} does not keep {format_count(len(wrong), 'id')} "
            f"({wrong[0]!r}, ...) when new tokens are added, so it cannot be extended. Choose another language model."
        )
    extended.name_or_path = tokenizer.name_or_path
    return extended


def _require_single_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str], where: str) -> None:
    left = [token for token in tokens if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if left:
        raise UserError(
            f"{where}: {format_count(len(left), 'line')} ({left[0]!r}, ...) did not become one token, because other merges of "
            "the tokenizer cut it. Remove them."
        )
