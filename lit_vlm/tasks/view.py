"""task=view: a page in the browser for the records of a stage's data, as the model will see them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lit_vlm.config import Run
from lit_vlm.config.schema import DataConfig
from lit_vlm.data.selection import SELECTION_SUFFIX, check_selection, read_selection
from lit_vlm.data.sources import choose_all_records, open_source
from lit_vlm.files import read_json, read_json_lines
from lit_vlm.model.spec import load_model_spec
from lit_vlm.tasks.curate_results import LEFT_OUT_FILE, SUMMARY_FILE
from lit_vlm.tasks.open_run import RunPlace, open_sources
from lit_vlm.tasks.prepare import resolve_init_from
from lit_vlm.tasks.prepare_data import build_indexes, build_stage_data, make_training_data, resolve_tiny_parts
from lit_vlm.tasks.serve import (
    format_url,
    list_loopback_names,
    open_socket,
    read_token,
    require_server_packages,
    run_server,
)
from lit_vlm.tasks.terminal import say, show_progress
from lit_vlm.types import Source, UserError
from lit_vlm.viewer.curated import CuratedList
from lit_vlm.viewer.flags import FlaggedSource, RecordFlags
from lit_vlm.viewer.samples import SampleTable

with contextlib.suppress(ImportError):  # packages of the extra `serve`; `require_server_packages` says so
    from lit_vlm.viewer.pages import create_view_app


def view_data(run: Run) -> None:
    """Index the data of a stage as task=prepare does, and serve the viewer until the process is stopped.

    Raises:
        UserError: a source cannot be opened, a package is missing, the port is in use, or a token is missing.
    """
    require_server_packages("view")
    config, data, settings = run.config, run.config.data, run.config.serve
    token = read_token(settings.host)
    with open_socket(settings.host, settings.port) as listening:
        place = RunPlace.from_settings(run.name, run.dir, config.run_dir, data.index_dir)
        model = resolve_tiny_parts(config.model, place.parts_dir, config.seed)
        stage_data = build_stage_data(
            place,
            open_sources(data, place, config.seed),
            load_model_spec(model, resolve_init_from(run.init_from), data.tiling),
            template_date=config.model.template_date,
            data=data,
            stage=config.stage,
            trainer=config.trainer,
            seed=config.seed,
            debug=config.debug,
            make=make_training_data,
        )
        with show_progress("index") as on_progress:
            indexes = build_indexes(stage_data.training_data, on_progress=on_progress)
        parts = {"training": indexes.training, "held_out": indexes.held_out}
        flags = RecordFlags(Path(config.run_dir) / "view" / run.name, open_flagged_sources(data, place, config.seed))
        curated = read_curated_lists(config.view.curated, Path(config.run_dir) / "curate", flags.get_sources())
        table = SampleTable(parts, stage_data.training_data.processor, flags, curated)
        hosts = list_loopback_names(settings.host) if token is None else None
        app = create_view_app(table, run.name, token, hosts, config.language.value)
        num_samples = sum(map(len, parts.values()))
        text = f"{run.name}: {num_samples:,} samples; open {format_url(listening)} in a browser. Ctrl-C ends it."
        run_server(app, [], listening, text)


def read_curated_lists(folders: list[str], default: Path, sources: dict[str, Source]) -> dict[str, CuratedList]:
    """Read the lists of task=curate, by method.

    Args:
        folders: folders that are named; without any, those below `default` whose records are these.
        sources: all records of each source, by name.

    Raises:
        UserError: a folder that is named has no list, or its list is of other records.
    """
    lists: dict[str, CuratedList] = {}
    for folder in map(Path, folders or sorted(str(path.parent) for path in default.glob(f"*/{SUMMARY_FILE}"))):
        summary = read_json(folder / SUMMARY_FILE, "Make it again with task=curate.")
        if summary is None:
            raise UserError(f"view.curated={folder}: has no {SUMMARY_FILE}; give a folder that task=curate wrote.")
        name = str(summary["request"]["curate"]["method"])
        try:
            for source in sources.values():
                selection = folder / f"{source.name}{SELECTION_SUFFIX}"
                if selection.is_file():
                    check_selection(read_selection(selection, "view.curated"), source, f"view.curated={folder}")
        except UserError as error:
            if folders:
                raise
            say(f"{folder} is not shown: {error}")
            continue
        lists[name if name not in lists else str(folder)] = CuratedList.from_lines(
            read_json_lines(folder / LEFT_OUT_FILE)
        )
    return lists


def open_flagged_sources(data: DataConfig, place: RunPlace, seed: int) -> dict[str, FlaggedSource]:
    """Open all records of each training source, as a selection counts them, and what its own selection leaves out."""
    sources = {}
    for name, source in data.sources.items():
        options = {"max_image_pixels": data.max_image_pixels, "seed": seed, "cache": place.index_dir}
        whole = open_source(name, choose_all_records(source), **options)  # type: ignore[arg-type]
        flagged = FlaggedSource(whole)
        if source.selection is not None:
            selection = read_selection(Path(source.selection), f"data.sources.{name}.selection")
            flagged = FlaggedSource(whole, frozenset(selection.list_left_out().tolist()), passes=selection.passes)
        sources[name] = flagged
    return sources
