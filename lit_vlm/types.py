"""The words that every room shares. Of ours it imports the arithmetic of tiles alone.

Text in a sample is data and never control: where an image stands and where a special token stands is said by the
structure (`ImageSlot`, `Control`), so `<image>` or `<|im_end|>` written in somebody's caption stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lit_vlm.anyres import Layout

HEAD_ROWS = 2048  # supervised tokens whose logits exist at a time
IGNORE_INDEX = -100  # label of a position that the loss leaves out; the field's value

# VARCO-VISION's nine, in the order of its release (special_tokens_map.json of NCSOFT/VARCO-VISION-14B)
SPECIAL_TOKENS = ("<gro>", "<ocr>", "<char>", "</char>", "<obj>", "</obj>", "<bbox>", "</bbox>", "<delim>")
IMAGE_TOKEN = "<image>"


# C0 (but tab and line break), delete and C1, what turns the direction of writing, halves of surrogate pairs
_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    """Write what a terminal obeys, and what no file can hold, as its escape: names and texts of data sets come from others."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(ValueError):
    """A user's mistake: shown as its message alone, without a traceback, exit status 1.

    The message says where, what was found, what was needed and what to do. Control characters in it are escaped here,
    once for all places that show it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(escape_controls(message))


def counted(number: int, what: str, many: str | None = None) -> str:
    """ "1 record", "2,000 records"; `many` where the plural does not end in s alone."""
    return f"{number:,} {what if number == 1 else many or what + 's'}"


class Fault(StrEnum):
    """What is wrong with a record, in a word; quarantined records are counted by it."""

    malformed = "malformed"  # not JSON, keys missing or of the wrong type, turns out of order
    placeholders = "placeholders"  # other numbers of image placeholders and images
    no_answer = "no_answer"  # nothing in it would be supervised
    overlong = "overlong"  # more tokens or tiles than a micro-batch may hold
    url = "url"  # an image that would have to be fetched
    outside = "outside"  # a path that leads out of the image root
    missing = "missing"  # no such file or member
    unreadable = "unreadable"  # no permission, a link loop, no regular file, an input/output error
    empty = "empty"  # a file of no bytes
    not_an_image = "not_an_image"  # another format than those that are read
    too_large = "too_large"  # more pixels or bytes than are allowed
    broken = "broken"  # a header, but not the pixels: truncated or damaged
    hostile = "hostile"  # an archive member that is refused: a link, a device, a name that leads elsewhere
    changed = "changed"  # not what it was when it was indexed


class RecordError(UserError):
    """One record cannot be used. Collected by the index, then handled by `data.on_bad_record`."""

    def __init__(
        self, origin: str, reason: str, remedy: str = "Fix the record", fault: Fault = Fault.malformed
    ) -> None:
        origin, reason = escape_controls(origin), escape_controls(reason)
        super().__init__(f"{origin}: {reason}. {remedy}.")
        self.origin, self.reason, self.remedy, self.fault = origin, reason, remedy, fault

    def __reduce__(self):  # crosses the border of a loader's worker process
        return type(self), (self.origin, self.reason, self.remedy, self.fault)


class Language(StrEnum):
    """ISO 639-1. `auto` asks the text: any Hangul makes it Korean."""

    ko = "ko"
    en = "en"
    auto = "auto"


class Kind(StrEnum):
    """What a sample trains; losses and scores are reported apart by kind."""

    caption = "caption"
    instruction = "instruction"
    word = "word"  # read one rendered word, answer without boxes
    number = "number"  # read one rendered number
    ocr = "ocr"  # VARCO's <ocr>: every text with its box
    grounding = "grounding"  # VARCO's <gro>: an answer that points
    referring = "referring"  # a question that points
    document = "document"
    table = "table"
    chart = "chart"
    arithmetic = "arithmetic"
    text = "text"  # no image
    image_only = "image_only"  # an image and no question; the answer is a caption
    multi_image = "multi_image"
    digit = "digit"  # a handwritten digit (data=digits)
    preference = "preference"
    other = "other"


class Part(StrEnum):
    """The parts of a model; each parameter belongs to exactly one."""

    vision_tower = "vision_tower"
    projector = "projector"
    language_model = "language_model"


class Role(StrEnum):
    system = "system"
    user = "user"
    assistant = "assistant"


@dataclass(frozen=True, slots=True)
class Control:
    """One control token, e.g. `Control("<bbox>")`."""

    token: str


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """Here stands `sample.images[index]`."""

    index: int


Content = str | Control | ImageSlot


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: tuple[Content, ...]
    trained: bool = True  # of an answer: False leaves it out of the loss

    @property
    def text(self) -> str:
        """The content as a person writes it: control tokens spelled out, images left out."""
        return "".join(
            piece if isinstance(piece, str) else piece.token
            for piece in self.content
            if not isinstance(piece, ImageSlot)
        )


@runtime_checkable
class ImageSource(Protocol):
    """An image that is opened late: its size is known from the header, its pixels when they are needed."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, after EXIF rotation, read without decoding."""
        ...

    def load(self) -> Image:
        """The whole picture as RGB, EXIF rotation applied. RecordError when it cannot be decoded."""
        ...


@dataclass(frozen=True, slots=True)
class Box:
    """Corners as fractions of the original image's width and height."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. The loss covers every assistant message that is `trained`; the last one is.

    `origin` is where a person finds it ("train.jsonl:1041"); `id` names it for good, within its source.
    """

    id: str
    source: str
    origin: str
    kind: Kind
    language: Language
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    max_tiles: int | None = None  # most tiles of an image beside its base view; None: as the model's grid says
    normalised: bool = False  # Unicode's NFC changed its text
    unread: tuple[str, ...] = ()  # keys of the record that nothing is read from


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt with two answers, the first preferred. `prompt` ends with a user message.

    With `rejected_images` the rejected answer was given to other pictures: the first half of `images` stands in the
    prompt of the chosen answer, the second half in that of the rejected one. The two answers may then be equal.
    """

    id: str
    source: str
    origin: str
    kind: Kind
    language: Language
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    images: tuple[ImageSource, ...] = ()
    max_tiles: int | None = None
    normalised: bool = False
    rejected_images: bool = False
    unread: tuple[str, ...] = ()

    @property
    def num_shown(self) -> int:
        """Pictures that stand in one prompt."""
        return len(self.images) // 2 if self.rejected_images else len(self.images)


Record = Sample | PreferencePair


class Source(Protocol):
    """A dataset by position. `source[i]` raises RecordError for a record that cannot be used.

    A source may also have `origin(index) -> str`, where a person finds a record that cannot be read, and
    `digest_of(start, stop) -> str` over what records start to stop - 1 hold and how they are read: then an index of a
    grown file reads only what is new. Without them name and position, and `digest`, stand in.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    @property
    def digest(self) -> str:
        """Changes when what the source holds changes (path, size, mtime; or a generator's settings)."""
        ...


# Shapes: T tokens of the micro-batch, B segments (sequences), S supervised tokens, N tiles, M distinct images, R image
# runs in the token row.
@dataclass(slots=True)
class Batch:
    """A flat micro-batch: one row of tokens without padding, one stack of tiles.

    Segment b is `input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]`. Its tokens see themselves, and before them segment
    `prefixes[b]` if that is not -1; nothing else. A preference pair is its prompt without the last token, once, and two
    answers that continue it, each with the prompt's last token before it, so that in every segment a token is predicted
    from the one before it. Each image is encoded once: run r of placeholder tokens takes the features of image
    `image_index[r]`.
    """

    input_ids: Tensor  # [T] int64; image_token_id where image features go
    labels: Tensor  # [T] int64, not shifted; IGNORE_INDEX where unsupervised
    rows: Tensor  # [S] int64, the positions that predict a supervised token: each the one before it
    position_ids: Tensor  # [T] int64, restart at each segment, behind its prefix
    cu_seqlens: Tensor  # [B + 1] int32
    lengths: list[int]  # B tokens of each segment; cu_seqlens on the host, so that nothing waits for the device
    prefixes: list[int]  # B; the segment that this one continues, or -1
    supervised: list[int]  # B supervised tokens of each segment; they sum to S
    tails: list[int]  # B tokens of each segment from its first row on; 0 without one
    owners: list[int]  # B; which record each segment is of
    tiles: Tensor  # [N, 3, H, W] uint8; the model normalises them on its device
    layouts: list[Layout]  # M; how each image's tiles become tokens. Their tiles sum to N
    tiles_of_records: list[int]  # tiles of each record; they sum to N
    image_index: list[int]  # R
    step_supervised_tokens: int  # in the whole optimizer step, over all ranks and micro-batches: the loss's divisor
    step_tiles: int = 0  # image tiles in the whole optimizer step
    step: int = 0  # optimizer step
    sample_ids: list[str] = field(default_factory=list)  # B for sft, one per pair for preferences
    kinds: list[Kind] = field(default_factory=list)
    languages: list[Language] = field(default_factory=list)
    num_pairs: int = 0  # preference batches: the last segments are the pairs' chosen answers, then their rejected ones
    step_pairs: int = 0  # in the whole optimizer step
    step_chosen_tokens: int = 0
    keys: list[int] = field(default_factory=list)  # of each record: what it says, and as how many tokens and tiles
    contents: list[int] = field(default_factory=list)  # of each record's pictures; for what is kept of them, else empty
    blank: bool = False  # nothing to learn here; it keeps the ranks in step

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_supervised_tokens(self) -> int:
        """Of this micro-batch; a segment's first token is never predicted."""
        return sum(self.supervised)

    @property
    def num_tiles(self) -> int:
        return int(self.tiles.shape[0])

    def to(self, device: Any, **kwargs: Any) -> Batch:
        """The same batch with its tensors on `device`; Lightning calls this."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        names = ("input_ids", "labels", "rows", "position_ids", "cu_seqlens", "tiles")
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **tensors)
