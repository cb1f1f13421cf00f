"""Registry of the callbacks of a run, and the meaning of the setting `callbacks`.

Each entry names its class, which is imported when a run is built: help and errors do not wait for torch. The default of the
setting, the help, the checks and the calling order all come from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lit_vlm.config.user_classes import find_argument_errors, read_constructor
from lit_vlm.types import find_nearest, format_suggestion


class Use(Enum):
    """Runs that have a callback."""

    default = "default"  # without a list of names, or if it is named
    named = "named"  # if it is named, beside the default ones
    setting = "setting"  # as a setting of its own says
    always = "always"  # every run


@dataclass(frozen=True, slots=True)
class CallbackEntry:
    """A callback of this project.

    Attributes:
        class_path: import path of the class.
        meaning: help text.
        arguments: constructor arguments that `callbacks={name: {argument: value}}` may set.
        settings: constructor arguments that settings of their own give: argument -> setting.
        order: position among the callbacks: -1 before the others, 1 and more after them.
    """

    class_path: str
    use: Use
    meaning: str
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    order: int = 0


ONLY_KEYWORD = "only"  # before other names: only these callbacks
CALLBACKS: dict[str, CallbackEntry] = {
    "throughput": CallbackEntry(
        "callbacks.throughput.Throughput",
        Use.default,
        "tokens, samples and images per second, fraction of time spent waiting for data",
    ),
    "language_loss": CallbackEntry(
        "callbacks.metrics.LanguageLoss", Use.default, "held-out loss by language and by kind"
    ),
    # The guard exchanges flags between ranks. Callbacks that measure the time after this exchange come later.
    "guard": CallbackEntry(
        "callbacks.guard.Guard",
        Use.default,
        "stops at a NaN or infinite loss before the weights change, and names the samples",
        settings={"on_nonfinite": "guard.on_nonfinite", "max_skipped": "guard.max_skipped"},
        order=-1,
    ),
    "samples": CallbackEntry(
        "callbacks.samples.Samples",
        Use.default,
        "generates answers before and after training, scores them, and renders them with their images",
        arguments=("shown", "max_new_tokens"),
        settings={"max_samples": "data.validation.max_samples"},
        order=2,
    ),
    # The report shows the files of all other callbacks.
    "report": CallbackEntry("callbacks.export.Report", Use.default, "writes report.html", order=3),
    # Export saves the model before `samples` reads held-out images again.
    "export": CallbackEntry(
        "callbacks.export.Export",
        Use.setting,
        "exports the model to hf/, unless export=false is set",
        settings={"special_boxes": "special_boxes"},
        order=1,
    ),
    "exam": CallbackEntry(
        "callbacks.exam.Exam",
        Use.setting,
        "takes a part of the exam between optimizer steps, with evaluate.every_steps=...",
        settings={
            "exam_every_steps": "evaluate.every_steps",
            "training_items": "evaluate.training_items",
            "metric": "logger.metric",
            "best_metric": "checkpoint.best_metric",
        },
    ),
    "benchmarks": CallbackEntry(
        "callbacks.benchmarks.Benchmarks",
        Use.setting,
        "scores slices of benchmarks between optimizer steps, with evaluate.every_steps=... and benchmarks=[...]",
        settings={
            "exam_every_steps": "evaluate.every_steps",
            "metric": "logger.metric",
            "best_metric": "checkpoint.best_metric",
        },
    ),
    "profile": CallbackEntry(
        "callbacks.profile.Profile",
        Use.named,
        "writes profile.html with the times of some steps, also with trainer.profile=true",
    ),
    "metric": CallbackEntry(
        "callbacks.metrics.Metric",
        Use.always,
        "ends a sweep's run that does not log its metric",
        settings={"metric": "logger.metric"},
    ),
    "out_of_memory": CallbackEntry(
        "callbacks.out_of_memory.OutOfMemory",
        Use.always,
        "halves the micro-batch limits after a device ran out of memory",
        settings={"max_oom_retries": "guard.max_oom_retries"},
    ),
    "checkpoint": CallbackEntry(
        "callbacks.checkpoint.Checkpoint",
        Use.always,
        "saves the state of an unfinished run",
        settings={
            **{
                name: f"checkpoint.{name}"
                for name in ("every_steps", "every_minutes", "keep_last", "keep_best", "best_metric", "asynchronous")
            },
            "resume_from": "resume_from",
            "timeout_minutes": "trainer.timeout_minutes",
        },
    ),
    "preemption": CallbackEntry("callbacks.preemption.Preemption", Use.always, "saves and leaves after a signal"),
    # It sets the next activity after the other callbacks have finished the same hook.
    "heartbeat": CallbackEntry(
        "callbacks.heartbeat.Heartbeat",
        Use.always,
        "writes each rank's progress and ends a run that is stuck",
        settings={"heartbeat_seconds": "guard.heartbeat_seconds", "timeout_minutes": "trainer.timeout_minutes"},
        order=4,
    ),
}


def list_callbacks(use: Use) -> tuple[str, ...]:
    """List the callbacks of one use."""
    return tuple(name for name, entry in CALLBACKS.items() if entry.use is use)


def list_default_callbacks() -> list[str]:
    """List the callbacks that a run has besides the required ones, the default of the setting `callbacks`."""
    return list(list_callbacks(Use.default))


# The setting


def convert_to_list(value: Any) -> Any:
    """Convert {name: arguments} to the list form, in which `callbacks` is stored; any other value is returned unchanged."""
    if not isinstance(value, Mapping):
        return value
    return [name if arguments in (None, {}) else {name: arguments} for name, arguments in value.items()]


def get_callback_arguments(items: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return the arguments of each callback by its name. An item is a name or {name: {argument: value}}."""
    pairs = [pair for item in items for pair in (item.items() if isinstance(item, Mapping) else [(item, None)])]
    return {name: dict(arguments or {}) for name, arguments in pairs}


def choose_callbacks(
    items: Sequence[Any], *, export: bool, profile: bool, exam: bool = False, benchmarks: bool = False
) -> dict[str, dict[str, Any]]:
    """Choose the callbacks of a run, with their arguments.

    User classes and `profile` are added to the default callbacks. If default callbacks are named, only these are used; with
    `only`, no unnamed one is added. The names do not decide whether the model is exported.
    """
    given = get_callback_arguments(items)
    defaults, named = list_callbacks(Use.default), list_callbacks(Use.named)
    chosen = [name for name in defaults if name in given]
    user_classes = [name for name in given if name not in CALLBACKS and name != ONLY_KEYWORD]
    added = {*user_classes, *named, *list_callbacks(Use.always)} & set(given)
    adds_defaults = bool(added) and not chosen and ONLY_KEYWORD not in given
    by_setting = {"export": export, "profile": profile, "exam": exam, "benchmarks": benchmarks}
    names = [
        *(defaults if adds_defaults else chosen),
        *user_classes,
        *(
            name for name in list_callbacks(Use.setting) if by_setting[name]
        ),  # the checkpoint holds the scores of the exam
        *list_callbacks(Use.always),
        *(name for name in named if name in given or by_setting.get(name)),
    ]
    return {name: given.get(name, {}) for name in names}


def find_callback_errors(items: Sequence[Any]) -> Iterator[str]:
    """Yield an error message for each unknown name, repeated name, and argument that its class does not have."""
    for item in items:
        is_pair = isinstance(item, Mapping) and all(isinstance(one, Mapping | None) for one in item.values())
        if not isinstance(item, str) and not is_pair:
            yield (
                f"callbacks: found {item!r}; each is a name, or a name with its arguments:"
                " callbacks={my_package.MyCallback: {every: 10}}."
            )
            return
    names = [str(name) for item in items for name in (item if isinstance(item, Mapping) else [item])]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        yield f"callbacks: {', '.join(map(repr, repeated))} stands there more than once; name each callback once."
    for name, arguments in get_callback_arguments(items).items():
        if name in CALLBACKS:
            yield from _find_own_argument_errors(name, CALLBACKS[name], arguments)
        elif name == ONLY_KEYWORD:
            if arguments:
                yield f"callbacks: {ONLY_KEYWORD} is no callback and has no arguments, found {', '.join(arguments)}."
        elif name_errors := list(_find_name_errors(name)):
            yield from name_errors
        else:
            constructor = read_constructor(name)
            yield from (f"callbacks: {error}" for error in find_argument_errors(name, arguments, constructor))


def _find_name_errors(name: str) -> Iterator[str]:
    known = [*CALLBACKS, ONLY_KEYWORD]
    if not name or ("." in name and not all(part.isidentifier() for part in name.split("."))):
        detail = repr(name) if name else "an empty name"
        yield (
            f"callbacks: found {detail}; name one of {', '.join(known)}, or the import path of your own class, names"
            " with dots between them (my_package.MyCallback)."
        )
    elif "." not in name:
        detail = format_suggestion(find_nearest(name, known))
        yield (
            f"callbacks: there is no callback {name}; there are {', '.join(known)},"
            f" or the import path of your own class (my_package.MyCallback).{detail}"
        )


def _find_own_argument_errors(name: str, entry: CallbackEntry, arguments: Mapping[str, Any]) -> Iterator[str]:
    offered = f"it has {', '.join(entry.arguments)}" if entry.arguments else "it has none"
    for argument in arguments:
        if argument in entry.settings:
            yield f"callbacks: {argument} of {name} is a setting of its own, {entry.settings[argument]}=..."
        elif argument not in entry.arguments:
            suggestion = format_suggestion(find_nearest(argument, entry.arguments))
            yield f"callbacks: {name} has no argument {argument}; {offered}.{suggestion}"
