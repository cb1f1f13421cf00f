"""What task=prefer needs, and settings of its that no run could use."""

from __future__ import annotations

from collections.abc import Iterator

from lit_vlm.config.schema import RunConfig, ScorerName


def mistakes_in_prefer(config: RunConfig) -> Iterator[str]:
    prefer = config.prefer
    if config.init_from is None:
        yield "init_from is not set: task=prefer asks a finished model, init_from=runs/<name>/hf or a hub id."
    if not prefer.output.endswith(".jsonl"):
        yield f"prefer.output: must end in .jsonl, found {prefer.output}."
    if not prefer.kinds:
        yield "prefer.kinds: is empty; name response, control or both."
    for name in ("num_samples", "max_new_tokens", "temperature"):
        if not getattr(prefer, name) > 0:  # also NaN
            yield f"prefer.{name}: must be above 0, found {getattr(prefer, name)}."
    if not 0 < prefer.top_p <= 1:
        yield f"prefer.top_p: must be above 0 and at most 1, found {prefer.top_p}."
    if not 0 <= prefer.min_margin <= 1:
        yield f"prefer.min_margin: scores lie in 0 to 1, so must it; found {prefer.min_margin}."
    judged = prefer.scorer is ScorerName.judge
    if judged and prefer.judge is None:
        yield "prefer.judge is not set: scorer=judge needs a finished model's folder, or the import path of your own class."
    if not judged and prefer.judge is not None:
        yield f"prefer.judge: is asked with prefer.scorer=judge only, and the scorer is {prefer.scorer.value}."
