"""Sweep files: W&B's format is read as W&B reads it, and every error is reported before a run is started."""

import math
from pathlib import Path

import pytest
import yaml

from lit_vlm.config import ConfigError
from lit_vlm.sweep.search_space import read_comments
from lit_vlm.sweep.sweep_file import (
    Goal,
    Objective,
    SearchMethod,
    build_trial_overrides,
    format_command,
    parse_sweep,
    read_sweep,
    try_parse_sweep,
    try_read_sweep,
)
from lit_vlm.sweep.validation import find_sweep_errors, list_metric_names

ROOT = Path(__file__).resolve().parents[2]
ALIGN = {"experiment": {"value": "tiny/1_align"}}
RATE = {"stage.learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}}


def make_sweep_dict(parameters: dict, **keys) -> dict:
    return {"method": "random", "metric": {"name": "val/loss", "goal": "minimize"}, "parameters": parameters, **keys}


def find_errors(parameters: dict, *overrides: str, **keys) -> list[str]:
    """Return all errors of a file, without the file name."""
    sweep, found = try_parse_sweep(make_sweep_dict(parameters, **keys), "x.yaml")
    found = [*found, *find_sweep_errors(sweep, list(overrides))]
    return [error_text.removeprefix("x.yaml: ") for error_text in found]


def parse_parameter(**entry):
    return parse_sweep(make_sweep_dict({"a": entry}), "x.yaml").parameters["a"]


# Reading


def test_a_file_is_read_with_every_key_of_wandb(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
program: run.py
command: ["${env}", "${interpreter}", "${program}", "experiment=tiny/1_align", "${args_json}"]
name: mine
project: p
entity: e
description: d
method: bayes
metric: {name: val/loss_ko, goal: maximize, target: 3}
run_cap: 7
early_terminate: {type: hyperband, min_iter: 3, eta: 2}
parameters:
  stage:
    parameters:
      learning_rate: {min: 1.0e-4, max: 1.0e-1, distribution: log_uniform_values}
  stage.warmup: {values: [0, 0.1]}
  seed: {value: 3}
""",
        encoding="utf-8",
    )
    sweep = read_sweep(path)
    assert (sweep.method, sweep.run_cap, sweep.name, sweep.command_overrides) == (
        SearchMethod.bayes,
        7,
        "mine",
        ["experiment=tiny/1_align"],
    )
    assert sweep.metric == Objective("val/loss_ko", Goal.maximize, 3)
    assert sweep.early_terminate.rungs[:4] == (3, 6, 12, 24) and sweep.early_terminate.eta == 2
    assert list(sweep.parameters) == ["stage.learning_rate", "stage.warmup", "seed"]
    assert (sweep.fixed, list(sweep.search_space)) == ({"seed": 3}, ["stage.learning_rate", "stage.warmup"])
    assert sweep.raw == yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("entry", "distribution"),
    [
        ({"value": 1}, "constant"),
        ({"values": [1, 2]}, "categorical"),
        ({"values": [1, 2], "probabilities": [0.1, 0.9]}, "categorical_w_probabilities"),
        ({"min": 1, "max": 8}, "int_uniform"),
        ({"min": 1, "max": 8.0}, "uniform"),
        ({"min": 1.0, "max": 8.0, "distribution": "q_uniform", "q": 0.5}, "q_uniform"),
    ],
)
def test_an_omitted_distribution_is_the_one_that_wandb_chooses(entry, distribution):
    assert parse_parameter(**entry).distribution == distribution


@pytest.mark.parametrize(
    ("entry", "raw", "value"),
    [
        ({"distribution": "uniform", "min": 0.0, "max": 2.0}, 0.5, 0.5),
        ({"distribution": "log_uniform", "min": -3, "max": 0}, math.exp(-1), 0.367879),
        ({"distribution": "q_uniform", "min": 0, "max": 100, "q": 8}, 50.0, 48),
        ({"distribution": "q_log_uniform_values", "min": 8, "max": 256, "q": 8}, 30.0, 32),
        ({"distribution": "normal", "mu": 2.0, "sigma": 0.5}, 0.5, 2.0),
        ({"distribution": "q_normal", "mu": 2.2, "sigma": 0.5, "q": 1}, 0.5, 2),
        ({"distribution": "log_normal", "mu": 0.0, "sigma": 1.0}, 0.5, 1.0),
        ({"distribution": "beta", "a": 2, "b": 2}, 0.5, 0.5),
        ({"values": ["a", "b"], "probabilities": [0.25, 0.75]}, 0.2, "a"),
        ({"values": ["a", "b"], "probabilities": [0.25, 0.75]}, 0.3, "b"),
    ],
)
def test_a_raw_sample_is_converted_by_its_distribution(entry, raw, value):
    found = parse_parameter(**entry).convert_value(raw)
    assert found == pytest.approx(value) if isinstance(value, float) else (found, type(found)) == (value, type(value))


def test_exponents_of_log_uniform_become_values():
    one = parse_parameter(distribution="log_uniform", min=-2, max=3)
    assert (one.min, one.max) == (pytest.approx(math.exp(-2)), pytest.approx(math.exp(3)))


@pytest.mark.parametrize(
    ("hyperband", "rungs"),
    [
        ({"max_iter": 27, "s": 2, "eta": 3}, (3, 9)),  # but none at 27
        ({"max_iter": 20, "s": 9}, (2, 6)),
        ({"min_iter": 3}, (3, 9, 27, 81)),
        ({"min_iter": 2, "eta": 2.5}, (2, 5, 12, 31)),
    ],
)
def test_the_rungs_of_hyperband_equal_those_of_wandb(hyperband, rungs):
    found = parse_sweep(make_sweep_dict(RATE, early_terminate={"type": "hyperband", **hyperband}), "x").early_terminate
    assert found.rungs[:4] == rungs


def test_the_reason_of_a_parameter_is_its_comment_in_the_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "method: grid  # no\nparameters:\n  # above\n  a:  # beside\n    values: [1]\n  b: {value: 1}\n"
        "  c:\n    parameters:\n      d: {value: 1}  # inside\n"
    )
    assert read_comments(path) == {"a": "above beside", "b": "", "c.d": "inside"}


# Errors


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"min": "1e-5", "max": 1.0}, "a.min: expected a number, found '1e-5'. YAML reads it as text; write 1.0e-5."),
        ({"min": "2E3", "max": "4"}, "a.max: expected a number, found '4'. Leave out the quotes."),
        ({"min": 3, "max": 1}, "a.min: must be below max, found 3 and 1."),
        ({"min": True, "max": 3}, "a.min: expected a number, found True."),
        ({"values": []}, "a.values: expected a list with something in it"),
        ({"values": 3}, "a.values: expected a list with something in it, found 3."),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "a.probabilities: expected 2 numbers that add up to 1"),
        (
            {"distribution": "log_uniform_values", "min": 0, "max": 1.0},
            "a.min: a logarithmic range has its ends above 0",
        ),
        ({"distribution": "log_uniform", "min": 1e-5, "max": 1e-2}, "write distribution: log_uniform_values"),
        ({"distribution": "loguniform", "min": 1, "max": 2}, "Did you mean log_uniform?"),
        ({"distribution": "int_uniform", "min": 1.5, "max": 2}, "int_uniform is of whole numbers"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 0}, "a.q: must be above 0"),
        ({"valeus": [1]}, "there is no key valeus. Did you mean values?"),
        ({"min": 1}, "needs value, values, or min and max"),
    ],
)
def test_an_invalid_parameter_is_reported(entry, message):
    with pytest.raises(ConfigError) as error:
        parse_sweep(make_sweep_dict({"a": entry}), "x.yaml")
    assert any(message in text for text in error.value.errors), error.value.errors


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "bays"}, "method: expected one of grid, random, bayes, found 'bays'. Did you mean bayes?"),
        ({"metod": "grid"}, "there is no key metod. Did you mean method?"),
        ({"method": "bayes", "metric": None}, "metric: method bayes learns from it"),
        ({"method": "grid"}, "a grid needs values, and log_uniform_values is a range without steps"),
        (
            {"metric": {"name": "val/loss", "goal": "minimise"}},
            "metric.goal: expected minimize or maximize, found 'minimise'. Did you mean minimize?",
        ),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: needs min_iter"),
        ({"early_terminate": {"type": "envelope", "min_iter": 3}}, "W&B knows hyperband alone"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate.s: is missing"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 2, "s": 1}}, "max_iter 2 divided by eta 3 is below 1"),
        (
            {"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1}},
            "early_terminate.eta: expected a number above 1",
        ),
        ({"run_cap": 0}, "run_cap: expected a whole number above 0, found 0."),
        ({"parameters": {}}, "parameters: is missing or empty"),
        ({"command": []}, "command: expected a list of words"),
    ],
)
def test_an_invalid_file_is_reported(keys, message):
    with pytest.raises(ConfigError) as error:
        parse_sweep({**make_sweep_dict(RATE), **keys}, "x.yaml")
    assert any(f"x.yaml: {message}" in text or message in text for text in error.value.errors), error.value.errors


def test_a_missing_file_or_invalid_yaml_is_reported(tmp_path):
    (tmp_path / "align.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"there is no such file. Did you mean .*align.yaml"):
        try_read_sweep(tmp_path / "algin.yaml")
    with pytest.raises(ConfigError, match="is no YAML"):
        try_read_sweep(tmp_path / "align.yaml")
    with pytest.raises(ConfigError, match="a sweep file is keys and values"):
        parse_sweep(["a"], "x.yaml")


def test_a_valid_file_has_no_errors():
    assert find_errors({**ALIGN, **RATE, "stage.warmup": {"values": [0, 0.1, 10]}}, "trainer.max_steps=9") == []


def test_all_errors_in_keys_values_and_metric_are_reported_together():
    found = find_errors(
        {
            **ALIGN,
            "stage.learnig_rate": {"min": 0.1, "max": 0.2},
            "trainer.max_steps": {"min": 10.5, "max": 20.0},
            "data.tiling": {"values": ["base", "anyre"]},
            "stage.adam_eps": {"values": [0.0, 1e-8]},
            "run_name": {"value": "x"},
        },
        "data.global_batch_sise=3",
        metric={"name": "val/los_ko"},
    )
    for message in (
        "unknown setting stage.learnig_rate. Did you mean stage.learning_rate?",
        "trainer.max_steps: expected a whole number or null, found 10.5. Give the range whole ends",
        "data.tiling: expected one of base, anyres, found 'anyre'. Did you mean anyres?",
        "stage.adam_eps: must be above 0",
        "parameters.run_name: is not a trial's to vary",
        "unknown setting data.global_batch_sise. Did you mean data.global_batch_size?",
        "metric.name: no run logs val/los_ko;",
    ):
        assert sum(message in error_text for error_text in found) == 1, (message, found)
    assert len(found) == 7 and "Did you mean val/loss_ko?" in found[-1]


@pytest.mark.parametrize(
    ("key", "ends", "message"),
    [
        ("stage.warmup", {"min": -0.5, "max": 0.5}, "stage.warmup: must be 0 or above, found -0.5."),
        ("data.max_quarantined", {"min": 0.0, "max": 1.5}, "must be within 0 and 1, found 1.5."),
        ("seed", {"values": [0, 2**32]}, "seed: must be from 0 up to 4294967295, found 4294967296."),
        ("stage.weight_decay", {"mu": 0.0, "sigma": 1.0}, "stage.weight_decay: must be 0 or above, found -3.09"),
    ],
)
def test_a_range_outside_that_of_the_setting_is_refused(key, ends, message):
    (found,) = find_errors({**ALIGN, key: ends})
    assert message in found and found.endswith(")") and f"(as with {key}=" in found


def test_a_contradiction_is_reported_with_the_values_that_cause_it():
    (message,) = find_errors({**ALIGN, "stage.parts.vision_tower.lora.rank": {"values": [0, 8]}})
    assert "vision_tower does not train" in message and message.endswith(
        "(as with stage.parts.vision_tower.lora.rank=8)"
    )


def test_a_swept_setting_must_not_be_set_on_the_command_line():
    (message,) = find_errors({**ALIGN, **RATE}, "stage.learning_rate=3")
    assert message.startswith("parameters.stage.learning_rate: is swept, and the command line sets it to 3.")


@pytest.mark.parametrize(
    ("metric", "overrides", "message"),
    [
        ("val/loss", [], "data.validation.every_steps is not set"),
        (
            "val/loss",
            ["data.validation.every_steps=30"],
            "the first comparison is after 4 values of val/loss, and a run of 60 steps logs 2",
        ),
        ("val/loss", ["data.validation.every_steps=15"], None),
        ("exam/mean", [], "is logged with evaluate.every_steps=<steps>, which is not set"),
        ("exam/mean", ["evaluate.every_steps=30"], "the first comparison is after 4 values of exam/mean"),
        ("exam/grounding_ko", ["evaluate.every_steps=15"], None),
        ("train/loss", [], None),
        ("score/word_ko", ["data.validation.every_steps=20"], "is logged once, at the end"),
        ("score/chrf/caption_ko", ["data.validation.every_steps=20"], "is logged once, at the end"),
        (
            "val/rewards/margins",
            ["data.validation.every_steps=20"],
            "is logged by stage=dpo, and these trials train align",
        ),
    ],
)
def test_early_stopping_needs_enough_logged_values(metric, overrides, message):
    hyperband = {"type": "hyperband", "min_iter": 3}
    found = find_errors({**ALIGN, **RATE}, *overrides, metric={"name": metric}, early_terminate=hyperband)
    assert found == [] if message is None else message in found[0]


def test_the_known_metrics_include_those_that_a_run_logs():
    assert {
        "train/loss",
        "val/loss",
        "val/loss_ko",
        "val/loss_caption",
        "val/rewards/accuracies",
        "score/word_ko",
        "score/anls/word_ko",
    } <= set(list_metric_names())


def test_every_file_of_the_folder_is_valid():
    files = sorted((ROOT / "sweeps").glob("*.yaml"))
    assert files
    for path in files:
        read_sweep(path)


# From values to overrides


def test_overrides_win_in_the_order_command_values_command_line():
    command = ["${program}", "experiment=tiny/1_align", "stage.warmup=0.5", "--flag", "${args_json}"]
    sweep = parse_sweep(
        make_sweep_dict({"seed": {"value": 1}, "stage.warmup": {"value": 0.2}, **RATE}, command=command), "x"
    )
    trial_overrides = build_trial_overrides(
        sweep, {"seed": 1, "stage.warmup": 0.2, "stage.learning_rate": 0.01}, ["seed=7"]
    )
    assert trial_overrides == [
        "task=train",
        "experiment=tiny/1_align",
        "stage.warmup=0.2",
        "seed=7",
        "stage.learning_rate=0.01",
    ]


def test_hangul_lists_and_quotes_survive_the_shell_and_the_parser():
    import shlex

    from lit_vlm.config import parse

    tags = ["한국어 지시문", "it's", "a,b", "[x]"]
    sweep = parse_sweep(
        make_sweep_dict({**ALIGN, "logger.tags": {"values": [tags]}, "logger.group": {"values": [None, "널 = null"]}}),
        "x",
    )
    trial_overrides = build_trial_overrides(
        sweep, {"experiment": "tiny/1_align", "logger.tags": tags, "logger.group": "널 = null"}, []
    )
    pasted = shlex.split(format_command(trial_overrides))[2:]
    logger = parse(pasted).config.logger
    assert (logger.tags, logger.group) == (tags, "널 = null")
