"""What models of captions share: checking the words of a sentence, and a small trained table as text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ditopt.errors import BadInput

NOTHING = "nothing"
"""The word of an empty slot; a caption of nothing else stands for no caption."""

Slots = Sequence[tuple[str, tuple[str, ...]]]
"""What a sentence consists of: for each slot its kind and the words it may hold."""


def check(words: Sequence[str], slots: Slots, said: str) -> None:
    """BadInput that names the first word a slot does not know, and lists what it knows."""
    for word, (kind, known) in zip(words, slots, strict=True):
        if word not in known:
            raise BadInput(f"{word!r} in {said} is no {kind}; there are: {', '.join(known)}")


def indices(rows: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> Tensor:
    """Word indices (N, slots) of ``rows`` of words."""
    return torch.tensor([[vocabulary.index(w) for w in row] for row in rows], dtype=torch.long)


class WordTable(nn.Module):
    """The text encoder: a row for each word plus a row for each slot, because the denoiser gives text no positions."""

    def __init__(self, words: int, slots: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.slots = nn.Embedding(slots, width)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, slots) word indices -> text tokens (N, slots, width)."""
        return self.words(ids) + self.slots.weight
