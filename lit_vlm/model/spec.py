"""Model spec: configs, tokenizer and image settings of a model, without its weights.

Parts and whole models come from local folders in the hub's layout, or from the hub where there is a network. Nothing
here downloads code: `trust_remote_code` is off unless the user asks for it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from lit_vlm.anyres import ImageSettings, ModelClass, Tiling, make_grid_pinpoints
from lit_vlm.config.model_folders import ADAPTER_FILE, format_adapter_error
from lit_vlm.config.schema import ModelConfig
from lit_vlm.model import families
from lit_vlm.model.adapter_folder import Adapter, open_adapter
from lit_vlm.model.box_tokens import mark_box_tokens_special
from lit_vlm.model.classes import CONFIG_CLASSES, VisionLanguageConfig, restore_config
from lit_vlm.model.hub import get_first_line, raise_folder_errors
from lit_vlm.model.new_tokens import TextTokens, add_text_tokens
from lit_vlm.model.original_layout import TOWER_KEY, is_original_config, make_config
from lit_vlm.model.projectors import PROJECTORS, Projector, get_projector
from lit_vlm.model.vocabulary import CHATML, VIDEO_TOKEN, add_special_tokens, wrap_chat_template
from lit_vlm.types import IMAGE_TOKEN, SPECIAL_TOKENS, UserError

OWN_SETTINGS_FILE = "lit_vlm.json"  # settings that transformers has no field for; only `tiling` is read back
SIZE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "image_size",
    "patch_size",
)
DEFAULT_GRID, DEFAULT_MAX_TILES = 6, 9  # LLaVA-OneVision's (1x1),...,(6x6) and anyres_max_9
# LLaVA-NeXT's tiles down and across: image_grid_pinpoints of its config
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(slots=True)
class ModelSpec:
    """Specification of a model without its weights: configs, tokenizer, image settings.

    It is enough for the data side, the cost model and a build on `meta`.
    """

    config: VisionLanguageConfig
    tokenizer: PreTrainedTokenizerFast
    images: ImageSettings
    new_tokens: list[str]  # added by this run; empty when the folder had them
    # control tokens of the data and text tokens of model.new_tokens_from, both new and existing
    special_tokens: list[str] = field(default_factory=list)
    text_tokens: TextTokens = field(default_factory=lambda: TextTokens([], {}))
    whole: str | None = None  # folder or hub id of a whole model; None: the parts below
    vision_tower: str | None = None
    language_model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    is_original: bool = False  # `whole` is in the layout of LLaVA's own repository (`original_layout.py`)
    projector_weights: str | None = None  # file with a projector for the parts; None: a new one
    adapter: Adapter | None = None  # to be merged into `whole`, its base
    remarks: list[str] = field(default_factory=list)  # notes for the user, found while the weights were read

    @property
    def hub_options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`: revision and trust_remote_code."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_model_spec(model: ModelConfig, init_from: str | None = None, tiling: Tiling = Tiling.anyres) -> ModelSpec:
    """Load configs and tokenizer of a model, without weights.

    Args:
        init_from: folder or hub id of a whole model of LLaVA's, LLaVA-NeXT's or LLaVA-OneVision's class; None: the
            parts named in `model` are assembled.
        tiling: LLaVA 1.x has one view of an image with any tiling.

    Raises:
        UserError: a missing folder, a model of another class, or a family whose logits this class would compute
            wrongly.
    """
    hub_options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    name = init_from or f"{model.vision_tower} and {model.language_model}"
    with raise_folder_errors(name, "no model could be made of what its files say"):
        return _load_model_spec(model, init_from, tiling, hub_options)


def _load_model_spec(
    model: ModelConfig, init_from: str | None, tiling: Tiling, hub_options: dict[str, Any]
) -> ModelSpec:
    spec = _make_pretrained_spec(model, init_from, hub_options) if init_from else _make_parts_spec(model, hub_options)
    model_class = spec.images.model_class
    spec.images = replace(spec.images, tiling=Tiling.base if model_class is ModelClass.llava else tiling)
    if model.pad_to_square is not None and model_class is ModelClass.llava:
        spec.images = replace(spec.images, pad_to_square=model.pad_to_square)
    placeholders = (IMAGE_TOKEN, VIDEO_TOKEN) if model_class is ModelClass.llava_onevision else (IMAGE_TOKEN,)
    if model.new_tokens_from is not None:
        spec.tokenizer, spec.text_tokens = add_text_tokens(spec.tokenizer, model.new_tokens_from, model.num_new_tokens)
    spec.new_tokens = add_special_tokens(spec.tokenizer, model.special_tokens, placeholders)
    spec.new_tokens += spec.tokenizer.convert_ids_to_tokens(list(spec.text_tokens.pieces))
    mark_box_tokens_special(spec.tokenizer)  # a folder of special_boxes=false is the same model
    added_vocab = spec.tokenizer.get_added_vocab()
    candidates = dict.fromkeys((*model.special_tokens, *SPECIAL_TOKENS))
    spec.special_tokens = [token for token in candidates if token in added_vocab]
    spec.special_tokens += spec.text_tokens.names
    spec.config.image_token_index = spec.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if model_class is ModelClass.llava_onevision:
        spec.config.video_token_index = spec.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)  # type: ignore[union-attr]
    spec.tokenizer.chat_template = _resolve_chat_template(model.chat_template, spec.tokenizer)
    return spec


def read_tiling(name: str) -> Tiling:
    """Read the tiling that a model folder was trained with.

    Plain transformers always tiles (anyres), and so does a folder that this project did not write.
    """
    with raise_folder_errors(name, f"its {OWN_SETTINGS_FILE} could not be read"):
        settings = read_json(name, OWN_SETTINGS_FILE) if Path(name).is_dir() else None
        return Tiling(settings["tiling"]) if settings else Tiling.anyres


def read_json(name: str, filename: str, **hub_options: Any) -> dict[str, Any] | None:
    """Read a JSON file of a model folder or hub repository; None when it does not exist."""
    options = {key: value for key, value in hub_options.items() if key == "revision"}
    with raise_folder_errors(name, f"its {filename} could not be read"):
        path = cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **options)
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
        if content is not None and not isinstance(content, dict):
            raise TypeError(f"it holds {type(content).__name__} and no JSON object")
        return content


def _make_pretrained_spec(model: ModelConfig, init_from: str, hub_options: dict[str, Any]) -> ModelSpec:
    _require_folder(init_from, "init_from")
    adapter = open_adapter(init_from, model.adapter_base)
    if adapter is None and model.adapter_base is not None:
        raise UserError(f"model.adapter_base={model.adapter_base}: init_from={init_from} is no adapter. Take it away.")
    settings = tokenizer = init_from
    if adapter is not None:
        init_from, settings = adapter.base, init_from if adapter.own else adapter.base
        tokenizer = adapter.name if adapter.has_tokenizer else adapter.base
    values = (
        read_json(init_from, "config.json", **hub_options) if Path(init_from).is_dir() or "/" in init_from else None
    )
    is_original = is_original_config(values or {})
    if is_original:
        config = make_config(values or {}, _load_original_tower(values or {}, model, init_from, hub_options), init_from)
    else:
        config = _load_config(init_from, "init_from", hub_options)
    _require_sizes(config, init_from)
    if config.model_type not in set(ModelClass):
        raise UserError(
            f"init_from={init_from} holds a model of type {config.model_type!r}; a stage starts from a model of one of the types "
            f"{', '.join(ModelClass)}. To build one from parts, leave init_from out and set model.vision_tower and model.language_model."
        )
    if (reason := families.find_packing_refusal(config.text_config)) is not None:
        raise UserError(
            f"init_from={init_from}: its language model ({config.text_config.model_type}) cannot be trained exactly: {reason}."
        )
    _require_usable_tiles(model, ModelClass(config.model_type))
    _drop_unused_layers(config.vision_config, config.vision_feature_layer)
    config.vision_feature_layer = -1
    config.text_config.tie_word_embeddings = config.tie_word_embeddings  # the latter is read here, the former in vLLM
    for key, value in (adapter.own.get("config") or {}).items() if adapter else ():
        setattr(config, key, value)
    if model.grid:
        pinpoints = make_grid_pinpoints(config.vision_config.image_size, model.grid)
        config.image_grid_pinpoints = [list(pair) for pair in pinpoints]
    if model.max_tiles:
        config.vision_aspect_ratio = f"anyres_max_{model.max_tiles}"
    return ModelSpec(
        config,
        _load_tokenizer(tokenizer, hub_options),
        _load_image_settings(settings, config, hub_options),
        [],
        whole=init_from,
        is_original=is_original,
        adapter=adapter,
        **hub_options,
    )


def _load_original_tower(
    values: dict[str, Any], model: ModelConfig, init_from: str, hub_options: dict[str, Any]
) -> Any:
    """Load the config of the vision tower that a folder in the original layout names, or of model.vision_tower if it is not there."""
    named = str(values[TOWER_KEY])
    local = Path(str(model.vision_tower)).is_dir()
    try:
        tower = _load_config(str(model.vision_tower) if local else named, "model.vision_tower", hub_options)
    except UserError as error:
        raise UserError(
            f"init_from={init_from} is in the original layout, and its vision tower {named} cannot be read ({get_first_line(error)}). Set "
            "model.vision_tower=<folder with the config.json of that tower>."
        ) from None
    tower = getattr(tower, "vision_config", tower)
    if tower.model_type == "siglip_vision_model":
        tower.vision_use_head = False
    return tower


def _require_usable_tiles(model: ModelConfig, model_class: ModelClass) -> None:
    """Raise UserError for a setting of tiles that the class does not have."""
    unused = {
        ModelClass.llava: {"grid": model.grid, "max_tiles": model.max_tiles},
        ModelClass.llava_next: {"max_tiles": model.max_tiles},
    }
    reason = {
        ModelClass.llava: "LLaVA 1.x encodes one square view of each picture",
        ModelClass.llava_next: "LLaVA-NeXT never downsamples its tiles",
    }
    for key, value in unused.get(model_class, {}).items():
        if value is not None:
            raise UserError(
                f"model.{key}={value}: has no effect ({reason[model_class]}; model_class {model_class}). Take it away."
            )


def _make_parts_spec(model: ModelConfig, hub_options: dict[str, Any]) -> ModelSpec:
    vision = _load_config(model.vision_tower, "model.vision_tower", hub_options)
    vision = getattr(vision, "vision_config", vision)  # a SigLIP or CLIP checkpoint also holds its text model
    if vision.model_type not in ("siglip_vision_model", "clip_vision_model"):
        raise UserError(
            f"model.vision_tower={model.vision_tower} is a {vision.model_type!r}; SigLIP, SigLIP 2 (fixed resolution) and CLIP towers are known."
        )
    text = _load_config(model.language_model, "model.language_model", hub_options)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(text, "auto_map"):
        raise UserError(
            f"model.language_model={model.language_model} is a {text.model_type!r}, which transformers knows as no language model."
        )
    _require_sizes(text, model.language_model)
    _require_sizes(vision, model.vision_tower)
    families.check_logits_supported(text, model.language_model)
    _drop_unused_layers(vision, -2 if model.vision_feature_layer is None else model.vision_feature_layer)
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False
    projector, model_class = (
        _select_projector(str(model.projector)),
        ModelClass(model.model_class or ModelClass.llava_onevision),
    )
    _require_usable_tiles(model, model_class)
    config = CONFIG_CLASSES[model_class](
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if vision.model_type == "clip_vision_model" else "full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        **_make_tile_values(model, model_class, vision, projector),
        **projector.config_values,
    )
    images = _load_image_settings(model.vision_tower, config, hub_options)
    _require_countable_tokens(images, projector, str(model.vision_tower))
    images = replace(images, pad_to_square=True)  # the tower's folder does not say what LLaVA does
    tokenizer = _load_tokenizer(model.language_model, hub_options)
    parts: dict[str, Any] = {"vision_tower": model.vision_tower, "language_model": model.language_model}
    return ModelSpec(config, tokenizer, images, [], **parts, **hub_options, projector_weights=model.projector_weights)


def _require_countable_tokens(images: ImageSettings, projector: Projector, name: str) -> None:
    """Raise UserError if transformers' processors cannot count the tokens of a tile: a division of whole pixels."""
    if images.tile_size // images.token_px != images.side:
        raise UserError(
            f"model.projector={projector.name} makes {images.side} x {images.side} tokens of a tile, and {name} has tiles of "
            f"{images.tile_size} px: transformers' processors would count {images.tile_size // images.token_px} a side. Choose "
            f"another projector, or a tower whose tiles are a multiple of {images.side} px."
        )


def _make_tile_values(model: ModelConfig, model_class: ModelClass, vision: Any, projector: Projector) -> dict[str, Any]:
    """Make the config's values of tiles and of their tokens.

    Raises:
        UserError: the projector does not fit the tower's grid.
    """
    size = vision.image_size
    try:
        token_side = projector.compute_token_side(size // vision.patch_size)
    except ValueError as error:
        raise UserError(
            f"model.projector={projector.name}: {error} ({model.vision_tower}). Choose another of the two."
        ) from None
    if model_class is ModelClass.llava:
        return {"image_seq_length": token_side**2}
    if model_class is ModelClass.llava_next:
        pinpoints = (
            make_grid_pinpoints(size, model.grid) if model.grid else [(h * size, w * size) for h, w in NEXT_GRIDS]
        )
        return {"image_seq_length": token_side**2, "image_grid_pinpoints": [list(pair) for pair in pinpoints]}
    return {
        "image_grid_pinpoints": [list(pair) for pair in make_grid_pinpoints(size, model.grid or DEFAULT_GRID)],
        "vision_aspect_ratio": f"anyres_max_{model.max_tiles or DEFAULT_MAX_TILES}",
    }


def _select_projector(name: str) -> Projector:
    if name not in PROJECTORS:
        raise UserError(f"model.projector={name}: there is no such projector; there are {', '.join(PROJECTORS)}.")
    return PROJECTORS[name]


def _drop_unused_layers(vision: Any, layer: int | list[int]) -> None:
    """Drop the vision tower's layers behind the one that feeds the projector.

    The last hidden state is then the selected one. Works for SigLIP with 27 layers and layer -2 (Google's) and for 26
    layers and layer -1 (LLaVA-OneVision's): both keep 26.
    """
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer={layer}: features of several layers are not supported; name one layer.")
    total = vision.num_hidden_layers
    num_kept = layer if layer >= 0 else total + 1 + layer
    if not 1 <= num_kept <= total:
        raise UserError(
            f"vision_feature_layer={layer} of a tower with {total} layers; name one from {-total} to -1, or 1 to {total}."
        )
    vision.num_hidden_layers = num_kept


def _load_config(name: str, setting: str, hub_options: dict[str, Any]) -> Any:
    _require_folder(name, setting)
    try:
        if (own := restore_config(read_json(name, "config.json", **hub_options) or {})) is not None:
            return own
        return AutoConfig.from_pretrained(name, **hub_options)
    except Exception as error:  # transformers raises any type of error for a wrong value
        if (adapter := _read_adapter_config(name, hub_options)) is not None:
            raise UserError(format_adapter_error(setting, name, adapter.get("base_model_name_or_path"))) from None
        first = get_first_line(error)
        raise UserError(
            f"{setting}={name}: no model configuration could be read there ({first}). {_format_need(setting, name)}"
        ) from None


def _format_need(setting: str, name: str) -> str:
    """Format which folder and which files a setting needs, and how to get them."""
    if Path(name).is_dir():
        return "Give a folder with a config.json."
    files = {"model.vision_tower": "preprocessor_config.json", "model.language_model": "tokenizer.json"}
    more = files.get(setting, "tokenizer.json and preprocessor_config.json")
    folder = f"models/{name.rpartition('/')[2]}"
    return (
        f"A folder is needed with config.json, {more} and model.safetensors, or its parts with their index: hf download {name} --local-dir "
        f"{folder}, then {setting}={folder}."
    )


def _read_adapter_config(name: str, hub_options: dict[str, Any]) -> dict[str, Any] | None:
    """Read the config of a PEFT adapter; None if the folder or repository holds none, or is not there."""
    try:
        return read_json(name, ADAPTER_FILE, **hub_options)
    except UserError:
        return None


def _read_max_tiles(name: str, config: Any) -> int:
    """Read N of `vision_aspect_ratio: anyres_max_N`. UserError if there is none: transformers' model needs it."""
    ratio = str(config.vision_aspect_ratio)
    number = ratio.removeprefix("anyres_max_")
    if number == ratio or not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"{name}: its config.json has vision_aspect_ratio={ratio!r}; LLaVA-OneVision's class needs anyres_max_N, the"
            " number of tiles above which features are downsampled. Set model.max_tiles=9 (LLaVA-OneVision's N), or correct"
            " the file."
        )
    return int(number)


def _require_sizes(config: Any, name: str) -> None:
    """Raise UserError for a size in the config that is no positive integer."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for key in SIZE_KEYS:
            value = getattr(part, key, None)
            if value is not None and not (type(value) is int and value > 0):
                raise UserError(
                    f"{name}: its config.json has {key}={value!r}, which must be a whole number above 0. Give a folder whose "
                    "config.json belongs to its weights."
                )


def _require_folder(name: str, setting: str) -> None:
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise UserError(
            f"{setting}={name}: no such folder. Give the folder that holds the model's config.json, or a hub id like 'owner/name'."
        )


def _load_tokenizer(name: str, hub_options: dict[str, Any]) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
    except Exception as error:  # tokenizers raises plain exceptions for a damaged file
        first = get_first_line(error)
        raise UserError(
            f"{name}: no tokenizer could be read there ({first}). The folder needs a tokenizer.json."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{name}: its tokenizer is not a fast one (tokenizer.json), which exact supervision masks need."
        )
    return tokenizer


def _load_image_settings(name: str, config: Any, hub_options: dict[str, Any]) -> ImageSettings:
    vision = config.vision_config
    processor_config = read_json(name, "processor_config.json", **hub_options) or {}
    settings = (
        read_json(name, "preprocessor_config.json", **hub_options) or processor_config.get("image_processor") or {}
    )
    siglip = vision.model_type == "siglip_vision_model"
    model_class, side = ModelClass(config.model_type), vision.image_size // vision.patch_size
    token_side = get_projector(config).compute_token_side(side)
    clip_mean, clip_std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ImageSettings(
        tile_size=vision.image_size,
        patch_size=vision.patch_size,
        grid_pinpoints=tuple(tuple(pair) for pair in getattr(config, "image_grid_pinpoints", ())),
        max_tiles=_read_max_tiles(name, config) if model_class is ModelClass.llava_onevision else None,
        mean=_read_channels(name, settings, "image_mean", (0.5,) * 3 if siglip else clip_mean),
        std=_read_channels(name, settings, "image_std", (0.5,) * 3 if siglip else clip_std),
        resample=_read_resample(name, settings),
        select=config.vision_feature_select_strategy,
        model_class=model_class,
        token_side=token_side if token_side != side else None,
        pad_to_square=bool(settings.get("do_pad")) or model_class is not ModelClass.llava,
    )


def _read_channels(
    name: str, settings: dict[str, Any], key: str, default: tuple[float, ...]
) -> tuple[float, float, float]:
    """Read one number for each of the three colours; a single number counts for all three, as in transformers.

    Raises:
        UserError: it is something else, a standard deviation of 0, or no number.
    """
    value = settings.get(key)
    values = default if value is None else [value] * 3 if is_number(value) else value
    is_valid = isinstance(values, list | tuple) and len(values) == 3 and all(map(is_number, values))
    if not is_valid or (key == "image_std" and min(values) <= 0):
        above = " above 0" if key == "image_std" else ""
        raise UserError(
            f"{name}: its image settings have {key}={value!r}; three numbers{above} are needed, for red, green and blue."
            " Correct preprocessor_config.json (or processor_config.json) of that folder."
        )
    red, green, blue = map(float, values)
    return red, green, blue


def _read_resample(name: str, settings: dict[str, Any]) -> int:
    value = settings.get("resample")
    if value is None:
        return 3
    if isinstance(value, bool) or value not in range(6):
        raise UserError(
            f"{name}: its image settings have resample={value!r}; Pillow's filters are 0 to 5, bicubic is 3."
            " Correct preprocessor_config.json (or processor_config.json) of that folder."
        )
    return int(value)


def is_number(value: Any) -> bool:
    """Return True for a finite number of a JSON file."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _resolve_chat_template(choice: str | None, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Resolve the chat template to use: the tokenizer's own, ChatML, or a Jinja file."""
    if choice is None:
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several templates, by name
            template = template.get("default")
        if template is not None and not isinstance(template, str):
            name = tokenizer.name_or_path
            raise UserError(
                f"{name}: its chat template is {type(template).__name__} and no text. Give model.chat_template=..."
            )
        return wrap_chat_template(template)
    if choice == "chatml":
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_added_vocab()]
        if missing:
            raise UserError(
                f"model.chat_template=chatml needs the tokens {', '.join(missing)}; add them to model.special_tokens."
            )
        return wrap_chat_template(CHATML)
    path = Path(choice)
    if not path.is_file():
        raise UserError(f"model.chat_template={choice}: no such file. Give a Jinja file, or 'chatml'.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.chat_template={choice}: cannot be read as text ({get_first_line(error)}). Give a Jinja file, or 'chatml'."
        ) from None
    if not text.strip():
        raise UserError(f"model.chat_template={choice}: is empty. Give a Jinja file, or 'chatml'.")
    return wrap_chat_template(text)
