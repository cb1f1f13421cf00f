"""The plan is a pure function, keeps its caps, loses nothing and makes packs of equal work."""

import multiprocessing
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from made_index import FLOPS, made_index, shaped_index
from support import builtin

from lit_vlm.cost import Flops
from lit_vlm.data.index.columns import KINDS, SampleIndex, split_held_out
from lit_vlm.data.index.store import build_index
from lit_vlm.data.micro_batches import TrainMicroBatches
from lit_vlm.data.plan import plan as plan_module
from lit_vlm.data.plan.deal import MicroBatchLimits, gather_steps, try_pack
from lit_vlm.data.plan.ledger import Ledger
from lit_vlm.data.plan.mixture import Mixture, MixtureSettings, SourceAmount
from lit_vlm.data.plan.plan import Plan, PlanStep, pack_validation
from lit_vlm.types import RecordError, SampleKind, UserError

TOKENS = Flops(per_token=1.0, per_square=0.0, per_tile=0.0, per_supervised=0.0)


@pytest.fixture
def index() -> SampleIndex:
    """200 samples of two sources, 10 to 100 tokens and 0 to 4 tiles each."""
    tiles = np.random.default_rng(1).integers(0, 5, 200)
    return made_index({"a": 150, "b": 50}, tiles=tiles, images=tiles > 0)


def plan_of(index: SampleIndex, mixture: Mixture | None = None, **changes) -> Plan:
    options = {"flops": FLOPS, "global_batch_size": 16, "max_tokens": 4096, "max_tiles": 64, "max_epochs": 2.0}
    return Plan(index, mixture, **{**options, **changes})


def steps_of(plan: Plan) -> list[PlanStep]:
    return [plan.get_step(number) for number in range(plan.num_steps)]


def held(step: PlanStep) -> list[int]:
    return sorted(sample for pack in step.packs for sample in pack)


def equal(one: Plan, other: Plan) -> bool:
    return one.accumulate_grad_batches == other.accumulate_grad_batches and steps_of(one) == steps_of(other)


class TestSteps:
    def test_a_step_has_the_same_samples_whatever_the_world_size_and_the_budget(self, index):
        settings = ((1, 4096, 64), (2, 4096, 64), (4, 300, 9), (3, 400, 64), (64, 101, 4))
        plans = [plan_of(index, world_size=w, most_tokens=t, most_tiles=i) for w, t, i in settings]
        for step in zip(*(steps_of(plan) for plan in plans), strict=True):
            assert all(held(one) == held(step[0]) for one in step)
            assert all(replace(one, packs=()) == replace(step[0], packs=()) for one in step)

    def test_totals_are_those_of_the_samples(self, index):
        plan = plan_of(index, world_size=2)
        for number, step in enumerate(steps_of(plan)):
            samples = plan.get_samples(number)
            assert step.num_samples == len(samples) == 16
            assert step.num_supervised == index.supervised[samples].sum()
            assert step.num_tiles == index.tiles[samples].sum()
            assert held(step) == sorted(samples)

    def test_a_pass_reads_every_sample_before_any_twice(self, index):
        plan = plan_of(index)
        counts = Counter(plan.get_sample_sequence().tolist())
        assert set(counts) == set(range(len(index)))
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_another_seed_gives_another_order_and_the_same_seed_the_same(self, index):
        one, same, other = (plan_of(index, seed=seed) for seed in (0, 0, 1))
        assert equal(one, same)
        assert not np.array_equal(one.get_samples(0), other.get_samples(0))

    def test_reading_step_k_needs_no_earlier_step(self, index):
        fresh, read = plan_of(index), plan_of(index)
        assert fresh.get_step(fresh.num_steps - 1) == steps_of(read)[-1]
        with pytest.raises(IndexError):
            fresh.get_step(fresh.num_steps)

    def test_epochs_become_steps_and_fractions_of_them_do(self, index):
        assert plan_of(index, max_epochs=2.0).num_steps == 25
        assert plan_of(index, max_epochs=0.25).num_steps == 4
        assert plan_of(index, max_epochs=0.001).num_steps == 1
        assert plan_of(index, max_steps=7).num_steps == 7
        half = Mixture(index, MixtureSettings({"a": SourceAmount(count=50)}))
        assert plan_of(index, half, max_epochs=1.0, global_batch_size=10).num_steps == 10

    def test_more_steps_keep_the_steps_before_them(self, index):
        few, many = plan_of(index, max_steps=5), plan_of(index, max_steps=200)
        assert all(np.array_equal(few.get_samples(number), many.get_samples(number)) for number in range(5))

    @pytest.mark.parametrize("bad", ({"global_batch_size": 0}, {"max_epochs": 0.0}, {"global_batch_size": None}))
    def test_a_length_of_nothing_is_refused(self, index, bad):
        with pytest.raises(UserError, match=r"data\.global_batch_size|trainer\.max_epochs"):
            plan_of(index, **bad)


class TestTokenSizedSteps:
    def test_a_step_ends_with_the_sample_that_reaches_the_target(self, index):
        plan = plan_of(index, global_batch_tokens=700)
        assert plan.global_batch_size is None
        for number in range(plan.num_steps):
            tokens = index.tokens[plan.get_samples(number)]
            assert tokens.sum() >= 700 > tokens[:-1].sum()

    def test_steps_are_the_same_for_every_world_size_and_follow_the_same_draws(self, index):
        by_size, *plans = (
            plan_of(index),
            *(plan_of(index, global_batch_tokens=700, world_size=w, most_tokens=t) for w, t in ((1, 4096), (3, 200))),
        )
        assert [held(step) for step in steps_of(plans[0])] == [held(step) for step in steps_of(plans[1])]
        assert np.array_equal(
            by_size.get_sample_sequence(), plans[0].get_sample_sequence()[: len(by_size.get_sample_sequence())]
        )

    def test_their_number_is_asked_or_covers_the_epochs(self, index):
        assert plan_of(index, global_batch_tokens=700, max_steps=90).num_steps == 90
        plan = plan_of(index, global_batch_tokens=700, max_epochs=1.5)
        assert (
            len(plan.get_sample_sequence()) - len(plan.get_samples(plan.num_steps - 1))
            < 300
            <= len(plan.get_sample_sequence())
        )

    def test_draws_that_turn_out_shorter_than_the_mean_are_added_to(self):
        tokens = np.concatenate([np.full(10, 1000), np.full(10, 10)])
        index = made_index({"long": 10, "short": 10}, tokens=tokens)
        short = Mixture(index, MixtureSettings({"long": SourceAmount(weight=0.0), "short": SourceAmount(weight=1.0)}))
        plan = plan_of(index, short, global_batch_tokens=1000, max_steps=3)
        assert [step.num_samples for step in steps_of(plan)] == [100, 100, 100]


class TestCaps:
    def test_caps_are_kept_and_k_is_one_number_for_the_stage(self, index):
        plan = plan_of(index, world_size=2, most_tokens=400, most_tiles=24)
        assert plan.accumulate_grad_batches > 1
        for step in steps_of(plan):
            assert len(step.packs) == plan.accumulate_grad_batches * 2
            assert max(index.tokens[list(pack)].sum() for pack in step.packs) <= 400
            assert max(index.tiles[list(pack)].sum() for pack in step.packs) <= 24

    @pytest.mark.parametrize("seed", range(25))
    def test_caps_hold_for_any_shape(self, seed):
        generator = np.random.default_rng(seed)
        count, world, batch = (int(generator.integers(low, high)) for low, high in ((1, 90), (1, 9), (1, 40)))
        tokens = np.ceil(np.exp(generator.normal(3, 1.2, count))).astype(int)
        tiles = generator.integers(0, 12, count)
        caps = {
            "max_tokens": int(tokens.max() * generator.uniform(1, 4)),
            "max_tiles": int(tiles.max() * generator.uniform(1, 3)) + 1,
        }
        batches = {"global_batch_size": batch} if seed % 3 else {"global_batch_tokens": int(tokens.sum() / 3) + 1}
        index = made_index({"a": count}, tokens=tokens, tiles=tiles)
        plan = plan_of(index, world_size=world, **caps, **batches)
        for number, step in enumerate(steps_of(plan)):
            assert held(step) == sorted(plan.get_samples(number))
            for pack in step.packs:
                assert index.tokens[list(pack)].sum() <= caps["max_tokens"]
                assert index.tiles[list(pack)].sum() <= caps["max_tiles"]

    def test_k_is_the_smallest_that_keeps_the_caps(self, index):
        plan = plan_of(index, most_tokens=350)
        tokens = [index.tokens[plan.get_samples(number)].sum() for number in range(plan.num_steps)]
        assert (
            plan.accumulate_grad_batches == 4 == max(-(-total // 350) for total in tokens)
        )  # no fewer packs could hold the largest step
        ends = np.arange(1, plan.num_steps + 1) * 16
        hand = gather_steps(index, FLOPS, plan.get_sample_sequence(), ends, np.arange(plan.num_steps))
        assert try_pack(hand, MicroBatchLimits(350, 64), plan.accumulate_grad_batches, 1) is not None
        assert try_pack(hand, MicroBatchLimits(350, 64), plan.accumulate_grad_batches - 1, 1) is None

    @pytest.mark.parametrize("seed", range(5))
    def test_packs_that_must_be_full_to_the_brim_are_found_before_k_is_raised(self, seed):
        index = shaped_index("mix665k", 64, seed)
        cap = int(index.tokens.sum() / 8 / 0.99)
        plan = plan_of(index, global_batch_size=64, max_steps=1, world_size=8, most_tokens=cap)
        assert plan.accumulate_grad_batches == 1
        assert plan.measure_balance()["tokens"]["largest"] <= cap

    def test_a_sample_above_a_cap_is_an_error_that_says_what_to_do(self, index):
        with pytest.raises(UserError, match=r"samples have more than data\.tokens_per_micro_batch=50 .*on_overlong"):
            plan_of(index, most_tokens=50)
        with pytest.raises(UserError, match=r"data\.tiles_per_micro_batch=3 tiles, the largest 4"):
            plan_of(index, most_tiles=3)

    def test_more_ranks_than_samples_leave_blank_packs(self, index):
        plan = plan_of(index, world_size=24)
        assert plan.accumulate_grad_batches == 1
        assert all(step.packs.count(()) == 8 for step in steps_of(plan))
        assert plan.measure_balance()["blank_packs"] == 8 * plan.num_steps

    def test_pairs_are_one_unit(self):
        index = made_index({"pairs": 40}, kind=KINDS.index(SampleKind.preference), chosen=7, tokens=100)
        plan = plan_of(index, most_tokens=250, world_size=2)
        assert all(len(pack) <= 2 for step in steps_of(plan) for pack in step.packs)
        assert all(step.num_chosen == 16 * 7 for step in steps_of(plan))


class TestBalance:
    @pytest.mark.parametrize(("shape", "cap"), (("lcs", 8192), ("mix665k", 8192), ("anyres", 16384)))
    @pytest.mark.parametrize(("world", "per_rank"), ((8, 8), (8, 16), (64, 8), (256, 8)))
    def test_ranks_with_eight_samples_wait_for_less_than_three_percent(self, shape, cap, world, per_rank):
        index = shaped_index(shape, max(2048, world * per_rank))
        plan = plan_of(index, global_batch_size=world * per_rank, most_tokens=cap, world_size=world, max_epochs=1.0)
        balance = plan.measure_balance()
        assert balance["micro_steps"]["mean"] >= 0.97
        assert balance["ranks"]["mean"] >= 0.97
        assert balance["tokens"]["largest"] <= cap
        assert balance["tiles"]["largest"] <= 64

    def test_packs_hold_nearly_equal_work(self, index):
        plan = plan_of(index, world_size=2, global_batch_size=64, most_tokens=100_000, most_tiles=10_000)
        for step in steps_of(plan):
            work = [index.flops(FLOPS)[list(pack)].sum() for pack in step.packs]
            assert min(work) / max(work) > 0.98

    def test_unequal_packs_share_a_micro_step_with_their_like(self):
        """Six samples that fill a pack alone, in three micro-steps of two ranks."""
        index = made_index({"a": 6}, tokens=[100, 20, 60, 99, 61, 21])
        plan = plan_of(index, flops=TOKENS, global_batch_size=6, most_tokens=100, world_size=2, max_steps=1)
        plan_packs = [index.tokens[list(pack)].sum() for pack in plan.get_step(0).packs]
        assert plan.accumulate_grad_batches == 2 and sorted(plan_packs[:2]) == [
            99,
            100,
        ]  # 60 + 21 and 61 + 20 behind them
        assert abs(sum(plan_packs[0::2]) - sum(plan_packs[1::2])) <= 2
        assert plan.measure_balance()["ranks"]["mean"] > 0.99

    def test_balance_is_what_the_packs_say(self, index):
        plan = plan_of(index, world_size=2, most_tokens=400)
        micro = []
        for step in steps_of(plan):
            work = np.array([index.flops(FLOPS)[list(pack)].sum() for pack in step.packs]).reshape(
                plan.accumulate_grad_batches, 2
            )
            micro.append(work.sum() / 2 / work.max(axis=1).sum())
        assert plan.measure_balance()["micro_steps"] == pytest.approx({"mean": np.mean(micro), "min": np.min(micro)})


class TestStore:
    def test_a_plan_from_the_store_is_the_plan(self, index, tmp_path):
        options = {"world_size": 3, "max_tokens": 300}
        plans = [plan_of(index, **options), *(plan_of(index, **options, store=tmp_path / "s") for _ in range(2))]
        assert equal(plans[0], plans[1]) and equal(plans[0], plans[2])

    def test_of_several_processes_one_builds_and_the_others_wait(self, index, tmp_path):
        def build() -> None:
            built = plan_module.sample_steps

            def counted(*arguments):
                (tmp_path / f"drawn-{os.getpid()}").touch()
                return built(*arguments)

            plan_module.sample_steps = counted
            os._exit(0 if equal(plan_of(index, store=tmp_path / "store"), in_memory) else 1)

        in_memory = plan_of(index)
        processes = [multiprocessing.get_context("fork").Process(target=build) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert len(list(tmp_path.glob("drawn-*"))) == 1

    def test_a_kept_plan_opens_without_reading_the_index(self, index, tmp_path, monkeypatch):
        plan = plan_of(index, store=tmp_path, world_size=2)

        class Closed(dict):
            def __getitem__(self, key):
                raise AssertionError(f"read {key}")

        closed = SampleIndex(index.sources, None, Closed())
        monkeypatch.setattr(SampleIndex, "digest", lambda self: pytest.fail("the digest reads all"))
        monkeypatch.setattr(plan_module, "sample_steps", lambda *_: pytest.fail("drawn again"))
        again = plan_of(closed, store=tmp_path, world_size=2, digest=made_index_digest(index))
        assert equal(plan, again)

    def test_another_world_size_or_cap_is_dealt_anew_and_not_drawn_anew(self, index, tmp_path, monkeypatch):
        plan_of(index, store=tmp_path)
        monkeypatch.setattr(plan_module, "sample_steps", lambda *_: pytest.fail("drawn again"))
        for changes in ({"world_size": 4}, {"max_tokens": 300}, {"max_tiles": 20}, {"flops": TOKENS}):
            assert equal(plan_of(index, store=tmp_path, **changes), plan_of_in_memory(index, monkeypatch, changes))

    @pytest.mark.parametrize("change", ({"seed": 1}, {"global_batch_size": 8}, {"max_epochs": 3.0}, {"max_steps": 4}))
    def test_other_settings_are_another_plan(self, index, tmp_path, change):
        plan_of(index, store=tmp_path)
        assert equal(plan_of(index, store=tmp_path, **change), plan_of(index, **change))

    def test_another_index_or_mixture_is_another_plan(self, index, tmp_path):
        plan_of(index, store=tmp_path)
        other = made_index({"a": 150, "b": 50}, seed=5)
        assert equal(plan_of(other, store=tmp_path), plan_of(other))
        mixture = Mixture(index, MixtureSettings({"a": SourceAmount(repeat=2)}))
        assert equal(plan_of(index, mixture, store=tmp_path), plan_of(index, mixture))

    @pytest.mark.parametrize("damage", (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(len(b))))
    @pytest.mark.parametrize("name", ("steps", "packs"))
    def test_a_torn_file_is_built_again(self, index, tmp_path, name, damage):
        plan_of(index, store=tmp_path)
        (path,) = tmp_path.glob(f"{name}-*.arrow")
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert equal(plan_of(index, store=tmp_path), plan_of(index))
        assert path.read_bytes() == whole

    def test_a_file_of_another_key_is_built_again(self, index, tmp_path):
        plan_of(index, store=tmp_path / "one")
        plan_of(index, store=tmp_path / "two", seed=1)
        for name in ("steps", "packs"):
            (foreign,), (own,) = ((tmp_path / folder).glob(f"{name}-*.arrow") for folder in ("one", "two"))
            own.write_bytes(foreign.read_bytes())
        assert equal(plan_of(index, store=tmp_path / "two", seed=1), plan_of(index, seed=1))


class TestLedger:
    def entered(self, index: SampleIndex, tmp_path, *samples: int) -> Ledger:
        ledger = Ledger.read(tmp_path / "ledger.jsonl")
        for sample in samples:
            name = index.sources[index.source_ids[sample]].name
            ledger.add(name, int(index.position[sample]), RecordError("file:1", "broken"))
        return Ledger.read(tmp_path / "ledger.jsonl")

    def test_its_samples_are_left_out_and_all_others_stay_where_they_were(self, index, tmp_path):
        ledger = self.entered(index, tmp_path, 3, 170)
        for world in (1, 3):
            plan, without = (plan_of(index, world_size=world, most_tokens=400, ledger=one) for one in (None, ledger))
            assert plan.accumulate_grad_batches == without.accumulate_grad_batches
            for number, (step, fewer) in enumerate(zip(steps_of(plan), steps_of(without), strict=True)):
                expected = tuple(tuple(s for s in pack if s not in (3, 170)) for pack in step.packs)
                assert fewer.packs == expected
                left = plan.get_samples(number)[~np.isin(plan.get_samples(number), [3, 170])]
                assert np.array_equal(without.get_samples(number), left)
                assert fewer.num_samples == len(left)
                assert fewer.num_supervised == index.supervised[left].sum()
                assert fewer.num_tiles == index.tiles[left].sum()

    def test_a_step_that_lost_all_is_blank(self, tmp_path):
        index = made_index({"a": 6})
        plan = plan_of(index, global_batch_size=2, ledger=self.entered(index, tmp_path, *range(6)), world_size=2)
        assert all(step == PlanStep(((), ()), 0, 0, 0, 0) for step in steps_of(plan))

    def test_a_kept_plan_is_not_built_again_for_it(self, index, tmp_path, monkeypatch):
        plan_of(index, store=tmp_path)
        monkeypatch.setattr(plan_module, "sample_steps", lambda *_: pytest.fail("drawn again"))
        monkeypatch.setattr(plan_module, "pack_steps", lambda *_: pytest.fail("dealt again"))
        plan = plan_of(index, store=tmp_path, ledger=self.entered(index, tmp_path, 3))
        assert 3 not in {sample for step in steps_of(plan) for sample in held(step)}


class TestValidation:
    def test_validation_reads_each_sample_once_on_any_number_of_ranks(self, index):
        for world in (1, 2, 3, 300):
            packs = pack_validation(index, max_tokens=300, max_tiles=9, world_size=world, flops=FLOPS)
            assert len(packs) % world == 0
            assert sorted(sample for pack in packs for sample in pack) == list(range(len(index)))
            assert all(index.tokens[list(pack)].sum() <= 300 and index.tiles[list(pack)].sum() <= 9 for pack in packs)

    def test_its_packs_are_few_and_of_equal_work(self):
        index = shaped_index("mix665k", 400)
        packs = pack_validation(index, max_tokens=8192, max_tiles=64, world_size=4, flops=FLOPS)
        assert len(packs) == -(-int(index.tokens.sum()) // (8192 * 4)) * 4
        work = np.array([index.compute_flops(FLOPS)[list(pack)].sum() for pack in packs]).reshape(-1, 4)
        assert work.sum() / 4 / work.max(axis=1).sum() > 0.97

    def test_nothing_held_out_is_no_pack(self, index):
        empty = index.select(np.array([], dtype=np.int64))
        assert pack_validation(empty, max_tokens=300, max_tiles=9, world_size=2, flops=FLOPS) == []

    def test_large_sets_are_dealt_in_parts(self, index, monkeypatch):
        monkeypatch.setattr(plan_module, "BLOCK_SIZE", 64)
        packs = pack_validation(index, max_tokens=300, max_tiles=64, world_size=3, flops=FLOPS)
        assert len(packs) % 3 == 0
        assert sorted(sample for pack in packs for sample in pack) == list(range(len(index)))


class TestRecords:
    KINDS = ("caption", "number", "grounding", "text", "multi_image")

    def test_the_step_total_is_what_the_micro_batches_add_up_to(self, processor):
        index = build_index(builtin(*self.KINDS, n=20), processor)
        plan = plan_of(index, world_size=2, most_tokens=400)
        readers = [TrainMicroBatches(processor, plan, rank) for rank in range(2)]
        for step in range(3):
            batches = [
                reader[step * plan.accumulate_grad_batches + micro]
                for reader in readers
                for micro in range(plan.accumulate_grad_batches)
            ]
            assert sum(batch.num_supervised_tokens for batch in batches) == batches[0].step_supervised_tokens
            records = [index.get_record(int(sample)) for sample in plan.get_samples(step)]
            names = sorted(f"{record.source}/{record.id}" for record in records)
            assert sorted(name for batch in batches for name in batch.sample_ids) == names

    def test_held_out_samples_are_never_trained_on(self, processor):
        training, held_out = split_held_out(build_index(builtin(*self.KINDS, n=40), processor), 0.1)
        train, out = (
            set(zip(part.source_ids.tolist(), part.position.tolist(), strict=True)) for part in (training, held_out)
        )
        assert out and not train & out
        assert len(out) == len(self.KINDS) * 4

    def test_the_split_is_by_digest_and_grows_by_adding_only(self, processor):
        whole = build_index(builtin("caption", n=400), processor)
        small, large = (set(split_held_out(whole, fraction)[1].position.tolist()) for fraction in (0.05, 0.1))
        assert len(small) == 20
        assert small < large


def made_index_digest(index: SampleIndex) -> str:
    """Worked out from the columns, past what a test has put in the method's place."""
    return DIGEST(index)


def plan_of_in_memory(index: SampleIndex, monkeypatch, changes: dict) -> Plan:
    with monkeypatch.context() as context:
        context.setattr(plan_module, "sample_steps", DRAW_STEPS)
        return plan_of(index, **changes)


DIGEST, DRAW_STEPS = SampleIndex.compute_digest, plan_module.sample_steps
