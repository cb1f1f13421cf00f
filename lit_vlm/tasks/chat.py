"""task=chat: conversation with a model in the terminal, with or without images."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from lit_vlm.config import Run
from lit_vlm.data.lazy_images import FORMATS, FileImage
from lit_vlm.data.markup import parse_markup
from lit_vlm.data.processor import Processor
from lit_vlm.evaluation.box_drawing import PREDICTED, draw_boxes, parse_box_marks
from lit_vlm.evaluation.generation import generate_answers, make_prompt_sample
from lit_vlm.fault_tolerance.signals import EXIT_STATUS, StopRequest, use_listener
from lit_vlm.tasks.pretrained import open_pretrained
from lit_vlm.types import (
    ContentPart,
    ControlToken,
    ImagePlaceholder,
    Message,
    RecordError,
    Role,
    UserError,
)

if TYPE_CHECKING:
    from lit_vlm.model.classes import VisionLanguageModel

HELP = """\
/image PATH   a picture for your next question; several are possible
/reset        forget what was said and the pictures
/help         this list
/quit         leave (so does the end of the input)
<gro> or <ocr> before a question asks for boxes; they are drawn into chat_<n>.png."""
TASK_TOKEN = re.compile(r"^\s*(<gro>|<ocr>)\s*(?=\S)")  # in training, the question is on the next line


def run_chat(run: Run) -> None:
    """Run a conversation line by line, or with `prompt` print one answer to the standard output.

    Raises:
        UserError: no model is given, or an image of `image` cannot be read.
    """
    if run.init_from is None:
        raise UserError("task=chat needs a model: init_from=runs/<name>/hf, or a LLaVA-class model's hub id.")
    config = run.config
    model = open_pretrained(run.init_from, config.model, config.trainer.accelerator, config.seed)
    max_new_tokens = config.max_new_tokens
    conversation = Conversation(model.load(), model.processor, max_new_tokens, config.data.max_image_pixels)
    for path in config.image:
        conversation.add_image(path)
    if config.prompt is not None:
        answer = conversation.generate_answer(config.prompt)
        print(remove_control_characters(answer))
        if image_path := conversation.save_boxes(answer):
            print(f"boxes: {image_path}", file=sys.stderr)  # the standard output holds only the answer
        return
    run_conversation(conversation)


class Conversation:
    """Conversation with a model: the messages and images so far.

    Args:
        max_new_tokens: maximum number of tokens of an answer.
        max_pixels: larger images are refused.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor, max_new_tokens: int, max_pixels: int) -> None:
        self.model, self.processor = model, processor
        self.max_new_tokens, self.max_pixels = max_new_tokens, max_pixels
        self.reset()

    def reset(self) -> None:
        """Remove all messages and images."""
        self.messages: tuple[Message, ...] = ()
        self.images: tuple[FileImage, ...] = ()
        self.pending_images: tuple[FileImage, ...] = ()  # added, but not part of a question yet

    def add_image(self, path: str) -> None:
        """Add an image before the next question. UserError if it cannot be read."""
        file = Path(path).expanduser().resolve()
        image = FileImage(file.name, file.parent, path, self.max_pixels)
        try:
            image.load()  # now, not in the middle of an answer
        except RecordError as error:
            remedy = f"Give the path of a {', '.join(FORMATS)} file"
            raise UserError(f"image={path}: {error.reason}. {remedy}.") from None
        self.pending_images += (image,)

    def generate_answer(self, text: str) -> str:
        """Generate the model's answer and add it to the conversation. After an error the conversation is unchanged."""
        images = self.images + self.pending_images
        slots = tuple(ImagePlaceholder(number) for number in range(len(self.images), len(images)))
        messages = (*self.messages, Message(Role.user, (*slots, *self._parse_text(TASK_TOKEN.sub(r"\1\n", text)))))
        sample = make_prompt_sample(messages, images)
        answer = generate_answers(self.model, self.processor, [sample], self.max_new_tokens)[0]
        self.messages, self.images, self.pending_images = (*messages, self._make_assistant_message(answer)), images, ()
        return answer

    def save_boxes(self, answer: str) -> Path | None:
        """Save the latest image with the answer's boxes to a file in the current folder; None if there are no boxes."""
        marks = parse_box_marks(answer, PREDICTED)
        if not marks or not self.images:
            return None
        path = next(path for number in count(1) if not (path := Path(f"chat_{number}.png")).exists())
        draw_boxes(self.images[-1].load(), marks).save(path)
        return path

    def _make_assistant_message(self, text: str) -> Message:
        return Message(Role.assistant, self._parse_text(text) or ("",))

    def _parse_text(self, text: str) -> tuple[ContentPart, ...]:
        """Parse markup in the text into control tokens; return plain text for a model that does not have these tokens."""
        contents = parse_markup(text)
        control_ids = self.processor.template.control_ids
        has_unknown_tokens = any(
            isinstance(content, ControlToken) and content.token not in control_ids for content in contents
        )
        return (text,) if has_unknown_tokens else contents


def run_conversation(conversation: Conversation) -> None:
    """Read lines and answer them until the input ends. An error is printed, and the conversation continues."""
    if sys.stdin.isatty():
        print(HELP, end="\n\n")
    for line in read_lines():
        try:
            if line.startswith("/"):
                if not run_command(conversation, line):
                    return
                continue
            answer = conversation.generate_answer(line)
            print(remove_control_characters(answer), flush=True)
            if image_path := conversation.save_boxes(answer):
                print(f"boxes: {image_path}", flush=True)
        except UserError as error:
            print(error, flush=True)


def run_command(conversation: Conversation, line: str) -> bool:
    """Run a command that begins with "/"; return False if it ends the conversation."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/image" and rest.strip():
        conversation.add_image(rest.strip())
    else:
        print(HELP)
    return True


def read_lines() -> Iterator[str]:
    """Read typed or piped lines, without empty ones."""
    with contextlib.suppress(ImportError):  # line editing and history, if Python has it
        import readline  # noqa: F401
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            with use_listener(stop_reading):
                line = input(prompt).strip()
            if line:
                yield line


def stop_reading(request: StopRequest) -> None:
    """Raise an exception, so that the terminal is restored. Ctrl-C ends the conversation like the end of the input."""
    raise KeyboardInterrupt if request is StopRequest.interrupt else SystemExit(EXIT_STATUS[request])


def remove_control_characters(text: str) -> str:
    """Remove control characters from the text: a model may have learnt sequences that a terminal executes."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
