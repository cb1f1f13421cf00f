"""Classes of transformers that a model trains and is exported as: LLaVA 1.x, LLaVA-NeXT, LLaVA-OneVision."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from lit_vlm.anyres import ModelClass
from lit_vlm.model import projector_modules
from lit_vlm.model.projectors import get_projector

VisionLanguageConfig: TypeAlias = LlavaConfig | LlavaNextConfig | LlavaOnevisionConfig
VisionLanguageModel: TypeAlias = (
    LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
)

CONFIG_CLASSES: dict[ModelClass, type[Any]] = {
    ModelClass.llava: LlavaConfig,
    ModelClass.llava_next: LlavaNextConfig,
    ModelClass.llava_onevision: LlavaOnevisionConfig,
}
MODEL_CLASSES: dict[ModelClass, type[Any]] = {
    ModelClass.llava: LlavaForConditionalGeneration,
    ModelClass.llava_next: LlavaNextForConditionalGeneration,
    ModelClass.llava_onevision: LlavaOnevisionForConditionalGeneration,
}
# Of models that are exported with `projector_modules.py`: their config classes there.
CODE_CONFIG_CLASSES: dict[ModelClass, type[Any]] = {
    ModelClass.llava: projector_modules.ProjectorLlavaConfig,
    ModelClass.llava_next: projector_modules.ProjectorLlavaNextConfig,
    ModelClass.llava_onevision: projector_modules.ProjectorLlavaOnevisionConfig,
}
CODE_MODEL_CLASSES: dict[ModelClass, type[Any]] = {
    ModelClass.llava: projector_modules.ProjectorLlavaForConditionalGeneration,
    ModelClass.llava_next: projector_modules.ProjectorLlavaNextForConditionalGeneration,
    ModelClass.llava_onevision: projector_modules.ProjectorLlavaOnevisionForConditionalGeneration,
}


def get_model_class(config: VisionLanguageConfig) -> type[Any]:
    """Return transformers' class of a config, or a subclass of it with the projector that the config names."""
    model_class = ModelClass(config.model_type)
    projector = get_projector(config)
    return MODEL_CLASSES[model_class] if projector.is_in_transformers else _make_class(model_class)


@lru_cache
def _make_class(model_class: ModelClass) -> type[Any]:
    """Make a subclass of transformers' class whose projector is the registry's."""
    base = MODEL_CLASSES[model_class]

    def init(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self.model.multi_modal_projector = get_projector(config).build(config)

    return type(base.__name__, (base,), {"__init__": init, "__module__": __name__})


def restore_config(values: dict[str, Any]) -> VisionLanguageConfig | None:
    """Restore the config in memory from the content of a `config.json` that was exported with code; None: it was not."""
    for model_class, code_class in CODE_CONFIG_CLASSES.items():
        if values.get("model_type") == code_class.model_type:
            own = {key: value for key, value in values.items() if key not in ("auto_map", "architectures")}
            return CONFIG_CLASSES[model_class].from_dict(own | {"model_type": model_class.value})
    return None


def make_code_values(config: VisionLanguageConfig, code_file: str) -> dict[str, Any]:
    """Make the values of `config.json` with which transformers loads the class from the exported code."""
    model_class = ModelClass(config.model_type)
    config_name, model_name = CODE_CONFIG_CLASSES[model_class].__name__, CODE_MODEL_CLASSES[model_class].__name__
    module = code_file.removesuffix(".py")
    return {
        "model_type": CODE_CONFIG_CLASSES[model_class].model_type,
        "architectures": [model_name],
        "auto_map": {"AutoConfig": f"{module}.{config_name}", "AutoModelForImageTextToText": f"{module}.{model_name}"},
    }
