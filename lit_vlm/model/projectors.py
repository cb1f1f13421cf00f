"""Registry of projectors, the networks between vision tower and language model: one class here is one projector.

To add a projector, write a class that derives from `Projector` and add an instance to `PROJECTORS`. Settings, help, build,
initial weights, number of tokens, cost model and export read this registry.

The module imports torch inside functions only, so that the configuration can read the names without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Shapes: N tiles, P = S * S patches of a tile, Q = T * T tokens of a tile, C width of the vision tower, D width of the
# language model.

PROJECTOR_KEY = "projector"  # in a model's config: name of a projector that transformers' config has no field for


class Projector:
    """A projector: how it is built and initialised, and its cost.

    Attributes:
        name: value of `model.projector`.
        description: help text of that value.
        is_in_transformers: True if the classes of plain transformers hold this projector.
        code_file: file beside this one that is exported with the model, so that transformers loads it with
            `trust_remote_code`; None: there is none. A projector with neither trains, but its model cannot be exported.
        original_names: names of its layers in `mm_projector.bin` of LLaVA's repository and of those built on it; empty: none.
    """

    name: str
    description: str
    is_in_transformers = False
    code_file: str | None = None
    original_names: Mapping[str, str] = {}

    @property
    def is_exportable(self) -> bool:
        """True if a model with this projector can be exported."""
        return self.is_in_transformers or self.code_file is not None

    @property
    def config_values(self) -> dict[str, Any]:
        """Values of the model's config that select this projector."""
        return {PROJECTOR_KEY: self.name}

    def build(self, config: Any) -> nn.Module:
        """Build the module, which maps [N, P, C] to [N, Q, D]. Its weights are parameters, not buffers.

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

    def compute_token_side(self, patch_side: int) -> int:
        """Compute the tokens along one side of a tile, T, from its patches along one side, S: by default as many.

        This is the one place that says how many tokens a projector makes. Index, cost, forward pass and export read it.

        Raises:
            ValueError: the projector does not fit this grid.
        """
        return patch_side

    def count_parameters(self, vision_width: int, text_width: int) -> int:
        """Count the weights in matrices and convolutions, for a tower of width C and a language model of width D."""
        raise NotImplementedError

    def count_flops(self, vision_width: int, text_width: int, patch_side: int) -> int:
        """Count the FLOPs of one tile of S * S patches in the forward pass: by default each weight multiplies each patch."""
        return 2 * self.count_parameters(vision_width, text_width) * patch_side**2

    def count_activations(self, vision_width: int, text_width: int, patch_side: int) -> int:
        """Count the values of one tile of S * S patches that are kept for the backward pass."""
        raise NotImplementedError


class MLPProjector(Projector):
    """Linear, GELU, Linear: the projector of LLaVA-1.5, LLaVA-OneVision and VARCO-VISION."""

    name = "mlp2x_gelu"
    description = "LLaVA-1.5, LLaVA-OneVision, VARCO-VISION: Linear, GELU, Linear"
    is_in_transformers = True
    hidden_act = "gelu"
    original_names: Mapping[str, str] = {"linear_1": "0", "linear_2": "2"}

    @property
    def config_values(self) -> dict[str, Any]:
        return {"projector_hidden_act": self.hidden_act}

    def build(self, config: Any) -> nn.Module:
        from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

        return LlavaOnevisionMultiModalProjector(config)

    def count_parameters(self, vision_width: int, text_width: int) -> int:
        return vision_width * text_width + text_width**2

    def count_activations(self, vision_width: int, text_width: int, patch_side: int) -> int:
        # inputs of the two matrices and of the activation function
        return patch_side**2 * (vision_width + 2 * text_width)


class LinearProjector(MLPProjector):
    """One linear layer, as in LLaVA.

    transformers' class has two layers, so the second one is the identity and stays frozen. It is computed, and counts.
    """

    name = "linear"
    description = "LLaVA: one linear layer"
    hidden_act = "linear"
    original_names: Mapping[str, str] = {"linear_1": ""}

    def init_weights(self, module: Any) -> None:
        from torch import nn

        super().init_weights(module)
        nn.init.eye_(module.linear_2.weight)
        nn.init.zeros_(module.linear_2.bias)

    def list_fixed_parameters(self, module: Any) -> list[nn.Parameter]:
        return list(module.linear_2.parameters())

    def count_activations(self, vision_width: int, text_width: int, patch_side: int) -> int:
        return patch_side**2 * (vision_width + text_width)  # no activation function


class ResamplingProjector(Projector):
    """A projector of `projector_modules.py`, which makes a fixed number of tokens of a tile: T x T."""

    code_file = "projector_modules.py"
    token_side: int

    @property
    def config_values(self) -> dict[str, Any]:
        return {PROJECTOR_KEY: self.name, "projector_token_side": self.token_side}

    def build(self, config: Any) -> nn.Module:
        from lit_vlm.model.projector_modules import build_projector

        return build_projector(config)

    def compute_token_side(self, patch_side: int) -> int:
        return self.token_side


class PoolingProjector(ResamplingProjector):
    """A projector that averages the patches of a tile to a smaller grid of tokens, 12 x 12 from any larger one."""

    token_side = 12

    def compute_token_side(self, patch_side: int) -> int:
        if patch_side < self.token_side:
            raise ValueError(
                f"the projector {self.name} pools a tile to {self.token_side} x {self.token_side} tokens, and the tower"
                f" makes only {patch_side} x {patch_side} patches of it"
            )
        return self.token_side


class LDPNetV2Projector(PoolingProjector):
    """MobileVLM V2's projector (arXiv 2402.03766), also of AIKU's small Korean model: 576 patches become 144 tokens."""

    name = "ldpnetv2"
    description = "MobileVLM V2: Linear, GELU, Linear, pooling to 12 x 12 tokens, depthwise residual convolution"

    def count_parameters(self, vision_width: int, text_width: int) -> int:
        return vision_width * text_width + text_width**2 + 9 * text_width

    def count_flops(self, vision_width: int, text_width: int, patch_side: int) -> int:
        matrices = 2 * (vision_width * text_width + text_width**2) * patch_side**2
        return matrices + 2 * 9 * text_width * self.token_side**2

    def count_activations(self, vision_width: int, text_width: int, patch_side: int) -> int:
        # inputs of the two matrices, of the activation function, of the pooling and of the convolution
        return patch_side**2 * (vision_width + 3 * text_width) + self.token_side**2 * text_width


class CAbstractorProjector(PoolingProjector):
    """Honeybee's C-Abstractor (arXiv 2312.06742) with 144 tokens. Its hidden width is the tower's, as with CLIP-L there."""

    name = "c_abstractor"
    description = "Honeybee: 3 RegNet blocks, pooling to 12 x 12 tokens, 3 RegNet blocks, Linear, SiLU, Linear"
    depth = 3

    @property
    def config_values(self) -> dict[str, Any]:
        return super().config_values | {"projector_depth": self.depth}

    def init_weights(self, module: Any) -> None:
        from torch import nn

        super().init_weights(module)
        nn.init.trunc_normal_(module.positions.weight, std=0.02)  # Honeybee's

    def count_parameters(self, vision_width: int, text_width: int) -> int:
        gate = 2 * vision_width * round(vision_width / 4)
        blocks = 2 * self.depth * (2 * vision_width**2 + 9 * vision_width + gate)
        return blocks + vision_width * text_width + text_width**2

    def count_flops(self, vision_width: int, text_width: int, patch_side: int) -> int:
        position = 2 * vision_width**2 + 9 * vision_width  # of a block
        gates = 2 * self.depth * 2 * vision_width * round(vision_width / 4)  # once for each tile
        blocks = self.depth * position * (patch_side**2 + self.token_side**2)
        return 2 * (blocks + gates + self.token_side**2 * (vision_width * text_width + text_width**2))

    def count_activations(self, vision_width: int, text_width: int, patch_side: int) -> int:
        # a block keeps the inputs of three norms, three activation functions, three convolutions and the gate
        blocks = self.depth * 10 * vision_width * (patch_side**2 + self.token_side**2)
        pooling, matrices = patch_side**2 * vision_width, self.token_side**2 * (vision_width + 2 * text_width)
        return blocks + pooling + matrices


class QFormerProjector(ResamplingProjector):
    """BLIP-2's Q-Former (arXiv 2301.12597) as a projector, with random initial weights.

    Three layers, each with cross-attention, as the Q-Former of LLaVA-NeXT's repository (`mm_qformer_depth`). That one has
    32 queries; transformers' classes arrange the tokens of a tile in a square, so there are 8 x 8 here.
    """

    name = "qformer"
    description = (
        "BLIP-2: 64 learned queries, 3 layers of self-attention, cross-attention to the patches and MLP, Linear"
    )
    token_side = 8
    width, depth, num_heads = 768, 3, 12

    @property
    def config_values(self) -> dict[str, Any]:
        sizes = {"projector_width": self.width, "projector_depth": self.depth, "projector_heads": self.num_heads}
        return super().config_values | sizes

    def init_weights(self, module: Any) -> None:
        from torch import nn

        super().init_weights(module)
        nn.init.normal_(module.queries, std=0.02)  # BLIP-2's, as for its matrices
        for layer in module.encoder.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def count_parameters(self, vision_width: int, text_width: int) -> int:
        of_queries, of_patches = self._count_layer_parameters(vision_width)
        return self.depth * (of_queries + of_patches) + self.width * text_width

    def _count_layer_parameters(self, vision_width: int) -> tuple[int, int]:
        """Count the weights of a layer that multiply queries, and those that multiply patches."""
        # self-attention 4 W^2, cross-attention 2 W^2 for queries and output, MLP 2 * W * 4 W; keys and values 2 C W
        return 14 * self.width**2, 2 * vision_width * self.width

    def count_flops(self, vision_width: int, text_width: int, patch_side: int) -> int:
        queries, patches = self.token_side**2, patch_side**2
        of_queries, of_patches = self._count_layer_parameters(vision_width)
        attention = 2 * queries * (queries + patches) * self.width
        layer = queries * of_queries + patches * of_patches + attention
        return 2 * (self.depth * layer + queries * self.width * text_width)

    def count_activations(self, vision_width: int, text_width: int, patch_side: int) -> int:
        # of a query, a layer keeps three inputs of norms and three outputs, queries, keys, values and output of self-attention,
        # queries and output of cross-attention, and both sides of the activation function; of a patch keys and values
        layer = self.token_side**2 * 20 * self.width + patch_side**2 * 2 * self.width
        return patch_side**2 * vision_width + self.depth * layer + self.token_side**2 * self.width


PROJECTORS: dict[str, Projector] = {
    projector.name: projector
    for projector in (
        MLPProjector(),
        LinearProjector(),
        LDPNetV2Projector(),
        CAbstractorProjector(),
        QFormerProjector(),
    )
}


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
    """List the names of the projectors whose models can be exported, for messages."""
    return ", ".join(name for name, projector in PROJECTORS.items() if projector.is_exportable)
