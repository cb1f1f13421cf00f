"""The packed forward pass against transformers' own, and against itself with one sample at a time."""

import random

import pytest
import torch
from float64 import restore_pixels
from support import blueprint_of, picture, sample

from lit_vlm.anyres import ImageSettings, Tiling, make_grid_pinpoints
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.data.tiling import split_into_tiles
from lit_vlm.model import packed_attention, plain_processor
from lit_vlm.model.build import build_model
from lit_vlm.model.packed_attention import Segments
from lit_vlm.stages import SFTStage
from lit_vlm.types import Batch


def make_plain_processor(processor: Processor):
    return plain_processor.make_plain_processor(processor.tokenizer, processor.images)


def collate_one(processor: Processor, record) -> Batch:
    return collate(processor, [record], step_supervised_tokens=1)


def get_gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.usefixtures("in_float64")
def test_our_forward_equals_transformers_own_forward(model, processor, mixed):
    plain = make_plain_processor(processor)
    for record in mixed:
        batch = collate_one(processor, record)
        ours = model.lm_head(model.model(batch=batch))
        messages = [
            {
                "role": message.role.value,
                "content": [
                    {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"}
                    for piece in message.content
                ],
            }
            for message in record.messages
        ]
        text = plain.apply_chat_template(messages, tokenize=False)
        images = [image.load() for image in record.images]
        inputs = plain(text=text, images=[images] if images else None, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == batch.input_ids.tolist()
        if images:
            inputs["pixel_values"] = restore_pixels(inputs["pixel_values"])
        theirs = model(**inputs, use_cache=False).logits[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("in_float64")
def test_a_packed_batch_gives_the_loss_and_gradients_of_its_samples_one_by_one(model, processor, mixed):
    stage = SFTStage(model)
    stage.configure_model()
    packed = collate(processor, mixed)
    losses = stage.compute_token_losses(packed)
    (losses.sum() / len(losses)).backward()
    together, loss = get_gradients(model), float(losses.sum() / len(losses))
    model.zero_grad()
    count = sum(collate_one(processor, record).num_supervised_tokens for record in mixed)
    alone = sum(stage.compute_token_losses(collate_one(processor, record)).sum() / count for record in mixed)
    alone.backward()
    assert loss == pytest.approx(float(alone), rel=1e-5)
    assert torch.cosine_similarity(together, get_gradients(model), dim=0) > 0.9999
    torch.testing.assert_close(together, get_gradients(model), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("in_float64")
def test_no_token_sees_another_segment(model, processor, mixed):
    with torch.no_grad():
        before = model.model(batch=collate(processor, mixed))
        changed = [sample("전혀 다른 질문", "another answer of another length", (90, 120), seed=77), *mixed[1:]]
        batch = collate(processor, changed)
        after = model.model(batch=batch)
    first = collate(processor, mixed).segment_lengths[0]
    torch.testing.assert_close(before[first:], after[batch.segment_lengths[0] :], atol=2e-6, rtol=0)


def test_attention_under_autocast_computes_in_the_autocast_type():
    """Rotary embeddings leave queries and keys in float32, which the variable-length kernel does not support."""
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    segments = Segments([2, 4], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention.flat_attention_forward(
            torch.nn.Module(), query, key, value.bfloat16(), None, segments=segments
        )
    assert out.dtype == torch.bfloat16
    exact, _ = packed_attention.flat_attention_forward(torch.nn.Module(), query, key, value, None, segments=segments)
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)


@pytest.mark.usefixtures("in_float64")
def test_the_head_on_supervised_rows_equals_the_whole_head(model, processor, mixed):
    batch = collate(processor, mixed)
    (ours,) = model(batch=batch)
    ours, rows = -ours.sum(), batch.loss_positions
    logits = model.lm_head(model.model(batch=batch)).float()
    whole = torch.nn.functional.cross_entropy(logits[:-1], batch.labels[1:], ignore_index=-100, reduction="sum")
    assert float(ours) == pytest.approx(float(whole), rel=1e-6)
    assert len(rows) == batch.num_supervised_tokens < batch.num_tokens


def test_the_number_of_placeholders_equals_the_number_of_features_for_a_thousand_image_sizes(model, processor):
    plain, rng = make_plain_processor(processor), random.Random(0)
    for _ in range(1000):
        size = (rng.randint(1, 400), rng.randint(1, 400))
        layout = processor.images.compute_layout(*size)
        features = torch.zeros(layout.num_tiles, processor.images.side**2, 32)
        arranged = model.model._merge_tiles(features[None], layout)
        assert arranged.shape[1] == layout.num_tokens
        assert plain._get_number_of_features(*size, 56, 56) == layout.num_tokens


@pytest.mark.parametrize("grid, max_tiles", [(6, 9), (6, 4), (8, 16)])
def test_token_counts_at_384_pixels_are_transformers_own(processor, grid, max_tiles):
    settings = ImageSettings(384, 14, make_grid_pinpoints(384, grid), max_tiles, (0.5,) * 3, (0.5,) * 3)
    plain, rng = make_plain_processor(processor), random.Random(1)
    plain.num_image_tokens, plain.vision_aspect_ratio = 729, f"anyres_max_{max_tiles}"
    plain.image_processor.image_grid_pinpoints = [list(pair) for pair in settings.grid_pinpoints]
    for _ in range(300):
        size = (rng.randint(1, 4000), rng.randint(1, 4000))
        assert plain._get_number_of_features(*size, 384, 384) == settings.compute_layout(*size).num_tokens, size
    if (grid, max_tiles) == (6, 9):  # the table of published token counts for LLaVA-OneVision's grid
        counts = {(384, 384): 1485, (480, 640): 2929, (1080, 1920): 7269, (3508, 2480): 7353, (1248, 1024): 8765}
        assert {size: settings.compute_layout(*size).num_tokens for size in counts} == counts


@pytest.mark.parametrize("size", [(56, 56), (57, 113), (200, 31), (300, 400), (10, 500), (112, 168), (1, 90)])
@pytest.mark.parametrize("alone", [True, False])
def test_tiles_equal_those_of_transformers(processor, size, alone):
    image = picture(*size).load()
    images = [[image]] if alone else [[image, image]]
    theirs = make_plain_processor(processor).image_processor(images, return_tensors="pt")["pixel_values"][0]
    ours = torch.from_numpy(split_into_tiles(image, processor.images, single_image=alone)).float() / 255
    torch.testing.assert_close((ours - 0.5) / 0.5, theirs[: len(ours)].float(), atol=1e-6, rtol=0)


def test_rotary_frequencies_stay_exact_in_bfloat16(small_parts):
    """The same holds for transformers' own `from_pretrained(dtype=)`."""
    model = build_model(blueprint_of(small_parts))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    torch.nn.ModuleList([model]).to(torch.bfloat16)
    assert before and {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], buffer) for name, buffer in before.items())


def test_a_batch_without_images_runs_the_tower_once_on_a_dummy_tile(model, processor, mixed):
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    for records in (mixed[:1], mixed, []):
        calls.clear()
        batch = collate(processor, records)
        stage_loss = model(batch=batch)[0].sum()
        assert len(calls) == 1
        assert torch.isfinite(stage_loss)
    hook.remove()


def test_base_tiling_is_the_base_view_and_one_newline(small_parts):
    blueprint = blueprint_of(small_parts, Tiling.base)
    processor, model = Processor(blueprint.tokenizer, blueprint.images), build_model(blueprint)
    batch = collate_one(processor, sample("무엇?", "원", (300, 100)))
    assert batch.num_tiles == 1
    assert int((batch.input_ids == processor.image_token_id).sum()) == 17
    assert torch.isfinite(model.model(batch=batch)).all()
