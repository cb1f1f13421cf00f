"""Talk to a finished model in the terminal, about pictures or without."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.config import Run
from lit_vlm.data.images import FORMATS, FileImage
from lit_vlm.data.markup import parse_markup
from lit_vlm.data.processor import Processor
from lit_vlm.engine.signals import STATUS, Ask, listening
from lit_vlm.evaluation.answers import ask
from lit_vlm.evaluation.drawing import PREDICTED, draw_boxes, marks_of
from lit_vlm.tasks.finished import open_finished
from lit_vlm.types import Content, Control, ImageSlot, Kind, Language, Message, RecordError, Role, Sample, UserError

HELP = """\
/image PATH   a picture for your next question; several are possible
/reset        forget what was said and the pictures
/help         this list
/quit         leave (so does the end of the input)
<gro> or <ocr> before a question asks for boxes; they are drawn into chat_<n>.png."""
TASK = re.compile(r"^\s*(<gro>|<ocr>)\s*(?=\S)")  # in training, the question stands on the line below


def chat(run: Run) -> None:
    """A conversation, line by line, or with `prompt` one answer on the standard output.

    Raises:
        UserError: no model, or a picture of `image` that cannot be read.
    """
    if run.init_from is None:
        raise UserError("task=chat needs a model: init_from=runs/<name>/hf, or a LLaVA-OneVision-class model's hub id.")
    config = run.config
    finished = open_finished(run.init_from, config)
    most = config.max_new_tokens
    conversation = Conversation(finished.load(), finished.processor, most, config.data.max_image_pixels)
    for path in config.image:
        conversation.attach(path)
    if config.prompt is not None:
        answer = conversation.ask(config.prompt)
        print(printable(answer))
        if drawing := conversation.draw(answer):
            print(f"boxes: {drawing}", file=sys.stderr)  # the standard output holds the answer alone
        return
    talk(conversation)


class Conversation:
    """What was said so far, and the pictures that it is about.

    Args:
        max_new_tokens: most tokens of an answer.
        max_pixels: larger pictures are refused.
    """

    def __init__(
        self, model: LlavaOnevisionForConditionalGeneration, processor: Processor, max_new_tokens: int, max_pixels: int
    ) -> None:
        self.model, self.processor = model, processor
        self.max_new_tokens, self.max_pixels = max_new_tokens, max_pixels
        self.reset()

    def reset(self) -> None:
        self.messages: tuple[Message, ...] = ()
        self.images: tuple[FileImage, ...] = ()
        self.waiting: tuple[FileImage, ...] = ()  # attached and not yet asked about

    def attach(self, path: str) -> None:
        """Put a picture before the next question. UserError when it cannot be read."""
        place = Path(path).expanduser().resolve()
        image = FileImage(place.name, place.parent, path, self.max_pixels)
        try:
            image.load()  # now, not in the middle of an answer
        except RecordError as error:
            remedy = f"Give the path of a {', '.join(FORMATS)} file"
            raise UserError(f"image={path}: {error.reason}. {remedy}.") from None
        self.waiting += (image,)

    def ask(self, text: str) -> str:
        """The model's answer, which then belongs to the conversation. On an error the conversation is as before."""
        images = self.images + self.waiting
        slots = tuple(ImageSlot(number) for number in range(len(self.images), len(images)))
        asked = (*self.messages, Message(Role.user, (*slots, *self._pieces(TASK.sub(r"\1\n", text)))))
        # An answer must stand where the model's own goes; what this one says is not read.
        sample = Sample("", "chat", "chat", Kind.other, Language.auto, (*asked, self._said("")), images)
        answer = ask(self.model, self.processor, [sample], self.max_new_tokens)[0]
        self.messages, self.images, self.waiting = (*asked, self._said(answer)), images, ()
        return answer

    def draw(self, answer: str) -> Path | None:
        """A file in the current folder with the answer's boxes on the latest picture; None when there are none."""
        marks = marks_of(answer, PREDICTED)
        if not marks or not self.images:
            return None
        path = next(path for number in count(1) if not (path := Path(f"chat_{number}.png")).exists())
        draw_boxes(self.images[-1].load(), marks).save(path)
        return path

    def _said(self, text: str) -> Message:
        return Message(Role.assistant, self._pieces(text) or ("",))

    def _pieces(self, text: str) -> tuple[Content, ...]:
        """The text with its markup as control tokens; as plain text for a model that lacks them."""
        pieces = parse_markup(text)
        known = self.processor.template.control_ids
        lacks = any(isinstance(piece, Control) and piece.token not in known for piece in pieces)
        return (text,) if lacks else pieces


def talk(conversation: Conversation) -> None:
    """Read lines and answer them until the input ends; a mistake is told and the conversation goes on."""
    if sys.stdin.isatty():
        print(HELP, end="\n\n")
    for line in lines():
        try:
            if line.startswith("/"):
                if not obey(conversation, line):
                    return
                continue
            answer = conversation.ask(line)
            print(printable(answer), flush=True)
            if drawing := conversation.draw(answer):
                print(f"boxes: {drawing}", flush=True)
        except UserError as error:
            print(error, flush=True)


def obey(conversation: Conversation, line: str) -> bool:
    """Do what a command says; False when it says to leave."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/image" and rest.strip():
        conversation.attach(rest.strip())
    else:
        print(HELP)
    return True


def lines() -> Iterator[str]:
    """The lines that are typed or piped in, without empty ones."""
    with contextlib.suppress(ImportError):  # editing and history, where Python has it
        import readline  # noqa: F401
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            with listening(stop_typing):
                line = input(prompt).strip()
            if line:
                yield line


def stop_typing(ask: Ask) -> None:
    """Raise, so that the terminal is given back as it was. Ctrl-C ends the conversation as the end of the input does."""
    raise KeyboardInterrupt if ask is Ask.interrupt else SystemExit(STATUS[ask])


def printable(text: str) -> str:
    """The text without control characters: a model may have learnt sequences that a terminal obeys."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
