"""Weights of a model as plain transformers saves them: adapters and new token rows merged, one weight at a time.

Only weights that transformers itself fuses in memory and splits in files (experts of some families) are made all at
once.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from lit_vlm.anyres import ImageSettings
from lit_vlm.compat.transformers import set_weight_conversions
from lit_vlm.files import atomic_folder
from lit_vlm.model.box_tokens import MODEL_CARD_FILE, format_model_card, set_special_boxes
from lit_vlm.model.classes import MODEL_NAMES, make_code_values
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.lora import find_lora_layers
from lit_vlm.model.plain_processor import make_image_processor_config, make_processor_config
from lit_vlm.model.projectors import get_projector, list_exportable_projectors
from lit_vlm.model.skeleton import EMBEDDINGS, build_on_meta, read_initial_values
from lit_vlm.model.spec import OWN_SETTINGS_FILE
from lit_vlm.model.tensor_files import MAX_SHARD_SIZE, split_into_files, write_index
from lit_vlm.model.vocabulary import HEAD
from lit_vlm.types import SPECIAL_TOKENS, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel


class MergedStateDict:
    """Merged state dict of a model for export, by the names that the files on the hub have.

    Args:
        model: its weights may be sharded over ranks.
        gather_weight: gathers the full weight of a name in memory; every rank calls it with the same names in the same
            order. None: weights are not sharded.

    Attributes:
        tensors: shape and type by name in the files, on `meta`.
        config: to be saved with the weights.
    """

    def __init__(self, model: VisionLanguageModel, gather_weight: Callable[[str], Tensor] | None = None) -> None:
        self.model, self.lora_layers, self.gather_weight = model, find_lora_layers(model), gather_weight
        self.parameters = dict(model.named_parameters())
        self.buffers = list_persistent_buffers(model)
        self.initial_weights: Any = getattr(model, "weights", None)  # of a model that was loaded in shards, else None
        dtype = self.initial_weights.dtype if self.initial_weights else model.dtype
        if (
            gather_weight and not self.initial_weights
        ):  # sharded weights may compute in another type than their master weights have
            dtype = model.config.dtype or dtype
        meta_model: Any = build_on_meta(copy.deepcopy(model.config)).to(dtype)
        meta_model.tie_weights()
        self.num_parameters, self.config = meta_model.num_parameters(), meta_model.config
        for config in (self.config, self.config.vision_config, self.config.text_config):
            config.dtype = str(dtype).removeprefix("torch.")
        self.config.architectures = [type(meta_model).__name__]
        use_released_names(meta_model)
        meta_tensors: dict[str, Tensor] = dict(
            meta_model.named_parameters()
        )  # a tied table is listed as embeddings only
        meta_tensors |= {name: buffer.to("meta") for name, buffer in self.buffers.items()}  # of experts' routers
        self.tensors: dict[str, Tensor] = revert_weight_conversion(meta_model, meta_tensors)
        names_by_id = {id(tensor): name for name, tensor in meta_tensors.items()}
        self._memory_names = {
            hub: names_by_id[id(tensor)] for hub, tensor in self.tensors.items() if id(tensor) in names_by_id
        }
        self._meta_model, self._meta_tensors = meta_model, meta_tensors
        self._unfused: dict[str, Tensor] | None = None

    def compute_value(self, name: str) -> Tensor:
        """Compute the merged weight of a name in the files, on the device where its parameter is."""
        if name in self._memory_names:
            return self.compute_memory_value(self._memory_names[name])
        if self._unfused is None:
            values = {
                memory_name: self.compute_memory_value(memory_name) for memory_name in self._list_memory_names(name)
            }
            self._unfused = revert_weight_conversion(self._meta_model, values)
        return self._unfused.pop(name)

    def gather(self, name: str) -> None:
        """Gather the same parameters as another rank that computes the weight of this name."""
        for memory_name in self._list_memory_names(name):
            self.gather_memory(memory_name)
        if name not in self._memory_names:
            self._unfused = {}

    def gather_memory(self, memory_name: str) -> None:
        """Gather the same parameters as another rank that computes the weight, or gathers the parameter, of this name."""
        for key in self._list_inputs(memory_name):
            if not self._is_in_files(key):
                self.gather_parameter(key)

    def _list_memory_names(self, name: str) -> list[str]:
        """List the names in memory that a name in the files is made of.

        All fused weights belong to the first name that needs one of them; later names get an empty list.
        """
        if name in self._memory_names:
            return [self._memory_names[name]]
        plain = set(self._memory_names.values())
        return [key for key in self._meta_tensors if key not in plain] if self._unfused is None else []

    def compute_memory_value(self, memory_name: str) -> Tensor:
        """Compute the merged weight of a name in memory."""
        target = self._meta_tensors[memory_name]
        value, *merged = [
            self.gather_parameter(key) for key in self._list_inputs(memory_name)
        ]  # from a file or from the device
        if memory_name.rpartition(".")[0] in self.lora_layers and merged:
            value = value + self._compute_lora_delta(memory_name.rpartition(".")[0], *merged[:2]).to(value)
        elif merged:  # rows of new tokens (TrainableTokens)
            value = value.index_copy(0, self.model.new_tokens.ids.to(value.device), merged[0].to(value))
        return value.to(target.dtype)

    def _list_inputs(self, memory_name: str) -> list[str]:
        """List the names in memory that are needed: the weight itself, then what is merged into it."""
        module, _, leaf = memory_name.rpartition(".")
        if module in self.lora_layers:
            base = f"{module}.base_layer.{leaf}"
            adapters = _list_adapters(self.lora_layers[module]) if leaf == "weight" else []
            return [base, *(f"{module}.lora_{side}.{adapter}.weight" for adapter in adapters for side in "AB")]
        rows = {EMBEDDINGS: "new_tokens.embedding", HEAD: "new_tokens.head"}.get(memory_name)
        return [memory_name, rows] if rows is not None and rows in self.parameters else [memory_name]

    def _is_in_files(self, name: str) -> bool:
        return name in self.buffers or (self.initial_weights is not None and not self.parameters[name].requires_grad)

    def gather_parameter(self, name: str) -> Tensor:
        """Gather the value of a parameter or buffer in memory, whole, unmerged."""
        if name in self.buffers:  # every rank has them whole
            return self.buffers[name]
        if self._is_in_files(name):
            shape = self._meta_tensors[name.replace(".base_layer.", ".")].shape
            return read_initial_values(self.model, name, shape, 0, shape.numel()).view(shape)
        return self.gather_weight(name).detach() if self.gather_weight else self.parameters[name].detach()

    def _compute_lora_delta(self, module: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """Compute what peft adds to a layer's weight when it merges an adapter, in the same arithmetic."""
        layer: Any = self.lora_layers[module]
        dtype = lora_b.dtype
        if lora_b.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            lora_a, lora_b = lora_a.float(), lora_b.float()
        return (lora_b @ lora_a * layer.scaling[_list_adapters(layer)[0]]).to(dtype)


def list_persistent_buffers(model: VisionLanguageModel) -> dict[str, Tensor]:
    """List the buffers that belong to the weights, by name in memory: the corrections of experts' routers."""
    others = {name for name, _ in model.named_non_persistent_buffers()}
    return {name: buffer for name, buffer in model.named_buffers() if name not in others}


def use_released_names(model: VisionLanguageModel) -> None:
    """Use the parameter names of the released checkpoints in exports, whatever folder the model came from.

    transformers 5.23 has no level `vision_model` in memory any more, and writes it only where it was read. The released
    LLaVA-OneVision checkpoints have it, and servers (vLLM) support only those names.
    """
    rules = get_model_conversion_mapping(model, add_legacy=False)
    own_rules = [rule for rule in rules if not isinstance(rule, PrefixChange) or rule.scope_prefix == "vision_tower"]
    set_weight_conversions(model, own_rules)


def _list_adapters(layer: Any) -> list[str]:
    """List a layer's adapters: one, that of its part."""
    return list(layer.lora_A)


_PATH_KEY = re.compile(r"(^|_)(name_or_path|file|path|dir|folder)$")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def export_model(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageSettings,
    folder: Path,
    *,
    gather_weight: Callable[[str], Tensor] | None = None,
    is_writer: bool = True,
    before_each_weight: Callable[[], object] = lambda: None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    special_boxes: bool = True,
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
        special_boxes: write the box tokens as special tokens; False: as ordinary added tokens (`box_tokens.py`).

    Raises:
        UserError: transformers' classes cannot hold the model's projector.
    """
    require_exportable_projector(model)
    state_dict = MergedStateDict(model, gather_weight)
    files = split_into_files(state_dict.tensors, max_shard_size)
    if not is_writer:
        for file in files:
            for name in _iterate_with_hook(file.tensors, before_each_weight):
                state_dict.gather(name)
        return
    with atomic_folder(folder, replace=True) as temporary:
        for file in files:
            file.write(temporary, map(state_dict.compute_value, _iterate_with_hook(file.tensors, before_each_weight)))
        write_index(temporary, files, state_dict.num_parameters)
        _write_settings(temporary, model, state_dict, tokenizer, images)
        if not special_boxes:
            set_special_boxes(temporary, False)


def require_exportable_projector(model: VisionLanguageModel) -> None:
    """Raise UserError for a projector that transformers' classes do not have: they would initialise it at random."""
    projector = get_projector(model.config)
    if not projector.is_exportable:
        raise UserError(
            f"The projector {projector.name} is none of transformers, whose class would load the model with a random "
            f"projector, so it is not exported. Set export=false, or choose another model.projector: {list_exportable_projectors()}."
        )


def _iterate_with_hook(names: Iterable[str], before: Callable[[], object]) -> Iterator[str]:
    for name in names:
        before()
        yield name


def _write_settings(
    folder: Path,
    model: VisionLanguageModel,
    state_dict: MergedStateDict,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageSettings,
) -> None:
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with disable_transformers_logging():
        state_dict.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    has_boxes = not set(SPECIAL_TOKENS).isdisjoint(tokenizer.get_added_vocab())
    class_name, code_file = MODEL_NAMES[images.model_class], get_projector(model.config).code_file
    (folder / MODEL_CARD_FILE).write_text(format_model_card(has_boxes, class_name, code_file), encoding="utf-8")
    write_processor(folder, tokenizer, images)
    if code_file is not None:
        _write_code(folder, model, code_file)
    for name in ("config.json", "generation_config.json"):
        _clean_settings(folder / name)


def write_processor(folder: Path, tokenizer: PreTrainedTokenizerFast, images: ImageSettings) -> None:
    """Write tokenizer, chat template and image settings to a folder."""
    tokenizer.save_pretrained(folder)
    write_json(folder / "processor_config.json", make_processor_config(images))
    write_json(folder / "preprocessor_config.json", make_image_processor_config(images))
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    write_json(folder / OWN_SETTINGS_FILE, {"tiling": images.tiling.value})
    _clean_settings(folder / "tokenizer_config.json")


def _clean_settings(path: Path) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    if (cleaned := remove_local_paths(settings)) != settings:
        write_json(path, cleaned)


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


def _write_code(folder: Path, model: VisionLanguageModel, code_file: str) -> None:
    """Write the file with the projector's code, and the config that names its classes."""
    shutil.copyfile(Path(__file__).with_name(code_file), folder / code_file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | make_code_values(model.config, code_file))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write settings as transformers writes them, with Korean characters as they are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
