"""The plan is a pure function, keeps its limits, loses no sample and makes packs of equal work."""

import multiprocessing
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from made_index import FLOPS, make_index, make_shaped_index
from support import builtin

from lit_vlm.cost import Flops
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.sample_index import KINDS, SampleIndex, split_held_out
from lit_vlm.data.micro_batches import TrainMicroBatches
from lit_vlm.data.packing import plan as plan_module
from lit_vlm.data.packing.mixture import Mixture, MixtureSettings, SourceAmount
from lit_vlm.data.packing.pack import MicroBatchLimits, gather_steps, try_pack
from lit_vlm.data.packing.plan import Plan, PlanStep, pack_validation
from lit_vlm.data.quarantine import Ledger
from lit_vlm.types import RecordError, SampleKind, UserError

TOKENS = Flops(per_token=1.0, per_square=0.0, per_tile=0.0, per_supervised=0.0)


@pytest.fixture
def index() -> SampleIndex:
    """200 samples of two sources, 10 to 100 tokens and 0 to 4 tiles each."""
    tiles = np.random.default_rng(1).integers(0, 5, 200)
    return make_index({"a": 150, "b": 50}, tiles=tiles, images=tiles > 0)


def make_plan(index: SampleIndex, mixture: Mixture | None = None, **changes) -> Plan:
    options = {"flops": FLOPS, "global_batch_size": 16, "max_tokens": 4096, "max_tiles": 64, "max_epochs": 2.0}
    return Plan(index, mixture, **{**options, **changes})


def get_steps(plan: Plan) -> list[PlanStep]:
    return [plan.get_step(number) for number in range(plan.num_steps)]


def list_samples(step: PlanStep) -> list[int]:
    return sorted(sample for pack in step.packs for sample in pack)


def is_equal(one: Plan, other: Plan) -> bool:
    return one.accumulate_grad_batches == other.accumulate_grad_batches and get_steps(one) == get_steps(other)


class TestSteps:
    def test_a_step_has_the_same_samples_for_any_world_size_and_limits(self, index):
        settings = ((1, 4096, 64), (2, 4096, 64), (4, 300, 9), (3, 400, 64), (64, 101, 4))
        plans = [make_plan(index, world_size=w, max_tokens=t, max_tiles=i) for w, t, i in settings]
        for step in zip(*(get_steps(plan) for plan in plans), strict=True):
            assert all(list_samples(one) == list_samples(step[0]) for one in step)
            assert all(replace(one, packs=()) == replace(step[0], packs=()) for one in step)

    def test_totals_of_a_step_are_the_sums_over_its_samples(self, index):
        plan = make_plan(index, world_size=2)
        for number, step in enumerate(get_steps(plan)):
            samples = plan.get_samples(number)
            assert step.num_samples == len(samples) == 16
            assert step.num_supervised == index.supervised[samples].sum()
            assert step.num_tiles == index.tiles[samples].sum()
            assert list_samples(step) == sorted(samples)

    def test_a_pass_reads_every_sample_before_any_is_repeated(self, index):
        plan = make_plan(index)
        counts = Counter(plan.get_sample_sequence().tolist())
        assert set(counts) == set(range(len(index)))
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_another_seed_gives_another_order_and_the_same_seed_the_same(self, index):
        one, same, other = (make_plan(index, seed=seed) for seed in (0, 0, 1))
        assert is_equal(one, same)
        assert not np.array_equal(one.get_samples(0), other.get_samples(0))

    def test_reading_step_k_needs_no_earlier_step(self, index):
        fresh, read = make_plan(index), make_plan(index)
        assert fresh.get_step(fresh.num_steps - 1) == get_steps(read)[-1]
        with pytest.raises(IndexError):
            fresh.get_step(fresh.num_steps)

    def test_epochs_and_fractions_of_epochs_become_steps(self, index):
        assert make_plan(index, max_epochs=2.0).num_steps == 25
        assert make_plan(index, max_epochs=0.25).num_steps == 4
        assert make_plan(index, max_epochs=0.001).num_steps == 1
        assert make_plan(index, max_steps=7).num_steps == 7
        half = Mixture(index, MixtureSettings({"a": SourceAmount(count=50)}))
        assert make_plan(index, half, max_epochs=1.0, global_batch_size=10).num_steps == 10

    def test_a_longer_plan_starts_with_the_steps_of_a_shorter_one(self, index):
        few, many = make_plan(index, max_steps=5), make_plan(index, max_steps=200)
        assert all(np.array_equal(few.get_samples(number), many.get_samples(number)) for number in range(5))

    @pytest.mark.parametrize("bad", ({"global_batch_size": 0}, {"max_epochs": 0.0}, {"global_batch_size": None}))
    def test_an_empty_length_is_refused(self, index, bad):
        with pytest.raises(UserError, match=r"data\.global_batch_size|trainer\.max_epochs"):
            make_plan(index, **bad)


class TestTokenSizedSteps:
    def test_a_step_ends_with_the_sample_that_reaches_the_target(self, index):
        plan = make_plan(index, global_batch_tokens=700)
        assert plan.global_batch_size is None
        for number in range(plan.num_steps):
            tokens = index.tokens[plan.get_samples(number)]
            assert tokens.sum() >= 700 > tokens[:-1].sum()

    def test_steps_in_tokens_are_the_same_for_every_world_size_and_follow_the_same_sample_sequence(self, index):
        by_size, *plans = (
            make_plan(index),
            *(make_plan(index, global_batch_tokens=700, world_size=w, max_tokens=t) for w, t in ((1, 4096), (3, 200))),
        )
        assert [list_samples(step) for step in get_steps(plans[0])] == [
            list_samples(step) for step in get_steps(plans[1])
        ]
        assert np.array_equal(
            by_size.get_sample_sequence(), plans[0].get_sample_sequence()[: len(by_size.get_sample_sequence())]
        )

    def test_the_number_of_steps_is_given_or_covers_the_epochs(self, index):
        assert make_plan(index, global_batch_tokens=700, max_steps=90).num_steps == 90
        plan = make_plan(index, global_batch_tokens=700, max_epochs=1.5)
        assert (
            len(plan.get_sample_sequence()) - len(plan.get_samples(plan.num_steps - 1))
            < 300
            <= len(plan.get_sample_sequence())
        )

    def test_more_samples_are_added_when_they_are_shorter_than_the_mean(self):
        tokens = np.concatenate([np.full(10, 1000), np.full(10, 10)])
        index = make_index({"long": 10, "short": 10}, tokens=tokens)
        short = Mixture(index, MixtureSettings({"long": SourceAmount(weight=0.0), "short": SourceAmount(weight=1.0)}))
        plan = make_plan(index, short, global_batch_tokens=1000, max_steps=3)
        assert [step.num_samples for step in get_steps(plan)] == [100, 100, 100]


class TestLimits:
    def test_limits_are_kept_with_one_number_of_micro_batches_for_the_stage(self, index):
        plan = make_plan(index, world_size=2, max_tokens=400, max_tiles=24)
        assert plan.accumulate_grad_batches > 1
        for step in get_steps(plan):
            assert len(step.packs) == plan.accumulate_grad_batches * 2
            assert max(index.tokens[list(pack)].sum() for pack in step.packs) <= 400
            assert max(index.tiles[list(pack)].sum() for pack in step.packs) <= 24

    @pytest.mark.parametrize("seed", range(25))
    def test_limits_hold_for_samples_of_any_shape(self, seed):
        generator = np.random.default_rng(seed)
        count, world, batch = (int(generator.integers(low, high)) for low, high in ((1, 90), (1, 9), (1, 40)))
        tokens = np.ceil(np.exp(generator.normal(3, 1.2, count))).astype(int)
        tiles = generator.integers(0, 12, count)
        limits = {
            "max_tokens": int(tokens.max() * generator.uniform(1, 4)),
            "max_tiles": int(tiles.max() * generator.uniform(1, 3)) + 1,
        }
        batches = {"global_batch_size": batch} if seed % 3 else {"global_batch_tokens": int(tokens.sum() / 3) + 1}
        index = make_index({"a": count}, tokens=tokens, tiles=tiles)
        plan = make_plan(index, world_size=world, **limits, **batches)
        for number, step in enumerate(get_steps(plan)):
            assert list_samples(step) == sorted(plan.get_samples(number))
            for pack in step.packs:
                assert index.tokens[list(pack)].sum() <= limits["max_tokens"]
                assert index.tiles[list(pack)].sum() <= limits["max_tiles"]

    def test_the_number_of_micro_batches_is_the_smallest_within_the_limits(self, index):
        plan = make_plan(index, max_tokens=350)
        tokens = [index.tokens[plan.get_samples(number)].sum() for number in range(plan.num_steps)]
        assert (
            plan.accumulate_grad_batches == 4 == max(-(-total // 350) for total in tokens)
        )  # no fewer packs could hold the largest step
        ends = np.arange(1, plan.num_steps + 1) * 16
        step_samples = gather_steps(index, FLOPS, plan.get_sample_sequence(), ends, np.arange(plan.num_steps))
        assert try_pack(step_samples, MicroBatchLimits(350, 64), plan.accumulate_grad_batches, 1) is not None
        assert try_pack(step_samples, MicroBatchLimits(350, 64), plan.accumulate_grad_batches - 1, 1) is None

    @pytest.mark.parametrize("seed", range(5))
    def test_nearly_full_packs_are_found_before_the_number_of_micro_batches_is_raised(self, seed):
        index = make_shaped_index("mix665k", 64, seed)
        cap = int(index.tokens.sum() / 8 / 0.99)
        plan = make_plan(index, global_batch_size=64, max_steps=1, world_size=8, max_tokens=cap)
        assert plan.accumulate_grad_batches == 1
        assert plan.measure_balance()["tokens"]["largest"] <= cap

    def test_a_sample_above_a_limit_is_an_error_with_the_remedy(self, index):
        with pytest.raises(UserError, match=r"samples have more than data\.tokens_per_micro_batch=50 .*on_overlong"):
            make_plan(index, max_tokens=50)
        with pytest.raises(UserError, match=r"data\.tiles_per_micro_batch=3 tiles, the largest 4"):
            make_plan(index, max_tiles=3)

    def test_more_ranks_than_samples_leave_empty_packs(self, index):
        plan = make_plan(index, world_size=24)
        assert plan.accumulate_grad_batches == 1
        assert all(step.packs.count(()) == 8 for step in get_steps(plan))
        assert plan.measure_balance()["blank_packs"] == 8 * plan.num_steps

    def test_a_preference_pair_is_one_unit(self):
        index = make_index({"pairs": 40}, kind=KINDS.index(SampleKind.preference), chosen=7, tokens=100)
        plan = make_plan(index, max_tokens=250, world_size=2)
        assert all(len(pack) <= 2 for step in get_steps(plan) for pack in step.packs)
        assert all(step.num_chosen == 16 * 7 for step in get_steps(plan))


def find_least_maximum(work: np.ndarray, num_packs: int) -> float:
    """Find the least work of the heaviest pack over all ways to pack the samples."""
    weights, best = sorted(work.tolist(), reverse=True), np.inf

    def place(number: int, loads: tuple[float, ...]) -> None:
        nonlocal best
        if number == len(weights):
            best = min(best, loads[-1])
            return
        for load in set(loads):
            if load + weights[number] < best:
                rest = list(loads)
                rest.remove(load)
                place(number + 1, tuple(sorted([*rest, load + weights[number]])))

    place(0, (0.0,) * num_packs)
    return best


class TestBalance:
    @pytest.mark.parametrize(("shape", "cap"), (("lcs", 8192), ("mix665k", 8192), ("anyres", 16384)))
    @pytest.mark.parametrize(("world", "per_rank"), ((8, 8), (8, 16), (64, 8), (256, 8)))
    def test_ranks_with_eight_samples_wait_for_less_than_three_percent(self, shape, cap, world, per_rank):
        index = make_shaped_index(shape, max(2048, world * per_rank))
        plan = make_plan(index, global_batch_size=world * per_rank, max_tokens=cap, world_size=world, max_epochs=1.0)
        balance = plan.measure_balance()
        assert balance["micro_steps"]["mean"] >= 0.97
        assert balance["ranks"]["mean"] >= 0.97
        assert balance["tokens"]["largest"] <= cap
        assert balance["tiles"]["largest"] <= 64

    @pytest.mark.parametrize(("shape", "world"), (("lcs", 8), ("mix665k", 8), ("anyres", 5)))
    def test_two_samples_a_rank_come_near_the_best_packs_there_are(self, shape, world):
        index = make_shaped_index(shape, 200)
        limits = {"max_tokens": 16384, "max_tiles": 99}
        plan = make_plan(index, global_batch_size=2 * world, **limits, world_size=world, max_steps=12)
        ratios = []
        for step in get_steps(plan):
            work = index.compute_flops(FLOPS)
            slowest = max(work[list(pack)].sum() for pack in step.packs)
            ratios.append(find_least_maximum(work[list_samples(step)], world) / slowest)
        assert plan.accumulate_grad_batches == 1 and np.mean(ratios) > 0.997

    def test_packs_hold_nearly_equal_work(self, index):
        plan = make_plan(index, world_size=2, global_batch_size=64, max_tokens=100_000, max_tiles=10_000)
        for step in get_steps(plan):
            work = [index.compute_flops(FLOPS)[list(pack)].sum() for pack in step.packs]
            assert min(work) / max(work) > 0.98

    def test_packs_of_similar_work_share_a_micro_step(self):
        """Six samples that fill a pack alone, in three micro-steps of two ranks."""
        index = make_index({"a": 6}, tokens=[100, 20, 60, 99, 61, 21])
        plan = make_plan(index, flops=TOKENS, global_batch_size=6, max_tokens=100, world_size=2, max_steps=1)
        plan_packs = [index.tokens[list(pack)].sum() for pack in plan.get_step(0).packs]
        assert plan.accumulate_grad_batches == 2 and sorted(plan_packs[:2]) == [
            99,
            100,
        ]  # 60 + 21 and 61 + 20 after them
        assert abs(sum(plan_packs[0::2]) - sum(plan_packs[1::2])) <= 2
        assert plan.measure_balance()["ranks"]["mean"] > 0.99

    def test_balance_is_computed_from_the_packs(self, index):
        plan = make_plan(index, world_size=2, max_tokens=400)
        micro = []
        for step in get_steps(plan):
            work = np.array([index.compute_flops(FLOPS)[list(pack)].sum() for pack in step.packs]).reshape(
                plan.accumulate_grad_batches, 2
            )
            micro.append(work.sum() / 2 / work.max(axis=1).sum())
        assert plan.measure_balance()["micro_steps"] == pytest.approx({"mean": np.mean(micro), "min": np.min(micro)})


class TestStore:
    def test_a_stored_plan_equals_the_one_in_memory(self, index, tmp_path):
        options = {"world_size": 3, "max_tokens": 300}
        plans = [make_plan(index, **options), *(make_plan(index, **options, store=tmp_path / "s") for _ in range(2))]
        assert is_equal(plans[0], plans[1]) and is_equal(plans[0], plans[2])

    def test_one_of_several_processes_builds_and_the_others_wait(self, index, tmp_path):
        def build() -> None:
            built = plan_module.sample_steps

            def record_and_sample(*arguments):
                (tmp_path / f"drawn-{os.getpid()}").touch()
                return built(*arguments)

            plan_module.sample_steps = record_and_sample
            os._exit(0 if is_equal(make_plan(index, store=tmp_path / "store"), in_memory) else 1)

        in_memory = make_plan(index)
        processes = [multiprocessing.get_context("fork").Process(target=build) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert len(list(tmp_path.glob("drawn-*"))) == 1

    def test_a_cached_plan_opens_without_reading_the_index(self, index, tmp_path, monkeypatch):
        plan = make_plan(index, store=tmp_path, world_size=2)

        class UnreadableColumns(dict):
            def __getitem__(self, key):
                raise AssertionError(f"read {key}")

        closed = SampleIndex(index.sources, None, UnreadableColumns())
        monkeypatch.setattr(SampleIndex, "compute_digest", lambda self: pytest.fail("the digest reads all"))
        monkeypatch.setattr(plan_module, "sample_steps", lambda *_: pytest.fail("drawn again"))
        again = make_plan(closed, store=tmp_path, world_size=2, digest=compute_original_digest(index))
        assert is_equal(plan, again)

    def test_another_world_size_or_limit_packs_again_and_does_not_sample_again(self, index, tmp_path, monkeypatch):
        make_plan(index, store=tmp_path)
        monkeypatch.setattr(plan_module, "sample_steps", lambda *_: pytest.fail("drawn again"))
        for changes in ({"world_size": 4}, {"max_tokens": 300}, {"max_tiles": 20}, {"flops": TOKENS}):
            assert is_equal(
                make_plan(index, store=tmp_path, **changes), make_plan_in_memory(index, monkeypatch, changes)
            )

    @pytest.mark.parametrize("change", ({"seed": 1}, {"global_batch_size": 8}, {"max_epochs": 3.0}, {"max_steps": 4}))
    def test_other_settings_are_another_plan(self, index, tmp_path, change):
        make_plan(index, store=tmp_path)
        assert is_equal(make_plan(index, store=tmp_path, **change), make_plan(index, **change))

    def test_another_index_or_mixture_is_another_plan(self, index, tmp_path):
        make_plan(index, store=tmp_path)
        other = make_index({"a": 150, "b": 50}, seed=5)
        assert is_equal(make_plan(other, store=tmp_path), make_plan(other))
        mixture = Mixture(index, MixtureSettings({"a": SourceAmount(repeat=2)}))
        assert is_equal(make_plan(index, mixture, store=tmp_path), make_plan(index, mixture))

    @pytest.mark.parametrize("damage", (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: bytes(len(b))))
    @pytest.mark.parametrize("name", ("steps", "packs"))
    def test_a_damaged_file_is_built_again(self, index, tmp_path, name, damage):
        make_plan(index, store=tmp_path)
        (path,) = tmp_path.glob(f"{name}-*.arrow")
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert is_equal(make_plan(index, store=tmp_path), make_plan(index))
        assert path.read_bytes() == whole

    def test_a_file_of_another_key_is_built_again(self, index, tmp_path):
        make_plan(index, store=tmp_path / "one")
        make_plan(index, store=tmp_path / "two", seed=1)
        for name in ("steps", "packs"):
            (foreign,), (own,) = ((tmp_path / folder).glob(f"{name}-*.arrow") for folder in ("one", "two"))
            own.write_bytes(foreign.read_bytes())
        assert is_equal(make_plan(index, store=tmp_path / "two", seed=1), make_plan(index, seed=1))


class TestLedger:
    def add_entries(self, index: SampleIndex, tmp_path, *samples: int) -> Ledger:
        ledger = Ledger.read(tmp_path / "ledger.jsonl")
        for sample in samples:
            name = index.sources[index.source_ids[sample]].name
            ledger.add(name, int(index.position[sample]), RecordError("file:1", "broken"))
        return Ledger.read(tmp_path / "ledger.jsonl")

    def test_samples_in_the_ledger_are_left_out_and_all_others_keep_their_place(self, index, tmp_path):
        ledger = self.add_entries(index, tmp_path, 3, 170)
        for world in (1, 3):
            plan, without = (make_plan(index, world_size=world, max_tokens=400, ledger=one) for one in (None, ledger))
            assert plan.accumulate_grad_batches == without.accumulate_grad_batches
            for number, (step, fewer) in enumerate(zip(get_steps(plan), get_steps(without), strict=True)):
                expected = tuple(tuple(s for s in pack if s not in (3, 170)) for pack in step.packs)
                assert fewer.packs == expected
                left = plan.get_samples(number)[~np.isin(plan.get_samples(number), [3, 170])]
                assert np.array_equal(without.get_samples(number), left)
                assert fewer.num_samples == len(left)
                assert fewer.num_supervised == index.supervised[left].sum()
                assert fewer.num_tiles == index.tiles[left].sum()

    def test_a_step_that_lost_all_samples_is_empty(self, tmp_path):
        index = make_index({"a": 6})
        plan = make_plan(index, global_batch_size=2, ledger=self.add_entries(index, tmp_path, *range(6)), world_size=2)
        assert all(step == PlanStep(((), ()), 0, 0, 0, 0) for step in get_steps(plan))

    def test_a_cached_plan_is_not_built_again_for_the_ledger(self, index, tmp_path, monkeypatch):
        make_plan(index, store=tmp_path)
        monkeypatch.setattr(plan_module, "sample_steps", lambda *_: pytest.fail("drawn again"))
        monkeypatch.setattr(plan_module, "pack_steps", lambda *_: pytest.fail("dealt again"))
        plan = make_plan(index, store=tmp_path, ledger=self.add_entries(index, tmp_path, 3))
        assert 3 not in {sample for step in get_steps(plan) for sample in list_samples(step)}


class TestValidation:
    def test_validation_reads_each_sample_once_on_any_number_of_ranks(self, index):
        for world in (1, 2, 3, 300):
            packs = pack_validation(index, max_tokens=300, max_tiles=9, world_size=world, flops=FLOPS)
            assert len(packs) % world == 0
            assert sorted(sample for pack in packs for sample in pack) == list(range(len(index)))
            assert all(index.tokens[list(pack)].sum() <= 300 and index.tiles[list(pack)].sum() <= 9 for pack in packs)

    def test_validation_packs_are_few_and_of_equal_work(self):
        index = make_shaped_index("mix665k", 400)
        packs = pack_validation(index, max_tokens=8192, max_tiles=64, world_size=4, flops=FLOPS)
        assert len(packs) == -(-int(index.tokens.sum()) // (8192 * 4)) * 4
        work = np.array([index.compute_flops(FLOPS)[list(pack)].sum() for pack in packs]).reshape(-1, 4)
        assert work.sum() / 4 / work.max(axis=1).sum() > 0.97

    def test_no_held_out_sample_gives_no_pack(self, index):
        empty = index.select(np.array([], dtype=np.int64))
        assert pack_validation(empty, max_tokens=300, max_tiles=9, world_size=2, flops=FLOPS) == []

    def test_large_sets_are_packed_in_parts(self, index, monkeypatch):
        monkeypatch.setattr(plan_module, "BLOCK_SIZE", 64)
        packs = pack_validation(index, max_tokens=300, max_tiles=64, world_size=3, flops=FLOPS)
        assert len(packs) % 3 == 0
        assert sorted(sample for pack in packs for sample in pack) == list(range(len(index)))


class TestRecords:
    KINDS = ("caption", "number", "grounding", "text", "multi_image")

    def test_the_total_of_a_step_is_the_sum_over_its_micro_batches(self, processor):
        index = build_index(builtin(*self.KINDS, n=20), processor)
        plan = make_plan(index, world_size=2, max_tokens=400)
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

    def test_the_held_out_split_is_by_digest_and_only_grows(self, processor):
        whole = build_index(builtin("caption", n=400), processor)
        small, large = (set(split_held_out(whole, fraction)[1].position.tolist()) for fraction in (0.05, 0.1))
        assert len(small) == 20
        assert small < large


def compute_original_digest(index: SampleIndex) -> str:
    """Compute the digest from the columns, also while a test has replaced the method."""
    return DIGEST(index)


def make_plan_in_memory(index: SampleIndex, monkeypatch, changes: dict) -> Plan:
    with monkeypatch.context() as context:
        context.setattr(plan_module, "sample_steps", SAMPLE_STEPS)
        return make_plan(index, **changes)


DIGEST, SAMPLE_STEPS = SampleIndex.compute_digest, plan_module.sample_steps
