"""Adapters as folders: what a LoRA stage trained, in PEFT's layout, beside the merged model; and the way back.

`PeftModel.from_pretrained(base, folder)` reads the folder; `init_from=` reads it together with its base and merges it. Beside
the LoRA matrices it holds what else differs from the base: the projector (`modules_to_save`), rows of tokens
(`trainable_token_indices`), and under their own names `image_newline` and a vision tower that trained as a whole: PEFT has
no layout for a bare parameter, and loads what has the name of one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings
from lit_vlm.config.model_folders import ADAPTER_FILE, CONFIG_FILE
from lit_vlm.files import atomic_folder, update_with_weight_files
from lit_vlm.model.adapter_folder import OWN_FILE, Adapter, find_file
from lit_vlm.model.export import MergedStateDict, write_json, write_processor
from lit_vlm.model.lora import find_lora_layers
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import EMBEDDINGS
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.tensor_files import SafetensorsFile
from lit_vlm.model.vocabulary import HEAD
from lit_vlm.model.weights import NotShardLoadableError, find_weight_files, rename_to_memory
from lit_vlm.types import ModelPart, UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all keys in PEFT's files
PROJECTOR = "model.multi_modal_projector."
ROWS = ".token_adapter.trainable_tokens_delta"
TILE_KEYS = ("image_grid_pinpoints", "vision_aspect_ratio")  # of the config, which a stage may set


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """Base model of the adapter that a model could be exported as.

    Attributes:
        name: folder or hub id of a whole model.
        new_ids: tokens that this run added to it.
    """

    name: str
    revision: str | None = None
    new_ids: list[int] = field(default_factory=list)


def find_export_base(spec: ModelSpec) -> AdapterBase | None:
    """Find the base on which PEFT would load what a LoRA stage of this model trains; None: no folder holds it.

    A run that starts from an adapter has the merged model beside it as its base.
    """
    name = None if spec.is_original else spec.whole  # transformers does not load LLaVA's own layout
    if spec.adapter is not None:
        merged = Path(spec.adapter.name).parent / "hf"
        name = str(merged) if (merged / CONFIG_FILE).is_file() else None
    return AdapterBase(name, spec.revision, spec.tokenizer.convert_tokens_to_ids(spec.new_tokens)) if name else None


def find_adapter_obstacle(model: VisionLanguageModel) -> str | None:
    """Find the reason why a model with LoRA has no adapter folder; None: it has one."""
    if getattr(model, "adapter_base", None) is None:
        return "no folder holds a base that PEFT could load (the model is made from parts, LLaVA's own layout or an adapter alone)"
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    is_whole = any(
        get_part(name) is ModelPart.language_model and "lora_" not in name and not name.startswith("new_tokens.")
        for name in trained
    )
    return "its language model trained as a whole" if is_whole else None


def can_export_adapter(model: VisionLanguageModel) -> bool:
    """Return True for a model with LoRA whose adapters can be loaded on a base without its other weights."""
    return bool(find_lora_layers(model)) and find_adapter_obstacle(model) is None


def list_adapter_remarks(model: Any) -> list[str]:
    """List what the user should know of the adapter of a stage's model: nothing, or why none is written."""
    if not isinstance(model, nn.Module) or not find_lora_layers(model):
        return []
    obstacle = find_adapter_obstacle(model)  # type: ignore[arg-type]
    return [f"The run writes hf/ and no hf-adapter/: {obstacle}."] if obstacle else []


def get_adapter_folder(model_folder: Path) -> Path:
    """Return the folder of the adapter beside a model's: `hf-adapter` beside `hf`."""
    return model_folder.with_name(f"{model_folder.name}-adapter")


def export_adapter(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageSettings,
    folder: Path,
    *,
    gather_weight: Callable[[str], Tensor] | None = None,
    is_writer: bool = True,
    before_each_weight: Callable[[], object] = lambda: None,
) -> None:
    """Export adapters, token rows and trained parts to a folder in PEFT's layout. The arguments are those of `export_model`.

    The model must have LoRA layers and no `find_adapter_obstacle`.
    """
    state = MergedStateDict(model, gather_weight)
    rows = _list_row_ids(model)
    entries = _list_entries(state, rows)
    shapes = {key: _get_shape(state, name, rows) for key, name in entries.items()}
    file = SafetensorsFile(WEIGHTS_FILE, dict(sorted(shapes.items(), key=lambda item: -item[1].element_size())))
    if not is_writer:
        for key in file.tensors:  # in the order of the rank that writes
            before_each_weight()
            state.gather_memory(entries[key])
        return

    def compute(key: str) -> Tensor:
        before_each_weight()
        name = entries[key]
        if not key.endswith(ROWS):
            return state.gather_parameter(name)
        return state.compute_memory_value(name)[rows].to(shapes[key].dtype)

    with atomic_folder(folder, replace=True) as temporary:
        file.write(temporary, map(compute, file.tensors))
        _write_settings(temporary, folder, model, tokenizer, images, rows)


def _list_row_ids(model: VisionLanguageModel) -> list[int]:
    """List the tokens whose rows differ from the base: those that trained, and those that this run added."""
    trained = model.new_tokens.ids.tolist() if hasattr(model, "new_tokens") else []
    return sorted({*trained, *model.adapter_base.new_ids})


def _list_entries(state: MergedStateDict, rows: list[int]) -> dict[str, str]:
    """List the tensors of the file: key in the file, and name in memory, in one order on every rank."""
    model, entries = state.model, dict[str, str]()
    is_saved = _saves_projector(model)
    for name, parameter in [*model.named_parameters(), *state.buffers.items()]:
        if "lora_" in name:
            module, side, _, leaf = name.rsplit(".", 3)
            entries[f"{PREFIX}{module}.{side}.{leaf}"] = name
        elif name.startswith(PROJECTOR):
            if is_saved:
                entries[PREFIX + name] = name
        elif parameter.requires_grad and not name.startswith("new_tokens."):
            entries[PREFIX + name] = name
    if rows:
        tables = [EMBEDDINGS] if model.lm_head.weight is model.get_input_embeddings().weight else [EMBEDDINGS, HEAD]
        entries |= {f"{PREFIX}{table.removesuffix('.weight')}{ROWS}": table for table in tables}
    return entries


def _saves_projector(model: VisionLanguageModel) -> bool:
    """Return True if the projector trains as a whole, and not with LoRA."""
    trained = [name for name, p in model.named_parameters() if name.startswith(PROJECTOR) and p.requires_grad]
    return bool(trained) and not any("lora_" in name for name in trained)


def _get_shape(state: MergedStateDict, name: str, rows: list[int]) -> Tensor:
    """Get shape and type of a tensor of the file, on `meta`."""
    value: Any = state.parameters.get(name, state.buffers.get(name))
    shape = tuple(getattr(value, "ds_shape", value.shape))
    if name in (EMBEDDINGS, HEAD):
        trained = state.parameters.get("new_tokens.embedding")
        return torch.empty(len(rows), shape[1], dtype=value.dtype if trained is None else trained.dtype, device="meta")
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _write_settings(
    temporary: Path,
    folder: Path,
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    images: ImageSettings,
    rows: list[int],
) -> None:
    base: AdapterBase = model.adapter_base
    name = format_base_name(base.name, folder)
    write_json(temporary / ADAPTER_FILE, _make_peft_config(model, rows, name))
    write_processor(temporary, tokenizer, images)
    num_rows = model.get_input_embeddings().num_embeddings
    digest = compute_base_digest(base.name, base.revision)
    tiles = {key: value for key in TILE_KEYS if (value := getattr(model.config, key, None)) is not None}
    own = json.loads((temporary / OWN_FILE).read_text(encoding="utf-8"))
    write_json(
        temporary / OWN_FILE, own | {"base": {"name": name, "digest": digest}, "rows": num_rows, "config": tiles}
    )
    grows = f"base.resize_token_embeddings({num_rows})  # tokens that the base lacks\n" if base.new_ids else ""
    (temporary / "README.md").write_text(_CARD.format(base=name, file=WEIGHTS_FILE, grows=grows), encoding="utf-8")


_CARD = """---
base_model: {base}
library_name: peft
---

Adapter of `{base}`, trained with lit_vlm. `{file}` holds the LoRA matrices, rows of tokens, and the parts that trained as a whole.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")
{grows}model = PeftModel.from_pretrained(base, "this folder")
```
"""


def format_base_name(base: str, folder: Path) -> str:
    """Format the base for files that may be published: a hub id; a folder of the same runs relative to `folder`; else a name.

    A path of the machine is not written: the run's manifest has it.
    """
    path = Path(base)
    if not path.is_dir():
        return base
    runs = folder.absolute().parent.parent
    return (
        Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
        if path.absolute().is_relative_to(runs)
        else path.name
    )


def _make_peft_config(model: VisionLanguageModel, rows: list[int], base: str) -> dict[str, Any]:
    """Make `adapter_config.json`: one LoRA config, with ranks and alphas of the other parts as patterns."""
    layers: dict[str, Any] = find_lora_layers(model)
    values = {name: (layer.r[a := next(iter(layer.lora_A))], layer.lora_alpha[a]) for name, layer in layers.items()}
    rank, alpha = next(iter(values.values()))
    dropout: Any = next(iter(next(iter(layers.values())).lora_dropout.values()))
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    tables = [EMBEDDINGS] if is_tied else [EMBEDDINGS, HEAD]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": model.adapter_base.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(getattr(dropout, "p", 0.0)),
        "bias": "none",
        "target_modules": list(layers),
        "rank_pattern": {re.escape(name): r for name, (r, _) in values.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, (_, a) in values.items() if a != alpha},
        "modules_to_save": [PROJECTOR.rstrip(".")] if _saves_projector(model) else None,
        "trainable_token_indices": {table.removesuffix(".weight"): rows for table in tables} if rows else None,
    }


def compute_base_digest(name: str, revision: str | None = None) -> str | None:
    """Compute the digest of a base model's weights: names, sizes and blocks of its files; None: they are no safetensors."""
    try:
        files = find_weight_files(name, revision)
    except NotShardLoadableError:
        return None
    hasher = hashlib.sha256()
    update_with_weight_files(hasher, [Path(file) for file in files])
    return hasher.hexdigest()


# Read


def check_base(adapter: Adapter, revision: str | None) -> None:
    """Raise UserError if the base holds other weights than the one that the adapter was trained on."""
    recorded = adapter.own.get("base") or {}
    expected = recorded.get("digest")
    if expected is not None and expected != compute_base_digest(adapter.base, revision):
        raise UserError(
            f"{adapter.name}: is an adapter of {recorded.get('name')}, and {adapter.base} holds other weights than that base had. Give "
            "the base with model.adapter_base=..., or start from the merged model, which is in hf/ beside the adapter."
        )


@torch.no_grad()
def merge_adapter(model: VisionLanguageModel, adapter: Adapter) -> None:
    """Merge an adapter into its base, in the arithmetic of `export_model`.

    Raises:
        UserError: the adapter does not fit: it is one for another model.
    """
    tensors = _read_tensors(adapter)
    num_rows = adapter.own.get("rows", 0)
    if num_rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    values = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    modules = sorted({key.partition(".lora_")[0] for key in tensors if ".lora_" in key})
    names = _find_memory_names(model, adapter, [f"{module}.weight" for module in modules])
    for module in modules:
        matrices = [tensors.pop(f"{module}.lora_{side}.weight", None) for side in "AB"]
        target = values.get(names.get(f"{module}.weight", ""))
        delta = None if None in matrices else matrices[1].float() @ matrices[0].float() * _get_scaling(adapter, module)  # type: ignore[union-attr]
        if delta is None or target is None or delta.shape != target.shape:
            raise _make_misfit(adapter, f"{module}.weight", delta, target)
        target.add_(delta.to(target))
    for key in list(tensors):
        value = tensors.pop(key)
        if key.endswith(ROWS):
            table = key.removesuffix(ROWS) + ".weight"
            target, ids = values.get(table), _get_row_ids(adapter, table)
            if target is None or value.shape != (len(ids), target.shape[1]) or max(ids) >= len(target):
                raise _make_misfit(adapter, table, value, target)
            target[ids] = value.to(target)
            continue
        target = values.get(key)
        if target is None or target.shape != value.shape:
            raise _make_misfit(adapter, key, value, target)
        target.copy_(value)


def _read_tensors(adapter: Adapter) -> dict[str, Tensor]:
    path = find_file(adapter.name, WEIGHTS_FILE)
    if path is None:
        raise UserError(f"{adapter.name}: it has no {WEIGHTS_FILE}. Give a whole folder of an adapter.")
    try:
        return {key.removeprefix(PREFIX): value for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).strip().splitlines()[0]}") from None


def _find_memory_names(model: nn.Module, adapter: Adapter, names: list[str]) -> dict[str, str]:
    """Find the names in memory of weights that adapters are for; an older transformers called them otherwise."""
    known = dict(model.named_parameters(remove_duplicate=False))
    found = {name: name for name in names if name in known}
    others = [name for name in names if name not in known]
    return found | {old: new for new, old in rename_to_memory(model, adapter.name, {n: n for n in others}).items()}


def _get_scaling(adapter: Adapter, module: str) -> float:
    """Return the factor on an adapter's product, as peft computes it."""
    peft = adapter.peft

    def find(pattern_key: str, default: float) -> float:
        for pattern, value in (peft.get(pattern_key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return default

    rank, alpha = find("rank_pattern", peft["r"]), find("alpha_pattern", peft["lora_alpha"])
    return alpha / math.sqrt(rank) if peft.get("use_rslora") else alpha / rank


def _get_row_ids(adapter: Adapter, table: str) -> list[int]:
    """Return the tokens whose rows an adapter holds for a table."""
    indices = adapter.peft.get("trainable_token_indices") or []
    if isinstance(indices, dict):
        name = table.removesuffix(".weight")
        return next((ids for key, ids in indices.items() if name.endswith(key)), [])
    return list(indices)


def _make_misfit(adapter: Adapter, name: str, value: Tensor | None, target: Tensor | None) -> UserError:
    found = "half of it is missing" if value is None else f"for one of shape {list(value.shape)}"
    needed = "no such weight" if target is None else f"one of shape {list(target.shape)}"
    return UserError(
        f"{adapter.name}: is an adapter of another model than {adapter.base}: its {name} is {found}, and the base has {needed}. Give its "
        "base with model.adapter_base=..."
    )
