"""Folders and projector files in the layout of the original repositories, LLaVA and LLaVA-NeXT, not in transformers'.

A folder's config.json is that of its language model with keys `mm_*`, and its weights have names such as
`model.mm_projector.0.weight`. The names are those of published indexes (toshi456/llava-jp-1.3b-v1.0 with CLIP and v1.1 with SigLIP,
lmms-lab/LLaVA-NeXT-Video-34B-DPO) and of transformers' scripts convert_llava_next_weights_to_hf.py and
convert_llava_onevision_weights_to_hf.py.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from lit_vlm.anyres import ModelClass
from lit_vlm.formatting import format_count
from lit_vlm.model.classes import CONFIG_CLASSES, VisionLanguageConfig
from lit_vlm.model.projectors import PROJECTORS, Projector
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Value = TypeVar("Value")
TOWER_KEY = "mm_vision_tower"  # of config.json: name of the vision tower; only the original layout has it
TEXT_TYPES = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}
# Prefixes in a file -> prefixes of transformers' releases, the first that fits
PREFIXES = {
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.image_newline": "image_newline",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
ROPE_KEYS = ("rope_theta", "rope_scaling")  # of configs before transformers 5
_PROJECTOR_PREFIX = re.compile(r"^(.*\.)?mm_projector\.")


def is_original_config(values: Mapping[str, Any]) -> bool:
    """Return True for the content of a config.json in the original layout."""
    return TOWER_KEY in values and "vision_config" not in values


def rename_original_tensors(tensors: dict[str, Value]) -> dict[str, Value]:
    """Rename tensors in the original layout as transformers' releases name them; others are returned as they are."""
    if not any(name.startswith("model.mm_projector.") for name in tensors):
        return tensors
    renamed = {}
    for name, value in tensors.items():
        old = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        renamed[PREFIXES.get(old, "") + name.removeprefix(old)] = value
    return renamed


def make_config(values: dict[str, Any], tower: PreTrainedConfig, name: str) -> VisionLanguageConfig:
    """Make transformers' config of a folder in the original layout.

    Args:
        values: content of its config.json.
        tower: config of the vision tower that it names.
        name: of the folder, for messages.

    Raises:
        UserError: a language model, a projector or an arrangement of pictures that is not known here.
    """
    (architecture,) = values.get("architectures") or ["none"]
    if architecture not in TEXT_TYPES:
        raise UserError(
            f"{name}: its config.json names the class {architecture}; of the original layout {', '.join(TEXT_TYPES)} are known."
        )
    if values.get("mm_projector_type") != "mlp2x_gelu":
        raise UserError(f"{name}: its projector is {values.get('mm_projector_type')!r}; mlp2x_gelu is known here.")
    aspect = str(values.get("image_aspect_ratio"))
    if not aspect.startswith("anyres") or values.get("mm_patch_merge_type") != "spatial_unpad":
        raise UserError(
            f"{name}: image_aspect_ratio={aspect!r} with mm_patch_merge_type={values.get('mm_patch_merge_type')!r}; anyres with spatial_unpad "
            "(LLaVA-NeXT, LLaVA-OneVision) is known of the original layout. LLaVA 1.x holds no vision tower there: build it from parts, "
            "with model.projector_weights=<mm_projector.bin>."
        )
    text_type = TEXT_TYPES[architecture]
    text_class = CONFIG_MAPPING[text_type]
    known = (text_class().to_dict().keys() | set(ROPE_KEYS)) - {"architectures", "model_type", "transformers_version"}
    text = text_class.from_dict({key: value for key, value in values.items() if key in known})
    model_class = ModelClass.llava_onevision if aspect.startswith("anyres_max") else ModelClass.llava_next
    pinpoints = values["image_grid_pinpoints"]
    pinpoints = json.loads(pinpoints) if isinstance(pinpoints, str) else pinpoints
    is_clip = tower.model_type == "clip_vision_model"
    return CONFIG_CLASSES[model_class](
        vision_config=tower,
        text_config=text,
        vision_feature_layer=values["mm_vision_select_layer"],
        vision_feature_select_strategy="default" if is_clip else "full",
        image_grid_pinpoints=[[height, width] for width, height in pinpoints],  # there width first
        tie_word_embeddings=bool(text.tie_word_embeddings),
        **({"vision_aspect_ratio": aspect} if model_class is ModelClass.llava_onevision else {}),
        **PROJECTORS["mlp2x_gelu"].config_values,
    )


def load_projector(module: nn.Module, projector: Projector, path: str) -> None:
    """Load the weights of `mm_projector.bin`, or of a safetensors file with its names, into a projector.

    Raises:
        UserError: the file is none of tensors alone, or its names or shapes are others.
    """
    setting = f"model.projector_weights={path}"
    if not projector.original_names:
        usable = ", ".join(name for name, other in PROJECTORS.items() if other.original_names)
        raise UserError(
            f"{setting}: the names of {projector.name} in such a file are not known; those of {usable} are."
        )
    stored = {_PROJECTOR_PREFIX.sub("", key): value for key, value in _read_tensors(path, setting).items()}
    targets = {
        f"{original}.{kind}".lstrip("."): module.get_parameter(f"{own}.{kind}")
        for own, original in projector.original_names.items()
        for kind in ("weight", "bias")
    }
    errors = [
        f"{name}: {_format_shape(stored.get(name))} there, {_format_shape(target)} needed"
        for name, target in targets.items()
        if name not in stored or stored[name].shape != target.shape
    ]
    errors += [f"{name}: {_format_shape(stored[name])} there, none needed" for name in stored.keys() - targets.keys()]
    if errors:
        raise UserError(
            f"{setting}: {format_count(len(errors), 'tensor does', 'tensors do')} not fit the projector {projector.name} "
            f"between these parts ({'; '.join(errors[:4])}). Choose the tower and the language model that it was trained with."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(stored[name])


def _read_tensors(path: str, setting: str) -> dict[str, Tensor]:
    """Read the tensors of a file. Nothing in it is executed."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{setting}: cannot be read ({error}). Give the file mm_projector.bin.") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{setting}: is no file of tensors alone. Such files can run code when they are read, so this one is not. Give mm_projector.bin as "
            "LLaVA writes it, or a safetensors file."
        )
    return content


def _format_shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else " x ".join(map(str, tensor.shape))
