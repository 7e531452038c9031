"""Token ids that come from a file may be anything: whoever takes some looks whether the vocabulary has them.

A model would answer an id that it does not know with an index error from inside torch, or on a card with one that names
nothing. Token files are hashed when they are opened, but not large ones (see ``lmkit.data.tokenfiles``), and none is
hashed again while it is in use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkit.errors import DataError

PIECE = 1 << 24
"""Tokens of a text that are looked at together."""


def file_of(tokens: object) -> str | None:
    """The file that an array is mapped from, if it is."""
    name = getattr(tokens, "filename", None)
    return None if name is None else str(name)


def check_ids(
    ids: NDArray[np.integer[Any]], vocab_size: int, source: object, positions: NDArray[np.int64] | range
) -> None:
    """Raise DataError, naming file, place and id, unless all ids are in range(vocab_size).

    ``ids`` were read from the array ``source`` at ``positions``, which have the same shape.
    """
    if ids.size == 0 or (int(ids.max()) < vocab_size and int(ids.min()) >= 0):
        return
    flat = ids.ravel()
    number = int(np.flatnonzero((flat < 0) | (flat >= vocab_size))[0])
    position = int(np.asarray(positions).ravel()[number])
    raise DataError(
        f"{file_of(source) or 'the text'}: token ids do not fit a vocabulary of {vocab_size:,}: {int(flat[number]):,}"
        f" at position {position:,}",
        "prepare the data again with force=true",
    )


def check_text(tokens: NDArray[np.integer[Any]], vocab_size: int) -> None:
    """The same for a whole text, in bounded memory."""
    for first in range(0, len(tokens), PIECE):
        piece = tokens[first : first + PIECE]
        check_ids(piece, vocab_size, tokens, range(first, first + len(piece)))
