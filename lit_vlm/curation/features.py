"""Features of records for curation: digests and hashes of texts and pictures, computed once in parallel and kept on disk.

Each shard of a source is a pair of files in the index folder, named by a hash of the content of its records and of the version of
the features. So an interrupted pass resumes with the shard at which it stopped, another pass finds the features again, and features
of another version are counted, and computed anew. A picture file that changed since is hashed again (its size and modification time are kept).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from lit_vlm.curation.picture_hashes import (
    HASH_VERSION,
    NUM_VIEWS,
    THUMBNAIL_SIDE,
    digest_reduction,
    hash_reduced,
    reduce_picture,
)
from lit_vlm.curation.text_hashes import (
    NUM_PERMUTATIONS,
    TEXT_VERSION,
    compute_signatures,
    hash_numbers,
    hash_shingles,
    hash_text,
    iterate_shingles,
    join_turns,
    list_messages,
)
from lit_vlm.data.index.build import map_parallel
from lit_vlm.data.index.fingerprint import compute_stamp
from lit_vlm.data.index.shard_cache import ShardRange, get_origin, hash_parts, list_shard_ranges, lock_source
from lit_vlm.data.lazy_images import EncodedImage, hash_pixels
from lit_vlm.files import atomic_write
from lit_vlm.types import LazyImage, Record, RecordError, Source

FEATURES_FOLDER = "curation"  # in the index folder
_PENDING_PICTURES = 256  # reduced and not hashed yet: 3 MB
ROW = np.dtype(
    [
        ("stamp", "u8"),  # of its picture files
        ("is_bad", "u1"),  # cannot be read
        ("text", "u8"),  # digest of the normalised turns
        ("numbers", "u8"),  # digest of their numbers
        ("num_shingles", "u4"),
        ("num_images", "u4"),
        ("signature", "u4", NUM_PERMUTATIONS),
    ]
)
IMAGE = np.dtype(
    [
        ("content", "u8", 2),  # digest of the encoded bytes
        ("reduction", "u8", 2),  # digest of size and reduced pixels
        ("views", "u8", NUM_VIEWS),
        ("brightness", "f4"),  # mean level
        ("thumbnail", "u1", (THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3)),
    ]
)
IMAGE_FIELDS = ("content", "reduction", "views", "brightness")  # read into memory; thumbnails stay on disk
OnProgress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Features:
    """Features of the records of several sources, in their order.

    Attributes:
        source_ids, positions: source of each record, and its position there, [R].
        rows: [R] of ROW.
        first_images: number of the first picture of each record, [R]; those of one record follow each other.
        images: pictures of all records: field -> [N, ...].
        thumbnails: [n, S, S, 3] of each shard, on disk, in the order of the pictures.
        errors: (source name, error) of the records that cannot be read; they are never left out by a pass.
        num_outdated: shards of which the store had features of an older version only.
    """

    source_ids: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    first_images: np.ndarray
    images: dict[str, np.ndarray]
    thumbnails: list[np.ndarray]
    errors: list[tuple[str, str]]
    num_outdated: int = 0

    def read_thumbnails(self, numbers: np.ndarray) -> np.ndarray:
        """Read the thumbnails of pictures: [n, S, S, 3] uint8."""
        ends = np.cumsum([len(part) for part in self.thumbnails])
        result = np.empty((len(numbers), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8)
        parts = np.searchsorted(ends, numbers, side="right")
        for part in np.unique(parts):
            chosen = parts == part
            result[chosen] = self.thumbnails[part][numbers[chosen] - (ends[part - 1] if part else 0)]
        return result


@dataclass(slots=True)
class ShardFeatures:
    """Features of one shard: records, pictures, and the messages of records that cannot be read by their position."""

    rows: np.ndarray
    images: np.ndarray
    errors: dict[int, str]


class FeatureStore:
    """Store of the features of shards.

    Args:
        folder: index folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FEATURES_FOLDER

    def read(self, shard: ShardRange) -> tuple[np.ndarray, np.ndarray] | None:
        """Read the rows and the pictures of a shard; the pictures stay on disk. None: not there, or of another version."""
        rows_path, images_path = self._get_paths(shard)
        try:
            rows, images = np.load(rows_path), np.load(images_path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        if rows.dtype != ROW or images.dtype != IMAGE or len(rows) != len(shard):
            return None
        return (rows, images) if int(rows["num_images"].sum()) == len(images) else None

    def is_outdated(self, shard: ShardRange) -> bool:
        """Return True if the features of a shard are there in an older version only."""
        versions = (version for version in range(HASH_VERSION, 0, -1) if self._get_paths(shard, version)[0].is_file())
        return next(versions, HASH_VERSION) < HASH_VERSION

    def write(self, shard: ShardRange, features: ShardFeatures) -> None:
        """Write the features of a shard; the rows come last, so that a pair of files is complete."""
        rows_path, images_path = self._get_paths(shard)
        for path, values in ((images_path, features.images), (rows_path, features.rows)):
            with atomic_write(path) as draft, draft.open("wb") as stream:
                np.save(stream, values, allow_pickle=False)

    def _get_paths(self, shard: ShardRange, version: int | None = None) -> tuple[Path, Path]:
        key = hash_parts("curation", version or HASH_VERSION, TEXT_VERSION, shard.content_key)
        return self.folder / f"{key}.rows.npy", self.folder / f"{key}.images.npy"


def compute_features(
    sources: Sequence[Source], index_dir: Path, *, workers: int, on_progress: OnProgress | None = None
) -> Features:
    """Compute the features of all records, or read those that are there.

    Args:
        index_dir: folder of the store.
        workers: processes that read and decode.
        on_progress: called after each shard.
    """
    store, parts = FeatureStore(index_dir), dict[tuple[int, int], dict[int, str]]()
    all_shards, num_outdated = list[ShardRange](), 0
    for source_id, source in enumerate(sources):
        with lock_source(source, index_dir, FEATURES_FOLDER):
            shards, done = list_shard_ranges(source_id, source, index_dir), 0
            num_outdated += sum(map(store.is_outdated, shards))
            for shard, errors in map_parallel(partial(_update_shard, sources, store), shards, workers):
                parts[source_id, shard.start] = errors
                done += len(shard)
                if on_progress:
                    on_progress(source.name, done, len(source))
        all_shards += shards
    return replace(_join_shards(sources, store, all_shards, parts), num_outdated=num_outdated)


def make_text_features(sources: Sequence[Source], errors: dict[int, str]) -> Features:
    """Make the features of records whose pictures were not read.

    Args:
        errors: messages of the records that cannot be read, by their number.
    """
    lengths = [len(source) for source in sources]
    source_ids = np.repeat(np.arange(len(sources), dtype=np.int32), lengths)
    positions = np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)])
    rows = np.zeros(len(positions), ROW)
    rows["is_bad"][list(errors)] = 1
    images = {name: np.zeros(0, IMAGE[name]) for name in IMAGE_FIELDS}
    named = [(sources[source_ids[record]].name, message) for record, message in sorted(errors.items())]
    return Features(source_ids, positions, rows, np.zeros(len(positions), np.int64), images, [], named)


def hash_share(
    sources: Sequence[Source],
    index_dir: Path,
    number: int,
    count: int,
    *,
    workers: int,
    on_progress: OnProgress | None = None,
) -> tuple[int, int]:
    """Compute the features of the shards that are one job's share: the shard `number` of all, and each `count`-th after it.

    Jobs side by side write different files, so none waits for another. `compute_features` joins what they wrote.

    Returns:
        Number of its shards, and of all shards.
    """
    shards = [
        shard for source_id, source in enumerate(sources) for shard in list_shard_ranges(source_id, source, index_dir)
    ]
    own = shards[number::count]
    results = map_parallel(partial(_update_shard, sources, FeatureStore(index_dir)), own, workers)
    for done, _ in enumerate(results, 1):
        if on_progress:
            on_progress("blocks of records", done, len(own))
    return len(own), len(shards)


def _update_shard(sources: Sequence[Source], store: FeatureStore, shard: ShardRange) -> dict[int, str]:
    """Bring the features of a shard up to date. Returns the messages of records that cannot be read."""
    source, known = sources[shard.source_id], store.read(shard)
    features = extract_features(source, range(shard.start, shard.stop), known)
    if known is None or not np.array_equal(known[0], features.rows):
        store.write(shard, features)
    return features.errors


def extract_features(
    source: Source, positions: Sequence[int], known: tuple[np.ndarray, np.ndarray] | None = None
) -> ShardFeatures:
    """Extract the features of records.

    Args:
        known: rows and pictures that were extracted before; those of unchanged files are taken over.
    """
    rows, shingles, errors = np.zeros(len(positions), ROW), list[np.ndarray](), {}
    images, hasher = list[np.ndarray | list[int]](), PictureHasher()
    ends = np.cumsum(known[0]["num_images"]) if known else None
    for number, position in enumerate(positions):
        shingles.append(np.zeros(0, np.uint64))
        try:
            record = source[position]
            rows[number]["stamp"] = compute_stamp(record)
            if known and ends is not None and _is_current(known[0][number], rows[number]):
                rows[number] = known[0][number]
                images.append(np.array(known[1][ends[number] - rows[number]["num_images"] : ends[number]]))
                continue
            found = [hasher.add(image) for image in record.images]
        except RecordError as error:
            rows[number]["is_bad"] = 1
            errors[number] = str(error)
            continue
        shingles[number] = fill_text(rows[number], record)
        rows[number]["num_images"] = len(found)
        images.append(found)
    fresh = [number for number, own in enumerate(shingles) if len(own)]
    rows["signature"][fresh] = compute_signatures([shingles[number] for number in fresh])
    hashes = hasher.get_hashes()
    joined = [part if isinstance(part, np.ndarray) else hashes[part] for part in images]
    return ShardFeatures(rows, np.concatenate([np.zeros(0, IMAGE), *joined]), errors)


def _is_current(known: np.void, row: np.void) -> bool:
    return known["stamp"] == row["stamp"] and not known["is_bad"]


def fill_text(row: np.void, record: Record) -> np.ndarray:
    """Fill in the digests of a record's text. Returns the hashes of its shingles."""
    turns = join_turns(list_messages(record))
    plain = " ".join(message.text for message in list_messages(record))
    row["text"], row["numbers"] = hash_text(turns), hash_numbers(plain)
    hashes = hash_shingles(iterate_shingles(plain))
    row["num_shingles"] = len(hashes)
    return hashes


class PictureHasher:
    """Hasher of pictures: each content is decoded once, and many pictures are hashed together."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}  # by content: a picture may have several conversations
        self._hashed, self._digests, self._reduced = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()

    def add(self, image: LazyImage) -> int:
        """Read a picture. Returns the number of its hashes. Raises RecordError if it cannot be decoded."""
        content, picture = load_unknown(image, self._numbers)
        if picture is not None:
            reduced = reduce_picture(picture)
            self._numbers[content] = len(self._numbers)
            digest = np.frombuffer(content.ljust(16, b"\0"), np.uint64)  # that of a zip member is shorter
            self._digests.append(np.stack([digest, digest_reduction(reduced, picture.size)]))
            self._reduced.append(reduced)
            if len(self._reduced) == _PENDING_PICTURES:
                self._hash_pending()
        return self._numbers[content]

    def get_hashes(self) -> np.ndarray:
        """Get the hashes of all pictures that were added, by their number: [n] of IMAGE."""
        self._hash_pending()
        return np.concatenate([np.zeros(0, IMAGE), *self._hashed])

    def _hash_pending(self) -> None:
        if not self._reduced:
            return
        rows, digests = np.zeros(len(self._reduced), IMAGE), np.stack(self._digests)
        rows["content"], rows["reduction"] = digests[:, 0], digests[:, 1]
        rows["views"], rows["thumbnail"] = hash_reduced(np.stack(self._reduced))
        rows["brightness"] = rows["thumbnail"].mean((1, 2, 3))
        self._hashed.append(rows)
        self._digests, self._reduced = [], []


def load_unknown(image: LazyImage, known: Container[bytes]) -> tuple[bytes, Image.Image | None]:
    """Hash the encoded bytes of a picture as `hash_content`, and load it unless the hash is known. Raises RecordError."""
    if isinstance(image, EncodedImage):
        return image.load_unless(known)
    content = hash_content(image)
    return content, None if content in known else image.load()


def hash_content(image: LazyImage) -> bytes:
    """Hash the encoded bytes of a picture, or its pixels if it has no file: at most 16 bytes."""
    content = getattr(image, "content", None)
    return content() if content else hash_pixels(np.asarray(image.load()))


def _join_shards(
    sources: Sequence[Source],
    store: FeatureStore,
    shards: Sequence[ShardRange],
    errors: dict[tuple[int, int], dict[int, str]],
) -> Features:
    read = [(shard, store.read(shard)) for shard in shards]
    parts = [(shard, found[0], found[1]) for shard, found in read if found is not None]
    assert len(parts) == len(shards)  # just written
    rows = np.concatenate([np.zeros(0, ROW), *(part[1] for part in parts)])
    ends = np.cumsum(rows["num_images"], dtype=np.int64)
    fields = {name: [np.zeros(0, IMAGE[name]), *(part[2][name] for part in parts)] for name in IMAGE_FIELDS}
    return Features(
        np.concatenate([np.zeros(0, np.int32), *(np.full(len(shard), shard.source_id, np.int32) for shard in shards)]),
        np.concatenate([np.zeros(0, np.int64), *(np.arange(shard.start, shard.stop) for shard in shards)]),
        rows,
        ends - rows["num_images"],
        {name: np.concatenate(values) for name, values in fields.items()},
        [part[2]["thumbnail"] for part in parts],
        [
            (sources[source_id].name, message or get_origin(sources[source_id], start + place))
            for (source_id, start), found in sorted(errors.items())
            for place, message in sorted(found.items())
        ],
    )
