"""Activation checkpointing: exact at every level, and `selective` computes no product and no attention again."""

import pytest
import torch
from support import blueprint_of, sample
from torch.utils._python_dispatch import TorchDispatchMode

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.checkpointing import should_save_result
from lit_vlm.model.tiny import make_language_model, make_vision_tower
from lit_vlm.stages import AlignStage, SFTStage
from lit_vlm.types import UserError

ATEN = torch.ops.aten
LORA = {"parts": {"language_model": {"lora": {"rank": 4, "dropout": 0.2}}}}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module")
def dropping(tmp_path_factory) -> tuple[str, str]:
    """Parts whose attention drops weights."""
    folder, small = tmp_path_factory.mktemp("dropping"), {"hidden_size": 32, "intermediate_size": 48}
    make_vision_tower(folder / "tower", num_attention_heads=2, attention_dropout=0.1, **small)
    make_language_model(
        folder / "language", num_hidden_layers=2, tie_word_embeddings=False, attention_dropout=0.1, **small
    )
    return str(folder / "tower"), str(folder / "language")


def make(folders, stage_class, level, **options):
    stage = stage_class(blueprint_of(folders), activation_checkpointing=level, **options)
    stage.configure_model()
    return stage


def batch_for(stage):
    blueprint = stage._model_source
    records = [sample("무엇이 보이나요?", "빨간 원", (60, 60)), sample("안녕?", "네, 안녕하세요. " * 4)]
    return collate(Processor(blueprint.tokenizer, blueprint.images), records * 2)


def backward(stage, mixed=False):
    """Loss, gradients, and a number drawn behind them."""
    batch = batch_for(stage)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = stage.compute_token_losses(batch).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, torch.rand(1)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
@pytest.mark.parametrize(("stage_class", "options"), [(SFTStage, {}), (SFTStage, LORA), (AlignStage, {})])
@pytest.mark.parametrize("kind", ["small_parts", "dropping"])
def test_every_level_gives_the_same_bits_with_all_draws_of_dropout(request, kind, stage_class, options, mixed):
    parts = request.getfixturevalue(kind)
    loss, gradients, drawn = backward(make(parts, stage_class, "none", **options), mixed)
    assert gradients
    for level in ("selective", "full"):
        other_loss, others, other_drawn = backward(make(parts, stage_class, level, **options), mixed)
        assert torch.equal(other_loss, loss) and torch.equal(other_drawn, drawn)
        assert others.keys() == gradients.keys()
        assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.times = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.times[name] = self.times.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def counted(parts, stage_class, level) -> dict[str, int]:
    stage = make(parts, stage_class, level)
    batch = batch_for(stage)
    with Counted() as mode:
        stage.compute_token_losses(batch).mean().backward()
    return mode.times


@pytest.mark.parametrize("stage_class", [SFTStage, AlignStage])
def test_selective_computes_norms_again_and_no_product_or_attention(small_parts, stage_class):
    plain, selective, full = (counted(small_parts, stage_class, level) for level in ("none", "selective", "full"))
    for name in ("mm", "addmm", ATTENTION):
        assert selective.get(name, 0) == plain.get(name, 0), name
    assert full[ATTENTION] > plain[ATTENTION] and full["mm"] > plain["mm"]
    assert plain["rsqrt"] < selective["rsqrt"] == full["rsqrt"]


def test_attention_that_draws_is_computed_again():
    """Were its result kept, what is drawn behind it in the layer would be drawn as if it had not drawn."""
    heads = torch.zeros(1, 2, 4, 8)
    assert should_save_result(16, ATEN._scaled_dot_product_flash_attention.default, heads, heads, heads, 0.0, True)
    assert not should_save_result(16, ATEN._scaled_dot_product_flash_attention.default, heads, heads, heads, 0.1, True)
    assert not should_save_result(
        16, ATEN._scaled_dot_product_efficient_attention.default, *[heads] * 3, None, True, dropout_p=0.1
    )


def test_the_last_product_of_a_layer_and_what_widens_an_adapter_are_not_kept():
    def product(inner, outer):
        return should_save_result(64, ATEN.mm.default, torch.zeros(5, inner), torch.zeros(inner, outer))

    assert product(64, 64) and product(64, 16) and product(64, 200)  # queries, keys, gate
    assert not product(200, 64)  # down
    assert product(64, 4) and not product(4, 200)  # an adapter's two
    assert should_save_result(64, ATEN.addmm.default, torch.zeros(64), torch.zeros(5, 64), torch.zeros(64, 64))
    assert not should_save_result(64, ATEN.mul.Tensor, torch.zeros(5, 64), torch.zeros(5, 64))


def test_a_level_that_there_is_not_is_refused(small_parts):
    with pytest.raises(UserError, match="activation_checkpointing=some: it is none, selective or full"):
        SFTStage(blueprint_of(small_parts), activation_checkpointing="some")
    assert SFTStage(blueprint_of(small_parts), activation_checkpointing=True).level.value == "full"
    assert SFTStage(blueprint_of(small_parts), activation_checkpointing=False).level.value == "none"
