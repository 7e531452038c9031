"""Laws of reading text: whatever the text and however it is cut."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from unittest import mock

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.data import textfiles
from lmkit.data.benchmarks import canonical_lines
from lmkit.data.cleaning import Piece, document_pieces
from lmkit.data.cutting import cut_by_lines
from lmkit.data.survey import Counter, count_words
from lmkit.data.textfiles import Part, text_blocks

LAW = settings(max_examples=50, deadline=None)

spaces = st.sampled_from(list(" \n\t\r\x0b\x1c\x85\u00a0\u2028\u3000"))
texts = st.text(st.one_of(spaces, st.characters(exclude_categories=["Cs"])), max_size=60)
chunks = st.integers(1, 9)


@LAW
@given(texts)
def test_words_are_those_of_split(text: str) -> None:
    assert count_words(text) == len(text.split())


@LAW
@given(texts)
def test_canonical_lines_are_the_words_of_each_line_and_change_no_more(text: str) -> None:
    text += "\n"
    canonical = canonical_lines(text)
    assert canonical == "\n".join(" ".join(line.split()) for line in text.split("\n"))
    assert canonical_lines(canonical) == canonical


@LAW
@given(st.lists(texts, max_size=5), st.data())
def test_counts_do_not_depend_on_how_documents_are_cut_into_pieces(documents: list[str], data: st.DataObject) -> None:
    whole, cut = Counter(), Counter()
    for document in documents:
        text = document + "\n"
        whole.add(Piece(text, True))
        places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)) - {len(text)})
        for start, end in zip([0, *places], [*places, len(text)], strict=True):
            cut.add(Piece(text[start:end], end == len(text)))
    assert whole.finish() == cut.finish()
    assert whole.counts.num_words == sum(len(text.split()) + text.count("\n") + 1 for text in documents)


@LAW
@given(texts, chunks, st.sampled_from(["a.txt", "a.txt.gz", "a.txt.zst"]))
def test_the_text_of_a_file_is_its_bytes_without_mark_and_carriage_returns(text: str, block: int, name: str) -> None:
    data = text.encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(name[-4:].lstrip("t"), bytes)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(textfiles, "BLOCK_BYTES", block):
        path = Path(folder) / name
        path.write_bytes(compress(data))
        found = "".join(text_blocks(Part(path)))
    assert found == text.removeprefix("\ufeff").replace("\r\n", "\n")


@LAW
@given(
    st.lists(st.text("ab ", max_size=9), min_size=3, max_size=30),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.5),
    st.booleans(),
)
def test_a_file_is_cut_in_three_at_line_starts_and_nothing_is_lost(
    lines: list[str], valid: float, test: float, compressed: bool
) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.txt.gz" if compressed else "a.txt")
        path.write_bytes(gzip.compress(data) if compressed else data)
        second, third, size = cut_by_lines(path, (valid, test))
        parts = [
            "".join(text_blocks(Part(path, start, end))).encode()
            for start, end in ((0, second), (second, third), (third, size))
        ]
    assert b"".join(parts) == data
    assert all(part == b"" or part.endswith(b"\n") for part in parts)
    assert (parts[2] != b"") == (test > 0)
    if parts[2] != data:
        assert (parts[1] != b"") == (valid > 0)


@LAW
@given(st.lists(st.text("ab", max_size=12), max_size=40), st.integers(1, 20))
def test_the_pieces_of_a_document_are_whole_lines_and_join_to_it(lines: list[str], size: int) -> None:
    text = "\n".join(lines)
    with mock.patch("lmkit.data.cleaning._PIECE_CHARS", size):
        pieces = list(document_pieces(text))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
