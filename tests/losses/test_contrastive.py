"""The losses of BLIP and BLIP-2: against loops over single numbers, and BLIP's against tensors of LAVIS 1.0.2.

The model's tests compare BLIP-2's whole losses with LAVIS (`tests/model/test_qformer.py`).
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from waiting import PATIENCE

from lit_vlm.losses.contrastive import (
    FeatureQueue,
    compute_alpha,
    compute_caption_loss,
    compute_itc_loss,
    compute_itm_loss,
    compute_momentum_itc_loss,
    compute_negative_weights,
    compute_query_similarities,
    compute_soft_targets,
    find_matches,
    make_itg_mask,
    sample_negatives,
    update_momentum,
)
from lit_vlm.types import IGNORE_INDEX, UserError

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "oracle"), str(TESTS / "engine")]
from made_weights import PAIRS, QUEUE_SIZE
from rank_runs import run_ranks

LAVIS = json.loads((TESTS / "oracle" / "lavis.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-11  # float64; numbers of some units


def make_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_softmax(row: list[float]) -> list[float]:
    largest = max(row)
    total = largest + math.log(sum(math.exp(value - largest) for value in row))
    return [value - total for value in row]


def test_similarity_is_the_largest_over_the_queries():
    images, texts = F.normalize(make_numbers(4, 3, 5), dim=-1), F.normalize(make_numbers(6, 5, seed=1), dim=-1)
    similarities = compute_query_similarities(images, texts)
    for i in range(4):
        for j in range(6):
            best = max(sum(float(a * b) for a, b in zip(query, texts[j], strict=True)) for query in images[i])
            assert float(similarities[i, j]) == pytest.approx(best, abs=TOLERANCE)


@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2, 2]], ids=["different", "equal_images"])
def test_contrast_is_the_cross_entropy_of_each_direction(ids):
    image_logits, text_logits = 5 * make_numbers(5, 5), 5 * make_numbers(5, 5, seed=1)
    matches = find_matches(5, None if ids is None else torch.tensor(ids))
    total = 0.0
    for logits in (image_logits, text_logits):
        for b, row in enumerate(logits.tolist()):
            same = [j for j in range(5) if (j == b if ids is None else ids[j] == ids[b])]
            for j, value in enumerate(log_softmax(row)):
                total -= value * ((0.9 / len(same) if j in same else 0.0) + 0.1 / 5) / 10
    loss = compute_itc_loss(image_logits, text_logits, matches)
    assert float(loss) == pytest.approx(total, abs=TOLERANCE)
    if ids is None:
        own = torch.arange(5)
        library = [F.cross_entropy(logits, own, label_smoothing=0.1) for logits in (image_logits, text_logits)]
        assert float(loss) == pytest.approx(float(sum(library) / 2), abs=TOLERANCE)


def test_negatives_are_similar_pairs_and_never_matches():
    logits = 3 * make_numbers(4, 4)
    matches = find_matches(4, torch.tensor([0, 1, 0, 2]))
    weights = compute_negative_weights(logits, matches)
    for b, row in enumerate(logits.tolist()):
        probabilities = [math.exp(value) for value in log_softmax(row)]
        expected = [0.0 if matches[b, j] else p + 1e-4 for j, p in enumerate(probabilities)]
        assert weights[b].tolist() == pytest.approx(expected, abs=TOLERANCE)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, 4, dtype=torch.float64)
    rounds = 4000
    for _ in range(rounds):
        counts[torch.arange(4), sample_negatives(weights, generator)] += 1
    assert not counts[matches].any()
    shares = weights / weights.sum(1, keepdim=True)
    # five standard deviations of a share
    assert ((counts / rounds - shares).abs() <= 5 * (shares * (1 - shares) / rounds).sqrt() + 1e-12).all()


def test_a_pair_without_a_negative_is_refused():
    with pytest.raises(UserError, match="needs a negative for each pair, and all 1 pairs"):
        compute_negative_weights(torch.zeros(1, 1), find_matches(1))
    with pytest.raises(UserError, match="all 3 pairs of the global batch match"):
        compute_negative_weights(torch.zeros(3, 3), find_matches(3, torch.tensor([7, 7, 7])))


def test_matching_is_the_cross_entropy_of_one_pair_and_two_negatives():
    logits = make_numbers(9, 2)
    rows = [log_softmax(row) for row in logits.tolist()]
    expected = -sum(row[1 if b < 3 else 0] for b, row in enumerate(rows)) / 9
    assert float(compute_itm_loss(logits)) == pytest.approx(expected, abs=TOLERANCE)


def test_queries_see_queries_and_a_token_sees_queries_and_earlier_tokens():
    mask = make_itg_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]), 2)
    assert mask.shape == (2, 1, 5, 5)
    for b, length in enumerate((3, 2)):
        for row in range(5):
            for column in range(5):
                is_query, is_padding = column < 2, column >= 2 + length
                visible = is_query if row < 2 else (is_query or column <= row) and not is_padding
                assert bool(mask[b, 0, row, column]) is visible


def test_the_caption_loss_is_smoothed_and_leaves_out_padding():
    logits = 2 * make_numbers(2, 4, 6)
    labels = torch.tensor([[3, 1, 5, 2], [3, 4, IGNORE_INDEX, IGNORE_INDEX]])
    total, count = 0.0, 0
    for b in range(2):
        for t in range(3):
            target = int(labels[b, t + 1])
            if target == IGNORE_INDEX:
                continue
            row = log_softmax(logits[b, t].tolist())
            total -= 0.9 * row[target] + 0.1 * sum(row) / 6
            count += 1
    assert float(compute_caption_loss(logits, labels)) == pytest.approx(total / count, abs=TOLERANCE)
    assert float(compute_caption_loss(logits, labels, num_tokens=10)) == pytest.approx(total / 10, abs=TOLERANCE)


def test_alpha_grows_over_two_epochs():
    assert [compute_alpha(step, 10) for step in (0, 5, 10, 20, 500)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])


def test_soft_targets_mix_the_momentum_encoder_and_the_own_pair():
    logits = make_numbers(2, 5)
    targets = compute_soft_targets(logits, 0.4)
    for b, row in enumerate(logits.tolist()):
        expected = [0.4 * math.exp(value) + (0.6 if j == b else 0.0) for j, value in enumerate(log_softmax(row))]
        assert targets[b].tolist() == pytest.approx(expected, abs=TOLERANCE)


def make_lavis_queue(queues: dict, world_size: int) -> FeatureQueue:
    queue = FeatureQueue(QUEUE_SIZE, len(queues["image_queue"][0]), world_size * PAIRS).double()
    queue.images.copy_(torch.tensor(queues["image_queue"], dtype=torch.float64))
    queue.texts.copy_(torch.tensor(queues["text_queue"], dtype=torch.float64))
    return queue


def compute_blip(rank: int, world_size: int) -> dict:
    """Compute BLIP's losses and the queue after the step from LAVIS's tensors of a rank."""
    lavis = LAVIS[f"world_{world_size}"][rank]["blip"]

    def read(name: str) -> torch.Tensor:
        return torch.tensor(lavis["features"][name], dtype=torch.float64)

    queue = make_lavis_queue(lavis["queues"], world_size)
    itc, image_logits, _ = compute_momentum_itc_loss(
        (read("vision_proj"), read("text_proj")),
        (read("vision_proj_m"), read("text_proj_m")),
        queue,
        torch.tensor(0.07, dtype=torch.float64),
        compute_alpha(lavis["step"], lavis["steps_per_epoch"]),
    )
    queue.push(read("vision_proj_m"), read("text_proj_m"))
    itm = compute_itm_loss(torch.tensor(lavis["itm_logits"], dtype=torch.float64))
    lm = compute_caption_loss(torch.tensor(lavis["lm_logits"], dtype=torch.float64), torch.tensor(lavis["lm_labels"]))
    losses = {"loss": itc + itm + lm, "loss_itc": itc, "loss_itm": itm, "loss_lm": lm}
    return {
        "losses": {name: float(value) for name, value in losses.items()},
        "image_logits": image_logits,
        "queue": (queue.images, queue.texts, int(queue.position)),
    }


def require_lavis(ours: dict, rank: int, world_size: int) -> None:
    theirs = LAVIS[f"world_{world_size}"][rank]["blip"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-10)  # the file has 13 digits
    options = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(
        ours["image_logits"], torch.tensor(theirs["image_logits"], dtype=torch.float64), **options
    )
    images, texts, position = ours["queue"]
    torch.testing.assert_close(
        images, torch.tensor(theirs["queues_after"]["image_queue"], dtype=torch.float64), **options
    )
    torch.testing.assert_close(
        texts, torch.tensor(theirs["queues_after"]["text_queue"], dtype=torch.float64), **options
    )
    assert position == theirs["position_after"]


def test_blips_whole_loss_and_queue_equal_those_of_lavis():
    require_lavis(compute_blip(0, 1), 0, 1)


def test_two_ranks_have_blips_losses_and_equal_queues(tmp_path):
    worker = Path(__file__).with_name("contrastive_worker.py")
    results = run_ranks(worker, [str(tmp_path)], ["blip", "gather"], tmp_path, 2, PATIENCE)
    for rank, result in enumerate(results):
        require_lavis(result["blip"], rank, 2)
    assert torch.equal(results[0]["blip"]["queue"][0], results[1]["blip"]["queue"][0])
    for rank, result in enumerate(results):  # rows of both ranks; each rank's gradient is the sum over both
        assert result["gather"]["rows"].tolist() == [[0.0, 1.0], [10.0, 11.0]]
        assert result["gather"]["gradient"].tolist() == [[3.0 * (rank + 1), 3.0 * (rank + 1)]]
        assert result["gather"]["matches"].tolist() == [[rank == 0, rank == 1]]


def test_the_momentum_encoder_moves_as_that_of_lavis():
    lavis = LAVIS["world_1"][0]["blip"]
    slow, fast = (torch.nn.Linear(16, 8, bias=False, dtype=torch.float64) for _ in range(2))
    slow.weight.data.copy_(torch.tensor(lavis["momentum_text_proj_before"], dtype=torch.float64))
    fast.weight.data.copy_(torch.tensor(lavis["text_proj"], dtype=torch.float64))
    update_momentum(slow, fast)
    expected = torch.tensor(lavis["momentum_text_proj"], dtype=torch.float64)
    torch.testing.assert_close(slow.weight.data, expected, rtol=0, atol=1e-12)


def test_a_queue_holds_whole_batches_only():
    with pytest.raises(UserError, match="10 entries and a step adds 4 pairs, which does not divide it"):
        FeatureQueue(10, 2, 4)
    queue = FeatureQueue(4, 2, 2)
    rows = F.normalize(make_numbers(3, 2), dim=1)
    queue.push(rows[:2], rows[:2])
    with pytest.raises(UserError, match="A batch of 3 pairs does not fit at entry 2 of 4"):
        queue.push(rows, rows)
    queue.push(rows[:2], rows[1:])
    assert int(queue.position) == 0 and torch.equal(queue.texts[2:], rows[1:].float())
    assert queue.state_dict().keys() == {"images", "texts", "position"}  # resumed with a checkpoint
