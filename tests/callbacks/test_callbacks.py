"""Tests of the callbacks: throughput counts, losses by language, scores, and the stop before a non-finite step."""

import json
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from support import blueprint_of, builtin

from callbacks import Export, Guard, LanguageLoss, Report, Samples, Throughput, get_callback_class, make_callbacks
from lit_vlm.anyres import Tiling
from lit_vlm.config.callbacks import CALLBACKS
from lit_vlm.data.collate import collate
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.index import sample_index
from lit_vlm.data.processor import Processor
from lit_vlm.evaluation.generation import get_end_of_answer_id
from lit_vlm.evaluation.metrics import list_text_metrics
from lit_vlm.fault_tolerance.watchdog import Activity, Progress
from lit_vlm.reports.run_record import read_run
from lit_vlm.stages import AlignStage, DPOStage, SFTStage
from lit_vlm.types import Language, SampleKind, UserError

KINDS = ("caption", "number", "grounding", "text")


class Mine(L.Callback):
    """A callback of a user."""


class Needy(L.Callback):
    def __init__(self, something):
        self.something = something


class BreaksAt(SFTStage):
    """SFT stage whose loss is NaN in the second micro-batch of one step."""

    broken_step = 1

    def compute_loss(self, batch):
        loss = super().compute_loss(batch)
        broken = batch.step == self.broken_step and self.trainer.fit_loop.epoch_loop.batch_idx % 2 == 1
        self.broken_ids = batch.sample_ids if broken else getattr(self, "broken_ids", None)
        return loss * float("nan") if broken else loss


def build_sources(*kinds, n=20, **options):
    languages = (Language.ko, Language.en)
    return [
        source for language in languages for source in builtin(*(kinds or KINDS), n=n, language=language, **options)
    ]


def name_sources(sources):
    for source in sources:
        source.name = f"{source.path}_{source.language}"
    return sources


def build_datamodule(processor, *kinds, **options) -> DataModule:
    training, held_out = name_sources(build_sources(*kinds)), name_sources(build_sources(*kinds, n=5, held_out=True))
    defaults = {"global_batch_size": 16, "max_steps": 4, "tokens_per_micro_batch": 600, "tiles_per_micro_batch": 64}
    return DataModule(processor, training, held_out, **{**defaults, **options})


def fit(blueprint, callbacks, *, stage_class=SFTStage, kinds=KINDS, folder=None, data=None, **stage):
    processor = Processor(blueprint.tokenizer, blueprint.images)
    module = build_datamodule(processor, *kinds, **(data or {}))
    logger = CSVLogger(folder, name="", version="") if folder else False
    disabled = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        logger=logger,
        callbacks=callbacks,
        **disabled,
    )
    module_stage = stage_class(blueprint, learning_rate=1e-3, **stage)
    trainer.fit(module_stage, module)
    return trainer, module_stage, module


def test_throughput_counts_the_tokens_and_samples_of_the_plan(blueprint):
    throughput = Throughput()
    trainer, stage, module = fit(blueprint, [throughput])
    index, plan, figures = module.index, module.plan, throughput.figures()
    positions = [int(i) for step in range(plan.num_steps) for i in plan.get_samples(step)]
    assert plan.accumulate_grad_batches > 1
    assert figures["steps"] == plan.num_steps == 4
    assert figures["samples"] == len(positions) == 64
    assert figures["tokens"] == index.tokens[positions].sum()
    assert figures["supervised_tokens"] == index.supervised[positions].sum()
    assert figures["images"] == sum(len(index.get_record(i).images) for i in positions)
    assert figures["tokens_per_second"] == pytest.approx(figures["tokens"] / figures["seconds"])
    assert 0 <= figures["data_wait"] < 1
    assert figures["peak_memory_bytes"] > 1e6
    assert {f"throughput/{name}_per_second" for name in ("tokens", "supervised_tokens", "samples", "images")} <= set(
        trainer.callback_metrics
    )


def test_throughput_keeps_the_first_loss_and_the_mean_of_the_last_steps(blueprint):
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, stage, *_):
            if trainer.global_step > len(losses):
                losses.append(float(trainer.callback_metrics["train/loss"]))

    throughput = Throughput()
    fit(blueprint, [throughput, Losses()], data={"max_steps": 12, "global_batch_size": 4})
    figures = throughput.figures()
    assert len(losses) == 12
    assert figures["loss_first"] == pytest.approx(losses[0])
    assert figures["loss_last"] == pytest.approx(sum(losses[-10:]) / 10)


def test_validation_time_is_not_counted_as_training_time():
    throughput, clock = Throughput(), SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(max_steps=1, accumulate_grad_batches=9, world_size=1, is_global_zero=True)
    throughput.on_train_start(trainer, clock)
    throughput.on_train_batch_start(trainer, clock, None, 0)
    throughput.on_train_batch_end(trainer, clock, None, None, 0)
    waited = throughput._window["wait"]
    throughput.on_validation_start(trainer, clock)
    throughput.on_train_batch_start(trainer, clock, None, 1)
    assert throughput._window["wait"] == waited


def test_the_token_weighted_mean_of_the_language_losses_is_the_validation_loss(blueprint):
    trainer, stage, module = fit(blueprint, [LanguageLoss()])
    metrics, index = {name: float(value) for name, value in trainer.callback_metrics.items()}, module.held_out
    for codes, known in ((index.language, sample_index.LANGUAGES), (index.kind, sample_index.KINDS)):
        names = [known[code] for code in codes]
        tokens = {
            str(name): sum(int(n) for n, other in zip(index.supervised, names, strict=True) if other == name)
            for name in names
        }
        assert len(tokens) > 1
        mean = sum(count * metrics[f"val/loss_{name}"] for name, count in tokens.items()) / sum(tokens.values())
        assert mean == pytest.approx(metrics["val/loss"], rel=1e-5)


def test_a_stage_without_segment_losses_gets_no_language_loss(blueprint, tmp_path):
    samples, losses = Samples(tmp_path, shown=1), LanguageLoss()
    trainer, _, _ = fit(
        blueprint, [losses, samples], stage_class=DPOStage, kinds=("preference",), data={"max_steps": 1}
    )
    assert "val/loss" in trainer.callback_metrics and "val/loss_ko" not in trainer.callback_metrics
    row = read_run(tmp_path).samples[0]
    chosen = {
        record.id: record.chosen.text for record in (trainer.datamodule.held_out.get_record(i) for i in range(10))
    }
    assert row["reference"] == chosen[row["id"]]


def test_segments_of_pairs_are_chosen_answers_then_rejected_ones(processor):
    pairs = [record for source in build_sources("preference", n=2) for record in source]
    batch = collate(processor, pairs)
    callback, stage = LanguageLoss(), SimpleNamespace(device=torch.device("cpu"))
    languages = np.array([sample_index.LANGUAGES.index(language) for language in batch.languages])
    index = SimpleNamespace(language=languages, kind=np.array([], dtype=int))
    callback.on_validation_epoch_start(SimpleNamespace(datamodule=SimpleNamespace(held_out=index)), stage)
    sums, counts = torch.arange(8.0), torch.ones(8, dtype=torch.long)
    callback.on_validation_batch_end(None, stage, {"loss_sum": sums, "num_tokens": counts}, batch, 0)
    assert batch.languages == ["ko", "ko", "en", "en"]
    assert callback._metrics["ko"].compute() == (0 + 1 + 4 + 5) / 4
    assert callback._metrics["en"].compute() == (2 + 3 + 6 + 7) / 4


def test_guard_stops_before_the_weights_change_and_names_the_samples(blueprint):
    before = {}

    class Before(L.Callback):
        def on_train_batch_start(self, trainer, stage, batch, batch_idx):
            if batch.step == 1 and not before:
                before.update({name: value.clone() for name, value in stage.state_dict().items()})

    stages = []

    class Stage(BreaksAt):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            stages.append(self)

    tokens = {"tokens_per_micro_batch": 900, "global_batch_size": 16}
    with pytest.raises(UserError, match="Step 2: the loss is not a number") as error:
        fit(blueprint, [Before(), Guard()], stage_class=Stage, data=tokens)
    (stage,) = stages
    assert stage.broken_ids and all(name in str(error.value) for name in stage.broken_ids)
    assert (
        str(error.value).count("-train-") == len(stage.broken_ids) < 16
    )  # the micro-batch with a finite loss is not named
    assert "stage.learning_rate" in str(error.value)
    assert before and all(torch.equal(value, before[name]) for name, value in stage.state_dict().items())


def test_scores_before_and_after_are_recorded_with_a_few_samples(blueprint, tmp_path):
    samples = Samples(tmp_path, max_samples=3, shown=2)
    _, stage, module = fit(blueprint, [samples], folder=tmp_path)
    groups = {f"{kind}_{language}" for kind in KINDS for language in ("ko", "en")}
    figures = samples.figures()
    assert set(figures["scores"]) == {"before", "after"}
    assert all(set(scores) == groups for scores in figures["scores"].values())
    assert figures["num_scored"] == dict.fromkeys(groups, 3)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * len(groups) * 2
    assert {row["phase"] for row in rows} == {"before", "after"}
    assert all((tmp_path / path).is_file() for row in rows for path in row["images"])
    assert all(("<image>" in row["prompt"]) == bool(row["images"]) for row in rows)
    assert all(row["prediction"] != "" or row["score"] == 0 for row in rows)
    logged = read_run(tmp_path).metrics
    names = {f"score/{group}" for group in groups}
    for kind in KINDS:
        for metric in list_text_metrics(SampleKind(kind)):
            names |= {f"score/{metric}/{kind}_{language}" for language in ("ko", "en")}
    assert {name for name in logged if name.startswith("score/")} == names > {"score/chrf/caption_ko"}
    assert set(figures["text_scores"]["after"]["chrf"]) == {
        f"{kind}_{language}" for kind in ("caption", "text") for language in ("ko", "en")
    }
    assert all(set(row["text_scores"]) == set(list_text_metrics(SampleKind(row["kind"]))) for row in rows)


def test_a_model_that_knows_the_answers_scores_one(blueprint, tmp_path, monkeypatch):
    def answer_perfectly(model, processor, samples, max_new_tokens):
        assert max_new_tokens <= 160
        return [sample.messages[-1].text for sample in samples]

    monkeypatch.setattr("callbacks.samples.generate_answers", answer_perfectly)
    samples = Samples(tmp_path)
    fit(blueprint, [samples])
    assert set(samples.figures()["scores"]["after"].values()) == {1.0}
    assert {v for scores in samples.figures()["text_scores"]["after"].values() for v in scores.values()} == {1.0}


def test_a_resumed_fit_keeps_the_scores_before_training(blueprint, tmp_path):
    samples = Samples(tmp_path)
    samples.load_state_dict({"scores": {"before": {"caption_ko": 0.5}}, "num_scored": {"caption_ko": 2}})
    fit(blueprint, [samples], data={"max_steps": 1})
    assert samples.figures()["scores"]["before"] == {"caption_ko": 0.5}


def test_the_end_of_an_answer_is_taken_from_the_template_and_not_the_tokenizer(parts):
    blueprint = blueprint_of(parts, Tiling.base)
    blueprint.tokenizer.eos_token = "<|endoftext|>"
    processor = Processor(blueprint.tokenizer, blueprint.images)
    assert get_end_of_answer_id(processor) == blueprint.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_export_marks_progress_for_each_weight(blueprint, tmp_path, monkeypatch):
    """This holds for frozen and trained weights. Otherwise a slow disk would count as a stuck rank."""
    activities, mark_progress = [], Progress.mark_progress
    monkeypatch.setattr(
        Progress, "mark_progress", lambda progress: [mark_progress(progress), activities.append(progress.state.doing)]
    )
    fit(blueprint, [Export(tmp_path)], stage_class=AlignStage, data={"max_steps": 1})
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert activities.count(Activity.exporting) == len(file.keys())


def test_callbacks_are_ordered_with_export_samples_and_report_last(tmp_path):
    callbacks = make_callbacks(["report", "export", "samples", f"{__name__}.Mine", "guard"], tmp_path, max_samples=7)
    assert [type(callback).__name__ for callback in callbacks] == ["Guard", "Mine", "Export", "Samples", "Report"]
    assert callbacks[3].max_samples == 7
    assert isinstance(callbacks[-1], Report)
    ordered = sorted(CALLBACKS, key=lambda name: CALLBACKS[name].order)
    made = make_callbacks(list(CALLBACKS), tmp_path)
    assert [type(callback) for callback in made] == list(map(get_callback_class, ordered))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("throughputs", "there is no callback throughputs; there are throughput, language_loss, guard"),
        ("no_such_package.Mine", "no_such_package.Mine cannot be imported"),
        ("json.dumps", "json.dumps is not a class of lightning.Callback"),
        (f"{__name__}.Needy", "cannot be made without arguments"),
    ],
)
def test_a_name_that_is_no_callback_is_refused(name, message, tmp_path):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        make_callbacks([name], tmp_path)
