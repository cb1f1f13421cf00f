"""Shared types of the whole package: samples, preference pairs, micro-batches and user errors.

From this package the module imports only `lit_vlm.anyres` (tile layouts). Text in a sample is data and never control: the
structure says where images and special tokens are (`ImagePlaceholder`, `ControlToken`). A caption that contains `<image>` or
`<|im_end|>` therefore stays text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lit_vlm.anyres import TileLayout

LOGITS_CHUNK_TOKENS = 2048  # supervised tokens of one chunk of logits; bounds the memory of the cross-entropy
IGNORE_INDEX = -100  # label of a position that the loss ignores; PyTorch's default

# The nine special tokens of VARCO-VISION, in the order of its release (special_tokens_map.json of NCSOFT/VARCO-VISION-14B)
SPECIAL_TOKENS = ("<gro>", "<ocr>", "<char>", "</char>", "<obj>", "</obj>", "<bbox>", "</bbox>", "<delim>")
IMAGE_TOKEN = "<image>"


# C0 without tab and line break, delete, C1, marks of the writing direction, halves of surrogate pairs
_CONTROL_CHARACTERS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_control_characters(text: str) -> str:
    """Replace control characters, and characters that no file can hold, by their escapes.

    Names and texts of data sets come from others, and a terminal executes control characters.
    """
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(ValueError):
    """Error that a user can correct: shown as its message without a traceback, exit status 1.

    The message says where, what was found, what was needed and what to do. Control characters in it are escaped here,
    once for all outputs.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(escape_control_characters(message))


def find_nearest(word: str, choices: Iterable[str]) -> str | None:
    """Find the choice that is most similar to a word, whatever their upper and lower case; None if none is similar."""
    by_lower = {choice.lower(): choice for choice in map(str, choices)}
    matches = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def format_suggestion(suggestion: str | None) -> str:
    """Format a suggestion for the end of a message; empty without one."""
    return f" Did you mean {suggestion}?" if suggestion else ""


def flatten(value: Any, separator: str = ".") -> dict[str, Any]:
    """Flatten nested dictionaries: {"a": {"b": 1}} gives {"a.b": 1}. A list and an empty dictionary are values."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict) and item:
            flat |= {f"{name}{separator}{key}": leaf for key, leaf in flatten(item, separator).items()}
        else:
            flat[str(name)] = item
    return flat


class Fault(StrEnum):
    """Reason for which a record is rejected; quarantined records are counted by it."""

    malformed = "malformed"  # not JSON, keys missing or of the wrong type, turns out of order
    placeholders = "placeholders"  # the numbers of image placeholders and of images differ
    no_answer = "no_answer"  # the record has no supervised token
    overlong = "overlong"  # more tokens or tiles than a micro-batch may hold
    url = "url"  # the image is a URL, and nothing is downloaded
    outside = "outside"  # the path leads out of the image root
    missing = "missing"  # the file or archive member does not exist
    unreadable = "unreadable"  # no permission, a loop of links, not a regular file, or an input/output error
    empty = "empty"  # the file has no bytes
    not_an_image = "not_an_image"  # the format is not supported
    too_large = "too_large"  # more pixels or bytes than the limit
    broken = "broken"  # the header is valid but the pixels are not: truncated or damaged
    hostile = "hostile"  # an unsafe archive member: a link, a device, or a name that leads out of the archive
    changed = "changed"  # the record differs from its state at indexing


class RecordError(UserError):
    """Error of one record. The index collects these errors and applies `data.on_bad_record` to them."""

    def __init__(
        self, origin: str, reason: str, remedy: str = "Fix the record", fault: Fault = Fault.malformed
    ) -> None:
        origin, reason = escape_control_characters(origin), escape_control_characters(reason)
        super().__init__(f"{origin}: {reason}. {remedy}.")
        self.origin, self.reason, self.remedy, self.fault = origin, reason, remedy, fault

    def __reduce__(self):  # pickled when it leaves a loader's worker process
        return type(self), (self.origin, self.reason, self.remedy, self.fault)


class Language(StrEnum):
    """ISO 639-1 code of a sample. `auto` detects it from the text: any Hangul makes it Korean."""

    ko = "ko"
    en = "en"
    auto = "auto"


class SampleKind(StrEnum):
    """Kind of task that a sample trains; losses and scores are reported per kind."""

    caption = "caption"
    instruction = "instruction"
    word = "word"  # read one rendered word; the answer has no boxes
    number = "number"  # read one rendered number
    ocr = "ocr"  # VARCO's <ocr>: the answer is every text with its box
    grounding = "grounding"  # VARCO's <gro>: the answer contains boxes
    referring = "referring"  # the question contains boxes
    document = "document"
    table = "table"
    chart = "chart"
    arithmetic = "arithmetic"
    text = "text"  # no image
    image_only = "image_only"  # an image without a question; the answer is a caption
    multi_image = "multi_image"
    digit = "digit"  # a handwritten digit (data=digits)
    preference = "preference"
    other = "other"


class ModelPart(StrEnum):
    """Part of a vision-language model; each parameter belongs to exactly one part."""

    vision_tower = "vision_tower"
    projector = "projector"
    language_model = "language_model"


class Role(StrEnum):
    """Role of a message in a conversation."""

    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A single control token, e.g. `ControlToken("<bbox>")`."""

    token: str


@dataclass(frozen=True, slots=True)
class ImagePlaceholder:
    """Placeholder in a message for `sample.images[index]`."""

    index: int


ContentPart = str | ControlToken | ImagePlaceholder


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation: text, control tokens and image placeholders, in order."""

    role: Role
    content: tuple[ContentPart, ...]
    supervised: bool = True  # of an answer; False excludes it from the loss

    @property
    def text(self) -> str:
        """The content as plain text: control tokens spelled out, images left out."""
        if len(self.content) == 1 and isinstance(self.content[0], str):
            return self.content[0]
        return "".join(
            piece if isinstance(piece, str) else piece.token
            for piece in self.content
            if not isinstance(piece, ImagePlaceholder)
        )


@runtime_checkable
class LazyImage(Protocol):
    """An image that is decoded lazily: the size comes from the header, the pixels are read on demand."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels after EXIF rotation, read without decoding."""
        ...

    def load(self) -> Image:
        """Decode the whole image as RGB with EXIF rotation applied.

        Raises:
            RecordError: the image cannot be decoded.
        """
        ...


@dataclass(frozen=True, slots=True)
class Box:
    """A bounding box; its corners are fractions of the width and height of the original image."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation. The loss covers every assistant message with `supervised=True`; the last message is one.

    Attributes:
        id: identifies the sample within its source, independent of its position.
        origin: where a person finds the sample, e.g. "train.jsonl:1041".
    """

    id: str
    source: str
    origin: str
    kind: SampleKind
    language: Language
    messages: tuple[Message, ...]
    images: tuple[LazyImage, ...] = ()
    max_tiles: int | None = None  # maximum tiles of an image besides its base view; None: limited by the model's grid
    nfc_changed: bool = False  # NFC normalisation changed the text
    unused_keys: tuple[str, ...] = ()  # keys of the record that the reader does not use


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with a chosen and a rejected answer. `prompt` ends with a user message.

    With `has_rejected_images` the rejected answer belongs to other images: the first half of `images` is in the prompt of the
    chosen answer, the second half in the prompt of the rejected answer. The two answers may then be equal.
    """

    id: str
    source: str
    origin: str
    kind: SampleKind
    language: Language
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    images: tuple[LazyImage, ...] = ()
    max_tiles: int | None = None
    nfc_changed: bool = False
    has_rejected_images: bool = False
    unused_keys: tuple[str, ...] = ()

    @property
    def num_prompt_images(self) -> int:
        """Number of images in one prompt."""
        return len(self.images) // 2 if self.has_rejected_images else len(self.images)


Record = Sample | PreferencePair


class Source(Protocol):
    """A data set with random access by position. `source[i]` raises RecordError for a record that cannot be used.

    A source may also have two optional methods. `origin(index) -> str` says where a person finds a record that cannot be
    read. `digest_of(start, stop) -> str` is a digest of the content of records start to stop - 1 and of how they are read;
    with it, the index of a grown file reads only the new records. Without them, name and position, and `digest`, are used.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    @property
    def digest(self) -> str:
        """Digest that changes when the source changes (path, size, mtime; or the settings of a generator)."""
        ...


# Shapes: T tokens of the micro-batch, B segments (sequences), S supervised tokens, N tiles, M distinct images,
# R runs of image placeholder tokens.
@dataclass(slots=True)
class Batch:
    """A packed micro-batch: one flat sequence of tokens without padding, and one stack of image tiles.

    Segment b is `input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]`. Its tokens attend to their own segment and, if
    `prefix_segments[b]` is not -1, to that segment before it; to nothing else. A preference pair is stored as its prompt
    without the last token, once, and two answers that continue it. Each answer starts with the prompt's last token, so that in
    every segment a token is predicted from the one before it. Each image is encoded once: run r of placeholder tokens takes the
    features of image `image_index[r]`.
    """

    input_ids: Tensor  # [T] int64; image_token_id at the positions of image features
    labels: Tensor  # [T] int64, not shifted; IGNORE_INDEX at unsupervised positions
    loss_positions: Tensor  # [S] int64, positions whose logits predict a supervised token: the position before each one
    position_ids: Tensor  # [T] int64, restart at each segment, continuing its prefix segment
    cu_seqlens: Tensor  # [B + 1] int32
    segment_lengths: list[
        int
    ]  # B; tokens of each segment: cu_seqlens on the host, which avoids a device synchronisation
    prefix_segments: list[int]  # B; index of the segment that each one continues, or -1
    segment_supervised_tokens: list[int]  # B; supervised tokens of each segment, S in total
    trailing_tokens: list[
        int
    ]  # B; tokens of each segment from its first loss position to its end, 0 without a loss position
    record_ids: list[int]  # B; index of the record that each segment belongs to, within the micro-batch
    tiles: Tensor  # [N, 3, H, W] uint8; the model normalises them on its device
    layouts: list[TileLayout]  # M; layout that maps the tiles of each image to tokens, N tiles in total
    tiles_per_record: list[int]  # tiles of each record, N in total
    image_index: list[int]  # R; index of the image whose features fill each run of placeholders
    step_supervised_tokens: int  # of all ranks and micro-batches of the optimizer step: divisor of the loss
    step_tiles: int = 0  # image tiles of the whole optimizer step
    step: int = 0  # optimizer step
    sample_ids: list[str] = field(default_factory=list)  # B for sft, one for each pair for preferences
    kinds: list[SampleKind] = field(default_factory=list)
    languages: list[Language] = field(default_factory=list)
    num_pairs: int = 0  # preference pairs; the last segments are all chosen answers, then all rejected answers
    step_pairs: int = 0  # preference pairs of the whole optimizer step
    step_chosen_tokens: int = 0
    record_keys: list[int] = field(default_factory=list)  # hash of each record's content and size
    image_hashes: list[int] = field(default_factory=list)  # hash of each record's images, for caches
    dummy: bool = False  # True: no loss; the rank only takes part in the collective operations

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_supervised_tokens(self) -> int:
        """Supervised tokens of this micro-batch; the first token of a segment is never predicted."""
        return sum(self.segment_supervised_tokens)

    @property
    def num_tiles(self) -> int:
        return int(self.tiles.shape[0])

    def to(self, device: Any, **kwargs: Any) -> Batch:
        """Return the same batch with its tensors on `device`. Lightning calls this method."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the same batch with its tensors in pinned memory."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        names = ("input_ids", "labels", "loss_positions", "position_ids", "cu_seqlens", "tiles")
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **tensors)
