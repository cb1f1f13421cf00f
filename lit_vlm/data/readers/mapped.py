"""Source for `format=mapped`: a dataset of label files and images, read through a mapping (`config/mapping.py`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_vlm.config.mapping import REGIONS_VARIABLE, MappingConfig, RegionTask, find_mapping_errors
from lit_vlm.data.readers.context import ReaderSettings, RecordContext
from lit_vlm.data.readers.conversation import make_sample
from lit_vlm.data.readers.file_catalogue import IMAGE_PATTERNS, FileCatalogue, FileName, require_files
from lit_vlm.data.readers.label_fields import FieldScope, Template, parse_template, read_regions
from lit_vlm.data.readers.label_files import LabelRecords
from lit_vlm.types import ContentPart, ControlToken, ImagePlaceholder, LazyImage, Message, Role, Sample, UserError

_READER_VERSION = 1  # increase it when the same files are read differently; it is part of the digest
_TASK_TOKENS = {
    RegionTask.ocr: (ControlToken("<ocr>"),),
    RegionTask.grounding: (ControlToken("<gro>"),),
    RegionTask.referring: (),
}


class MappedSource:
    """Source of label files and images, in folders and zip files.

    Its text is never read as markup: control tokens come from the mapping's regions alone. It pickles as its settings,
    so each process that reads lists the files once for itself.
    """

    def __init__(
        self,
        path: Path,
        mapping: MappingConfig,
        settings: ReaderSettings,
        limit: int | None = None,
        *,
        split: str | None = None,
    ) -> None:
        """
        Args:
            path: folder, zip or file of the labels; of the images if mapping.labels is null.
            limit: maximum number of records; the first ones are used.
            split: the split to read if names of files and folders give several.

        Raises:
            UserError: the mapping is invalid, a zip or a list of records cannot be read, or no records are found.
        """
        if errors := list(find_mapping_errors(f"data.sources.{settings.source}.mapping", mapping)):
            raise UserError(errors[0] if len(errors) == 1 else "\n".join(f"- {error}" for error in errors))
        self.name, self._path, self._mapping, self._limit = settings.source, path, mapping, limit
        self._settings, self._split = dataclasses.replace(settings, markup=False, counts_markup=False), split
        self._answer_template = self._get_template("answer") or [("", REGIONS_VARIABLE)]
        self._question_templates = [parse_template(text, "mapping.questions") for text in mapping.questions]
        what = "pictures" if mapping.labels is None else f"label files {mapping.labels}"
        require_files(self.name, "path", path, self._labels.catalogue, what)
        require_files(self.name, "image_root", settings.image_root, self._pictures, "pictures")
        if not len(self):
            raise UserError(f"data.sources.{self.name}.path={path}: no records in it. Give a file that has some.")

    def __len__(self) -> int:
        return len(self._labels) if self._limit is None else min(self._limit, len(self._labels))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        context, labels = RecordContext(self.origin(index), self._settings), self._labels
        file = labels.find_file(index)
        scope = FieldScope(labels[index], FileName(labels.catalogue.get_path(file)), context)
        image = self._make_image(scope, file)
        id_template = self._get_template("id")
        row = {} if id_template is None else {"id": scope.render_text(id_template)}
        return make_sample(row, self._make_messages(scope, image), (image,), context)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_labels", "_pictures")}

    def origin(self, index: int) -> str:
        return self._labels.get_origin(index)

    @cached_property
    def digest(self) -> str:
        return self.digest_of(0, len(self))

    def digest_of(self, start: int, stop: int) -> str:
        """Compute the digest of the labels of records start to stop - 1, of all images and of the settings.

        All images count, because an added one may make a name ambiguous.
        """
        labels = self._labels
        first, last = labels.find_file(start), labels.find_file(max(start, stop - 1))
        local_range = (start - int(labels.ends[first - 1] if first else 0), stop - start)
        parts = (_READER_VERSION, self._settings_digest, labels.catalogue.compute_digest(first, last + 1), local_range)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def _labels(self) -> LabelRecords:
        patterns = IMAGE_PATTERNS if self._mapping.labels is None else (self._mapping.labels,)
        catalogue = FileCatalogue(self._path, patterns)
        catalogue.keep_split(f"data.sources.{self.name}.path={self._path}", self._split, self._mapping.labels is None)
        return LabelRecords(catalogue, self._mapping)

    @cached_property
    def _pictures(self) -> FileCatalogue:
        if self._mapping.labels is None:
            return self._labels.catalogue
        return FileCatalogue(self._settings.image_root, IMAGE_PATTERNS)

    @cached_property
    def _settings_digest(self) -> str:
        settings = {**self._settings.describe(), "mapping": dataclasses.asdict(self._mapping)}
        return json.dumps(settings, default=str, sort_keys=True) + self._pictures.compute_digest()

    def _get_template(self, setting: str) -> Template | None:
        text = getattr(self._mapping, setting)
        return None if text is None else parse_template(text, f"data.sources.{self.name}.mapping.{setting}")

    def _make_image(self, scope: FieldScope, file: int) -> LazyImage:
        context, image_template = scope.context, self._get_template("image")
        if self._mapping.labels is None:
            return self._pictures.make_image(file, context.origin, self._settings.max_pixels)
        # Without a template the image has the label file's name with another suffix.
        path = (
            scope.file.path.removesuffix(Path(scope.file.name).suffix)
            if image_template is None
            else scope.render_text(image_template)
        )
        found = self._pictures.find_image(path, context.origin, near=self._labels.catalogue.get_archive(file))
        return self._pictures.make_image(found, context.origin, self._settings.max_pixels)

    def _make_messages(self, scope: FieldScope, image: LazyImage) -> list[Message]:
        mapping, text = self._mapping, self._get_template("text")
        regions: Sequence[ContentPart] = ()
        if mapping.regions is not None and text is not None:
            regions = read_regions(scope, mapping, text, image)
        messages: list[Message] = []
        for number, turn in enumerate([scope] if mapping.turns is None else scope.get_items(mapping.turns)):
            image_slot: tuple[ContentPart, ...] = () if number else (ImagePlaceholder(0),)
            messages.append(Message(Role.user, (*image_slot, *self._choose_question(turn, number, regions))))
            messages.append(Message(Role.assistant, turn.render_content(self._answer_template, regions)))
        return messages

    def _choose_question(
        self, turn: FieldScope, number: int, regions: Sequence[ContentPart]
    ) -> tuple[ContentPart, ...]:
        task_tokens: tuple[ContentPart, ...] = _TASK_TOKENS[self._mapping.task] if regions else ()
        if not self._question_templates:
            return task_tokens
        seed = f"{turn.context.origin}\0{number}".encode("utf-8", "surrogatepass")
        digest = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big")
        question = self._question_templates[digest % len(self._question_templates)]
        if task_tokens:  # as in the model card of VARCO-VISION-14B: the task's token, a line break, the question
            (literal, path), *rest = question
            question = [("\n" + literal, path), *rest]
        return (*task_tokens, *turn.render_content(question, regions))
