"""The plan is a pure function, keeps its caps and loses nothing."""

from collections import Counter

import numpy as np
import pytest
from support import builtin, sample

from lit_vlm.data.datamodule import DataModule, TrainMicroBatches
from lit_vlm.data.index import build_index, split
from lit_vlm.data.plan import Plan, validation_packs
from lit_vlm.types import RecordError

KINDS = ("caption", "number", "grounding", "text", "multi_image")


@pytest.fixture
def module(processor):
    return DataModule(
        processor, builtin(*KINDS, n=40), 0.1, global_batch_size=16, tokens_per_micro_batch=4096, max_epochs=2.0
    )


def plan_of(module: DataModule, **changes) -> Plan:
    module.build()
    options = {"global_batch_size": 16, "most_tokens": 4096, "most_tiles": 64, "max_epochs": 2.0}
    return Plan(module.index, **{**options, **changes})


def test_a_step_has_the_same_samples_whatever_the_world_size_and_the_budget(module):
    plans = [plan_of(module, world_size=w, most_tokens=t) for w, t in ((1, 4096), (2, 4096), (4, 300), (3, 400))]
    for step in range(plans[0].num_steps):
        drawn = [sorted(i for pack in plan.step(step).packs for i in pack) for plan in plans]
        assert all(one == drawn[0] for one in drawn)
        assert len({plan.step(step).num_supervised for plan in plans}) == 1


def test_caps_are_kept_and_k_is_one_number_for_the_stage(module):
    plan = plan_of(module, world_size=2, most_tokens=400, most_tiles=24)
    assert plan.k > 1
    for step in range(plan.num_steps):
        packs = plan.step(step).packs
        assert len(packs) == plan.k * 2
        for pack in packs:
            assert plan.index.tokens[list(pack)].sum() <= 400
            assert plan.index.tiles[list(pack)].sum() <= 24


def test_k_is_the_smallest_that_keeps_the_caps(module):
    plan = plan_of(module, most_tokens=400)
    fewer = [plan._deal(plan.samples(step), plan.k - 1) for step in range(plan.num_steps)]
    assert any(packs is None for packs in fewer)


def test_packs_hold_nearly_equal_work(module):
    plan = plan_of(module, world_size=2, global_batch_size=64, most_tokens=100_000, most_tiles=10_000)
    for step in range(plan.num_steps):
        work = [plan.index.flops[list(pack)].sum() for pack in plan.step(step).packs]
        assert min(work) / max(work) > 0.9


def test_a_pass_reads_every_sample_before_any_twice(module):
    plan = plan_of(module)
    drawn = np.concatenate([plan.samples(step) for step in range(plan.num_steps)])
    counts = Counter(drawn.tolist())
    assert set(counts) == set(range(len(plan.index)))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_weights_are_shares_of_the_samples_and_every_prefix_keeps_them(module):
    plan = plan_of(module, weights=[5.0, 3.0, 1.0, 1.0, 0.0], max_steps=40)
    source = np.concatenate([plan.index.source_of[plan.samples(step)] for step in range(40)])
    for upto in (64, 320, len(source)):
        shares = np.bincount(source[:upto], minlength=5) / upto
        np.testing.assert_allclose(shares, [0.5, 0.3, 0.1, 0.1, 0.0], atol=1.5 / upto + 1e-9)


def test_another_seed_gives_another_order_and_the_same_seed_the_same(module):
    one, same, other = (plan_of(module, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.samples(0), same.samples(0))
    assert not np.array_equal(one.samples(0), other.samples(0))


def test_reading_step_k_needs_no_earlier_step(module):
    fresh, read = plan_of(module), plan_of(module)
    for step in range(fresh.num_steps - 1):
        read.step(step)
    assert fresh.step(fresh.num_steps - 1) == read.step(fresh.num_steps - 1)


def test_the_step_total_is_what_the_micro_batches_add_up_to(module, processor):
    plan = plan_of(module, world_size=2, most_tokens=400)
    readers = [TrainMicroBatches(processor, plan, rank) for rank in range(2)]
    for step in range(3):
        batches = [reader[step * plan.k + micro] for reader in readers for micro in range(plan.k)]
        assert sum(batch.num_supervised_tokens for batch in batches) == batches[0].step_supervised_tokens
        assert sorted(name for batch in batches for name in batch.sample_ids) == sorted(
            f"{plan.index.record(int(i)).source}/{plan.index.record(int(i)).id}" for i in plan.samples(step)
        )


def test_held_out_samples_are_never_trained_on(module):
    module.build()
    train = set(zip(module.index.source_of.tolist(), module.index.position.tolist(), strict=True))
    held = set(zip(module.held_out.source_of.tolist(), module.held_out.position.tolist(), strict=True))
    assert held
    assert not train & held
    assert len(held) == len(KINDS) * 4


def test_the_split_is_by_digest_and_grows_by_adding_only(module, processor):
    whole = build_index(builtin("caption", n=400), processor, module.flops, most_tokens=4096, most_tiles=64)
    small, large = (set(split(whole, fraction)[1].position.tolist()) for fraction in (0.05, 0.1))
    assert len(small) == 20
    assert small < large


def test_validation_reads_each_sample_once_on_any_number_of_ranks(module):
    module.build()
    for world in (1, 2, 3):
        packs = validation_packs(module.held_out, most_tokens=300, most_tiles=64, world_size=world)
        assert len(packs) % world == 0
        assert sorted(i for pack in packs for i in pack) == list(range(len(module.held_out)))


def test_a_sample_longer_than_the_budget_is_a_bad_record_that_says_what_to_do(processor):
    class Long:
        name, digest = "long", "0"

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return sample("q", "아주 긴 답 " * (200 if index else 1))

    index = build_index([Long()], processor, DataModule(processor, []).flops, most_tokens=300, most_tiles=8)
    assert len(index) == 1
    ((name, error),) = index.errors
    assert name == "long"
    assert isinstance(error, RecordError)
    assert "more than data.tokens_per_micro_batch=300" in str(error)
