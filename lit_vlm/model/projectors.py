"""Registry of projectors, the networks between vision tower and language model: one class here is one projector.

To add a projector, write a class that derives from `Projector` and add an instance to `PROJECTORS`. Settings, help, build,
initial weights, cost model and export read this registry. A projector maps each patch to one token: the number of tokens
of an image does not depend on it.

The module imports torch inside functions only, so that the configuration can read the names without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Shapes: N tiles, P patches of a tile, C width of the vision tower, D width of the language model.

PROJECTOR_KEY = "projector"  # in a model's config: name of a projector that transformers' config has no field for


class Projector:
    """A projector: how it is built and initialised, and its cost.

    Attributes:
        name: value of `model.projector`.
        description: help text of that value.
        is_exportable: True if the classes of plain transformers hold this projector. Other projectors train, but their
            models cannot be exported.
    """

    name: str
    description: str
    is_exportable = False

    @property
    def config_values(self) -> dict[str, Any]:
        """Values of the model's config that select this projector."""
        return {PROJECTOR_KEY: self.name}

    def build(self, config: Any) -> nn.Module:
        """Build the module, which maps [N, P, C] to [N, P, D]. Its weights are parameters, not buffers.

        Args:
            config: of the whole model; C is `config.vision_config.hidden_size`, D `config.text_config.hidden_size`.
        """
        raise NotImplementedError

    def init_weights(self, module: nn.Module) -> None:
        """Initialise the weights in place, from torch's global random generator: by default each layer as torch does."""
        for layer in module.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()

    def list_fixed_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """List the parameters that never train."""
        return []

    def count_parameters(self, vision_width: int, text_width: int) -> int:
        """Count the weights in the matrices, for a tower of width C and a language model of width D."""
        raise NotImplementedError

    def count_flops(self, vision_width: int, text_width: int) -> int:
        """Count the FLOPs of one patch in the forward pass: by default each weight multiplies it once."""
        return 2 * self.count_parameters(vision_width, text_width)

    def count_activations(self, vision_width: int, text_width: int) -> int:
        """Count the values of one patch that are kept for the backward pass."""
        raise NotImplementedError


class MLPProjector(Projector):
    """Linear, GELU, Linear: the projector of LLaVA-1.5, LLaVA-OneVision and VARCO-VISION."""

    name = "mlp2x_gelu"
    description = "LLaVA-1.5, LLaVA-OneVision, VARCO-VISION: Linear, GELU, Linear"
    is_exportable = True
    hidden_act = "gelu"

    @property
    def config_values(self) -> dict[str, Any]:
        return {"projector_hidden_act": self.hidden_act}

    def build(self, config: Any) -> nn.Module:
        from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

        return LlavaOnevisionMultiModalProjector(config)

    def count_parameters(self, vision_width: int, text_width: int) -> int:
        return vision_width * text_width + text_width**2

    def count_activations(self, vision_width: int, text_width: int) -> int:
        return vision_width + 2 * text_width  # inputs of the two matrices and of the activation function


class LinearProjector(MLPProjector):
    """One linear layer, as in LLaVA.

    transformers' class has two layers, so the second one is the identity and stays frozen. It is computed, and counts.
    """

    name = "linear"
    description = "LLaVA: one linear layer"
    hidden_act = "linear"

    def init_weights(self, module: Any) -> None:
        from torch import nn

        super().init_weights(module)
        nn.init.eye_(module.linear_2.weight)
        nn.init.zeros_(module.linear_2.bias)

    def list_fixed_parameters(self, module: Any) -> list[nn.Parameter]:
        return list(module.linear_2.parameters())


PROJECTORS: dict[str, Projector] = {projector.name: projector for projector in (MLPProjector(), LinearProjector())}


def get_projector(config: Any) -> Projector:
    """Get the projector of a model from its config, an object of transformers or the content of a `config.json`.

    A model with another activation function than the registered ones, from a folder of plain transformers, has an MLP.
    """
    values = config if isinstance(config, Mapping) else vars(config)
    if values.get(PROJECTOR_KEY) is not None:
        return PROJECTORS[values[PROJECTOR_KEY]]
    for projector in PROJECTORS.values():
        if all(values.get(key) == value for key, value in projector.config_values.items()):
            return projector
    return PROJECTORS[MLPProjector.name]


def list_exportable_projectors() -> str:
    """List the names of the projectors that plain transformers loads, for messages."""
    return ", ".join(name for name, projector in PROJECTORS.items() if projector.is_exportable)
