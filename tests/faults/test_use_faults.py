"""What people ask for and get wrong: prompts, sampling, keys, paths, devices; and the numbers that must not mislead.

Numbers in names (row_107 ...) are the rows of the project's fault table. The laws of sampling, scoring and tokenizing
are in tests/property; here they are tried through the command line.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Lmkit, forge_config

from lmkit.errors import DivergedError
from lmkit.models.recurrent import Recurrent
from lmkit.store.checkpoint import list_checkpoints

DEVICE = ["device=cpu", "device.threads=1"]
QUICK = ["checks=false", "baselines=false", "bootstrap=0"]


@pytest.fixture
def word_run(small: list[str], lmkit: Lmkit, tmp_path: Path) -> Path:
    """A run with a word tokenizer of 8 types, which does not know most words."""
    words = [word for word in small if word != "tokenizer=byte"]
    done = lmkit(*words, "tokenizer=word", "tokenizer.vocab_size=8", f"run.dir={tmp_path}/words", "train.max_steps=2")
    assert done.code == 0, done.err
    return tmp_path / "words"


def test_row_107_a_corpus_comes_back_from_each_tokenizer(lmkit: Lmkit, tmp_path: Path) -> None:
    from lmkit.data.tokenfiles import open_prepared

    text = "Grüße\t 我们 喜欢  学习\n\n  a\u2028b </s> <unk> \U0001f469\u200d\U0001f467 e\u0301\n" * 30
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8", newline="\n")
    output = {}
    for kind in (["byte"], ["char"], ["sentencepiece", "tokenizer.vocab_size=300"]):
        tokenizer = [f"tokenizer={kind[0]}", *kind[1:]]
        done = lmkit("prepare", "dataset=text", f"dataset.path={tmp_path}", "dataset.cleaning.normalize_nfc=false",
                     "dataset.cleaning.strip_control=false", *tokenizer)  # fmt: skip
        assert done.code == 0, done.err
        stored = next(line.split(maxsplit=2)[2] for line in done.err.splitlines() if "stored in" in line)
        data = open_prepared(Path(stored))
        output[kind[0]] = data.tokenizer.decode(data.splits["test"].tokens.tolist())
    assert output == dict.fromkeys(("byte", "char", "sentencepiece"), text)


def test_row_108_unknown_words_are_counted_beside_a_number_per_byte(
    word_run: Path, lmkit: Lmkit, tmp_path: Path
) -> None:
    done = lmkit("eval-ppl", f"run={word_run}", *DEVICE, *QUICK, f"output={tmp_path}/numbers.json")
    assert done.code == 0, done.err
    assert "<unk>" in done.out
    assert "bits per byte" in done.out
    numbers = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["num_unk"] > 0.3 * numbers["num_tokens"]
    assert numbers["num_bytes"] > 0


def test_row_109_texts_shorter_and_longer_than_the_window_are_scored_once_whatever_the_batch(
    small: list[str], lmkit: Lmkit, tmp_path: Path
) -> None:
    words = [word for word in small if not word.startswith("model")]
    model = ["model=tiny", "model.d_model=16", "model.num_heads=2", "model.num_layers=1", "model.context=16"]
    assert lmkit(*words, *model, f"run.dir={tmp_path}/run", "train.max_steps=2").code == 0
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("a text to have one\n", encoding="utf-8")
    for text in ("a", "a longer text than the window of sixteen tokens is, by far", "x" * 15, "x" * 16, "x" * 17):
        (tmp_path / "test.txt").write_text(text, encoding="utf-8")
        seen = []
        for batch in (1, 7):
            output = tmp_path / f"numbers{batch}.json"
            done = lmkit("eval-ppl", f"run={tmp_path}/run", "dataset=text", f"dataset.path={tmp_path}", "stride=5",
                         f"batch_size={batch}", f"output={output}", *DEVICE, *QUICK)  # fmt: skip
            assert done.code == 0, done.err
            numbers = json.loads(output.read_text(encoding="utf-8"))
            assert numbers["num_tokens"] == len(text) + 2  # the line end and the end of the document
            seen.append(numbers["nats"])
        assert seen[0] == pytest.approx(seen[1], rel=1e-6)


@pytest.mark.parametrize("prompt", ["", " ", "\n", "   \n ", "x" * 5000, "\x00", "\u00fc"])
@pytest.mark.parametrize("count", ["0", "1", "40"])
def test_row_110_any_prompt_and_length_is_continued(trained: Path, lmkit: Lmkit, prompt: str, count: str) -> None:
    done = lmkit("generate", f"run={trained}", "--prompt", prompt, "-n", count, *DEVICE)
    assert done.code == 0, done.err
    assert done.out.startswith(prompt)


def test_row_110_a_prompt_longer_than_the_context_is_cut_with_a_warning(
    small: list[str], lmkit: Lmkit, tmp_path: Path
) -> None:
    words = [word for word in small if not word.startswith("model")]
    model = ["model=tiny", "model.d_model=16", "model.num_heads=2", "model.num_layers=1", "model.context=16"]
    assert lmkit(*words, *model, f"run.dir={tmp_path}/run", "train.max_steps=2").code == 0
    done = lmkit("generate", f"run={tmp_path}/run", "--prompt", "y" * 100, "-n", "40", *DEVICE)
    assert done.code == 0, done.err
    assert "its first 92 tokens are not read" in done.err
    assert done.out.startswith("y" * 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "sampling.temperature=-1 must be >= 0"),
        (["--temperature", "inf"], "sampling.temperature=inf must be >= 0 and finite"),
        (["--temperature", "nan"], "sampling.temperature=nan must be >= 0 and finite"),
        (["--top-k", "0"], "sampling.top_k=0 must be >= 1"),
        (["--top-k", "-3"], "sampling.top_k=-3 must be >= 1"),
        (["--top-p", "0"], "sampling.top_p=0 must be above 0"),
        (["--top-p", "1.5"], "sampling.top_p=1.5 must be above 0 and at most 1"),
        (["--top-p", "nan"], "sampling.top_p=nan must be above 0"),
        (["--min-p", "-0.1"], "sampling.min_p=-0.1 must be between 0 and 1"),
        (["--repetition-penalty", "0"], "sampling.repetition_penalty=0 must be > 0"),
        (["-n", "-1"], "max_new_tokens=-1 must be >= 0"),
        (["-n", "many"], "max_new_tokens=many must be"),
        (["num_samples=0"], "num_samples=0 must be >= 1"),
        (["seed=-1"], "seed=-1 must be >= 0"),
    ],
)
def test_row_111_sampling_that_has_no_meaning_is_refused(
    trained: Path, lmkit: Lmkit, words: list[str], message: str
) -> None:
    done = lmkit("generate", f"run={trained}", *words, *DEVICE)
    assert done.code == 2, done.err
    assert message in done.error
    assert done.out == ""


@pytest.mark.parametrize("words", [["--temperature", "0"], ["--top-k", "9999"], ["--temperature", "1e-30"],
                                   ["--top-p", "1e-30"], ["--temperature", "1e30"]])  # fmt: skip
def test_row_111_sampling_at_its_edges_works(trained: Path, lmkit: Lmkit, words: list[str]) -> None:
    done = lmkit("generate", f"run={trained}", *words, "-n", "8", "--prompt", "a", *DEVICE)
    assert done.code == 0, done.err
    assert len(done.out) >= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row_112_logits_that_are_not_finite_end_the_text(
    trained: Path, lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    build = Recurrent.load_state_dict

    def broken(self: Recurrent, *args: object, **options: object) -> object:
        result = build(self, *args, **options)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.fill_(value)
        return result

    monkeypatch.setattr(Recurrent, "load_state_dict", broken)
    done = lmkit("generate", f"run={trained}", "-n", "5", *DEVICE)
    assert done.code == DivergedError.exit_code == 7, done.err
    assert "not finite" in done.error


def test_row_113_what_is_streamed_is_whole_characters(trained: Path, lmkit: Lmkit) -> None:
    """A barely trained byte model writes bytes that are not UTF-8; a prompt may end in the middle of nothing."""
    for seed in range(5):
        done = lmkit("generate", f"run={trained}", "--prompt", "ü我", "-n", "60", f"seed={seed}", *DEVICE)
        assert done.code == 0, done.err
        assert done.out.startswith("ü我")
        done.out.encode("utf-8")


def test_row_114_a_model_and_a_tokenizer_of_other_sizes_are_refused(trained: Path, lmkit: Lmkit) -> None:
    newest = list_checkpoints(trained)[-1]
    forge_config(newest, lambda config: config.update(vocab_size=300))
    done = lmkit("generate", f"run={newest}", *DEVICE)
    assert done.code == 4, done.err
    assert "the tokenizer has 257 entries, the model 300" in done.error


def test_row_115_a_seed_gives_its_text_whatever_is_drawn_beside_it(trained: Path, lmkit: Lmkit) -> None:
    alone = lmkit("generate", f"run={trained}", "--prompt", "a", "-n", "20", "seed=3", *DEVICE)
    again = lmkit("generate", f"run={trained}", "--prompt", "a", "-n", "20", "seed=3", *DEVICE)
    beside = lmkit("generate", f"run={trained}", "--prompt", "a", "-n", "20", "seed=3", "num_samples=4", *DEVICE)
    assert alone.out == again.out
    assert beside.out.startswith(alone.out)


@pytest.mark.parametrize("prefix", ["", "+", "++", "--"])
@pytest.mark.parametrize(
    ("typo", "meant"), [("optimizer.learing_rate", "optimizer.lr"), ("train.max_step", "train.max_steps")]
)
def test_row_116_a_typo_is_refused_however_it_is_written(
    small: list[str], lmkit: Lmkit, prefix: str, typo: str, meant: str
) -> None:
    done = lmkit(*small, f"{prefix}{typo}=5")
    assert done.code == 2, done.err
    assert "not added or removed" in done.error if "+" in prefix else meant in done.error
    assert list(Path.cwd().iterdir()) == []


def test_row_117_every_bad_value_is_named_at_once_before_anything_is_made(small: list[str], lmkit: Lmkit) -> None:
    bad = {
        "optimizer.lr": "-1", "optimizer.weight_decay": "nan", "model.dropout_embed": "1.5", "model.d_hidden": "0",
        "train.batch_size": "0", "train.seq_len": "-4", "schedule.warmup_ratio": "2", "optimizer.beta1": "1e400",
        "seed": "-7",
    }  # fmt: skip
    done = lmkit(*small, *(f"{key}={value}" for key, value in bad.items()))
    assert done.code == 2, done.err
    assert [key for key in bad if f"{key}=" not in done.error] == []
    typed = {"train.max_steps": "true", "model.num_layers": "2.5", "eval.every_steps": "1e400", "resume": "maybe"}
    done = lmkit(*small, *(f"{key}={value}" for key, value in typed.items()))
    assert done.code == 2, done.err
    assert [key for key in typed if f"{key}=" not in done.error] == []
    heads = ["model=tiny", "model.d_model=30", "model.num_heads=4"]
    done = lmkit(*[word for word in small if not word.startswith("model")], *heads)
    assert done.code == 2, done.err
    assert "30" in done.error
    assert list(Path.cwd().iterdir()) == []


LONG = "x" * 300
VERY_LONG = "/".join(["y" * 200] * 25)
NOT_UTF8 = pytest.param(
    "caf\udce9", id="latin-1", marks=pytest.mark.skipif(sys.platform != "linux", reason="names of Linux")
)


@pytest.mark.parametrize(
    "name", ["missing", "with blank", "ünï cödé", "a,b", "a=b", "'quoted\"", LONG, VERY_LONG, "~no_such_user/x"]
)
def test_row_118_a_path_that_is_not_there_is_named_in_full(lmkit: Lmkit, trained: Path, name: str) -> None:
    full = str(Path.cwd() / name)
    for words, code in [
        (["generate", f"run={name}", *DEVICE], 4),
        (["prepare", "dataset=text", f"dataset.path={name}"], 3),
        (["prepare", "dataset=ptb", f"dataset.path={name}"], 3),
        (["prepare", "dataset=pydocs", "tokenizer=hf", f"tokenizer.path={name}"], 3),
        (["eval-ppl", f"run={trained}", f"output={name}/out.json", *DEVICE], 2),
    ]:
        if name.startswith("~") and words[0] == "eval-ppl":
            continue  # where the output goes is expanded by another module
        done = lmkit(*words)
        assert done.code == code or (name in (LONG, VERY_LONG) and done.code == 6), (words, done.err)
        if "tokenizer=hf" not in words:
            assert full in done.error
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("name", ["with blank", "ünï cödé", "a,b=c", "-x", "{a}", "$HOME", NOT_UTF8])
def test_row_118_odd_and_relative_paths_mean_what_they_say(
    small: list[str], lmkit: Lmkit, corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lmkit", f"dataset.path={name}"])  # which the run notes
    Path(name).mkdir()
    for path in corpus.iterdir():
        (Path(name) / path.name).write_bytes(path.read_bytes())
    done = lmkit(*small, f"dataset.path={name}", f"run.dir=../{name} run", "train.max_steps=1")
    assert done.code == 0, done.err
    run_dir = Path.cwd().parent / f"{name} run"
    assert (run_dir / "result.json").is_file()
    assert [path.name for path in Path.cwd().iterdir()] == [name]
    if name.isprintable():
        assert f"run={run_dir.parent / 'cwd' / '..' / run_dir.name}" in shlex.split(done.err.splitlines()[-1])


def ask(**answers: object) -> Callable[[pytest.MonkeyPatch], None]:
    """A machine whose torch answers like this."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)

    return patch


@pytest.mark.parametrize(
    ("machine", "words", "message"),
    [
        (ask(is_available=False), ["device=cuda"], "device.type=cuda is not available here"),
        (ask(is_available=True, device_count=1, current_device=0), ["device=cuda", "device.index=7"],
         "device.index=7 is not there"),
        (ask(is_available=True, device_count=1, current_device=0, get_device_capability=(7, 5)),
         ["device=cuda", "device.precision=bf16"], "device.precision=bf16 is not supported by this GPU"),
        (ask(is_available=False), ["device=mps"], "device.type=mps is not available here"),
        (ask(is_available=False), ["device=cpu", "device.precision=fp16"], "device.precision=fp16 needs a GPU"),
        (ask(is_available=False), ["device=cpu", "device.index=1"], "device.index=1 needs device=cuda"),
    ],
    ids=range(6),
)  # fmt: skip
def test_row_119_a_device_that_is_not_there_is_refused_and_only_auto_falls_back(
    small: list[str], lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch,
    machine: Callable[[pytest.MonkeyPatch], None], words: list[str], message: str,
) -> None:  # fmt: skip
    machine(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    command = [word for word in small if not word.startswith("device")]
    done = lmkit(*command, *words)
    assert done.code == 6, done.err
    assert message in done.error
    assert list(Path.cwd().iterdir()) == []


def test_row_119_auto_says_what_it_took(small: list[str], lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(is_available=False)(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    command = [word for word in small if not word.startswith("device")]
    done = lmkit(*command, "device=auto", "device.threads=1", f"run.dir={os.getcwd()}/run", "train.max_steps=1")
    assert done.code == 0, done.err
    assert done.err.startswith("device: cpu, 1 thread, fp32\n")
