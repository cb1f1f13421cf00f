"""Text of `python run.py --help`, and the tables of docs/config.md. Choices are read from conf/, settings from the schema.

`python -m lit_vlm.config.help` writes the tables into docs/config.md, each between `<!-- table: <name> -->` and
`<!-- end of table -->`.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, get_args

import yaml

from lit_vlm.config import choices, schema
from lit_vlm.config.callbacks import CALLBACKS, Use
from lit_vlm.config.compose import CONF_DIR, list_choices
from lit_vlm.config.recipe import list_recipes
from lit_vlm.config.settings import Setting, describe_type, list_settings, read_field_comments
from lit_vlm.model.projectors import PROJECTORS

# Settings that are changed most often, in the order in which a user needs them.
COMMON_SETTINGS = (
    "data.sources.<name>.path",
    "init_from",
    "stage.learning_rate",
    "stage.trainable",
    "data.global_batch_size",
    "data.tokens_per_micro_batch",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.devices",
    "run_dir",
)
GROUP_MEANINGS = {
    "model": "which parts are put together",
    "data": "what is read",
    "data/source": "ready sources: 'data/source@data.sources=[...]', after a download",
    "stage": "what trains, on which loss",
    "trainer": "on which machine",
    "logger": "where the metrics go",
}
EXAMPLES = (
    ("python run.py", "the tiny recipe, all stages, on a CPU, without a download"),
    ("python run.py experiment=tiny/2_sft trainer.max_steps=50", "one stage of it, shorter"),
    ("python run.py data=digits run_dir=runs/digits", "all stages on real pictures"),
    (
        "python run.py experiment=tiny/2_sft data=llava_json data.sources.mine.path=my.json",
        "your own data, its images beside it (or below data.sources.mine.image_root)",
    ),
    (
        "torchrun --nproc-per-node=8 run.py experiment=varco_vision_14b/1_align",
        "VARCO-VISION's first stage on eight GPUs",
    ),
    (
        "python run.py task=submit experiment=varco_vision_14b/2_sft trainer=deepspeed_zero3 trainer.num_nodes=8",
        "a Slurm job on eight nodes; with recipe=varco_vision_14b all stages as a chain (docs/cluster.md)",
    ),
    (
        "python run.py task=prefer init_from=runs/tiny/3_highres/hf data=llava_json data.sources.mine.path=my.json",
        "preference pairs from a model's own answers, for stage=dpo (docs/preferences.md)",
    ),
    (
        "python run.py task=curate data=llava_json data.sources.mine.path=my.json",
        "find duplicate records; curate.method=contamination: rows of benchmarks, personal: phone and card numbers (docs/curation.md)",
    ),
    (
        "python run.py task=generate data=llava_json data.sources.mine.path=my.json generate.endpoint=http://127.0.0.1:8000/v1"
        " generate.model=writer",
        "have a model write conversations, sentences, captions or translations for your records (docs/generation.md)",
    ),
    ("python run.py task=export init_from=runs/mine", "the model's folder from a run's checkpoint"),
    ("python run.py task=runs", "the runs below runs/, their figures and the settings in which they differ"),
    ("python run.py task=sync sync=runs/tiny/2_sft", "send a run that was written offline to Weights & Biases"),
    ("python run.py task=chat init_from=runs/tiny/4_dpo/hf image=cat.jpg", "talk to the result"),
    ("python run.py task=serve init_from=runs/tiny/4_dpo/hf", "serve it to OpenAI's clients (docs/serving.md)"),
    ("python run.py task=demo init_from=runs/tiny/4_dpo/hf", "ask it in the browser, with boxes (docs/demo.md)"),
    ("python run.py task=view experiment=tiny/2_sft", "look at its data as the model will see it (docs/viewer.md)"),
    (
        "python run.py task=evaluate init_from=runs/tiny/4_dpo/hf 'benchmarks=[k_dtcbench,mmstar]'",
        "score it with lmms-eval, beside published scores (docs/evaluation.md)",
    ),
    (
        "python run.py task=judge judge.answers=runs/tiny/2_sft judge.endpoint=http://127.0.0.1:8000/v1 judge.model=judge",
        "have a model judge its answers (docs/judge.md)",
    ),
)
MORE_COMMANDS = (
    ("python run.py --help settings", "every setting, its type, default and meaning"),
    ("python run.py --cfg job experiment=tiny/2_sft", "what a command line composes to, without running it"),
    ("python run.py --config-dir FOLDER ...", "your own data/, experiment/, ... beside conf/"),
    ('eval "$(python run.py -sc install=bash)"', "completion of keys and choices in this shell"),
    ("docs/", "one page per question"),
)
LINE_WIDTH = 110


def format_help(arguments: list[str]) -> str:
    """Format the overview, or with the argument `settings` the table of all settings."""
    return _format_all_settings() if "settings" in arguments else _format_overview()


def _format_overview() -> str:
    parts = [
        "lit_vlm trains Korean and English vision-language models: align -> sft -> highres -> dpo.\n"
        "Every setting is a word on the command line: python run.py key=value ...",
        "TASKS   task=<name>, by default the pipeline; naming an experiment= means train\n" + _format_tasks(),
        "RECIPES   recipe=<folder> for all its stages, experiment=<folder>/<stage> for one\n" + _format_recipes(),
        "CHOICES   <group>=<name>; a file each in conf/\n" + _format_choices(),
        "SETTINGS   what people change first\n"
        + "\n".join(
            _format_setting(setting) for key in COMMON_SETTINGS for setting in list_settings() if setting.key == key
        ),
        "CALLBACKS   callbacks=[<name>,<import path of your own class>], or {<name>: {<argument>: <value>}}\n"
        + _format_callbacks(),
        "EXAMPLES\n" + _format_commands(EXAMPLES),
        "MORE\n" + _format_commands(MORE_COMMANDS),
    ]
    return "\n\n".join(parts)


def _format_tasks() -> str:
    return "\n".join(f"  {name:<12}{meaning}" for name, meaning in _get_member_meanings(choices.Task).items())


def _format_callbacks() -> str:
    chosen = {name: entry for name, entry in CALLBACKS.items() if entry.use in (Use.default, Use.named)}
    return "\n".join(
        f"  {name:<15}{entry.meaning}{'' if entry.use is Use.default else '; not by default'}"
        for name, entry in chosen.items()
    )


def _format_recipes() -> str:
    names = list_choices("experiment")
    stages = {
        recipe: [name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == recipe]
        for recipe in list_recipes()
    }
    return "\n".join(f"  {recipe:<20}{', '.join(stage_names)}" for recipe, stage_names in stages.items())


def _format_choices() -> str:
    defaults = yaml.safe_load((CONF_DIR / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = {group: name for entry in defaults if isinstance(entry, dict) for group, name in entry.items()}
    lines = []
    for group, meaning in GROUP_MEANINGS.items():
        default = f" (default {chosen[group]})" if chosen.get(group) else ""
        lines += [f"  {group:<12}{meaning}{default}", _wrap_text(", ".join(list_choices(group)), 14)]
    return "\n".join(lines)


def _format_commands(rows: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(f"  {command}\n      {meaning}" for command, meaning in rows)


def _format_setting(setting: Setting) -> str:
    default = "must be set" if setting.default == "???" else f"default {format_default(setting.default)}"
    if setting.key.startswith("stage.") and setting.default == "???":
        default = "set by stage="
    range_text = f" ({setting.range})" if setting.range else ""
    return f"  {setting.key}   {describe_type(setting.type)}{range_text}; {default}" + (
        f"\n{_wrap_text(_get_meaning(setting), 6)}" if _get_meaning(setting) else ""
    )


def _get_meaning(setting: Setting) -> str:
    if setting.comment:
        return setting.comment
    enum_classes = [
        enum_class
        for enum_class in (get_args(setting.type) or (setting.type,))
        if inspect.isclass(enum_class) and issubclass(enum_class, Enum)
    ]
    return "; ".join(
        f"{name}: {text}"
        for enum_class in enum_classes
        for name, text in _get_member_meanings(enum_class).items()
        if text
    )


def _get_member_meanings(enum_class: type[Enum]) -> dict[str, str]:
    if enum_class is choices.ProjectorName:
        return {name: projector.description for name, projector in PROJECTORS.items()}
    return {name: read_field_comments().get((enum_class.__name__, name), "") for name in enum_class.__members__}


def _wrap_text(text: str, indent: int) -> str:
    return textwrap.fill(
        text, LINE_WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def format_default(value: Any) -> str:
    """Format a default as on the command line."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_default, value)) + "]"
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return str(value)


def _format_all_settings() -> str:
    """Format each setting once."""
    notes = (
        "<name> is the name of a source; data.validation.sources.<name> has the same settings.\n"
        f"<part> is one of {', '.join(schema.ModelPart.__members__)}."
    )
    return "\n".join(map(_format_setting, _list_distinct_settings())) + f"\n\n{notes}"


def _list_distinct_settings() -> list[Setting]:
    """List each setting once: the three model parts share their rows, and so do training and validation sources."""
    distinct: dict[str, Setting] = {}
    for setting in list_settings():
        key = setting.key
        for part in schema.ModelPart.__members__:
            key = key.replace(f"stage.parts.{part}.", "stage.parts.<part>.")
        key = key.replace("data.validation.sources.", "data.sources.")
        distinct.setdefault(key, replace(setting, key=key))
    return list(distinct.values())


# Tables of docs/config.md

PAGE = CONF_DIR.parent / "docs" / "config.md"
_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def write_tables(page: str) -> str:
    """Replace the tables of a page by those of the schema.

    Raises:
        KeyError: there is no such table.
    """
    return _TABLE.sub(lambda match: f"{match[1]}\n{_make_table(match[2])}\n\n{match[3]}", page)


def _make_table(name: str) -> str:
    """Make a table in Markdown: choices, tasks, callbacks, or the settings whose keys begin with the name."""
    if name == "choices":
        rows = [
            (f"`{group}=`", meaning, ", ".join(f"`{choice}`" for choice in list_choices(group)))
            for group, meaning in GROUP_MEANINGS.items()
            if group != "data/source"
        ]
        return _format_table(("group", "meaning", "choices"), rows)
    if name == "tasks":
        members = _get_member_meanings(choices.Task).items()
        return _format_table(("task", "what runs"), [(f"`task={member}`", text) for member, text in members])
    if name == "callbacks":
        chosen = {key: entry for key, entry in CALLBACKS.items() if entry.use in (Use.default, Use.named)}
        return _format_table(
            ("name", "", "arguments"),
            [(f"`{key}`", entry.meaning, ", ".join(entry.arguments)) for key, entry in chosen.items()],
        )
    prefixes = tuple(name.split())
    groups = {setting.key.partition(".")[0] for setting in list_settings() if "." in setting.key}
    settings = [
        setting
        for setting in _list_distinct_settings()
        if (
            setting.key.startswith(prefixes)
            if name != "others"
            else setting.key.partition(".")[0] not in {"task", *groups}
        )
        and not (name == "data." and setting.key.startswith(("data.sources.", "data.validation.", "data.share.")))
    ]
    return _format_table(("setting", "type", "default", "meaning"), [_make_setting_row(one) for one in settings])


def _make_setting_row(setting: Setting) -> tuple[str, ...]:
    kind = describe_type(setting.type) + (f" ({setting.range})" if setting.range else "")
    default = "" if setting.default == "???" else f"`{format_default(setting.default)}`"
    return f"`{setting.key}`", _escape(kind), default, _escape(_get_meaning(setting))


def _escape(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")


def _format_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
