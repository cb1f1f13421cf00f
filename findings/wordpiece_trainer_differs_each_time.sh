#!/usr/bin/env bash
# A tokenizer that tokenizers trains with WordPieceTrainer has another vocabulary each time, from the same text on the same machine: pairs of equal
# frequency are merged in the order of a hash table, and the ids of continuing pieces follow the same order. BpeTrainer gives one
# vocabulary. So a BERT tokenizer "trained with a fixed corpus" cannot be made again, and a model trained with one cannot use another.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3 2>/dev/null
cat > "$folder/train.py" <<'END'
import hashlib
import json
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = ["a red circle and a green star", "a blue square and a black cross", "a purple triangle and a yellow ring"]


def train(kind):
    """Train a tokenizer on the same texts; return a digest of its vocabulary."""
    model = models.WordPiece(unk_token="[UNK]") if kind == "WordPiece" else models.BPE(unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    make = trainers.WordPieceTrainer if kind == "WordPiece" else trainers.BpeTrainer
    tokenizer.train_from_iterator(TEXTS, make(vocab_size=80, special_tokens=["[UNK]"], show_progress=False))
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    found = {kind: len({train(kind) for _ in range(5)}) for kind in ("WordPiece", "BPE")}
    for kind, number in found.items():
        print(f"{kind}: {number} of 5 vocabularies from the same texts differ" if number > 1 else f"{kind}: all 5 vocabularies are equal")
    sys.exit(0 if found["WordPiece"] > 1 and found["BPE"] == 1 else 1)
END
"$folder/env/bin/python" "$folder/train.py"
