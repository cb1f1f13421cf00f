"""Activation checkpointing: exact at every level, and `selective` recomputes no matrix product and no attention."""

import pytest
import torch
from support import blueprint_of, sample
from torch.utils._python_dispatch import TorchDispatchMode

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.activation_checkpointing import should_save_result
from lit_vlm.model.tiny import make_language_model, make_vision_tower
from lit_vlm.stages import AlignStage, SFTStage
from lit_vlm.types import UserError

ATEN = torch.ops.aten
LORA = {"parts": {"language_model": {"lora": {"rank": 4, "dropout": 0.2}}}}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module")
def dropout_parts(tmp_path_factory) -> tuple[str, str]:
    """Parts with attention dropout."""
    folder, small = tmp_path_factory.mktemp("dropping"), {"hidden_size": 32, "intermediate_size": 48}
    make_vision_tower(folder / "tower", num_attention_heads=2, attention_dropout=0.1, **small)
    make_language_model(
        folder / "language", num_hidden_layers=2, tie_word_embeddings=False, attention_dropout=0.1, **small
    )
    return str(folder / "tower"), str(folder / "language")


def make_stage(folders, stage_class, level, **options):
    stage = stage_class(blueprint_of(folders), activation_checkpointing=level, **options)
    stage.configure_model()
    return stage


def make_batch(stage):
    blueprint = stage._model_source
    records = [sample("무엇이 보이나요?", "빨간 원", (60, 60)), sample("안녕?", "네, 안녕하세요. " * 4)]
    return collate(Processor(blueprint.tokenizer, blueprint.images), records * 2)


def run_backward(stage, mixed=False):
    """Return the loss, the gradients, and a random number that is sampled after them."""
    batch = make_batch(stage)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = stage.compute_token_losses(batch).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, torch.rand(1)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
@pytest.mark.parametrize(("stage_class", "options"), [(SFTStage, {}), (SFTStage, LORA), (AlignStage, {})])
@pytest.mark.parametrize("kind", ["small_parts", "dropout_parts"])
def test_every_level_gives_the_same_bits_with_dropout_of_every_kind(request, kind, stage_class, options, mixed):
    parts = request.getfixturevalue(kind)
    loss, gradients, random_number = run_backward(make_stage(parts, stage_class, "none", **options), mixed)
    assert gradients
    for level in ("selective", "full"):
        other_loss, others, other_random_number = run_backward(make_stage(parts, stage_class, level, **options), mixed)
        assert torch.equal(other_loss, loss) and torch.equal(other_random_number, random_number)
        assert others.keys() == gradients.keys()
        assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())


class OperationCounter(TorchDispatchMode):
    """Counts how often each operation runs."""

    def __init__(self):
        super().__init__()
        self.times = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.times[name] = self.times.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def count_operations(parts, stage_class, level) -> dict[str, int]:
    stage = make_stage(parts, stage_class, level)
    batch = make_batch(stage)
    with OperationCounter() as mode:
        stage.compute_token_losses(batch).mean().backward()
    return mode.times


@pytest.mark.parametrize("stage_class", [SFTStage, AlignStage])
def test_selective_recomputes_norms_and_no_product_or_attention(small_parts, stage_class):
    plain, selective, full = (
        count_operations(small_parts, stage_class, level) for level in ("none", "selective", "full")
    )
    for name in ("mm", "addmm", ATTENTION):
        assert selective.get(name, 0) == plain.get(name, 0), name
    assert full[ATTENTION] > plain[ATTENTION] and full["mm"] > plain["mm"]
    assert plain["rsqrt"] < selective["rsqrt"] == full["rsqrt"]


def test_attention_with_dropout_is_recomputed():
    """If its result were saved, later random numbers of the layer would be sampled as if attention had used none."""
    heads = torch.zeros(1, 2, 4, 8)
    assert should_save_result(16, ATEN._scaled_dot_product_flash_attention.default, heads, heads, heads, 0.0, True)
    assert not should_save_result(16, ATEN._scaled_dot_product_flash_attention.default, heads, heads, heads, 0.1, True)
    assert not should_save_result(
        16, ATEN._scaled_dot_product_efficient_attention.default, *[heads] * 3, None, True, dropout_p=0.1
    )


def test_the_last_product_of_a_layer_and_the_up_projection_of_an_adapter_are_not_saved():
    def is_product_saved(inner, outer):
        return should_save_result(64, ATEN.mm.default, torch.zeros(5, inner), torch.zeros(inner, outer))

    assert (
        is_product_saved(64, 64) and is_product_saved(64, 16) and is_product_saved(64, 200)
    )  # query, key and gate projections
    assert not is_product_saved(200, 64)  # down projection
    assert is_product_saved(64, 4) and not is_product_saved(4, 200)  # the two matrices of an adapter
    assert should_save_result(64, ATEN.addmm.default, torch.zeros(64), torch.zeros(5, 64), torch.zeros(64, 64))
    assert not should_save_result(64, ATEN.mul.Tensor, torch.zeros(5, 64), torch.zeros(5, 64))


def test_an_unknown_level_is_refused(small_parts):
    with pytest.raises(
        UserError,
        match=r"stage.activation_checkpointing: Invalid value 'some', expected one of \[auto, none, selective, full\]",
    ):
        SFTStage(blueprint_of(small_parts), activation_checkpointing="some")
    assert SFTStage(blueprint_of(small_parts), activation_checkpointing=True).level.value == "full"
    assert SFTStage(blueprint_of(small_parts), activation_checkpointing=False).level.value == "none"
