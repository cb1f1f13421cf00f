"""Worker thread of the server: it alone runs the model, and sends the text of each answer to the client that waits for it."""

from __future__ import annotations

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from lit_vlm.model.continuous_batching import ContinuousBatcher, DecodingParams, GeneratedSequence
from lit_vlm.types import Batch

INCOMPLETE = "\ufffd"  # what the tokenizer writes for a part of a character


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Next piece of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """End of an answer: its reason ("stop", "length" or "error") and the number of tokens."""

    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    error: str | None = None


class TextStream:
    """Incremental decoder of one answer: the pieces joined equal the text of all tokens decoded at once.

    White space at both ends is left out, as in `Processor.decode`. What may still change is held back: a part of a character,
    white space at the end, and the beginning of a stop text.

    Args:
        decode: decodes token ids, without the stop token.
        stop: texts that end the answer; the answer ends before the first of them.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._hold = max(map(len, stop), default=1) - 1
        self._ids: list[int] = []
        self._window_start = self._window_end = 0  # tokens that give the left context of the next piece
        self._text, self._sent = "", 0
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, "" if there is none."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window_start : self._window_end])
        after = self._decode(self._ids[self._window_start :])
        if after.endswith(INCOMPLETE):
            return ""
        self._window_start, self._window_end = self._window_end, len(self._ids)
        return self._append(after[len(before) :])

    def finish(self) -> str:
        """Return the rest of the text."""
        if self.is_stopped:
            return ""
        before = self._decode(self._ids[self._window_start : self._window_end])
        return self._append(self._decode(self._ids[self._window_start :])[len(before) :], is_last=True)

    def _append(self, piece: str, is_last: bool = False) -> str:
        self._text += piece if self._text else piece.lstrip()
        positions = [found for stop in self._stop if (found := self._text.find(stop)) >= 0]
        if positions:
            self.is_stopped, self._text, is_last = True, self._text[: min(positions)], True
        certain = len(self._text.rstrip())
        if not is_last:
            certain = min(certain, len(self._text) - self._hold)
        start, self._sent = self._sent, max(self._sent, certain)
        return self._text[start : self._sent]


@dataclass(slots=True, eq=False)
class Job:
    """One answer that a client waits for; its pieces arrive in `events`."""

    batch: Batch
    params: DecodingParams
    stream: TextStream
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TextDelta | AnswerEnd] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False

    def send(self, event: TextDelta | AnswerEnd) -> None:
        """Send an event to the client's task. It may be called in any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class GenerationWorker(threading.Thread):
    """Thread that generates the answers of all clients with continuous batching.

    A job whose `is_cancelled` is set frees its place before the next step. An error of the model, such as memory that ran out,
    ends the answers in the batch with an error; the worker continues with the next ones.
    """

    def __init__(self, batcher: ContinuousBatcher) -> None:
        super().__init__(name="generation", daemon=True)
        self.batcher = batcher
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: dict[int, tuple[Job, GeneratedSequence]] = {}

    def submit(self, job: Job) -> None:
        """Give a job to the worker."""
        self._inbox.put(job)

    def stop(self) -> None:
        """End the thread after the current step."""
        self._inbox.put(None)

    @property
    def num_jobs(self) -> int:
        """Number of jobs that are not finished."""
        return self._inbox.qsize() + len(self._jobs)

    def run(self) -> None:
        """Run until `stop`: take new jobs, generate one token of each active answer, send the text."""
        while self._take_jobs():
            self._cancel_jobs()
            try:
                for sequence in self.batcher.step():
                    self._send(sequence)
            except Exception as error:
                traceback.print_exc()
                self._fail_all(describe_error(error))

    def _take_jobs(self) -> bool:
        """Take the jobs that have arrived; without work wait for one. False: the thread must end."""
        should_wait = not self.batcher.has_work
        while True:
            try:
                job = self._inbox.get(block=should_wait)
            except queue.Empty:
                return True
            if job is None:
                self._fail_all("the server is shutting down")
                return False
            should_wait = False
            try:
                (sequence,) = self.batcher.add(job.batch, [job.params])
            except Exception as error:  # of this job alone; the thread must continue
                job.send(AnswerEnd("error", 0, 0, describe_error(error)))
            else:
                self._jobs[id(sequence)] = job, sequence

    def _cancel_jobs(self) -> None:
        for key in [key for key, (job, _) in self._jobs.items() if job.is_cancelled]:
            _, sequence = self._jobs.pop(key)
            sequence.is_cancelled = True

    def _send(self, sequence: GeneratedSequence) -> None:
        found = self._jobs.get(id(sequence))
        if found is None:  # it ended at a stop text
            return
        job, _ = found
        reason = sequence.finish_reason
        text = "" if reason == "stop" else job.stream.push(sequence.ids[-1])
        if reason and not job.stream.is_stopped:
            text += job.stream.finish()
        if text:
            job.send(TextDelta(text))
        if job.stream.is_stopped:
            reason, sequence.is_cancelled = "stop", sequence.finish_reason is None
        if reason:
            job.send(AnswerEnd(reason, sequence.num_prompt_tokens, len(sequence.ids)))
            del self._jobs[id(sequence)]

    def _fail_all(self, error: str) -> None:
        self.batcher.clear()
        for job, sequence in self._jobs.values():
            job.send(AnswerEnd("error", sequence.num_prompt_tokens, len(sequence.ids), error))
        self._jobs.clear()


def describe_error(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
