"""DataModule: its loaders yield the batches of the plan, stored or in memory, on any number of ranks and workers."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from index_cases import LinesSource, make_rows, save_photo, write
from support import builtin, sample

from lit_vlm.data import micro_batches
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.index.build import build_index
from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.micro_batches import CorruptRecord, TrainMicroBatches, ValidationMicroBatches
from lit_vlm.data.packing.plan import Plan
from lit_vlm.types import Batch, Fault, RecordError, UserError

COUNT = 40


@pytest.fixture
def lines(tmp_path) -> Path:
    return write(tmp_path / "a.jsonl", make_rows(tmp_path, COUNT))


@pytest.fixture
def make_datamodule(lines, processor):
    """Factory of a DataModule over the file and synthetic images."""

    def make_datamodule(**options) -> DataModule:
        sources = [LinesSource(lines), *builtin("caption", n=20)]
        return DataModule(processor, sources, **{"global_batch_size": 8, "validation": 0.2, **options})

    return make_datamodule


def get_steps(plan: Plan) -> list[list[int]]:
    return [
        sorted(sample for pack in plan.get_step(number).packs for sample in pack) for number in range(plan.num_steps)
    ]


def is_same(one: Plan, other: Plan) -> bool:
    packs = [[plan.get_step(number) for number in range(plan.num_steps)] for plan in (one, other)]
    return one.accumulate_grad_batches == other.accumulate_grad_batches and packs[0] == packs[1]


def read_batches(loader) -> list[Batch]:
    return list(loader)


def is_equal(one: Batch, other: Batch) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "labels", "tiles", "cu_seqlens")
    )
    return tensors and one.sample_ids == other.sample_ids and one.step == other.step and one.layouts == other.layouts


class TestPlan:
    def test_another_number_of_ranks_packs_the_same_samples(self, make_datamodule):
        datamodule = make_datamodule()
        plans = [datamodule.make_plan(world) for world in (1, 2, 3)]
        assert [plan.world_size for plan in plans] == [1, 2, 3] and datamodule.plan is plans[2]
        assert get_steps(plans[0]) == get_steps(plans[1]) == get_steps(plans[2])
        assert [len(plan.get_step(0).packs) for plan in plans] == [
            plan.accumulate_grad_batches * plan.world_size for plan in plans
        ]
        assert datamodule.make_plan(3) is plans[2]

    def test_a_stored_plan_equals_the_one_in_memory(self, make_datamodule, tmp_path):
        memory, first, second = (
            make_datamodule(store=store).make_plan(2) for store in (None, tmp_path / "s", tmp_path / "s")
        )
        assert is_same(memory, first) and is_same(first, second)
        assert (
            len(list((tmp_path / "s").glob("steps-*.arrow"))) == len(list((tmp_path / "s").glob("packs-*.arrow"))) == 1
        )

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:-20],
            lambda data: data[: len(data) // 2],
            lambda data: b"ARROW1" + bytes(200),
        ],
        ids=["empty", "torn", "half", "foreign"],
    )
    @pytest.mark.parametrize("name", ["steps", "packs"])
    def test_a_damaged_plan_is_built_again(self, make_datamodule, tmp_path, name, damage):
        whole = make_datamodule(store=tmp_path / "s").make_plan(2)
        (file,) = (tmp_path / "s").glob(f"{name}-*.arrow")
        original = file.read_bytes()
        steps = [whole.get_step(number) for number in range(whole.num_steps)]
        del whole
        file.unlink()  # other processes may have it mapped
        file.write_bytes(damage(original))
        again = make_datamodule(store=tmp_path / "s").make_plan(2)
        assert [again.get_step(number) for number in range(again.num_steps)] == steps and file.read_bytes() == original

    def test_a_plan_under_the_name_of_another_is_built_again(self, make_datamodule, tmp_path):
        whole = make_datamodule(store=tmp_path / "s").make_plan(1)
        make_datamodule(store=tmp_path / "s", seed=1).make_plan(1)
        one, other = sorted((tmp_path / "s").glob("steps-*.arrow"))
        original, foreign = one.read_bytes(), other.read_bytes()
        for path, data in ((one, foreign), (other, original)):
            path.unlink()
            path.write_bytes(data)
        assert is_same(whole, make_datamodule(store=tmp_path / "s").make_plan(1))

    def test_a_plan_without_a_usable_sample_is_an_error(self, processor, lines):
        datamodule = DataModule(processor, [LinesSource(lines)], tokens_per_micro_batch=2)
        with pytest.raises(UserError, match="No usable sample for training in the sources: lines"):
            datamodule.make_plan()

    def test_overfit_repeats_the_first_step(self, make_datamodule):
        plan, usual = make_datamodule(overfit=True, max_steps=5).make_plan(1), make_datamodule(max_steps=5).make_plan(1)
        names = {(index.source_ids[i], index.position[i]) for index in (usual.index,) for i in usual.get_samples(0)}
        for number in range(5):
            assert {(plan.index.source_ids[i], plan.index.position[i]) for i in plan.get_samples(number)} == names


class TestLoaders:
    @pytest.mark.parametrize("stored", [False, True])
    def test_workers_yield_the_batches_of_one_process(self, make_datamodule, tmp_path, stored):
        store = tmp_path / "s" if stored else None
        alone, workers = (make_datamodule(store=store, num_workers=number) for number in (0, 2))
        for name in ("train_dataloader", "val_dataloader"):
            one, other = (read_batches(getattr(datamodule, name)()) for datamodule in (alone, workers))
            assert len(one) == len(other) > 0 and all(map(is_equal, one, other))

    def test_all_ranks_together_read_each_sample_of_a_step_once(self, make_datamodule):
        datamodule = make_datamodule()
        plan = datamodule.make_plan(3)
        ranks = [TrainMicroBatches(datamodule.processor, plan, rank) for rank in range(3)]
        for number in range(plan.num_steps):
            batches = [
                rank[number * plan.accumulate_grad_batches + micro]
                for micro in range(plan.accumulate_grad_batches)
                for rank in ranks
            ]
            names = sorted(name for batch in batches for name in batch.sample_ids)
            records = [plan.index.get_record(sample) for sample in plan.get_samples(number)]
            assert names == sorted(f"{record.source}/{record.id}" for record in records)
            assert sum(batch.num_supervised_tokens for batch in batches) == batches[0].step_supervised_tokens

    def test_held_out_samples_are_read_once_over_all_ranks_and_never_trained_on(self, make_datamodule):
        datamodule = make_datamodule()
        plan = datamodule.make_plan(1)
        held, index = datamodule.held_out, datamodule.index
        pairs = [{(int(i.source_ids[n]), int(i.position[n])) for n in range(len(i))} for i in (held, index)]
        assert not pairs[0] & pairs[1] and sum(map(len, pairs)) == COUNT + 20
        assert {
            (int(index.source_ids[n]), int(index.position[n])) for n in plan.get_sample_sequence().tolist()
        } == pairs[1]
        read = [name for batch in read_batches(datamodule.val_dataloader()) for name in batch.sample_ids]
        assert len(read) == len(set(read)) == len(held)

    def test_lightning_takes_steps_and_accumulation_from_the_plan(self, make_datamodule):
        datamodule = make_datamodule(tokens_per_micro_batch=200)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=3)
        datamodule.trainer = trainer
        datamodule.setup("fit")
        assert (
            trainer.accumulate_grad_batches == datamodule.plan.accumulate_grad_batches > 1
            and datamodule.plan.num_steps == 3
        )
        assert len(datamodule.train_dataloader()) == 3 * datamodule.plan.accumulate_grad_batches
        assert datamodule.state_dict() == {}


class FailingSource(LinesSource):
    """Source in which reading record 7 fails `failing` times."""

    failing = 0

    def __getitem__(self, index):
        if index == 7 and self.failing:
            self.failing -= 1
            raise RecordError("a.jsonl:8", "Input/output error", fault=Fault.unreadable)
        return super().__getitem__(index)


class TestCorruptRecords:
    @pytest.fixture
    def index(self, lines, processor, monkeypatch) -> SampleIndex:
        monkeypatch.setattr(micro_batches, "RETRY_DELAYS", (0.0, 0.0))
        return build_index([FailingSource(lines)], processor)

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_failed_read_is_retried(self, index, processor, times):
        index.sources[0].failing = times
        batch = micro_batches.read_micro_batch(processor, index, (6, 7, 8))
        assert isinstance(batch, Batch) and len(batch.sample_ids) == 3 and index.sources[0].failing == 0

    def test_the_corrupt_record_is_identified_in_any_pack(self, index, processor):
        index.sources[0].failing = 10**6
        for pack in ((7,), (6, 7, 8), (8, 7), (1, 2, 7)):
            bad = micro_batches.read_micro_batch(processor, index, pack)
            assert isinstance(bad, CorruptRecord) and (bad.source, bad.position) == ("lines", 7)
            assert bad.error.fault is Fault.unreadable
        bad = ValidationMicroBatches(processor, index, [(6, 7)], separate_sources=True)[0]
        assert bad.held_out and bad.add_to_ledger(None) is bad.error

    def test_an_image_error_of_another_origin_is_attributed_to_its_record(self, processor, monkeypatch):
        """The source of a user can give its images any names."""
        monkeypatch.setattr(micro_batches, "RETRY_DELAYS", (0.0, 0.0))
        records = [sample("What?", f"{number}", (40, 40), seed=number) for number in range(3)]

        class OwnSource:
            name, digest = "own", "1"
            __len__ = lambda self: 3
            __getitem__ = lambda self, index: records[index]

        index = build_index([OwnSource()], processor)

        def load_or_fail(image):
            if image is records[1].images[0]:
                raise RecordError("some picture", "broken", fault=Fault.broken)
            return load(image)

        load = type(records[1].images[0]).load
        monkeypatch.setattr(type(records[1].images[0]), "load", load_or_fail)
        bad = micro_batches.read_micro_batch(processor, index, (0, 1, 2))
        assert isinstance(bad, CorruptRecord) and bad.position == 1

    def test_a_changed_record_of_the_same_number_of_tokens_is_detected(self, tmp_path, processor):
        """One token less in the question and one more in the answer: only the divisor of the loss changes."""
        path = write(tmp_path / "b.jsonl", [{"turns": ["a a", "a"]}, {"turns": ["a", "a"]}])
        index = build_index([LinesSource(path)], processor)
        source = LinesSource(write(tmp_path / "b.jsonl", [{"turns": ["a", "a a"]}, {"turns": ["a", "a"]}]))
        changed = SampleIndex([source], index.source_ids, index.columns)
        assert processor.compute_cost(source[0]).num_tokens == index.tokens[0]
        bad = micro_batches.run_with_retries(
            lambda: micro_batches._read_micro_batch_once(processor, changed, (1, 0)), processor, changed, (1, 0)
        )
        assert isinstance(bad, CorruptRecord) and bad.position == 0 and bad.error.fault is Fault.changed
        assert "supervised tokens now and had" in bad.error.reason

    def test_a_replaced_image_is_detected_by_its_number_of_tokens(self, index, processor, tmp_path):
        save_photo(tmp_path / "1.jpg", width=300, height=40, seed=9)
        numbers = np.flatnonzero(index.images > 0)
        found = [micro_batches.read_micro_batch(processor, index, (int(number),)) for number in numbers]
        bad = [batch for batch in found if isinstance(batch, CorruptRecord)]
        assert bad and all(one.error.fault is Fault.changed for one in bad)
        assert {int(one.position) % 4 for one in bad} == {1}
