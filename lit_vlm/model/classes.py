"""Classes of transformers that a model trains and is exported as: LLaVA 1.x, LLaVA-NeXT, LLaVA-OneVision.

Configs are imported here, models only where one is built: who plans a run waits for no model class.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

from lit_vlm.anyres import ModelClass
from lit_vlm.imports import pause_collector
from lit_vlm.model.projectors import get_projector

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextForConditionalGeneration,
        LlavaOnevisionForConditionalGeneration,
    )

    VisionLanguageModel: TypeAlias = (
        LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
    )

VisionLanguageConfig: TypeAlias = LlavaConfig | LlavaNextConfig | LlavaOnevisionConfig

CONFIG_CLASSES: dict[ModelClass, type[Any]] = {
    ModelClass.llava: LlavaConfig,
    ModelClass.llava_next: LlavaNextConfig,
    ModelClass.llava_onevision: LlavaOnevisionConfig,
}
# Names of transformers' models, and of the classes of `projector_modules.py` with which a model is exported
MODEL_NAMES: dict[ModelClass, str] = {
    ModelClass.llava: "LlavaForConditionalGeneration",
    ModelClass.llava_next: "LlavaNextForConditionalGeneration",
    ModelClass.llava_onevision: "LlavaOnevisionForConditionalGeneration",
}
CODE_PREFIX, CODE_TYPE_PREFIX = "Projector", "lit_vlm_"


def get_transformers_class(model_class: ModelClass) -> type[Any]:
    """Return transformers' class of models."""
    import transformers

    with pause_collector():  # transformers imports a class at its first use
        return getattr(transformers, MODEL_NAMES[model_class])


def get_model_class(config: VisionLanguageConfig) -> type[Any]:
    """Return transformers' class of a config, or a subclass of it with the projector that the config names."""
    model_class = ModelClass(config.model_type)
    is_plain = get_projector(config).is_in_transformers
    return get_transformers_class(model_class) if is_plain else _make_class(model_class)


@lru_cache
def _make_class(model_class: ModelClass) -> type[Any]:
    """Make a subclass of transformers' class whose projector is the registry's."""
    base = get_transformers_class(model_class)

    def init(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self.model.multi_modal_projector = get_projector(config).build(config)

    return type(base.__name__, (base,), {"__init__": init, "__module__": __name__})


def restore_config(values: dict[str, Any]) -> VisionLanguageConfig | None:
    """Restore the config in memory from the content of a `config.json` that was exported with code; None: it was not."""
    for model_class in ModelClass:
        if values.get("model_type") == CODE_TYPE_PREFIX + model_class.value:
            own = {key: value for key, value in values.items() if key not in ("auto_map", "architectures")}
            return CONFIG_CLASSES[model_class].from_dict(own | {"model_type": model_class.value})
    return None


def make_code_values(config: VisionLanguageConfig, code_file: str) -> dict[str, Any]:
    """Make the values of `config.json` with which transformers loads the class from the exported code."""
    model_class, module = ModelClass(config.model_type), code_file.removesuffix(".py")
    config_name = CODE_PREFIX + CONFIG_CLASSES[model_class].__name__
    model_name = CODE_PREFIX + MODEL_NAMES[model_class]
    return {
        "model_type": CODE_TYPE_PREFIX + model_class.value,
        "architectures": [model_name],
        "auto_map": {"AutoConfig": f"{module}.{config_name}", "AutoModelForImageTextToText": f"{module}.{model_name}"},
    }
