"""Initial weights of a model, by the names that they have in memory, read from safetensors on request.

Nothing is read ahead, and no tensor has to be read whole: a process that holds an interval of a weight reads that
interval. The parts may come from different folders, in the hub's layout or in memory's. transformers' own rules map
names in a file to names in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from lit_vlm.compat.transformers import can_tie
from lit_vlm.formatting import format_count
from lit_vlm.model.original_layout import rename_original_tensors
from lit_vlm.model.parts import UNUSED_PARAMETERS
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.vocabulary import HEAD, untie_embeddings
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

Value = TypeVar("Value")
INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
TABLES = (HEAD, "embed_tokens.weight")


class NotShardLoadableError(UserError):
    """The weights of a folder can only be loaded whole, not by shards."""


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """Location of a tensor in a safetensors file."""

    file: str
    key: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class InitialWeights:
    """Initial values of a model's weights.

    Args:
        dtype: type of the values that are returned.
        seed: for values that are initialised at random.
        locations: of each name in memory that comes from a file.
        new_tensors: small tensors that come from no file, by name in memory.
        scale_factors: by name, the factor on the stored values.
        mean_rows: by name of a vocabulary table, the rows that start as the mean of other rows.
    """

    dtype: torch.dtype
    seed: int
    locations: dict[str, TensorLocation] = field(default_factory=dict)
    new_tensors: dict[str, Tensor] = field(default_factory=dict)
    scale_factors: dict[str, float] = field(default_factory=dict)
    mean_rows: dict[str, dict[int, list[int]]] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.locations or name in self.new_tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> InitialWeights:
        return self  # a copy of the model has the same initial values

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read [stop - start] on the CPU: elements `start` to `stop` of the flattened tensor of that name."""
        if name in self.new_tensors:
            return self.new_tensors[name].flatten()[start:stop]
        location = self.locations[name]
        width = math.prod(location.shape[1:])
        first = start // width
        return self.read_rows(name, first, -(-stop // width)).flatten()[start - first * width : stop - first * width]

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Read [last - first, ...]: rows of a tensor from a file. An extended table has more rows than the file."""
        values = self._read_stored_rows(name, first, min(last, self._count_stored_rows(name)))
        new = {row: ids for row, ids in self.mean_rows.get(name, {}).items() if first <= row < last}
        if not new:
            return values
        missing = values.new_zeros((last - first - len(values), *values.shape[1:]))
        values = torch.cat([values, missing])
        for row, ids in new.items():
            source_rows = torch.cat([self._read_stored_rows(name, i, i + 1) for i in ids])
            values[row - first] = source_rows.float().mean(dim=0).to(self.dtype)
        return values

    def _count_stored_rows(self, name: str) -> int:
        return (self.locations[name].shape or (1,))[0]

    def _read_stored_rows(self, name: str, first: int, last: int) -> Tensor:
        location = self.locations[name]
        try:
            with safe_open(location.file, framework="pt") as file:
                if not location.shape:
                    values = file.get_tensor(location.key)[None]
                else:
                    values = file.get_slice(location.key)[min(first, last) : last]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{location.file}: {location.key} could not be read: {error}") from None
        values = values.to(self.dtype)
        return values * self.scale_factors[name] if name in self.scale_factors else values


def find_tensor_locations(model: PreTrainedModel, name: str, revision: str | None = None) -> dict[str, TensorLocation]:
    """Find where a folder or hub repository keeps each weight of a model, by the model's own names.

    Args:
        model: of the class that the folder is for, on `meta`.

    Raises:
        UserError: weights are missing or of another shape, a file is corrupt, or there are no safetensors.
    """
    stored = rename_original_tensors(_list_tensors(name, find_weight_files(name, revision)))
    locations = rename_to_memory(model, name, stored)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    _resolve_ties(model, locations)
    mismatched = {
        key: f"{key} ({_format_shape(locations[key].shape)} there, {_format_shape(shape)} needed)"
        for key, shape in expected.items()
        if key in locations and locations[key].shape != shape
    }
    require_all_weights(name, [key for key in expected if key not in locations], mismatched.values(), model.config)
    return {key: place for key, place in locations.items() if place.shape == expected.get(key)}


def require_all_weights(name: str, missing: Iterable[str], mismatched: Iterable[str], config: Any) -> None:
    """Require all weights that the model uses.

    Raises:
        UserError: some are missing, or have another shape.
    """
    missing = [
        key
        for key in missing
        if not UNUSED_PARAMETERS.match(f"model.vision_tower.{key}") and not UNUSED_PARAMETERS.match(key)
    ]
    absent = sorted([*missing, *mismatched])
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if len(missing) == len(absent) and (description := _describe_missing_table(name, missing, tied)):
        raise UserError(description)
    if absent:
        raise UserError(
            f"{name}: {format_count(len(absent), 'weight is', 'weights are')} missing or of another shape there, "
            f"{', '.join(absent[:3])} among them. The folder holds another model than its config.json says, or half of one."
        )


def _format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _describe_missing_table(name: str, missing: Collection[str], tied: bool) -> str | None:
    """Describe the error of files that lack a table; None when they lack other weights."""
    if not missing or not all(key.endswith(TABLES) for key in missing):
        return None
    if tied:
        return f"{name}: its files hold neither embeddings nor head ({', '.join(sorted(missing))}): half of a model."
    missing_table = "head" if any(key.endswith(HEAD) for key in missing) else "embeddings"
    return (
        f"{name}: its files hold no {missing_table} ({', '.join(sorted(missing))}), and its config.json does not tie head and "
        "embeddings. If they are one table, set tie_word_embeddings to true in its config.json (in text_config, too, where "
        "it has one); else the folder holds half of a model."
    )


def find_weight_files(name: str, revision: str | None) -> list[str]:
    """Find the safetensors files of a folder or hub repository.

    Raises:
        UserError: a file is missing or the index cannot be read; NotShardLoadableError: there are no safetensors.
    """

    def resolve(filename: str) -> str | None:
        return cached_file(name, filename, revision=revision, _raise_exceptions_for_missing_entries=False)

    try:
        index = resolve(INDEX_FILE)
        if index is None:
            single = resolve(WEIGHTS_FILE)
            files = [single] if single else []
        else:
            shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path for path in map(resolve, shards) if path]
            if len(files) < len(shards):
                missing = next(shard for shard in shards if resolve(shard) is None)
                raise UserError(f"{name}: its weights could not be loaded: {missing} is missing.")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: its weights could not be loaded: {str(error).strip().splitlines()[0]}") from None
    if not files:
        raise NotShardLoadableError(
            f"{name}: no {WEIGHTS_FILE} there. A strategy that shares the weights out reads them piece by piece, which other "
            f"files (pytorch_model.bin) do not allow. Convert the folder once: load it with transformers' from_pretrained "
            "and write it to a new folder with save_pretrained, then name that folder; or use trainer.strategy=ddp."
        )
    return files


def _list_tensors(name: str, files: list[str]) -> dict[str, TensorLocation]:
    """List the tensors in the files, by key. Reads the files' headers and no values."""
    locations = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, not a dict
                    locations[key] = TensorLocation(path, key, tuple(file.get_slice(key).get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{name}: its weights could not be loaded: {str(error).strip().splitlines()[0]}") from None
    return locations


def rename_to_memory(model: PreTrainedModel, name: str, stored: dict[str, Value]) -> dict[str, Value]:
    """Rename keys in the files to names in memory, as transformers' `convert_and_load_state_dict_in_model` does.

    Tensors that the model does not have are left out (a text model, layers that were dropped).
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    expected = model.state_dict()
    prefix = model.base_model_prefix
    renamed = {}
    for key, location in stored.items():
        memory_name, fused = rename_source_key(key, renamings, converters, prefix, expected)
        if memory_name not in expected and key in expected:
            memory_name, fused = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if memory_name in expected and fused is not None:
            raise NotShardLoadableError(
                f"{name}: transformers fuses weights of {model.config.model_type} when it loads them ({memory_name}), which "
                "cannot be read piece by piece. Use trainer.strategy=ddp."
            )
        if memory_name in expected:
            renamed[memory_name] = location
    return renamed


def resolve_weight_tying(model: VisionLanguageModel, loaded: PreTrainedModel, spec: ModelSpec, name: str) -> None:
    """Untie the tables of a model whose files hold two different ones, and add a note to the spec's remarks.

    peft writes such folders: `modules_to_save=["lm_head"]` on a tied model, merged and saved, leaves two tables and a
    `text_config` that ties them.

    Args:
        loaded: the model that was read from `name`: the model itself, or the language model that became a part of it.
            Loading removes a pair of different tables from its `all_tied_weights_keys`.
    """
    tied_by_config = getattr(loaded.config, "tie_word_embeddings", False)
    if not tied_by_config or not can_tie(loaded, HEAD) or HEAD in loaded.all_tied_weights_keys:
        return
    untie_embeddings(model)
    spec.config.tie_word_embeddings = spec.config.text_config.tie_word_embeddings = False
    spec.remarks.append(
        f"{name}: its config.json ties head and embeddings, and its files hold two different tables. Both are kept; "
        "what is exported says tie_word_embeddings=false."
    )


def _resolve_ties(model: PreTrainedModel, found: dict[str, TensorLocation]) -> None:
    """Resolve weight tying: one table may be stored under either name or both; two different tables are not tied."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in found and source in found and not _is_equal_tensor(found[target], found[source]):
            del model.all_tied_weights_keys[target]  # as transformers does; see `resolve_weight_tying`
        for one, other in ((target, source), (source, target)):
            if one not in found and other in found:
                found[one] = found[other]


def _is_equal_tensor(one: TensorLocation, other: TensorLocation, rows_per_read: int = 4096) -> bool:
    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
        left, right = a.get_slice(one.key), b.get_slice(other.key)
        return all(
            torch.equal(left[i : i + rows_per_read].float(), right[i : i + rows_per_read].float())
            for i in range(0, one.shape[0], rows_per_read)
        )
