"""Export of a model to a folder in transformers' own layout, which loads without code of this project."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings
from lit_vlm.files import move_into_place
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.merged import MergedStateDict
from lit_vlm.model.tensor_files import MAX_SHARD_SIZE, split_into_files, write_index

_PATH_KEY = re.compile(r"(^|_)(name_or_path|file|path|dir|folder)$")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
OWN_SETTINGS_FILE = "lit_vlm.json"  # settings that transformers has no field for; only `tiling` is read back


def export_model(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageSettings,
    folder: Path,
    *,
    gather_weight: Callable[[str], Tensor] | None = None,
    is_writer: bool = True,
    before_each_weight: Callable[[], object] = lambda: None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
    """Export a model to a folder: weights, configs, tokenizer, chat template and processor.

    Adapters and new token rows are merged into the weights. The folder is written under a temporary name and moved into
    place when it is complete. Leftovers of a killed export are removed first. The model itself is not changed, so that
    training can continue.

    Weights are exported one at a time: in addition to the model, this needs memory for the largest weight and one copy
    of it (for a weight with an adapter, two). A frozen weight of a model that was loaded in shards is read from its
    source files and not gathered.

    Args:
        gather_weight: gathers the full weight of a name where ranks share weights. All ranks must then call this
            function, because all of them take part in it.
        is_writer: True on the one rank that writes.
        before_each_weight: called before each weight, on every rank that calls this function, to report progress. It
            may also be used to synchronise the other ranks with the writer.
        max_shard_size: weights are split into files of at most this size.
    """
    state_dict = MergedStateDict(model, gather_weight)
    files = split_into_files(state_dict.tensors, max_shard_size)
    if not is_writer:
        for file in files:
            for name in _iterate_with_hook(file.tensors, before_each_weight):
                state_dict.gather(name)
        return
    temporary = folder.with_name(f".{folder.name}-unfinished")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        for file in files:
            file.write(temporary, map(state_dict.compute_value, _iterate_with_hook(file.tensors, before_each_weight)))
        write_index(temporary, files, state_dict.num_parameters)
        _write_settings(temporary, model, state_dict, tokenizer, images)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    move_into_place(temporary, folder)


def _iterate_with_hook(names: Iterable[str], before: Callable[[], object]) -> Iterator[str]:
    for name in names:
        before()
        yield name


def _write_settings(
    folder: Path,
    model: LlavaOnevisionForConditionalGeneration,
    state_dict: MergedStateDict,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageSettings,
) -> None:
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with disable_transformers_logging():
        state_dict.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_json(folder / "processor_config.json", _make_processor_config(tokenizer, images))
    _write_json(folder / "preprocessor_config.json", _make_image_processor_config(images))
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    _write_json(folder / OWN_SETTINGS_FILE, {"tiling": images.tiling.value})
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        if (cleaned := remove_local_paths(settings)) != settings:
            _write_json(folder / name, cleaned)


def remove_local_paths(settings: Any) -> Any:
    """Remove local paths that a part was read from out of settings, nested ones included.

    A published model must not contain names of users and machines. Ids of the hub stay.
    """
    if isinstance(settings, list):
        return [remove_local_paths(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: remove_local_paths(value)
        for key, value in settings.items()
        if not (isinstance(value, str) and _PATH_KEY.search(key) and _is_local_path(value))
    }


def _is_local_path(path: str) -> bool:
    return not _HUB_ID.fullmatch(path) or os.path.exists(path)


def _make_processor_config(tokenizer: PreTrainedTokenizerFast, images: ImageSettings) -> dict[str, Any]:
    image_processor = _make_image_processor_config(images)
    video = {key: image_processor[key] for key in ("image_mean", "image_std", "size", "resample")}
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": image_processor,
        "video_processor": {"video_processor_type": "LlavaOnevisionVideoProcessor", **video},
        "image_token": "<image>",
        "video_token": "<video>",
        # with the class token of CLIP, which transformers counts and then removes
        "num_image_tokens": images.side**2 + (1 if images.select == "default" else 0),
        "vision_feature_select_strategy": images.select,
        "vision_aspect_ratio": images.vision_aspect_ratio,
    }


def _make_image_processor_config(images: ImageSettings) -> dict[str, Any]:
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
