"""Data deliveries like those of AI-Hub: zip files with CP949, UTF-8 or decomposed names, labels of any structure."""

import io
import json
import unicodedata
import zipfile

from PIL import Image

from lit_vlm.config import parse
from lit_vlm.config.choices import Format, MarkerMeaning
from lit_vlm.config.mapping import MappingConfig
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.sources import open_source


class RawName(zipfile.ZipInfo):
    """Zip member whose name is written in `encoding`, without the UTF-8 flag."""

    def _encodeFilenameFlags(self):
        return self.filename.encode(self.encoding), self.flag_bits


def make_zip(path, members, encoding=None, compress=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in members:
            entry = zipfile.ZipInfo(name) if encoding is None else RawName(name)
            if encoding is not None:
                entry.encoding = encoding
            entry.compress_type = compress
            archive.writestr(entry, data)
    return path


def picture(width=100, height=50, kind="JPEG", colour=(200, 30, 30)):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, kind)
    return stream.getvalue()


def label(record, encoding="utf-8"):
    return json.dumps(record, ensure_ascii=False).encode(encoding)


def decompose(text):
    return unicodedata.normalize("NFD", text)


def open_named_set(name, path, *more_overrides):
    """Open the source that conf/data/source/<name>.yaml describes, with its files at `path`."""
    overrides = [f"data.sources.{name}.path={path}", *more_overrides]
    config = parse(["task=train", f"data/source@data.sources=[{name}]", *overrides]).config.data.sources[name]
    return open_source(name, config, max_image_pixels=1_000_000)


def open_mapped(path, image_root=None, split=None, marks=MarkerMeaning.place, **mapping):
    config = SourceConfig(
        path=str(path),
        image_root=None if image_root is None else str(image_root),
        format=Format.mapped,
        split=split,
        marks=marks,
        mapping=MappingConfig(**{"answer": "{answer}", **mapping}),
    )
    return open_source("mine", config, max_image_pixels=1_000_000)


def make_pair(folder, record, image="a.jpg"):
    """Write a zip with one label a.json and a zip with one image."""
    make_zip(folder / "TL_1.zip", [("a.json", record if isinstance(record, bytes) else label(record))])
    make_zip(folder / "TS_1.zip", [(image, picture())])
    return folder
