"""Cached log-probabilities of the reference model: the same numbers as with a reference model in memory."""

import copy

import numpy as np
import pytest
import torch
from fits import export_copy, fit
from support import builtin

from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.index.build import build_index
from lit_vlm.data.processor import Processor
from lit_vlm.model.export import export_model
from lit_vlm.model.spec import load_model_spec
from lit_vlm.stages import DPOStage, dpo
from lit_vlm.stages.caches import ReferenceLogProbCache, compute_cache_key
from lit_vlm.types import UserError


@pytest.fixture
def folder(model, processor, tmp_path):
    return export_copy(model, processor, tmp_path / "hf")


def train(folder, processor, store, n=24, steps=9, precision="32-true", **options):
    # for a bias without a true gradient, Adam turns rounding errors into a step; with this eps it does not
    options = {"learning_rate": 3e-3, "adam_eps": 1e-6, "warmup": 0.0, "beta": 0.5, "cache_reference": True, **options}
    stage = DPOStage(folder, **options)
    data = {"global_batch_size": 6, "max_steps": steps}
    return fit(stage, processor, builtin("preference", n=n), store, precision=precision, **data), stage


def list_parts(store):
    return sorted((store / "reference").rglob("part-*.safetensors"))


@pytest.mark.parametrize(
    "options",
    [{}, {"parts": {"language_model": {"lora": {"rank": 2}}}}, {"loss_type": ["ipo", "sft"], "ld_alpha": 0.5}],
    ids=["copy", "LoRA", "other losses"],
)
def test_cached_log_probabilities_train_as_a_reference_in_memory_does(folder, processor, tmp_path, options):
    cached, stage = train(folder, processor, tmp_path / "store", **options)
    online, _ = train(folder, processor, tmp_path / "store", cache_reference=False, **options)
    assert stage.reference is None and cached.losses[-1] != pytest.approx(cached.losses[0], rel=1e-2)
    # rewards are beta times differences of sums of log-probabilities, and the loss is no steeper: both have the rounding
    # error of these sums, a millionth of the sums, however small they are themselves
    rounding = 0.5 * 1e-6 * max(abs(value) for name, value in online.metrics.items() if "logps/" in name)
    assert cached.losses == pytest.approx(online.losses, rel=1e-5, abs=rounding)
    assert (
        online.metrics.pop("val/kl") > 0
        and "val/kl is not computed with stage.cache_reference=true" in cached.messages[-1]
    )
    assert cached.metrics == pytest.approx(online.metrics, rel=1e-4, abs=rounding)


@pytest.mark.parametrize("options", [{}, {"parts": {"language_model": {"lora": {"rank": 2}}}}], ids=["copy", "LoRA"])
def test_val_kl_is_the_mean_divergence_over_the_vocabulary_at_the_answers_positions(
    folder, processor, tmp_path, options, monkeypatch
):
    monkeypatch.setattr(dpo, "KL_CHUNK_TOKENS", 7)
    result, stage = train(folder, processor, tmp_path / "store", steps=3, cache_reference=False, **options)
    total = tokens = 0.0
    for number in range(len(result.data.held_out)):
        batch = collate(processor, [result.data.held_out.get_record(number)])
        with torch.no_grad():
            *_, hidden = stage.model(batch=batch, return_hidden=True)
            policy = stage.model.lm_head(hidden).double().log_softmax(-1)
            with stage._use_reference() as reference:
                *_, hidden = reference(
                    batch=batch, vision_features=stage.model.model.encode_images(batch), return_hidden=True
                )
                other = reference.lm_head(hidden).double().log_softmax(-1)
        total += float((policy.exp() * (policy - other)).sum())
        tokens += len(batch.loss_positions)
    assert result.metrics["val/kl"] == pytest.approx(total / tokens, rel=1e-3) and total / tokens > 1e-5


def test_one_pass_of_the_reference_serves_other_betas_and_losses(folder, processor, tmp_path, monkeypatch):
    passes = []
    whole = DataModule.make_subset_dataloader
    monkeypatch.setattr(
        DataModule, "make_subset_dataloader", lambda self, *args: passes.append(1) or whole(self, *args)
    )
    train(folder, processor, tmp_path / "store")
    assert len(passes) == 2  # training records and held-out records
    written = list_parts(tmp_path / "store")
    train(folder, processor, tmp_path / "store", loss_type=["apo_zero"], steps=3)
    assert len(passes) == 2 and list_parts(tmp_path / "store") == written
    train(folder, processor, tmp_path / "store", precision="bf16-mixed", steps=2)
    assert len(passes) == 4 and len({part.parent for part in list_parts(tmp_path / "store")}) == 2


def test_another_reference_model_has_a_separate_cache(folder, model, processor, tmp_path):
    train(folder, processor, tmp_path / "store", steps=1)
    with torch.no_grad():
        model.lm_head.weight[5, 3] += 0.01
    export_model(model, processor.tokenizer, processor.images, tmp_path / "other")
    train(tmp_path / "other", processor, tmp_path / "store", steps=1)
    assert len({part.parent for part in list_parts(tmp_path / "store")}) == 2
    known = compute_cache_key(weights="a", processor="b", precision=["32-true", "float32"])
    assert known != compute_cache_key(weights="a", processor="c", precision=["32-true", "float32"])


def test_an_interrupted_pass_of_the_reference_resumes(folder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vlm.stages.caches.PART_BYTES", 80)
    add, added = ReferenceLogProbCache.add_batch, []

    def fail_after_two_batches(self, batch, log_probs):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(batch.num_pairs)
        add(self, batch, log_probs)

    small = {"n": 60, "steps": 10}
    with monkeypatch.context() as broken:
        broken.setattr(ReferenceLogProbCache, "add_batch", fail_after_two_batches)
        broken.setattr("lit_vlm.data.datamodule.pack_validation", make_packs_of_one)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(folder, processor, tmp_path / "store", **small)
    before = list_parts(tmp_path / "store")
    assert before
    seen = []
    monkeypatch.setattr(
        ReferenceLogProbCache, "add_batch", lambda self, b, p: seen.extend(b.record_keys) or add(self, b, p)
    )
    cached, _ = train(folder, processor, tmp_path / "store", **small)
    online, _ = train(folder, processor, tmp_path / "store", cache_reference=False, **small)
    assert cached.losses == pytest.approx(online.losses, rel=1e-5)
    known = np.concatenate([np.array(read_keys(part)) for part in before])
    assert not set(known.tolist()) & set(seen)


def read_keys(part):
    from safetensors.numpy import load_file

    return load_file(part)["keys"].view(np.uint64).tolist()


def make_packs_of_one(index, **_):
    return [(number,) for number in range(len(index))]


def test_a_pair_that_is_missing_in_the_cache_is_reported(folder, processor, tmp_path):
    (source,) = builtin("preference", n=4)
    index = build_index([source], processor)
    batches = []
    for samples in ([0, 1], [2]):
        batch = collate(processor, [source[i] for i in samples])
        batch.record_keys, batch.image_hashes = index.compute_keys(samples).tolist(), [7] * len(samples)
        batches.append(batch)
    cache = ReferenceLogProbCache(tmp_path / "cache")
    cache.add_batch(batches[0], torch.arange(float(batches[0].num_supervised_tokens)))
    cache.write()
    again = ReferenceLogProbCache(tmp_path / "cache")
    assert again.get(batches[0]).tolist() == list(range(batches[0].num_supervised_tokens))
    contents = np.full(3, 7, np.uint64)
    assert again.find_missing(index.compute_keys([0, 1, 2]), contents).tolist() == [False, False, True]
    with pytest.raises(UserError, match=r"lack this record as it is now.*cache_reference=false"):
        again.get(batches[1])
    batches[0].image_hashes[1] = 8
    with pytest.raises(UserError, match=r"pictures hold something else.*Start again.*cache_reference=false"):
        again.get(batches[0])
    (part,) = (tmp_path / "cache").glob("part-*")
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(UserError, match="Remove it; what it held is made again"):
        ReferenceLogProbCache(tmp_path / "cache")


def test_a_reference_of_another_tokenizer_is_refused(folder, processor, model, tmp_path):
    other = copy.deepcopy(processor.tokenizer)
    other.add_tokens(["another word"])
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(max(len(other), grown.get_input_embeddings().num_embeddings), mean_resizing=False)
    export_model(grown, other, processor.images, tmp_path / "other")
    stage = DPOStage(load_model_spec(ModelConfig(special_tokens=[]), str(folder)), reference=tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer.*1 entry differs.*another word"):
        stage.configure_model()


def test_a_collapse_of_the_chosen_answers_gives_a_warning(folder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "COLLAPSE", 10.0)
    with pytest.warns(UserWarning, match=r"tokens of chosen answers are .* times less likely.*sigmoid,sft"):
        train(folder, processor, tmp_path / "store", steps=1, cache_reference=False)


def test_metrics_by_language_and_kind_cover_all_pairs(folder, processor, tmp_path):
    run, _ = train(folder, processor, tmp_path / "store", steps=2, cache_reference=False)
    metrics = run.metrics
    kinds = {name.rpartition("_")[2] for name in metrics if name.startswith("val/rewards/accuracies_")}
    assert "ko" in kinds and kinds & {"caption", "word", "number", "grounding", "text"}
    assert 0 <= metrics["val/rewards/accuracies"] <= 1 and metrics["val/kl"] >= 0
    assert {
        "train/entropy",
        "train/logps/chosen",
        "train/mean_token_accuracy",
        "val/drift",
        "val/loss",
    } <= metrics.keys()


def test_a_processor_with_another_template_has_another_digest(processor):
    other = copy.deepcopy(processor.tokenizer)
    other.chat_template = other.chat_template + " "
    assert Processor(other, processor.images).digest != processor.digest
