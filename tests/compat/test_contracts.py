"""Contract tests of `lit_vlm/compat/`: the private parts that it uses exist in the installed releases.

A new release may move them. Then a test here fails and names what is missing, before a training run fails in the middle.
How these parts behave is tested with the features that use them: resumed runs (tests/engine, tests/tasks), losses equal to
those of TRL (tests/stages/test_dpo.py, tests/losses), the tracking server (tests/engine/test_tracking.py) and ZeRO
(tests/engine/test_deepspeed.py).
"""

import inspect
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import lightning as L
import pytest
import torch

from lit_vlm.compat import hydra, lightning, transformers

ROOT = Path(__file__).resolve().parents[2]
# module -> (object in another package, the names that compat reads of it)
ATTRIBUTES = {
    "trl": [("trl.trainer.dpo_trainer.DPOTrainer", ["_compute_loss"])],
    "wandb": [("wandb.sdk.data_types.utils", ["val_to_json"])],
    "deepspeed": [
        (
            "lightning.pytorch.strategies.DeepSpeedStrategy",
            ["_init_config_if_needed", "_init_deepspeed_distributed", "_initialize_deepspeed_inference"],
        ),
        ("deepspeed.runtime.zero.partition_parameters.Init", ["_convert_to_deepspeed_param"]),
        (
            "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
            [
                "_get_fp32_grad_state_partition",
                "_reassign_or_swap_out_partitioned_parameters",
                "_overflow_check_and_loss_scale_update",
                "get_param_id",
            ],
        ),
        ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer", ["check_overflow", "update_lp_params"]),
    ],
    "hydra": [
        ("hydra._internal.core_plugins.file_config_source.FileConfigSource", ["_normalize_file_name"]),
        ("hydra._internal.sources_registry.SourcesRegistry", ["instance"]),
        (
            "hydra._internal.config_loader_impl.ConfigLoaderImpl",
            [
                "_parse_overrides_and_create_caching_repo",
                "_compose_config_from_defaults_list",
                "_apply_overrides_to_config",
                "validate_sweep_overrides_legal",
            ],
        ),
        ("hydra.plugins.config_source.ConfigSource", ["_get_header_dict"]),
        ("hydra._internal.defaults_list", ["create_defaults_list"]),
        ("omegaconf._utils", ["get_yaml_loader"]),
    ],
    "torch": [
        ("torch", ["_foreach_norm"]),
        ("torch.UntypedStorage", ["_new_shared"]),
        ("torch.nn.Module", ["_apply"]),
        ("torch.ops.aten._grouped_mm.default", ["_schema"]),
        ("torch.autograd.Variable._execution_engine", ["queue_callback"]),
        ("torch.distributed.tensor._utils", ["compute_local_shape_and_global_offset"]),
        ("torch.utils._python_dispatch", ["TorchDispatchMode"]),
        ("torch.distributed.fsdp.FSDPModule", ["_get_fsdp_state"]),
        ("torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState", ["_lazy_init"]),
    ],
    "transformers": [("transformers.PreTrainedModel", ["_tied_weights_keys", "initialize_weights"])],
    "lightning": [
        ("lightning.LightningModule", ["_set_hparams"]),
        ("lightning.pytorch.loops.fit_loop._FitLoop", ["_should_accumulate"]),
        ("lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop", ["_should_check_val_fx"]),
    ],
}
# names that exist in instances only, or that are set for another package: the source of this object must name them
NAMES_IN_SOURCE = {
    "trl": [("trl.trainer.dpo_trainer.DPOTrainer", ["_metrics", "_total_train_tokens", "_tp_size"])],
    "wandb": [("wandb.apis.public.Api", ["_service_api"])],
    "deepspeed": [
        ("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", ["fp32_partitioned_groups_flat"]),
        ("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", ["grad_position", "persistent_parameters"]),
        ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer", ["single_partition_of_fp32_groups"]),
        ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer", ["averaged_gradients"]),
        ("deepspeed.utils.mixed_precision_linkage", ["_hp_mapping", "_index_in_param_group", "get_full_hp_param"]),
        ("deepspeed.runtime.zero.partition_parameters.Init", ["ds_tensor", "ds_status", "ds_persist"]),
        ("lightning.pytorch.plugins.DeepSpeedPrecision", ["_desired_dtype"]),
        ("torch.nn.Module", ["_forward_hooks", "_forward_pre_hooks"]),
    ],
    "transformers": [
        ("transformers.PreTrainedModel", ["_is_hf_initialized", "all_tied_weights_keys"]),
        ("transformers.core_model_loading", ["_weight_conversions"]),
    ],
    "lightning": [
        ("lightning.pytorch.strategies.ModelParallelStrategy", ["_data_parallel_size", "_tensor_parallel_size"]),
        ("lightning.fabric.loggers.TensorBoardLogger", ["SummaryWriter(log_dir=self.log_dir, **self._kwargs)"]),
        ("lightning.pytorch.plugins.MixedPrecision", ["_optimizer_handles_unscaling"]),
        ("lightning.fabric.plugins.precision.amp", ["_step_supports_amp_scaling"]),
        ("lightning.pytorch.loggers.utilities", ["_log_hyperparams"]),
    ],
}


def find_object(path: str):
    """Find the object of a dotted path: a module, or an attribute of one."""
    names, found = path.split("."), None
    for number, name in enumerate(names):
        found = getattr(found, name, None) if found is not None else None
        if found is None:
            found = import_module(".".join(names[: number + 1]))
    return found


def describe_release(room: str) -> str:
    """Describe the installed release, and the pinned one for which the room was written."""
    pinned = re.search(rf"^{room}(?:-core)?==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    installed = version("hydra-core" if room == "hydra" else room)
    return f"{room} {installed} (lit_vlm/compat/{room}.py was written for {pinned})"


@pytest.mark.parametrize("room", ATTRIBUTES)
def test_the_private_parts_of_the_installed_release_are_where_compat_reads_them(room):
    for path, names in ATTRIBUTES[room]:
        owner = find_object(path)
        for name in names:
            assert hasattr(owner, name), f"{describe_release(room)}: {path} has no {name}"
    for path, names in NAMES_IN_SOURCE.get(room, []):
        source = inspect.getsource(find_object(path))
        for name in names:
            assert name in source, f"{describe_release(room)}: {path} does not use {name}"


def make_trainer(**options) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


def test_lightning_keeps_its_counters_and_handlers_where_compat_sets_them():
    trainer, release = make_trainer(max_steps=7), describe_release("lightning")
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    for owner, names in {
        trainer: ["_signal_connector", "_logger_connector", "_accelerator_connector", "_results"],
        fit: ["_data_fetcher", "_combined_loader", "restarting", "epoch_progress"],
        epoch: ["_batches_that_stepped", "_broadcast_sigterm_tensor", "batch_progress", "scheduler_progress"],
        trainer._signal_connector: ["register_signal_handlers"],
        trainer._logger_connector: ["metrics", "should_update_logs"],
    }.items():
        for name in names:
            assert hasattr(type(owner), name) or name in vars(owner), f"{release}: {type(owner).__name__} has no {name}"
    assert lightning.get_num_steps(trainer) == 7
    lightning.set_num_steps(trainer, 5)
    assert trainer.max_steps == 5, f"{release}: the number of steps is kept in another place"
    trainer.accumulate_grad_batches = 2
    lightning.set_loop_position(trainer, 3)
    assert (trainer.global_step, epoch.batch_progress.total.ready) == (3, 6), f"{release}: other loop counters"
    assert lightning.get_batch_index(trainer) == 5 and lightning.is_last_micro_step(trainer)
    assert lightning.has_distributed_sampler(make_trainer()) and not lightning.has_distributed_sampler(
        make_trainer(use_distributed_sampler=False)
    )


def test_a_module_without_a_trainer_has_none_and_keeps_its_hparams_from_the_logger():
    module = L.LightningModule()
    assert lightning.get_trainer(module) is None and hasattr(module, "_trainer")
    lightning.set_hparams(module, {"learning_rate": 1.0})
    assert module.hparams == {"learning_rate": 1.0} and not module._log_hyperparams


def test_lightning_clips_the_gradients_of_a_fused_optimizer_after_allow_clipping():
    from lightning.pytorch.plugins import MixedPrecision

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)
    plugin = MixedPrecision("16-mixed", "cpu")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        plugin.clip_gradients(optimizer, 1.0)
    lightning.allow_clipping(optimizer)
    plugin.clip_gradients(optimizer, 1.0)


def test_hydra_reads_the_header_of_a_file():
    assert hydra.read_header("# @package data\na: 1")["package"] == "data"


def test_a_model_that_can_tie_its_head_says_so():
    from transformers import LlamaForCausalLM, ViTModel

    assert transformers.can_tie(LlamaForCausalLM, "lm_head.weight")
    assert not transformers.can_tie(ViTModel, "lm_head.weight")
