#!/usr/bin/env bash
# A model whose embeddings and head are one table, with LoRA on the embeddings. peft warns that the head should follow and offers
# `ensure_weight_tying=True`, which gives the head the same adapter. The unmerged model is right with it. `merge_and_unload` adds the
# adapter once through the embeddings and once through the head, into the one table: the merged model has it twice, without a word.
# So the option that is there for tied models makes their export wrong. Without it the merge adds the adapter once, but then the
# merged head has the adapter that the unmerged head did not have.
# Exits 0 when it is as described and 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - 2>/dev/null <<'END'
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

print("peft", version("peft"), "transformers", version("transformers"))
shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
ids, found = torch.arange(10)[None], {}
for is_ensured in (False, True):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**shape, vocab_size=40, tie_word_embeddings=True)).double().eval()
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=is_ensured)
    model = get_peft_model(base, config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn_like(weight))
        unmerged = model(input_ids=ids).logits
        layer = base.get_input_embeddings()
        start, delta = layer.base_layer.weight.clone(), layer.get_delta_weight("default")
        merged = model.merge_and_unload()
        added = merged.get_input_embeddings().weight - start
        times = float((added * delta).sum() / (delta * delta).sum())
        difference = float((unmerged - merged(input_ids=ids).logits).abs().max())
    is_tied = merged.lm_head.weight is merged.get_input_embeddings().weight
    found[is_ensured] = times
    print(f"ensure_weight_tying={is_ensured}: adapter added {times:.3f} times, tied {is_tied}, logits differ by {difference:.2f}")
sys.exit(0 if abs(found[True] - 2) < 1e-6 and abs(found[False] - 1) < 1e-6 else 1)
END
