"""Catalogue of a dataset's files, in folders and in zip files, with look-up by name.

Names are compared in Unicode NFC. A file is one row of numbers and its name, not a Python object, because a dataset may
have hundreds of thousands of files.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import stat
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from lit_vlm.data.lazy_images import FileImage, format_untrusted
from lit_vlm.data.readers.splits import infer_split, select_split
from lit_vlm.data.readers.zip_members import ZipImage, ZipMember, ZipMemberFlaw, iter_members
from lit_vlm.formatting import format_count
from lit_vlm.types import Fault, LazyImage, RecordError, UserError

IMAGE_PATTERNS = ("*.jpg", "*.jpeg", "*.png", "*.webp", "*.gif", "*.bmp", "*.avif")
_COLUMNS = ("container", "offset", "packed", "size", "crc", "flaw", "stamp")
_NO_ARCHIVE = -1  # the `container` of a file that is in no zip
_REMEDY = "Set data.sources.<name>.image_root=... to the folder of the pictures or their zip files, or fix the record"


@dataclass(frozen=True, slots=True)
class FileName:
    """File name for templates, in NFC: {@path}, {@name}, {@stem}, {@folder}."""

    path: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def folder(self) -> str:
        return PurePosixPath(self.path).parent.name


class FileCatalogue:
    """Catalogue of the files below a folder (or of one file, or one zip) whose names match a pattern, in a fixed order.

    Raises:
        UserError: a zip cannot be opened, or holds zips itself.
    """

    def __init__(self, root: Path, patterns: Sequence[str]) -> None:
        self.root = root if root.is_dir() else root.parent
        self.archives: list[Path] = []
        self._match = re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in patterns)).match
        self._columns = {name: array("q") for name in _COLUMNS}
        self._names, self._ends = bytearray(), array("q")  # all names joined, and the end of each
        # function of a path -> sorted hashes, files
        self._hash_tables: dict[Callable[[str], str], tuple[np.ndarray, np.ndarray]] = {}
        for path in _walk_files(root):
            if path.suffix.lower() != ".zip":
                self._add_file(path)
            elif path.is_file():
                self._add_zip(path)
            else:  # reading a pipe would block for ever
                raise UserError(f"{path}: is no regular file. Take it out of the folder.")

    def __len__(self) -> int:
        return len(self._ends)

    def get_path(self, file: int) -> str:
        """Return the file's path in NFC, relative to the root or inside of its zip."""
        return unicodedata.normalize("NFC", os.fsdecode(self._get_raw_name(file)))

    def format_path(self, file: int) -> str:
        """Format the file's path for messages, with the zip's name before it."""
        container = self._columns["container"][file]
        return (
            self.get_path(file)
            if container == _NO_ARCHIVE
            else f"{self.archives[container].name}/{self.get_path(file)}"
        )

    def get_archive(self, file: int) -> Path | None:
        """Return the zip that holds the file, or None."""
        container = self._columns["container"][file]
        return None if container == _NO_ARCHIVE else self.archives[container]

    def read(self, file: int, origin: str) -> bytes:
        """Read all bytes of a file or zip member; raise a RecordError if it is refused or cannot be read."""
        member = self._get_member(file)
        if member is not None:
            return member.read(origin)
        if self._columns["flaw"][file]:
            reason = f"{format_untrusted(self.get_path(file))} is a link or no regular file, and is not read"
            raise RecordError(origin, reason, fault=Fault.hostile)
        try:
            return self.get_disk_path(file).read_bytes()
        except OSError as error:
            reason = f"{format_untrusted(self.get_path(file))} cannot be read: {error.strerror}"
            raise RecordError(origin, reason, fault=Fault.unreadable) from error

    def get_disk_path(self, file: int) -> Path:
        """Return the path on disk of a file that is in no zip."""
        return self.root / os.fsdecode(self._get_raw_name(file))

    def make_image(self, file: int, origin: str, max_pixels: int) -> LazyImage:
        """Make the image source of a file; nothing is decoded yet."""
        member = self._get_member(file)
        if member is not None:
            return ZipImage(member, origin, max_pixels)
        return FileImage(os.fsdecode(self._get_raw_name(file)), self.root, origin, max_pixels)

    def find_image(self, path: str, origin: str, near: Path | None = None) -> int:
        """Find the image that a label names: by its whole path, else by its file name; the suffix may be missing.

        Args:
            near: the label's own zip. If several images have one name, the one in the zip paired with it is used.

        Raises:
            RecordError: no image has this name, or several have it.
        """
        path = unicodedata.normalize("NFC", path.replace("\\", "/")).removeprefix("./")
        name = PurePosixPath(path).name
        for part, wanted in ((_get_whole_path, path), (_drop_suffix, path), (_get_name, name), (_get_stem, name)):
            candidates = [file for file in self._find_candidates(part, wanted) if part(self.get_path(file)) == wanted]
            candidates = self._filter_paired(candidates, near) if len(candidates) > 1 else candidates
            if len(candidates) > 1:
                names = " and ".join(format_untrusted(self.format_path(file)) for file in candidates[:2])
                raise RecordError(
                    origin, f"image {format_untrusted(path)} may be {names}", "Give its whole path", Fault.missing
                )
            if candidates:
                return candidates[0]
        reason = f"image {format_untrusted(path)} not found in {self.root}, which has {format_count(len(self), 'picture')}, zip files included"
        raise RecordError(origin, reason, _REMEDY, Fault.missing)

    def compute_digest(self, start: int = 0, stop: int | None = None) -> str:
        """Compute the digest of names and contents of files start to stop - 1.

        A zip member's content is given by its checksum, a file's by its size and modification time.
        """
        stop = len(self) if stop is None else stop
        hasher = hashlib.sha256(bytes(self._names[self._ends[start - 1] if start else 0 : self._ends[stop - 1]]))
        for name in ("size", "crc", "flaw", "stamp"):
            hasher.update(self._columns[name][start:stop].tobytes())
        return hasher.hexdigest()

    def keep_split(self, setting: str, split: str | None, are_pictures: bool) -> None:
        """Keep only the files of one split, inferred from the names of folders, zips and label files.

        Names of image files are ignored.

        Raises:
            UserError: there are several splits and none is wanted, or the wanted one is not among them.
        """
        paths = [self._get_path_from_root(file) for file in range(len(self))]
        splits = [infer_split(path, folders_only=are_pictures, is_label_file=True) for path in paths]
        chosen = select_split(setting, paths, splits, split)
        if all(chosen):
            return
        files = [file for file, is_chosen in enumerate(chosen) if is_chosen]
        names = [self._get_raw_name(file) for file in files]
        for name, column in self._columns.items():
            self._columns[name] = array("q", [column[file] for file in files])
        self._names, self._ends = bytearray(b"".join(names)), array("q", itertools.accumulate(map(len, names)))

    def _get_path_from_root(self, file: int) -> str:
        archive = self.get_archive(file)
        path = self.get_path(file)
        return path if archive is None else f"{archive.relative_to(self.root)}/{path}"

    def _filter_paired(self, files: list[int], near: Path | None) -> list[int]:
        paired = [
            file
            for file in files
            if (archive := self.get_archive(file)) and near and _get_pair_name(archive) == _get_pair_name(near)
        ]
        return paired or files

    def _get_raw_name(self, file: int) -> bytes:
        return bytes(self._names[self._ends[file - 1] if file else 0 : self._ends[file]])

    def _get_member(self, file: int) -> ZipMember | None:
        container, offset, packed, size, crc, flaw, _ = (self._columns[name][file] for name in _COLUMNS)
        if container == _NO_ARCHIVE:
            return None
        return ZipMember(self.archives[container], self.get_path(file), offset, packed, size, crc, ZipMemberFlaw(flaw))

    def _add_file(self, path: Path) -> None:
        if self._match(path.name.lower()):
            status = path.lstat()
            flaw = ZipMemberFlaw.none if stat.S_ISREG(status.st_mode) else ZipMemberFlaw.link
            numbers = (_NO_ARCHIVE, 0, 0, status.st_size, 0, flaw, status.st_mtime_ns)
            self._add(os.fsencode(path.relative_to(self.root)), *numbers)

    def _add_zip(self, path: Path) -> None:
        self.archives.append(path)
        number = len(self.archives) - 1
        for member in iter_members(path):
            if self._match(PurePosixPath(member.name).name.lower()):
                numbers = (number, member.offset, member.compressed_size, member.size, member.crc, member.flaw, 0)
                self._add(os.fsencode(member.name), *numbers)

    def _add(self, name: bytes, *numbers: int) -> None:
        self._names += name
        self._ends.append(len(self._names))
        for column, number in zip(_COLUMNS, numbers, strict=True):
            self._columns[column].append(number)

    def _find_candidates(self, get_part: Callable[[str], str], wanted: str) -> list[int]:
        """Find files by the hash of a part of their path, with a binary search over 12 bytes a file."""
        if get_part not in self._hash_tables:
            hashes = np.fromiter(
                (_hash_text(get_part(self.get_path(file))) for file in range(len(self))), np.uint64, len(self)
            )
            files = np.argsort(hashes, kind="stable").astype(np.uint32)
            self._hash_tables[get_part] = hashes[files], files
        hashes, files = self._hash_tables[get_part]
        wanted_hash = np.uint64(_hash_text(wanted))
        return files[
            np.searchsorted(hashes, wanted_hash, "left") : np.searchsorted(hashes, wanted_hash, "right")
        ].tolist()


def _get_whole_path(path: str) -> str:
    return path


def _drop_suffix(path: str) -> str:
    return path.removesuffix(PurePosixPath(path).suffix)


def _get_name(path: str) -> str:
    return PurePosixPath(path).name


def _get_stem(path: str) -> str:
    return PurePosixPath(path).stem


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def _get_pair_name(archive: Path) -> str:
    """Return the common name of a zip of images and its zip of labels: TS_1 and TL_1, [원천]1 and [라벨]1."""
    name = unicodedata.normalize("NFC", archive.name)
    return re.sub(r"\[(?:원천|라벨)\]|원천데이터|라벨링데이터|(?<=^[TV])[SL](?=[_.\d])", "", name)


def _walk_files(root: Path) -> Iterator[Path]:
    """Walk the files in the order of their names; folders that are symbolic links are skipped."""
    if root.is_file():
        yield root
        return
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            yield Path(folder, name)


def find_zip_parts(root: Path) -> list[str]:
    """Find the parts into which AIHub splits large zips; they are no valid zips until they are joined."""
    return sorted(path.name for path in _walk_files(root) if re.search(r"\.zip\.part\d+$", path.name))


def require_files(name: str, setting: str, root: Path, catalogue: FileCatalogue, what: str) -> None:
    """Raise a UserError if the catalogue is empty, with a hint if the zips are still in parts."""
    if len(catalogue):
        return
    parts = find_zip_parts(root)
    found = f"parts of zip files ({parts[0]}, ...)" if parts else "none, in folders or zip files"
    remedy = "Put them together: cat NAME.zip.part* > NAME.zip." if parts else "Give the folder that they were put in."
    raise UserError(f"data.sources.{name}.{setting}={root}: looked for {what}, found {found}. {remedy}")
