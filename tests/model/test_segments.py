"""Segments that continue a prefix, the pruned last layer, and the arguments of variable-length kernels."""

import copy

import pytest
import torch
from support import blueprint_of, picture
from torch.nn.attention import varlen

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model import packed_attention, packed_forward
from lit_vlm.model.build import build_model
from lit_vlm.model.packed_attention import Segments
from lit_vlm.model.packed_forward import PrunedLastLayer
from lit_vlm.stages import DPOStage
from lit_vlm.stages.preference_metrics import PreferenceMetrics
from lit_vlm.types import ImagePlaceholder, Language, Message, PreferencePair, Role, SampleKind

CPU = torch.device("cpu")
LENGTHS, PREFIXES = [7, 4, 3, 5, 6, 2], [-1, -1, 0, 1, 0, 1]
TAILS = [0, 0, 2, 5, 1, 1]


def make_qkv(num_queries: int, width: int = 8, heads: int = 4, kv_heads: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    shapes = (heads, num_queries), (kv_heads, total), (kv_heads, total)
    kind = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(1, *shape, width, **kind).requires_grad_() for shape in shapes]


def attend_by_hand(query, key, value, segments: Segments, window=None):
    """Compute attention for one query at a time, over exactly the tokens that it sees."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    repeats = query.shape[1] // key.shape[1]
    results = []
    for number, position in enumerate(segments.query_positions.tolist()):
        segment = next(i for i in range(len(LENGTHS)) if starts[i] <= position < starts[i + 1])
        seen = list(range(starts[segment], position + 1))
        if PREFIXES[segment] >= 0:
            prefix = PREFIXES[segment]
            seen = [*range(starts[prefix], starts[prefix + 1]), *seen]
        seen = seen[-window:] if window else seen
        k, v = (tensor[0, :, seen].repeat_interleave(repeats, dim=0) for tensor in (key, value))
        weights = (query[0, :, number, None] @ k.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        results.append((weights @ v)[:, 0])
    return torch.stack(results)[None]


def run_kernel_on_cpu(
    q, k, v, cu_q, cu_k, max_q_length, max_k_length, *, scale=None, window_size=(-1, -1), enable_gqa=False, **_
):
    """Compute what `varlen_attn` computes, bottom-right causal, span by span, because it has no CPU kernel."""
    assert window_size[1] == 0 and (enable_gqa or q.shape[1] == k.shape[1])
    results = []
    for i in range(len(cu_q) - 1):
        spans = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        assert len(spans[0]) <= max_q_length and len(spans[1]) <= max_k_length
        one, keys, values = (span.transpose(0, 1)[None] for span in spans)
        distance = torch.arange(len(spans[1]) - len(spans[0]), len(spans[1]))[:, None] - torch.arange(len(spans[1]))
        mask = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        out = torch.nn.functional.scaled_dot_product_attention(
            one, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        results.append(out[0].transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tails", [None, TAILS], ids=["all", "tails"])
@pytest.mark.parametrize("way", ["grouped", "variable-length"])
def test_a_token_sees_its_prefix_and_its_segment_up_to_itself(way, tails, window, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", run_kernel_on_cpu)
    segments = Segments(LENGTHS, CPU, PREFIXES, tails)
    tensors = make_qkv(len(segments.query_positions))
    if way == "grouped":
        ours = packed_attention._run_grouped_attention(*tensors, segments, None, 0.0, window)
    else:
        ours = packed_attention._run_varlen_attention(*tensors, segments, None, window)
    theirs = attend_by_hand(*tensors, segments, window)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    factors = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    for mine, other in zip(
        torch.autograd.grad((ours * factors).sum(), tensors),
        torch.autograd.grad((theirs * factors).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_long_segments_without_padding_have_the_results_and_gradients_of_padded_groups(monkeypatch):
    def run(min_tokens):
        monkeypatch.setattr(packed_attention, "MIN_UNPADDED_TOKENS", min_tokens)
        segments, tensors = Segments(LENGTHS, CPU), make_qkv(sum(LENGTHS))
        assert segments.is_cheaper_unpadded == (min_tokens == 1)
        out = packed_attention._run_grouped_attention(*tensors, segments, None, 0.0, None)
        factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        return out, *torch.autograd.grad((out * factors).sum(), tensors)

    for unpadded, padded in zip(run(1), run(1000), strict=True):
        torch.testing.assert_close(unpadded, padded, atol=1e-12, rtol=1e-10)
    assert not Segments(LENGTHS, CPU, PREFIXES).is_cheaper_unpadded
    monkeypatch.setattr(packed_attention, "MIN_UNPADDED_TOKENS", 1)
    assert not Segments(LENGTHS, CPU, None, TAILS).is_cheaper_unpadded
    assert not Segments(LENGTHS, CPU, PREFIXES).is_cheaper_unpadded


def test_no_kernel_call_has_a_key_twice():
    """So the sum of a key's gradients has one order, even on a device where additions race."""
    calls = Segments(LENGTHS, CPU, PREFIXES).varlen_calls
    assert len(calls) == 3
    for call in calls:
        assert len(call.keys) == len(set(call.keys.tolist()))
    (whole,) = Segments(LENGTHS, CPU).varlen_calls
    assert whole.queries is None and whole.keys is None  # the row as it is stored, nothing is copied


@pytest.mark.parametrize("release", ["2.10", "2.12"])
def test_the_kernel_is_called_with_the_arguments_of_its_release(release, monkeypatch):
    segments = Segments(LENGTHS, CPU, PREFIXES)
    tensors = make_qkv(len(segments.query_positions))
    expected = attend_by_hand(*tensors, segments)

    def run_old_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert is_causal
        return run_kernel_on_cpu(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0))

    def run_newer_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return run_kernel_on_cpu(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
        )

    monkeypatch.setattr(varlen, "varlen_attn", {"2.10": run_old_kernel, "2.12": run_newer_kernel}[release])
    for scaling in (None, 0.25):
        ours = packed_attention._run_varlen_attention(*tensors, segments, scaling, None)
        if scaling is None:
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(
                ours,
                packed_attention._run_grouped_attention(*tensors, segments, scaling, 0.0, None),
                atol=1e-6,
                rtol=1e-5,
            )


def make_pair(number: int, *sizes) -> PreferencePair:
    images = tuple(picture(*size, seed=number + i) for i, size in enumerate(sizes))
    prompt = (
        Message(Role.user, (*(ImagePlaceholder(i) for i in range(len(images))), "무엇이 보이나요? " * (number + 1))),
    )
    answers = Message(Role.assistant, ("빨간 원입니다 " * (number + 1),)), Message(Role.assistant, ("파란 별",))
    return PreferencePair(f"p{number}", "t", f"t:{number}", SampleKind.other, Language.ko, prompt, *answers, images)


PAIRS = [make_pair(0), make_pair(1, (150, 60)), make_pair(2, (56, 56), (60, 90)), make_pair(3, (56, 56))]


def compute_loss_and_gradients(model, processor, records=PAIRS, **options):
    torch.manual_seed(0)
    stage = DPOStage(copy.deepcopy(model), beta=0.5, **options)
    stage.configure_model()
    with torch.no_grad():  # policy and reference differ
        for parameter in stage.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    batch = collate(processor, records, step_pairs=len(records))
    loss, output = stage._compute_preference(batch, PreferenceMetrics(), training=True)
    loss.backward()
    gradients = {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, output, batch


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trainable": ["vision_tower", "projector", "language_model"]},
        {"parts": {"language_model": {"lora": {"rank": 2}}}},
        {"activation_checkpointing": True},
    ],
    ids=["language model", "all parts", "LoRA", "checkpointing"],
)
def test_a_shared_prompt_changes_no_number(model, processor, options):
    separate_processor = Processor(processor.tokenizer, processor.images, share_prompts=False)
    loss, gradients, output, batch = compute_loss_and_gradients(model, processor, **options)
    other, others, theirs, plain = compute_loss_and_gradients(model, separate_processor, **options)
    assert (
        batch.num_tokens < 0.7 * plain.num_tokens
        and len(batch.segment_lengths) == 12
        and len(plain.segment_lengths) == 8
    )
    torch.testing.assert_close(loss, other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.rewards, theirs.rewards, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("in_float64")
def test_packed_pairs_give_the_loss_of_pairs_one_by_one(model, processor):
    loss, *_ = compute_loss_and_gradients(model, processor)
    alone = sum(float(compute_loss_and_gradients(model, processor, [record])[0]) for record in PAIRS) / len(PAIRS)
    assert float(loss) == pytest.approx(alone, rel=1e-5)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("records", ["pairs", "samples"])
def test_pruning_the_last_layer_changes_no_number(model, processor, mixed, records, monkeypatch):
    batch = collate(processor, PAIRS if records == "pairs" else mixed)
    model.requires_grad_(True)
    found = {}
    for pruned in (True, False):
        monkeypatch.setattr(type(model.model), "prunes_last_layer", pruned)
        model.zero_grad()
        (log_probs,) = model(batch=batch)
        log_probs.sum().backward()
        found[pruned] = log_probs.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-5, rtol=1e-5)
    assert found[True][1].keys() == found[False][1].keys()
    for name, gradient in found[True][1].items():
        torch.testing.assert_close(gradient, found[False][1][name], atol=2e-5, rtol=1e-4)


def test_the_last_layer_computes_only_supervised_rows(model, processor, mixed):
    batch, seen = collate(processor, mixed), []
    layers = model.model.language_model.layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    model(batch=batch)
    assert seen == [batch.num_tokens] * (len(layers) - 1) + [batch.num_supervised_tokens]


def test_an_unknown_family_computes_its_whole_last_layer(small_parts, processor, mixed, monkeypatch):
    monkeypatch.setattr(packed_forward, "MODELS_WITH_PRUNED_LAST_LAYER", ())
    model = build_model(blueprint_of(small_parts))
    assert not isinstance(model.model.language_model.layers[-1], PrunedLastLayer)
    batch = collate(processor, mixed)
    (log_probs,) = model(batch=batch)
    logits = model.lm_head(model.model(batch=batch))[batch.loss_positions].log_softmax(-1)
    expected = logits.gather(-1, batch.input_ids[batch.loss_positions + 1][:, None]).squeeze(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


def test_answers_with_different_pictures_have_separate_prompts(model, processor):
    shown, other = picture(150, 60, seed=1), picture(56, 56, seed=2)
    prompt = (Message(Role.user, (ImagePlaceholder(0), "무엇?")),)
    answer = Message(Role.assistant, ("빨간 원",))
    record = PreferencePair(
        "p", "t", "t:1", SampleKind.other, Language.ko, prompt, answer, answer, (shown, other), has_rejected_images=True
    )
    batch = collate(processor, [record, PAIRS[1]], step_pairs=2)
    cost = processor.compute_cost(record)
    assert batch.prefix_segments == [-1, -1, 0, -1, 0] and batch.record_ids == [1, 0, 1, 0, 1]
    assert batch.image_index == [2, 0, 1]  # the image of the shared prompt, then those of the two answers
    assert cost.lengths == (batch.segment_lengths[1], batch.segment_lengths[3]) and cost.num_images == 2
    alone = collate(processor, [record], step_pairs=1)
    loss, gradients, output, _ = compute_loss_and_gradients(model, processor, [record])
    assert (
        alone.num_supervised_tokens == 2 * alone.segment_supervised_tokens[0] and output.rewards[0] != output.rewards[1]
    )
    assert gradients and torch.isfinite(loss)
