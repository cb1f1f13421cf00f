"""Skeleton of a model without weights: all modules and names, parameters on `meta`, buffers real.

Strategies that shard a model over devices (FSDP2, ZeRO-3) build it inside `defer_weights`, shard the skeleton, and then
fill the part that each process holds from `read_initial_values`. No process ever holds the whole model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_vlm.compat.transformers import mark_as_initialized
from lit_vlm.formatting import format_count
from lit_vlm.model import families
from lit_vlm.model.classes import VisionLanguageConfig, get_model_class
from lit_vlm.model.hub import disable_transformers_logging
from lit_vlm.model.lora import init_adapter
from lit_vlm.model.original_layout import load_projector
from lit_vlm.model.packed_forward import LogProbHead
from lit_vlm.model.projectors import get_projector
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.vocabulary import HEAD, extend_embeddings
from lit_vlm.model.weights import InitialWeights, find_tensor_locations, resolve_weight_tying
from lit_vlm.types import UserError

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

EMBEDDINGS = "model.language_model.embed_tokens.weight"

_is_deferring: ContextVar[bool] = ContextVar("defer_weights", default=False)


@contextlib.contextmanager
def defer_weights() -> Iterator[None]:
    """Defer weights inside: `build_model` makes skeletons, whose attribute `weights` says where the weights are."""
    token = _is_deferring.set(True)
    try:
        yield
    finally:
        _is_deferring.reset(token)


def is_deferring_weights() -> bool:
    """Return True inside `defer_weights`."""
    return _is_deferring.get()


def build_on_meta(config: VisionLanguageConfig) -> VisionLanguageModel:
    """Build the model on `meta`: shapes and counts at full size, without memory."""
    with torch.device("meta"):
        return build_model_class(config)


def build_model_class(config: VisionLanguageConfig) -> VisionLanguageModel:
    """Build transformers' model with random weights, and with the projector that its config names."""
    return get_model_class(config)(config)


def make_skeleton(spec: ModelSpec, dtype: torch.dtype, seed: int) -> VisionLanguageModel:
    """Make the model of `build_model` without weights; `model.weights` can read them.

    Raises:
        UserError: weights are missing, of another shape, corrupt, or not in safetensors. It is raised now and not when
            they are read.
    """
    if spec.adapter is not None:
        raise UserError(
            f"init_from={spec.adapter.name}: is an adapter, which is merged into a base that is loaded whole, and this strategy reads "
            "weights piece by piece. Start from the merged model (hf/ beside the adapter), or use trainer.strategy=ddp."
        )
    model = build_on_meta(copy.deepcopy(spec.config) if spec.whole else spec.config)
    model.weights = weights = InitialWeights(dtype, seed)
    with disable_transformers_logging():
        if spec.whole:
            weights.locations = find_tensor_locations(model, spec.whole, spec.revision)
            _read_generation_config(model, spec.whole, spec.revision)
            resolve_weight_tying(model, model, spec, spec.whole)
        else:
            _collect_part_weights(model, weights, spec)
        families.fold_logit_scale(model)
        model.tie_weights()
        _add_token_rows(model, weights, spec)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    _make_buffers(model)
    return model.eval()


def read_initial_values(model: nn.Module, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
    """Read initial values of a skeleton's parameter on the CPU: [stop - start], elements `start` to `stop` flattened.

    Args:
        name: as in `model.named_parameters()`, adapters and new token rows included.
        shape: of the whole parameter.
    """
    weights: Any = model.weights
    if "lora_" in name:
        return init_adapter(name, shape, weights.seed).to(weights.dtype).flatten()[start:stop]
    if name.startswith("new_tokens."):
        table = EMBEDDINGS if name.endswith("embedding") or HEAD not in weights else HEAD
        ids: list[int] = model.new_tokens.ids.tolist()  # type: ignore[union-attr, operator]
        width = shape[1]
        first, last = start // width, -(-stop // width)
        rows = [weights.read_rows(table, i, i + 1) for i in ids[first:last]]
        return torch.cat(rows or [torch.empty(0)]).flatten()[start - first * width : stop - first * width]
    return weights.read(name.replace(".base_layer.", "."), start, stop)


@torch.no_grad()
def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter; one that stands in several places (tied tables) stays one."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in replaced:
                replaced[old] = make(f"{prefix}.{leaf}" if prefix else leaf, old)
            setattr(module, leaf, replaced[old])


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move all buffers to a device."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, buffer.to(device))


def init_projector(
    config: VisionLanguageConfig, dtype: torch.dtype, seed: int, weights: str | None = None
) -> tuple[nn.Module, Tensor]:
    """Initialise a new projector from `seed`, and the newline's features [D] that end each row of tiles.

    LLaVA 1.x has no newline.

    Args:
        weights: file with the projector's weights (`mm_projector.bin`); None: at random.
    """
    projector = get_projector(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            module = projector.build(config)
        module = module.to_empty(device="cpu").to(dtype)
        projector.init_weights(module)
        if weights is not None:
            load_projector(module, projector, weights)
        width = config.text_config.hidden_size
        return module, torch.randn(width, dtype=dtype) * width**-0.5


def share_config(part: nn.Module, config: Any) -> None:
    """Share one config object among all modules of a part, so that a change reaches every layer.

    from_pretrained copies the config that it is given.
    """
    for module in part.modules():
        if hasattr(module, "config"):
            module.config = config


def _collect_part_weights(model: VisionLanguageModel, weights: InitialWeights, spec: ModelSpec) -> None:
    """Collect where the weights of vision tower and language model are, and initialise the projector."""
    assert spec.vision_tower and spec.language_model
    config, revision = spec.config, spec.revision
    tower: Any = model.model.vision_tower
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=spec.trust_remote_code)
    families.check_head(language.lm_head, spec.language_model)
    tower_locations = find_tensor_locations(tower, spec.vision_tower, revision)
    language_locations = find_tensor_locations(language, spec.language_model, revision)
    resolve_weight_tying(model, language, spec, spec.language_model)
    _read_generation_config(language, spec.language_model, revision)
    model.generation_config = language.generation_config
    share_config(tower, config.vision_config)
    share_config(model.model.language_model, config.text_config)
    weights.locations = {f"model.vision_tower.{name}": place for name, place in tower_locations.items()}
    weights.locations |= {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: place
        for name, place in language_locations.items()
    }
    for name, parameter in tower.named_parameters():  # unused parameters may be missing
        if name not in tower_locations:
            fill = torch.ones if name.endswith("weight") else torch.zeros
            weights.new_tensors[f"model.vision_tower.{name}"] = fill(parameter.shape, dtype=weights.dtype)
    factor = families.get_logit_factor(config.text_config)
    if factor != 1.0:
        weights.scale_factors[HEAD] = factor
    projector, newline = init_projector(config, weights.dtype, weights.seed, spec.projector_weights)
    weights.new_tensors |= {
        f"model.multi_modal_projector.{name}": value.detach() for name, value in projector.named_parameters()
    }
    if hasattr(model.model, "image_newline"):
        weights.new_tensors["model.image_newline"] = newline


def _add_token_rows(model: VisionLanguageModel, weights: InitialWeights, spec: ModelSpec) -> None:
    """Add rows for new tokens to the tables.

    Raises:
        UserError: the tokenizer has more tokens than the tables have rows, and not because of new tokens.
    """
    num_stored = model.get_input_embeddings().num_embeddings
    mean_rows = extend_embeddings(model, spec.tokenizer, spec.new_tokens, spec.text_tokens.pieces)
    weights.mean_rows = {EMBEDDINGS: mean_rows, HEAD: mean_rows} if mean_rows else {}
    unknown = set(range(num_stored, model.get_input_embeddings().num_embeddings)) - set(mean_rows)
    if unknown:
        raise UserError(
            f"The tokenizer has {len(spec.tokenizer):,} tokens and the model's table {num_stored:,} rows; "
            f"{format_count(len(unknown), 'of its own tokens has', 'of its own tokens have')} none. Give the tokenizer that belongs to the model."
        )


def _read_generation_config(model: Any, name: str, revision: str | None) -> None:
    model.adjust_generation_fn(
        None, False, None, name, None, False, None, False, None, revision or "main", "", trust_remote_code=False
    )


def _make_buffers(model: PreTrainedModel) -> None:
    """Make the buffers that no file holds (rotary frequencies, position ids), as `from_pretrained` does."""
    for name, buffer in model.named_non_persistent_buffers():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, torch.empty_like(buffer, device="cpu"))
    for tensor in model.state_dict(keep_vars=True).values():
        mark_as_initialized(tensor)
    model.initialize_weights()


def list_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the weights and biases that only linear layers and convolutions read."""
    matmul_modules = (nn.Linear, nn.Conv2d, LogProbHead)
    uses = [(type(module) in matmul_modules, p) for module in model.modules() for p in module.parameters(recurse=False)]
    others = {id(parameter) for is_matrix, parameter in uses if not is_matrix}
    return list({id(p): p for is_matrix, p in uses if is_matrix and id(p) not in others}.values())


def list_frozen_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the weights and biases of `list_matrices` that do not train."""
    return [parameter for parameter in list_matrices(model) if not parameter.requires_grad]


@torch.no_grad()
def fill_skeleton(model: nn.Module, frozen_dtype: torch.dtype) -> None:
    """Allocate CPU memory and fill in initial values for a skeleton whose trainable parameters are already marked.

    Args:
        frozen_dtype: type of frozen matrices; all other parameters have the skeleton's own.
    """
    frozen = {id(parameter) for parameter in list_frozen_matrices(model)}

    def make(name: str, old: nn.Parameter) -> nn.Parameter:
        new = torch.empty(old.shape, dtype=frozen_dtype if id(old) in frozen else old.dtype)
        new.view(-1).copy_(read_initial_values(model, name, old.shape, 0, old.numel()))
        return nn.Parameter(new, requires_grad=old.requires_grad)

    replace_parameters(model, make)
    move_buffers(model, torch.device("cpu"))


def read_exact_values(model: nn.Module) -> dict[str, Tensor]:
    """Read from the files the exact values of the parameters that `fill_skeleton` rounded, by name."""
    rounded = {id(p) for p in list_frozen_matrices(model) if p.dtype != model.weights.dtype}
    named = [(name, p.shape) for name, p in model.named_parameters() if id(p) in rounded]
    return {name: read_initial_values(model, name, shape, 0, shape.numel()).view(shape) for name, shape in named}
