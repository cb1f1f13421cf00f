"""What a run leaves: a folder in transformers' own layout that loads with no code of ours."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings
from lit_vlm.model.forward import as_transformers_class
from lit_vlm.model.hub import quiet_transformers
from lit_vlm.model.lora import lora_layers, merge_lora

OURS = "lit_vlm.json"  # what transformers has no field for; nothing but `tiling` is read back


def export_model(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageSettings,
    folder: Path,
) -> None:
    """Write weights, configs, tokenizer, chat template and processor; adapters and new rows merged into the weights.

    The folder is written beside its place and moved there when whole. The model goes on training as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    plain = _plain(model)
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    with as_transformers_class(plain), quiet_transformers():
        plain.save_pretrained(beside, max_shard_size="5GB")
    tokenizer.save_pretrained(beside)
    _write(beside / "processor_config.json", _processor_config(tokenizer, images))
    _write(beside / "preprocessor_config.json", _image_processor_config(images))
    (beside / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    _write(beside / OURS, {"tiling": images.tiling.value})
    beside.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(beside, folder)


def _plain(model: LlavaOnevisionForConditionalGeneration) -> LlavaOnevisionForConditionalGeneration:
    """The model itself, or a copy with its adapters and new rows merged."""
    new_tokens = getattr(model, "new_tokens", None)
    if new_tokens is None and not lora_layers(model):
        return model
    plain = copy.deepcopy(model)
    merge_lora(plain)
    if new_tokens is not None:
        plain.new_tokens.merge(plain)
        del plain.new_tokens
    for module in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        _clear_hooks(module)
    return plain


def _clear_hooks(module: nn.Module) -> None:
    module._forward_hooks.clear()  # copies of hooks that point at the copied rows


def _processor_config(tokenizer: PreTrainedTokenizerFast, images: ImageSettings) -> dict[str, Any]:
    image_processor = _image_processor_config(images)
    video = {key: image_processor[key] for key in ("image_mean", "image_std", "size", "resample")}
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": image_processor,
        "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", **video},
        "image_token": "<image>",
        "video_token": "<video>",
        # with the class token of CLIP, which transformers counts and then takes off
        "num_image_tokens": images.side**2 + (1 if images.select == "default" else 0),
        "vision_feature_select_strategy": images.select,
        "vision_aspect_ratio": images.vision_aspect_ratio,
    }


def _image_processor_config(images: ImageSettings) -> dict[str, Any]:
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": [list(pair) for pair in images.grid_pinpoints],
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        "resample": images.resample,
        "rescale_factor": images.do_rescale,
        "size": {"height": images.tile_size, "width": images.tile_size},
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
