"""Label files of COCO's structure and Flickr30k's caption files, as they are published.

COCO keeps pictures and labels in two lists of one object (`images`, `annotations`), joined by the number of the picture.
Captions become one record each. Objects become one record for each picture, whose answer names them with their boxes. Files
of both, read together, give one record for each picture with all its captions and its objects. Crowds (`iscrowd`) have no box of
their own and are counted as unread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_vlm.data.lazy_images import format_untrusted
from lit_vlm.data.markup import build_object_mention
from lit_vlm.data.readers.context import RecordContext
from lit_vlm.data.readers.conversation import make_sample
from lit_vlm.data.readers.label_fields import parse_number
from lit_vlm.data.readers.rows.base import DuplicateKeyError, Hasher, build_unique_dict
from lit_vlm.data.readers.rows.json_files import parse_record
from lit_vlm.data.readers.unsupported_keys import check_record
from lit_vlm.types import Box, ContentPart, ControlToken, ImagePlaceholder, LazyImage, Message, Role, Sample, UserError

CAPTIONS, OBJECTS = "coco_captions", "coco_objects"  # keys of our rows, which no published row has
_KEYS = frozenset(("id", "image", "width", "height", "crowds", CAPTIONS, OBJECTS))
_HEAD_BYTES = 4096
_HEAD = re.compile(rb'\s*\{\s*"(?:info|images|annotations|licenses|categories)"\s*:')
CAPTION_QUESTIONS = (
    "What does the picture show?",
    "Describe the picture in one sentence.",
    "What can be seen here?",
    "Write a caption for the picture.",
    "Say briefly what is in the picture.",
)
OBJECT_QUESTION = "Which objects are in the picture, and where?"
MAX_SIZE_DIFFERENCE = 0.01  # of the aspect ratios of a picture and of its entry: a resized copy is allowed


class LabelRows:
    """Rows of label files, in memory as JSON: some hundred bytes each.

    Args:
        rows: (origin, JSON of the row).
    """

    def __init__(self, rows: Sequence[tuple[str, bytes]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def get_origin(self, index: int) -> str:
        return self._rows[index][0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        origin, data = self._rows[index]
        return parse_record(data, origin)

    def update_hash(self, hasher: Hasher, start: int, stop: int) -> None:
        for _, data in self._rows[start:stop]:
            hasher.update(data)


def is_label_file(path: Path) -> bool:
    """Return True if a .json file begins as a label file of COCO's structure, or is a .token file of Flickr30k."""
    if path.suffix.lower() == ".token":
        return True
    with path.open("rb") as stream:
        return path.suffix.lower() == ".json" and _HEAD.match(stream.read(_HEAD_BYTES)) is not None


def open_label_files(setting: str, files: Sequence[Path]) -> LabelRows:
    """Open label files; those of COCO are joined by the number of the picture.

    Args:
        setting: the setting that names them, for messages.

    Raises:
        UserError: a file is not of this structure, or labels belong to no picture.
    """
    if files[0].suffix.lower() == ".token":
        return LabelRows([row for file in files for row in _iterate_token_rows(setting, file)])
    contents = [_read_labels(setting, file) for file in files]
    if all("annotations" not in content for content in contents):
        rows = [
            row for file, one in zip(files, contents, strict=True) for row in _iterate_sentence_rows(setting, file, one)
        ]
        return LabelRows(rows)
    return LabelRows(list(_iterate_joined_rows(setting, files, contents)))


def _read_labels(setting: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=build_unique_dict)
    except (ValueError, RecursionError, DuplicateKeyError) as error:
        raise UserError(f"{setting}: {file.name} cannot be read: {error}. Get the file again.") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f'{setting}: {file.name} has no list "images", which label files of COCO have.')
    return content


def _iterate_token_rows(setting: str, file: Path) -> Iterator[tuple[str, bytes]]:
    """Iterate over the captions of Flickr30k's token file: `<picture>#<number><tab><caption>` in each line."""
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        name, tab, caption = line.partition("\t")
        picture, mark, position = name.rpartition("#")
        if not (tab and mark and position.isdigit()):
            raise UserError(
                f"{setting}: {file.name}:{number} is {format_untrusted(line, 60)}; needed: <picture>#<number>, a tab and a caption."
            )
        yield f"{file.name}:{number}", _dump({"id": name, "image": picture, CAPTIONS: [caption.strip()]})


def _iterate_sentence_rows(setting: str, file: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Iterate over the captions of a file of Karpathy's splits: each picture has `filename`, `sentences` and `split`."""
    for image in content["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list) or "filename" not in image:
            found = ", ".join(map(str, image))[:60] if isinstance(image, dict) else type(image).__name__
            raise UserError(f'{setting}: {file.name}: a picture has no "sentences" and no "filename"; it has {found}.')
        folder = f"{image['filepath']}/" if image.get("filepath") else ""
        for number, sentence in enumerate(image["sentences"]):
            row = {"id": f"{image['filename']}#{number}", "image": f"{folder}{image['filename']}"}
            row |= {"split": image["split"]} if image.get("split") else {}
            text = sentence.get("raw") if isinstance(sentence, dict) else None
            yield f"{file.name}: {image['filename']}#{number}", _dump(row | {CAPTIONS: [text]})


def _iterate_joined_rows(
    setting: str, files: Sequence[Path], contents: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, bytes]]:
    """Iterate over the pictures of COCO's files with their labels; over single captions if there are no objects."""
    pictures = _collect_pictures(setting, files, contents)
    for file, content in zip(files, contents, strict=True):
        names = {category["id"]: category["name"] for category in content.get("categories") or ()}
        for label in content.get("annotations") or ():
            picture = pictures.get(label["image_id"])
            if picture is None:
                raise UserError(
                    f"{setting}: {file.name}: the label {label.get('id')} belongs to picture {label['image_id']}, which is not in it."
                )
            if "caption" in label:
                picture[CAPTIONS].append((label.get("id"), label["caption"]))
            elif label.get("iscrowd"):
                picture["crowds"] += 1
            elif "bbox" in label:
                category = names.get(label.get("category_id"))
                picture[OBJECTS].append({"category": category, "bbox": label["bbox"]})
    has_objects = any(picture[OBJECTS] for picture in pictures.values())
    for number, picture in pictures.items():
        captions = picture.pop(CAPTIONS)
        shared = {key: value for key, value in picture.items() if value}
        if not has_objects:
            for label, caption in captions:
                yield (
                    f"{files[0].name}: caption {label}",
                    _dump(shared | {"id": f"{number}-{label}", CAPTIONS: [caption]}),
                )
        elif captions or picture[OBJECTS]:
            row = shared | {"id": str(number), CAPTIONS: [caption for _, caption in captions]}
            yield f"{files[0].name}: image {number}", _dump(row)


def _collect_pictures(
    setting: str, files: Sequence[Path], contents: Sequence[Mapping[str, Any]]
) -> dict[Any, dict[str, Any]]:
    """Collect the pictures of all files by their number; a file may name each once."""
    pictures: dict[Any, dict[str, Any]] = {}
    for file, content in zip(files, contents, strict=True):
        for image in content["images"]:
            if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
                raise UserError(f'{setting}: {file.name}: a picture has no "id" or no "file_name".')
            picture = {"image": image["file_name"], "width": image.get("width"), "height": image.get("height")}
            known = pictures.setdefault(image["id"], picture | {"crowds": 0, CAPTIONS: [], OBJECTS: []})
            if known["image"] != picture["image"]:
                raise UserError(
                    f"{setting}: picture {image['id']} is {known['image']} and {picture['image']}. Read these files as two sources."
                )
    return pictures


def _dump(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_coco(row: Mapping[str, Any], context: RecordContext) -> Sample:
    """Read a picture with its captions and objects as turns: one for each caption, then one with all boxes."""
    check_record(row, context, _KEYS)
    images = context.collect_images(row)
    questions = context.settings.prompts or CAPTION_QUESTIONS
    messages: list[Message] = []
    for number, caption in enumerate(row.get(CAPTIONS) or ()):
        question: tuple[ContentPart, ...] = (questions[number % len(questions)],)
        text = context.require_text(caption, "caption").strip()
        messages += [Message(Role.user, question), Message(Role.assistant, context.parse_text(text))]
    if objects := _read_objects(row, images[0], context) if row.get(OBJECTS) else ():
        messages.append(Message(Role.user, (ControlToken("<gro>"), "\n" + OBJECT_QUESTION)))
        messages.append(Message(Role.assistant, objects))
    if row.get("crowds"):
        context.mark_unread("crowds (iscrowd)")
    if not messages:
        raise context.make_error("it has neither a caption nor an object with a box")
    first = messages[0]
    messages[0] = Message(first.role, (ImagePlaceholder(0), *first.content))
    return make_sample(row, messages, images, context)


def _read_objects(row: Mapping[str, Any], image: LazyImage, context: RecordContext) -> tuple[ContentPart, ...]:
    """Read the boxes, [x, y, width, height] in pixels of the entry's size: one mention for each category, in their order."""
    width, height = (parse_number(row.get(name), name, context) for name in ("width", "height"))
    found_height, found_width = image.size
    if abs(found_width / found_height / (width / height) - 1) > MAX_SIZE_DIFFERENCE:
        raise context.make_error(
            f"its boxes are measured on {width:g} x {height:g} pixels, and the picture has {found_width} x {found_height}"
        )
    boxes: dict[str, list[Box]] = {}
    for position, label in enumerate(row[OBJECTS]):
        category = context.require_text(label["category"], f"category of annotation {position}")
        corners = label["bbox"]
        if not isinstance(corners, list) or len(corners) != 4:
            raise context.make_error(f"bbox of annotation {position} is no list of four numbers")
        left, top, box_width, box_height = (parse_number(value, "bbox", context) for value in corners)
        fractions = (left / width, top / height, (left + box_width) / width, (top + box_height) / height)
        box = Box(*(min(1.0, max(0.0, value)) for value in fractions))
        if box.x1 < box.x2 and box.y1 < box.y2:
            boxes.setdefault(category, []).append(box)
        else:
            context.mark_unread("bbox without area")
    content: list[ContentPart] = []
    for category, places in boxes.items():
        content += [", "] if content else []
        content += build_object_mention(category, places)
    return tuple(content)
