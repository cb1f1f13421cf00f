"""Every error and warning of TRL's `DPOTrainer.__init__`, which we skip, exists here too or cannot occur here."""

import ast
import inspect
import textwrap

import pytest

from lit_vlm.config import ConfigError, parse
from lit_vlm.losses.loss_types import PREFERENCE_LOSSES, find_sorting_losses
from lit_vlm.losses.preference import PreferenceLoss
from lit_vlm.types import UserError

# The beginning of TRL's message -> the overrides that cause it here, and the message here.
CHECKED_HERE = {
    "`train_dataset` is required": (["data=ready"], "data.sources: is empty"),
    "`f_divergence_type='": (
        ["stage.loss_type=[nca_pair]", "stage.f_divergence_type=js_divergence"],
        "stage.f_divergence_type: js_divergence is defined for",
    ),
    "WPO-style weighting is not implemented for 'aot'": (
        ["stage.loss_type=[aot]", "stage.use_weighting=true"],
        "stage.use_weighting: WPO weights pairs, and aot sorts",
    ),
    "The `label_smoothing` parameter should lie in [0.0, 0.5)": (
        ["stage.loss_type=[robust]", "stage.label_smoothing=0.5"],
        "stage.label_smoothing: must be from 0 to below 0.5, found 0.5.",
    ),
    "Label smoothing must be greater than 0.0 when using 'exo": (
        ["stage.loss_type=[exo_pair]"],
        "stage.label_smoothing: must be above 0 for loss_type=exo_pair",
    ),
    "Applying a PEFT adapter to `lm_head` is not supported": (
        ["stage.parts.language_model.lora.rank=4", "stage.parts.language_model.lora.targets=[lm_head]"],
        "stage.parts.language_model.lora.targets: lm_head cannot have an adapter",
    ),
    "`loss_weights` must have the same length as `loss_type`": (
        ["stage.loss_type=[sigmoid,sft]", "stage.loss_weights=[1.0]"],
        "stage.loss_weights: 1 weight for 2 losses",
    ),
}
IMPOSSIBLE_HERE = {
    "You are using an `IterableDataset` for training with": "data are indexed files, never a stream",
    "`train_dataset` must be a `Dataset` or": "the same",
    "You set `quantization_config` both as": "there is no quantization",
    "You passed `model_init_kwargs` to the": "a model is never handed over as an object",
    "You passed `quantization_config` to the trainer": "there is no quantization",
    "`model` and `ref_model` cannot be the same": "the reference is a folder, or the model without its adapters",
    "The `processing_class` must be either": "the processor is our own",
    "You passed `peft_config` but the `peft`": "peft is a requirement",
    "`peft_config` must be a `peft.PeftConfig`": "adapters are settings",
    "You passed a `PeftModel` instance together": "init_from names a whole model",
    "Prefix tuning requires `peft>=0.18.0`": "there is no prefix tuning",
    "PEFT<0.20.0 can't add a frozen reference": "the reference is the model without its adapters, in any release",
    "You are using PEFT with DeepSpeed ZeRO-3 and": "checkpointing is our own, never reentrant",
    "`padding_free=True` is temporarily unavailable": "every batch is flat",
    "The dataset appears to be vision-related": "every model has a vision tower",
    "truncation_mode='keep_end' is not supported": "a prompt is never cut",
    "`precompute_ref_log_probs=True` is not supported": "stage.cache_reference does this with pictures, by our own pass",
    "The specified `pad_token` ('": "nothing is padded",
    " does not support `nn.DataParallel`": "one process has one device",
    "`router_aux_loss_coef` is set to": "no mixture of experts is among the models",
    "`use_liger_kernel=True` is deprecated": "there are no such kernels",
    '`liger_kernel_config={"fused_linear': "there are no such kernels",
    "You passed `sync_ref_model=True` while using": "the reference stays as it is",
    "You cannot use `sync_ref_model=True` together": "the reference stays as it is",
    "`pad_token` is deprecated": "nothing is padded",
    "The `'keep_end'` truncation mode is deprecated": "a prompt is never cut",
}


def read_refusals(function) -> list[str]:
    """Return the messages of all errors and warnings of a function, without their formatted values."""
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        call = node.exc if isinstance(node, ast.Raise) else node
        warns = isinstance(call, ast.Call) and ast.unparse(call.func) in (
            "logger.warning",
            "warnings.warn",
            "logger.warning_once",
        )
        if isinstance(call, ast.Call) and call.args and (isinstance(node, ast.Raise) or warns):
            found.append("".join(one.value for one in ast.walk(call.args[0]) if is_text(one)))
    return found


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_each_error_of_trls_trainer_exists_here_or_cannot_occur():
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    refusals = [*read_refusals(DPOTrainer.__init__), *read_refusals(DPOConfig.__post_init__)]
    known = [*CHECKED_HERE, *IMPOSSIBLE_HERE]
    assert [message for message in refusals if not any(message.startswith(begin) for begin in known)] == [], (
        "a new one of TRL's"
    )
    assert [begin for begin in known if not any(message.startswith(begin) for message in refusals)] == [], (
        "TRL has it no more"
    )


@pytest.mark.parametrize("begin", CHECKED_HERE)
def test_settings_that_trl_refuses_are_refused_before_anything_is_built(begin):
    overrides, message = CHECKED_HERE[begin]
    with pytest.raises(ConfigError) as error:
        parse(["experiment=tiny/4_dpo", *overrides])
    assert any(text.startswith(message) for text in error.value.errors), error.value.errors


@pytest.mark.parametrize("name", find_sorting_losses(list(PREFERENCE_LOSSES)))
@pytest.mark.parametrize("others", [[], ["sigmoid"]])
def test_weights_of_pairs_are_refused_for_losses_that_sort_them(name, others):
    with pytest.raises(UserError, match=rf"stage\.use_weighting: WPO weights pairs, and {name} sorts"):
        PreferenceLoss(loss_type=[*others, name], use_weighting=True)
    PreferenceLoss(loss_type=[*others, name])
