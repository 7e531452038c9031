"""The text on which two tokenizers are compared."""

from __future__ import annotations

import random

from lmkit.tokenizers import Tokenizer

PAGE = """\
The company said it would, in 1987, pay $1,234.56 (up 7.5%) a share; "we're pleased", Mr. O'Neill wrote.

# A heading\tand a tab
def area(r: float) -> float:
    return 3.14159 * r ** 2  # naïve

Größe, façade, Ærøskøbing, Việt Nam, Москва, Ελλάδα, עברית, العربية, हिन्दी, ไทย.
我们喜欢学习。日本語のテキスト、한국어 문장. e\u0301 = é, ﬁ, ½, ™, no\u00a0break, em\u2003space, zero\u200bwidth.
Smileys 😀👩\u200d👩\u200d👧 and flags 🇩🇪; control \x01 and \x7f; CR LF\r
   three blanks before,   three between, and at the end \x20 \x20
x@y.org https://example.org/a_b?c=d&e=f#g  aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa  ________ ---- ....!!!??

"""
"""A page of mixed text, without the written name of any control token."""
NUM_TOKENS = 2000


def sample_text(tokenizer: Tokenizer) -> str:
    """The page, and the text of tokens drawn from the vocabulary."""
    draw = random.Random(0)
    drawn = tokenizer.decode([draw.randrange(tokenizer.vocab_size) for _ in range(NUM_TOKENS)])
    for name in ("<unk>", "<eos>", "<|"):
        drawn = drawn.replace(name, "")
    return PAGE + drawn + PAGE.rstrip("\n")
