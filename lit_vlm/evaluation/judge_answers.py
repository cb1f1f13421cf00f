"""Files of answers for the judge: samples of a run, samples of lmms-eval, and JSON Lines with fields of common names."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from lit_vlm.config.choices import JudgeKind
from lit_vlm.config.task_settings import JudgeConfig
from lit_vlm.data.lazy_images import BytesImage, FileImage
from lit_vlm.formatting import format_count
from lit_vlm.types import Language, LazyImage, RecordError, UserError

SAMPLES_FILE = "samples.jsonl"
# Names of the fields, the first that a row has is used. `answer` beside a prediction is the reference, as in VLMEvalKit.
FIELDS = {
    "id": ("id", "question_id", "index", "doc_id"),
    "question": ("question", "prompt", "input", "query"),
    "answer": ("prediction", "filtered_resps", "resps", "model_answer", "response", "answer"),
    "reference": ("reference", "target", "ground_truth", "answer"),
    "rubric": ("rubric", "criteria"),
    "context": ("context", "caption"),
    "other": ("other", "other_answer", "baseline", "gpt_answer"),
}
# With pictures: `plain` of samples.jsonl is the picture without the boxes of the reference.
IMAGE_FIELDS = ("plain", "images", "image")
SENT_FORMATS = ("jpeg", "png", "webp", "gif")  # that OpenAI's interface names; other pictures are sent as PNG
MAX_SHOWN_ERRORS = 5
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """An answer to be judged.

    Attributes:
        origin: file and line.
        group: rows of one group have a mean of their own.
        material: texts for the prompt by name: question, answer and others of `judge_prompts.MATERIAL`.
    """

    id: str
    origin: str
    group: str
    language: Language
    material: Mapping[str, str]
    images: tuple[FileImage | BytesImage, ...] = ()


def read_answers(path: Path, settings: JudgeConfig, max_pixels: int) -> list[AnswerRow]:
    """Read all answers of a file, or of `samples.jsonl` in a run folder.

    Args:
        max_pixels: larger images are refused.

    Raises:
        UserError: the file cannot be read, or rows lack what this kind of judgement needs; the message names the rows.
    """
    path = path / SAMPLES_FILE if path.is_dir() else path
    rows, errors = _read_rows(path, settings, max_pixels)
    if settings.against is not None and not errors:
        rows, errors = _add_others(rows, Path(settings.against), settings)
    if not errors:
        errors = [f"{row.origin}: {reason}" for row in rows if (reason := _find_missing(row, settings))]
    if errors:
        shown = "\n".join(f"  {error}" for error in errors[:MAX_SHOWN_ERRORS])
        more = f"\n  and {len(errors) - MAX_SHOWN_ERRORS:,} more" if len(errors) > MAX_SHOWN_ERRORS else ""
        raise UserError(
            f"{path}: {format_count(len(errors), 'row')} cannot be judged. Nothing was sent.\n{shown}{more}"
        )
    if not rows:
        raise UserError(f"{path} has no answers.")
    return rows


def _read_rows(path: Path, settings: JudgeConfig, max_pixels: int) -> tuple[list[AnswerRow], list[str]]:
    rows: list[AnswerRow] = []
    errors: list[str] = []
    root = Path(settings.image_root) if settings.image_root else path.parent
    for origin, value in _iterate_values(path):
        if settings.limit is not None and len(rows) + len(errors) >= settings.limit:
            break
        try:
            row = _parse_row(value, origin, settings.language)
            images = tuple(_open_images(value, root, origin, max_pixels)) if settings.images else ()
            rows.append(replace(row, images=images))
        except RecordError as error:
            errors.append(f"{origin}: {error.reason}")
    return rows, errors


def _iterate_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Iterate over the rows of a JSON or JSON Lines file with their places; a line that is no JSON gives None."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"judge.answers={path}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise UserError(f"judge.answers={path}: is no UTF-8 text. Give a .jsonl or .json file.") from None
    if path.suffix.lower() == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"judge.answers={path}: is no JSON ({error}).") from None
        if not isinstance(values, list):
            raise UserError(f"judge.answers={path}: expected a list of rows, found {type(values).__name__}.")
        yield from ((f"{path.name}[{number}]", value) for number, value in enumerate(values))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path.name}:{number}", json.loads(line)
        except (ValueError, RecursionError):
            yield f"{path.name}:{number}", None


def _parse_row(value: Any, origin: str, language: Language) -> AnswerRow:
    """Parse a row. Raises RecordError if it is no object or its texts are no texts."""
    if not isinstance(value, dict):
        raise RecordError(origin, "is no JSON object")
    names = {
        role: next((name for name in fields if value.get(name) is not None), None) for role, fields in FIELDS.items()
    }
    if names["answer"] == "answer" and names["reference"] == "answer":
        names["reference"] = None
    material: dict[str, str] = {}
    for role, name in names.items():
        if name is not None and role != "id":
            material[role] = _read_text(value[name], name, origin)
    for role in ("question", "answer"):
        if role not in material:
            raise RecordError(origin, f"has no {role} (field {', '.join(FIELDS[role])})")
    if language is Language.auto:
        is_korean = _HANGUL.search(material["question"]) is not None
        language = Language.ko if is_korean else Language.en
    row_id = str(value[names["id"]]) if names["id"] else origin
    return AnswerRow(row_id, origin, _get_group(value), language, material)


def _read_text(value: Any, name: str, origin: str) -> str:
    """Read a text or a number. Of a list, responses give the first, and several references are joined."""
    if isinstance(value, list) and value:
        if name in ("filtered_resps", "resps"):
            return _read_text(value[0], name, origin)
        return " / ".join(_read_text(item, name, origin) for item in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordError(origin, f"{name}: expected a text, found {type(value).__name__}")
    return str(value)


def _get_group(value: Mapping[str, Any]) -> str:
    """Return the group of a row: phase, kind and language of a run's samples; else its category."""
    parts = [str(value[name]) for name in ("kind", "language") if isinstance(value.get(name), str)]
    if isinstance(value.get("phase"), str) and parts:
        return f"{value['phase']}/{'_'.join(parts)}"
    return str(value.get("category") or value.get("kind") or "all")


def _open_images(
    value: Mapping[str, Any], root: Path, origin: str, max_pixels: int
) -> Iterator[FileImage | BytesImage]:
    """Open the images of a row: paths below `root`, data URLs, or base64. Raises RecordError if one cannot be read."""
    name = next((name for name in IMAGE_FIELDS if value.get(name)), None)
    listed = value[name] if name else []
    for item in listed if isinstance(listed, list) else [listed]:
        if not isinstance(item, str):
            raise RecordError(origin, f"{name}: expected paths or data URLs, found {type(item).__name__}")
        image: FileImage | BytesImage = FileImage(item, root, origin, max_pixels)
        if match := _DATA_URL.match(item):
            try:
                data = base64.b64decode(item[match.end() :], validate=True)
            except ValueError:
                raise RecordError(origin, f"{name}: its base64 cannot be decoded") from None
            image = BytesImage(data, origin, max_pixels)
        assert image.size  # reads the header: an unreadable picture is found before anything is sent
        yield image


def _add_others(rows: Sequence[AnswerRow], path: Path, settings: JudgeConfig) -> tuple[list[AnswerRow], list[str]]:
    """Add the other answer to each row, from another file, matched by group and id."""
    path = path / SAMPLES_FILE if path.is_dir() else path
    others, errors = _read_rows(path, replace(settings, limit=None, images=False), 0)
    counts = Counter((row.group, row.id) for row in others)
    repeated = Counter((row.group, row.id) for row in rows) + counts
    answers = {(row.group, row.id): row.material["answer"] for row in others}
    joined = []
    for row in rows:
        key = (row.group, row.id)
        if key not in answers:
            errors.append(f"{row.origin}: {path.name} has no answer with id {row.id} in the group {row.group}")
        elif repeated[key] > 2:
            errors.append(
                f"{row.origin}: the id {row.id} is not unique in the group {row.group}, so answers cannot be matched"
            )
        else:
            joined.append(replace(row, material={**row.material, "other": answers[key]}))
    return joined, errors


def _find_missing(row: AnswerRow, settings: JudgeConfig) -> str | None:
    """Find what a row lacks for a kind of judgement; None if it has all."""
    material = row.material
    if settings.kind is JudgeKind.correctness and "reference" not in material:
        return f"has no reference (field {', '.join(FIELDS['reference'][:-1])}), which judge.kind=correctness needs"
    if settings.kind is JudgeKind.pairwise and "other" not in material:
        return f"has no other answer (field {', '.join(FIELDS['other'])}); or name a second file with judge.against"
    has_measure = "rubric" in material or "reference" in material or row.images
    if settings.kind is JudgeKind.rating and not has_measure and settings.prompt is None:
        return "has no rubric, no reference and no image (judge.images), so there is nothing to rate by"
    return None


def encode_image(image: LazyImage) -> str:
    """Encode an image as a data URL: its own bytes, or as PNG if it has none or their format is not one that endpoints read.

    Raises:
        RecordError: the image cannot be read.
    """
    data, name = image.read_encoded() if isinstance(image, FileImage | BytesImage) else (b"", "")
    # EXIF orientation: not every reader applies it
    if name not in SENT_FORMATS or (isinstance(image, FileImage | BytesImage) and image.orientation != 1):
        buffer = BytesIO()
        image.load().save(buffer, "PNG")
        data, name = buffer.getvalue(), "png"
    return f"data:image/{name};base64,{base64.b64encode(data).decode()}"
