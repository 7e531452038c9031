"""The texts that generate takes: nobody interprets them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

PROMPTS = [
    "the company said",
    "{curly}, [square] (round)",
    'it\'s "quoted" \\ back',
    "${oc.env:HOME} $HOME ${seed}",
    "two\nlines\n",
    "我喜欢学习 🙂",
    "key=value",
    "-n",
    "--help",
    "null",
    "???",
    "",
    "debug=true",
]


@pytest.mark.parametrize("text", PROMPTS, ids=repr)
def test_a_prompt_arrives_as_it_was_written(lmkit: Any, text: str) -> None:
    assert lmkit("generate", "--prompt", text, f"--prompt={text}", "-p", text, "--seed", "3") == 0, lmkit.err
    assert lmkit.prompts == [[text, text, text]]
    assert lmkit.configs[0].seed == 3


@pytest.mark.parametrize("text", [text for text in PROMPTS if text], ids=repr)
def test_a_stop_text_arrives_as_it_was_written(lmkit: Any, text: str) -> None:
    assert lmkit.config("generate", "--stop", text, f"--stop={text}", "stop=a,b").stop == ["a", "b", text, text]


def test_an_empty_stop_text_is_refused(lmkit: Any) -> None:
    assert "--stop is empty" in lmkit.refused("generate", "--stop", "")
    assert "--stop is empty" in lmkit.refused("generate", "--stop=", "--prompt", "a")


def test_without_a_prompt_the_text_starts_from_nothing(lmkit: Any) -> None:
    assert lmkit("generate") == 0
    assert lmkit.prompts == [[""]]


def test_a_dash_reads_standard_input(lmkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO("${x}, {y}\n我喜欢\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="ascii"))
    assert lmkit("generate", "--prompt", "a", "--prompt", "-") == 0
    assert lmkit.prompts == [["a", "${x}, {y}\n我喜欢"]]


def test_standard_input_is_read_once_and_its_text_is_not_interpreted(
    lmkit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("-", "other"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert lmkit("generate", "-m", "--prompt", "-", "--prompt", "-", "seed=1,2") == 0
        assert lmkit.prompts == [[text, text]] * 2


def test_a_prompt_file_that_holds_a_dash_is_a_dash(lmkit: Any, tmp_path: Path) -> None:
    path = tmp_path / "dash.txt"
    path.write_bytes(b"-\n")
    assert lmkit("generate", "--prompt-file", str(path)) == 0
    assert lmkit.prompts == [["-"]]


def test_a_prompt_can_come_from_a_file(lmkit: Any, tmp_path: Path) -> None:
    path = tmp_path / "a, b=c.txt"
    path.write_bytes("line one\n我喜欢 ${x}\n".encode())
    assert lmkit("generate", "--prompt-file", str(path), f"--prompt-file={path}") == 0
    assert lmkit.prompts == [["line one\n我喜欢 ${x}"] * 2]


def test_a_prompt_is_read_from_a_file_and_standard_input_as_a_corpus_is(
    lmkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "\ufeffone\r\ntwo\rthree\r\n\r\n".encode()
    (tmp_path / "windows.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert lmkit("generate", "--prompt-file", str(tmp_path / "windows.txt"), "--prompt", "-") == 0
    assert lmkit.prompts == [["one\ntwo\rthree\n"] * 2]


def test_a_prompt_file_that_cannot_be_read_is_named(lmkit: Any, tmp_path: Path) -> None:
    assert "No such file" in lmkit.refused("generate", "--prompt-file", str(tmp_path / "missing.txt"))
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    assert "latin1.txt: it is not UTF-8" in lmkit.refused("generate", "--prompt-file", str(tmp_path / "latin1.txt"))
    assert str(tmp_path) in lmkit.refused("generate", "--prompt-file", str(tmp_path))


def test_a_prompt_of_bytes_that_are_not_utf8_is_refused(lmkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lmkit.refused("generate", "--prompt", "a\udcffb") == "--prompt a?b: it is not UTF-8 text"
    assert lmkit.refused("generate", "--stop", "a\udcffb") == "--stop a?b: it is not UTF-8 text"
    assert lmkit.refused("generate", "--prompt", "a\ud800b") == "--prompt a?b: it is not UTF-8 text"  # as on Windows
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("我喜欢学习".encode("gbk"))))
    assert "--prompt -: standard input is not UTF-8 text; convert it" in lmkit.refused("generate", "--prompt", "-")


def test_the_usual_options_set_the_sampling_keys(lmkit: Any) -> None:
    config = lmkit.config(
        *("generate", "-n", "7", "--num-samples", "2", "--seed=5", "--temperature", "0.5", "--top-k", "9"),
        *("--top-p", "0.9", "--min-p=0.1", "--repetition-penalty", "1.2"),
    )
    sampling = config.sampling
    assert (config.max_new_tokens, config.num_samples, config.seed) == (7, 2, 5)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 9, 0.9, 0.1)
    assert sampling.repetition_penalty == 1.2
    for words in (["--max-new-tokens", "8"], ["-n", "8"], ["-n8"], ["-n=8"]):
        assert lmkit.config("generate", *words).max_new_tokens == 8


def test_a_prompt_is_not_an_option_of_other_commands(lmkit: Any) -> None:
    assert "prompt" in lmkit.refused("pretrain", "--prompt", "x")


def test_the_sentences_of_a_line_need_its_ends(lmkit: Any) -> None:
    assert "vae.steps=9 needs vae.interpolate_from" in lmkit.refused("generate", "vae.steps=9", "vae.reconstruct=x")
    ends = ["vae.interpolate_from=a", "vae.interpolate_to=b"]
    assert lmkit.config("generate", "vae.steps=9", *ends).vae.steps == 9
