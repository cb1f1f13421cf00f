"""Validation of the settings of task=prefer."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.schema import RunConfig, ScorerName


def find_prefer_errors(config: RunConfig) -> Iterator[str]:
    """Yield an error message for each missing or unusable setting of task=prefer."""
    prefer = config.prefer
    if config.init_from is None:
        yield "init_from is not set: task=prefer asks a finished model, init_from=runs/<name>/hf or a hub id."
    if not prefer.output.endswith(".jsonl"):
        yield f"prefer.output: must end in .jsonl, found {prefer.output}."
    if not prefer.kinds:
        yield "prefer.kinds: is empty; name response, control or both."
    uses_judge = prefer.scorer is ScorerName.judge
    if uses_judge and prefer.judge is None:
        yield "prefer.judge is not set: scorer=judge needs a finished model's folder, or the import path of your own class."
    if not uses_judge and prefer.judge is not None:
        yield f"prefer.judge: is asked with prefer.scorer=judge only, and the scorer is {prefer.scorer.value}."
