"""lmkit's tokenizers as a ``tokenizer.json`` of the Hugging Face tokenizers library, and such a file as a tokenizer.

The same text gets the same ids, with these exceptions, which the file format cannot express: the written name of a
control token (``<|endoftext|>``, ``</s>``, ``<unk>``) becomes that token, and with ``sentencepiece`` also the name of a
byte (``<0x41>``) and the character U+2581, which stands for a blank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmkit.errors import DataError
from lmkit.tokenizers import read_bytes
from lmkit.tokenizers.base import EOS, HEADER_FILE, UNK, Tokenizer
from lmkit.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer
from lmkit.tokenizers.hf import HfTokenizer, byte_letters
from lmkit.tokenizers.probe import try_in_child
from lmkit.tokenizers.sentencepiece import BLANK, SentencePieceTokenizer

END = "<|endoftext|>"
"""Name of the end-of-document token of the tokenizers that have none of their own."""
_ITS_OWN = "put the tokenizer.json there that the model was trained with"
SPACES = "".join(chr(code) for code in range(0x110000) if chr(code).isspace() and chr(code) != "\n")
"""What separates words, as ``str.split`` sees it."""


def hf_json(tokenizer: Tokenizer) -> bytes:
    """The content of a tokenizer.json that gives the same ids. Raises DataError if there can be none."""
    match tokenizer:
        case ByteTokenizer():
            spec = _bytes_spec()
        case CharTokenizer():
            spec = _chars_spec(tokenizer)
        case WordTokenizer():
            spec = _words_spec(tokenizer)
        case SentencePieceTokenizer():
            spec = _pieces_spec(tokenizer)
        case HfTokenizer():
            spec = _stripped(tokenizer)
        case _:
            raise DataError(f"a tokenizer of kind {tokenizer.kind} cannot become a tokenizer.json")
    return (json.dumps(spec, ensure_ascii=False, indent=1) + "\n").encode()


QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cuts_like_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether text is cut as transformers cuts it for model_type=qwen2, whatever tokenizer.json says."""
    if not isinstance(tokenizer, HfTokenizer):
        return False
    spec = json.loads(tokenizer.content())
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    return bool(spec.get("normalizer") == {"type": "NFC"} and steps[0].get("pattern") == {"Regex": QWEN2_SPLIT})


def end_name(tokenizer: Tokenizer) -> str:
    """What ``hf_json`` calls the end-of-document token, or the end of a line."""
    match tokenizer:
        case WordTokenizer():
            return EOS
        case SentencePieceTokenizer():
            return tokenizer.pieces_and_scores()[0][tokenizer.eos_id]
        case HfTokenizer() if tokenizer.token_text(tokenizer.eos_id) in HfTokenizer.EOS_NAMES:
            return tokenizer.token_text(tokenizer.eos_id)
    return END


def read_hf_tokenizer(folder: Path, vocab_size: int) -> HfTokenizer:
    """The tokenizer of a model's folder, with an id for each of the model's ``vocab_size`` types.

    Types that the file does not name (models are often padded) get names that no text holds. Raises DataError.
    """
    path = folder / HEADER_FILE
    remedy = "make it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    content = read_bytes(path, remedy)
    try:
        try_in_child(HfTokenizer, content)
        tokenizer = HfTokenizer(content)
        if tokenizer.token_text(tokenizer.eos_id) in HfTokenizer.EOS_NAMES and tokenizer.vocab_size < vocab_size:
            tokenizer = HfTokenizer(_padded(content, tokenizer, vocab_size))
    except DataError as error:
        raise DataError(f"{path} is not a usable tokenizer.json: {error}", _ITS_OWN) from None
    if tokenizer.token_text(tokenizer.eos_id) not in HfTokenizer.EOS_NAMES:
        raise DataError(f"{path} has no end-of-document token: none of {', '.join(HfTokenizer.EOS_NAMES)}", _ITS_OWN)
    if tokenizer.vocab_size != vocab_size:
        raise DataError(f"{path} has {tokenizer.vocab_size} tokens, but the model only {vocab_size} types", _ITS_OWN)
    return tokenizer


def _padded(content: bytes, tokenizer: HfTokenizer, vocab_size: int) -> bytes:
    spec = json.loads(content)
    taken = {token["id"] for token in spec.get("added_tokens") or ()}
    added = [_added(f"<|unused_{id}|>", id) for id in range(tokenizer.vocab_size, vocab_size) if id not in taken]
    spec["added_tokens"] = [*(spec.get("added_tokens") or ()), *added]
    return json.dumps(spec, ensure_ascii=False).encode()


def _spec(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": [], **empty, **parts, "model": model}


def _added(content: str, id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags}


def _bpe(vocab: Mapping[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **flags, **options, "vocab": dict(vocab), "merges": merges}


def _bytes_spec() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
    return _spec(_bpe(vocab | {END: 256}, []), added_tokens=[_added(END, 256)], pre_tokenizer=level, decoder=level)


def _chars_spec(tokenizer: CharTokenizer) -> dict[str, Any]:
    vocab = {UNK: 0, END: 1} | {char: id for id, char in enumerate(tokenizer.characters, 2)}
    model = _bpe(vocab, [], unk_token=UNK)
    return _spec(model, added_tokens=[_added(END, 1)], decoder={"type": "Fuse"})


def _words_spec(tokenizer: WordTokenizer) -> dict[str, Any]:
    """``<eos>`` in the text is made ``<unk>`` before each line break becomes an ``<eos>``."""
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(tokenizer.words)}, "unk_token": UNK}
    bound = f"[{SPACES}\n]"
    steps = [
        {"type": "Replace", "pattern": {"Regex": f"(?<={bound}|^){EOS}(?={bound}|$)"}, "content": UNK},
        {"type": "Replace", "pattern": {"String": "\n"}, "content": f" {EOS} "},
    ]
    splits = {"type": "Split", "pattern": {"Regex": f"[{SPACES}]+"}, "behavior": "Removed", "invert": False}
    joined = [
        {"type": "WordPiece", "prefix": "\n", "cleanup": False},
        {"type": "Fuse"},
        {"type": "Replace", "pattern": {"Regex": f" ?{EOS} ?"}, "content": "\n"},
    ]
    return _spec(
        model,
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=splits,
        decoder={"type": "Sequence", "decoders": joined},
    )


def _pieces_spec(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    pieces, scores = tokenizer.pieces_and_scores()
    if tokenizer.is_unigram():
        least = min(score for piece, score in zip(pieces, scores, strict=True) if score != 0.0)
        by_piece = [
            [piece, least if tokenizer.is_byte(id) or id in (tokenizer.unk_id, tokenizer.eos_id) else score]
            for id, (piece, score) in enumerate(zip(pieces, scores, strict=True))
        ]
        model: dict[str, Any] = {"type": "Unigram", "unk_id": tokenizer.unk_id, "vocab": by_piece}
        model["byte_fallback"] = True
    else:
        vocab = {piece: id for id, piece in enumerate(pieces)}
        merges = _merges(tokenizer, vocab)
        model = _bpe(vocab, merges, unk_token=pieces[tokenizer.unk_id or 0], fuse_unk=True, byte_fallback=True)
    return _spec(
        model,
        added_tokens=[_added(pieces[id], id) for id in sorted({tokenizer.unk_id or 0, tokenizer.eos_id})],
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        pre_tokenizer={"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False},
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    )


def _merges(tokenizer: SentencePieceTokenizer, vocab: Mapping[str, int]) -> list[list[str]]:
    """The pairs that make a piece, best piece first; sentencepiece merges by the score of what is made."""
    pieces, scores = tokenizer.pieces_and_scores()
    normal = {piece for id, piece in enumerate(pieces) if tokenizer.is_normal(id)}
    found: list[tuple[float, int, list[str]]] = []
    for piece in normal:
        id = vocab[piece]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                found.append((-scores[id], id, [left, right]))
    return [pair for _, _, pair in sorted(found, key=lambda item: (item[0], item[1], len(item[2][0])))]


def _stripped(tokenizer: HfTokenizer) -> dict[str, Any]:
    """The file as HfTokenizer uses it: nothing is added, cut or padded, and the end of document has a name."""
    spec: dict[str, Any] = json.loads(tokenizer.content())
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    if spec["model"].get("dropout"):
        spec["model"]["dropout"] = None
    added = list(spec.get("added_tokens") or ())
    if end_name(tokenizer) == END and END not in {token["content"] for token in added}:
        added.append(_added(END, tokenizer.eos_id))
    spec["added_tokens"] = added
    return spec
