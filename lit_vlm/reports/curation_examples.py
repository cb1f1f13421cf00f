"""Records side by side, as pages show them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShownRecord:
    """Record on the page: where it is, its turns, and its pictures as data URLs."""

    title: str
    origin: str
    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CurationExample:
    """Records side by side, with the reason why they are shown together."""

    reason: str
    records: tuple[ShownRecord, ...]
