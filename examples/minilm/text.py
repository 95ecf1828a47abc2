"""Real text that every Python carries: the paragraphs of the language reference in pydoc_data.topics."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics

__all__ = ["MIN_WORDS", "paragraphs", "samples"]

MIN_WORDS = 15
"""Shorter paragraphs are headings, lines of code and list items."""


def paragraphs() -> list[str]:
    """Every distinct paragraph of at least MIN_WORDS words, white space normalised, by topic in alphabetical order."""
    found: dict[str, None] = {}
    for topic in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[topic]):
            words = block.split()
            if len(words) >= MIN_WORDS:
                found[" ".join(words)] = None
    return list(found)


def samples(measured: int, calibration: int) -> tuple[list[str], list[str]]:
    """Two lists without a paragraph in common, the same in every run: `measured` to embed, `calibration` to choose static scales from."""
    texts = paragraphs()
    if measured + calibration > len(texts):
        raise ValueError(f"measured + calibration must be at most {len(texts)}, the paragraphs there are, got {measured} + {calibration}")
    random.Random(0).shuffle(texts)
    return texts[:measured], texts[measured : measured + calibration]
