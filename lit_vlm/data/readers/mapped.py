"""Source for `format=mapped`: a dataset of label files and images, read through a mapping (`config/mapping.py`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_vlm.config.mapping import REGIONS, MappingConfig, RegionTask, mistakes_in_mapping
from lit_vlm.data.readers.catalogue import PICTURES, Catalogue, FileName, refuse_empty
from lit_vlm.data.readers.fields import Scope, Template, template
from lit_vlm.data.readers.labels import Labels
from lit_vlm.data.readers.place import Place, Settings
from lit_vlm.data.readers.record import make_sample
from lit_vlm.data.readers.regions import read_regions
from lit_vlm.data.staging import original
from lit_vlm.types import Content, Control, ImageSlot, ImageSource, Message, Role, Sample, UserError

_READING = 1  # increase it when the same files are read differently; it is part of the digest
_ASKING = {RegionTask.ocr: (Control("<ocr>"),), RegionTask.grounding: (Control("<gro>"),), RegionTask.referring: ()}


class MappedSource:
    """Source of label files and images, in folders and zip files.

    Its text is never read as markup: control tokens come from the mapping's regions alone. It pickles as its settings,
    so each process that reads lists the files once for itself.
    """

    def __init__(
        self,
        path: Path,
        mapping: MappingConfig,
        settings: Settings,
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
        if errors := list(mistakes_in_mapping(f"data.sources.{settings.source}.mapping", mapping)):
            raise UserError(errors[0] if len(errors) == 1 else "\n".join(f"- {error}" for error in errors))
        self.name, self._path, self._mapping, self._limit = settings.source, path, mapping, limit
        self._settings, self._split = dataclasses.replace(settings, markup=False, counts_markup=False), split
        self._answer = self._template("answer") or [("", REGIONS)]
        self._questions = [template(text, "mapping.questions") for text in mapping.questions]
        what = "pictures" if mapping.labels is None else f"label files {mapping.labels}"
        refuse_empty(self.name, "path", path, self._labels.catalogue, what)
        refuse_empty(self.name, "image_root", settings.image_root, self._pictures, "pictures")
        if not len(self):
            raise UserError(f"data.sources.{self.name}.path={path}: no records in it. Give a file that has some.")

    def __len__(self) -> int:
        return len(self._labels) if self._limit is None else min(self._limit, len(self._labels))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        context, labels = Place(self.origin(index), self._settings), self._labels
        file = labels.file(index)
        scope = Scope(labels[index], FileName(labels.catalogue.path(file)), context)
        image = self._image(scope, file)
        id_template = self._template("id")
        row = {} if id_template is None else {"id": scope.text(id_template)}
        return make_sample(row, self._messages(scope, image), (image,), context)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_labels", "_pictures")}

    def origin(self, index: int) -> str:
        return self._labels.origin(index)

    @cached_property
    def digest(self) -> str:
        return self.digest_of(0, len(self))

    def digest_of(self, start: int, stop: int) -> str:
        """Compute the digest of the labels of records start to stop - 1, of all images and of the settings.

        All images count, because an added one may make a name ambiguous.
        """
        labels = self._labels
        first, last = labels.file(start), labels.file(max(start, stop - 1))
        local_range = (start - int(labels.ends[first - 1] if first else 0), stop - start)
        parts = (_READING, self._digest_of_rest, labels.catalogue.digest(first, last + 1), local_range)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def _labels(self) -> Labels:
        patterns = PICTURES if self._mapping.labels is None else (self._mapping.labels,)
        catalogue = Catalogue(self._path, patterns)
        catalogue.keep_split(f"data.sources.{self.name}.path={self._path}", self._split, self._mapping.labels is None)
        return Labels(catalogue, self._mapping)

    @cached_property
    def _pictures(self) -> Catalogue:
        if self._mapping.labels is None:
            return self._labels.catalogue
        return Catalogue(self._settings.image_root, PICTURES)

    @cached_property
    def _digest_of_rest(self) -> str:
        settings = {**dataclasses.asdict(self._settings), "mapping": dataclasses.asdict(self._mapping)}
        del settings["source"]  # only a name; it does not change how files are read
        settings["image_root"] = original(self._settings.image_root)
        return json.dumps(settings, default=str, sort_keys=True) + self._pictures.digest()

    def _template(self, setting: str) -> Template | None:
        text = getattr(self._mapping, setting)
        return None if text is None else template(text, f"data.sources.{self.name}.mapping.{setting}")

    def _image(self, scope: Scope, file: int) -> ImageSource:
        context, image_template = scope.place, self._template("image")
        if self._mapping.labels is None:
            return self._pictures.image(file, context.origin, self._settings.max_pixels)
        # Without a template the image has the label file's name with another suffix.
        path = (
            scope.file.path.removesuffix(Path(scope.file.name).suffix)
            if image_template is None
            else scope.text(image_template)
        )
        found = self._pictures.find(path, context.origin, near=self._labels.catalogue.archive(file))
        return self._pictures.image(found, context.origin, self._settings.max_pixels)

    def _messages(self, scope: Scope, image: ImageSource) -> list[Message]:
        mapping, text = self._mapping, self._template("text")
        regions: Sequence[Content] = ()
        if mapping.regions is not None and text is not None:
            regions = read_regions(scope, mapping, text, image)
        messages: list[Message] = []
        for number, turn in enumerate([scope] if mapping.turns is None else scope.items(mapping.turns)):
            image_slot: tuple[Content, ...] = () if number else (ImageSlot(0),)
            messages.append(Message(Role.user, (*image_slot, *self._question(turn, number, regions))))
            messages.append(Message(Role.assistant, turn.content(self._answer, regions)))
        return messages

    def _question(self, turn: Scope, number: int, regions: Sequence[Content]) -> tuple[Content, ...]:
        task_tokens: tuple[Content, ...] = _ASKING[self._mapping.task] if regions else ()
        if not self._questions:
            return task_tokens
        seed = f"{turn.place.origin}\0{number}".encode("utf-8", "surrogatepass")
        digest = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big")
        question = self._questions[digest % len(self._questions)]
        if task_tokens:  # as in the model card of VARCO-VISION-14B: the task's token, a line break, the question
            (literal, path), *rest = question
            question = [("\n" + literal, path), *rest]
        return (*task_tokens, *turn.content(question, regions))
