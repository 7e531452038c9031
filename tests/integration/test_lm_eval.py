"""lm-evaluation-harness on run directories: its own tasks on local data against lmkit's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import pretrain_small
from torch import Tensor

from lmkit.commands import eval_ppl, export, generate
from lmkit.config.commands import EvalPplConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig, TokenizerConfig, WordTokenizerConfig
from lmkit.config.evaluation import LmEvalWikitextProtocolConfig
from lmkit.config.export import ExportConfig
from lmkit.config.generation import GenerateConfig, SamplingConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.training import ExistingRunConfig, TrainConfig
from lmkit.data.corpus import open_corpus
from lmkit.errors import ConfigError
from lmkit.evaluation.detokenize import wikitext_pages

pytestmark = pytest.mark.extra("lm-eval")

CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
LONG = "the cat sat on the mat and the dog ran under the tree. "
RUNS: dict[str, tuple[ModelConfig, TokenizerConfig]] = {
    "transformer": (TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=32), ByteTokenizerConfig()),
    "lstm": (RecurrentConfig(d_embed=12, d_hidden=16, num_layers=1), ByteTokenizerConfig()),
    "words": (TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=32), WordTokenizerConfig()),
}
OPEN = ["transformer", "lstm"]


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    """Forty articles in the manner of WikiText, some of them in test."""
    folder = tmp_path_factory.mktemp("articles")
    for number in range(40):
        lines = [
            f" = Cat {number} = ",
            " ",
            f" The cat 's mat , {number} @,@ 000 of ( them ) , sat . ",
            " = = Dogs = = ",
        ]
        lines += [' " We like it " , he said ; 我们 the dog ran . '] * (1 + number % 4)
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return TextConfig(path=str(folder), valid_fraction=0.1, test_fraction=0.2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, articles: TextConfig) -> Path:
    """A folder with a run of each name in RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (model, tokenizer) in RUNS.items():
        train = TrainConfig(batch_size=4, seq_len=24, max_steps=30)
        pretrain_small(folder / name, articles, model, tokenizer, train)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, articles: TextConfig) -> Path:
    """The harness's task wikitext on the test articles, and a multiple choice of three questions."""
    lm_eval = pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    text = "".join(piece.text for piece in open_corpus(articles).pieces("test"))
    pages = [{"page": page} for page in wikitext_pages(text)]
    assert len(pages) > 3
    (folder / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)) + "\n", encoding="utf-8")
    questions = [
        {"question": "The cat 's", "choices": ["mat , 3", "zzzzzzz", "QXQXQXQ"], "answer": 0},
        {"question": " the dog", "choices": ["WWWWW", "ran .", "#####"], "answer": 1},
        {"question": LONG, "choices": ["We like it", "0", LONG], "answer": 2},
    ]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n", encoding="utf-8")
    task = {"dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None}
    task |= {"test_split": "test"}

    def data(name: str) -> dict[str, Any]:
        return {"data_files": {"test": str(folder / name)}, "cache_dir": str(folder / "cache")}

    original = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"
    local = {"include": str(original), "task": "local_wikitext", "dataset_kwargs": data("pages.jsonl")}
    choice = {
        "task": "local_choice",
        "dataset_kwargs": data("choice.jsonl"),
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    for one in (local, choice):
        (folder / f"{one['task']}.yaml").write_text(json.dumps(task | one), encoding="utf-8")
    return folder


def existing(run: Path) -> ExistingRunConfig:
    return ExistingRunConfig(path=str(run), root=str(run.parent))


def model_of(run: Path, **arguments: Any) -> Any:
    pytest.importorskip("lm_eval")
    from lmkit.lm_eval.model import RunModel

    return RunModel.create_from_arg_obj({"run": str(run), "device": "cpu", **arguments})


def evaluate(model: Any, tasks: Path, name: str) -> dict[str, Any]:
    """The harness's results of one of the local tasks."""
    evaluator, manager = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    found: dict[str, Any] = evaluator.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=manager.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    return found


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("context", [None, 7])
def test_wikitext_of_the_harness_has_the_word_perplexity_of_eval_ppl(
    runs: Path, tasks: Path, name: str, context: int | None
) -> None:
    context = None if name == "lstm" else context
    theirs = evaluate(model_of(runs / name, context=context), tasks, "local_wikitext")["results"]["local_wikitext"]
    ours = eval_ppl.run(
        EvalPplConfig(
            run=existing(runs / name),
            protocol=LmEvalWikitextProtocolConfig(),
            context=context,
            device=CPU,
            split="test",
        )
    )
    assert theirs["word_perplexity,none"] == pytest.approx(ours["ppl"], rel=1e-5)
    assert theirs["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)


def by_hand(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p and greediness from the whole softmax, one forward pass."""
    ids = [model.tokenizer.eos_id, *context, *continuation]
    net = model.loaded.model
    with torch.no_grad():
        logits: Tensor = net.head.logits(net(torch.tensor([ids[:-1]]))[0][0])
    rows = logits.log_softmax(-1)[-len(continuation) :]
    picked = rows.gather(1, torch.tensor(continuation)[:, None])
    return float(picked.sum()), rows.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
@pytest.mark.parametrize("name", RUNS)
def test_a_continuation_has_the_probability_of_the_whole_softmax(runs: Path, name: str, batch_size: int | str) -> None:
    model = model_of(runs / name, batch_size=batch_size)
    pairs = [("The cat", " 's mat"), ("", "The cat"), ("The cat ", "sat ."), ("The", " dog ran"), ("We", " like it")]
    answers = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), answer in zip(pairs, answers, strict=True):
        bare = context.rstrip()
        whole = model.tokenizer.encode(context + continuation).tolist()
        at = len(model.tokenizer.encode(bare))
        log_p, greedy = by_hand(model, whole[:at], whole[at:])
        assert answer == (pytest.approx(log_p, abs=1e-4), greedy)


def test_the_greedy_continuation_is_called_greedy(runs: Path) -> None:
    model = model_of(runs / "transformer")
    (text,) = model.generate_until(requests(("The cat", {"until": [], "max_gen_toks": 6})), disable_tqdm=True)
    good, bad = model.loglikelihood(requests(("The cat", text), ("The cat", text[:-1] + "Q")), disable_tqdm=True)
    assert good[1] is True
    assert bad[1] is False
    assert good[0] > bad[0]


def test_a_long_context_is_cut_from_the_left_and_a_long_continuation_read_in_windows(runs: Path) -> None:
    model = model_of(runs / "transformer", context=16)
    net, ids = model.loaded.model, model.tokenizer.encode(LONG + " ran").tolist()
    cut, whole = model.loglikelihood(requests((LONG, " ran"), ("", LONG + " ran")), disable_tqdm=True)
    with torch.no_grad():
        rows = net.head.logits(net(torch.tensor([ids[-17:-1]]))[0][0]).log_softmax(-1)
    scored = len(" ran") + 1  # the blank at the end of the context is the continuation's
    expected = rows.gather(1, torch.tensor(ids[-16:])[:, None])[-scored:].sum()
    assert cut == (pytest.approx(float(expected), abs=1e-4), False)
    windows = [by_hand(model, [], ids[:16])[0]]
    for first in range(16, len(ids), 16):
        last = min(first + 16, len(ids))
        with torch.no_grad():
            rows = net.head.logits(net(torch.tensor([ids[last - 17 : last - 1]]))[0][0]).log_softmax(-1)
        windows.append(float(rows.gather(1, torch.tensor(ids[last - 16 : last])[:, None])[first - last :].sum()))
    assert whole[0] == pytest.approx(sum(windows), abs=1e-3)


def test_multiple_choice_picks_what_the_run_finds_most_probable(runs: Path, tasks: Path) -> None:
    model = model_of(runs / "transformer")
    found = evaluate(model, tasks, "local_choice")
    questions = [json.loads(line) for line in (tasks / "choice.jsonl").read_text(encoding="utf-8").splitlines()]
    picked = []
    for one in questions:
        pairs = [(one["question"], f" {choice}") for choice in one["choices"]]
        picked.append(int(np.argmax([log_p for log_p, _ in model.loglikelihood(requests(*pairs), disable_tqdm=True)])))
    expected = sum(pick == one["answer"] for pick, one in zip(picked, questions, strict=True)) / len(questions)
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(expected)
    assert picked[:2] == [0, 1]  # what it was trained on, against letters that it never saw
    assert found["config"]["model_sha"] == model.loaded.checkpoint_digest


def test_what_the_harness_generates_is_what_lmkit_generates(runs: Path) -> None:
    model, prompt = model_of(runs / "transformer"), "The cat"
    sampling = SamplingConfig(temperature=0.0)
    made = GenerateConfig(run=existing(runs / "transformer"), max_new_tokens=12, sampling=sampling, device=CPU)
    (sample,) = generate.run(made, [prompt])
    options = {"until": ["never"], "max_gen_toks": 12, "do_sample": False}
    whole, cut = model.generate_until(
        requests((prompt, options), (prompt, options | {"until": [sample["text"][4:6]]})), disable_tqdm=True
    )
    assert whole == sample["text"]
    assert cut == whole[: whole.index(sample["text"][4:6])]


def test_empty_texts_have_probability_one(runs: Path) -> None:
    model = model_of(runs / "transformer")
    assert model.loglikelihood_rolling(requests(("",), ("The cat",), ("",)), disable_tqdm=True)[::2] == [0.0, 0.0]
    assert model.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0.0]
    assert model.loglikelihood_rolling([], disable_tqdm=True) == []
    assert model.loglikelihood(requests(("", "")), disable_tqdm=True) == [(0.0, True)]
    behind = model.loglikelihood(requests(("The cat", ""), ("The", " cat")), disable_tqdm=True)
    assert behind[0] == (0.0, True)
    assert behind[1][0] < 0.0
    assert model.loglikelihood([], disable_tqdm=True) == []


def test_words_that_are_not_in_the_vocabulary_are_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(runs / "words")
    capsys.readouterr()
    one, other, _ = model.loglikelihood(
        requests(("The cat", " zebra ."), ("The cat", " okapi ."), ("The unheard cat", " sat .")), disable_tqdm=True
    )
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert "warning: 2 of the 6 tokens to be scored are not in the vocabulary (tokenizer=word)" in (
        " ".join(capsys.readouterr().err.split())
    )
    model.loglikelihood(requests(("The unheard cat", " sat .")), disable_tqdm=True)
    assert "vocabulary" not in capsys.readouterr().err


def test_a_closed_vocabulary_has_no_perplexity_of_free_text(runs: Path) -> None:
    with pytest.raises(ConfigError, match="not tokenizer=word"):
        model_of(runs / "words").loglikelihood_rolling(requests(("zebra",)), disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"runs": 1}, "model_args has runs; it may have run, checkpoint"),
        ({"context": 0}, "context=0 must be a whole number >= 1"),
        ({"context": 33}, "context=33 must be between 1 and the model's context of 32"),
        ({"batch_size": "many"}, "batch_size=many must be a whole number"),
        ({"device": "tpu"}, "device=tpu is no device; use auto, cpu"),
        ({"device": "cuda:x"}, "device=cuda:x is no device"),
    ],
)
def test_wrong_arguments_are_named(runs: Path, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_of(runs / "transformer", **arguments)
    assert problem in str(error.value)


def test_an_unknown_generation_argument_is_named(runs: Path) -> None:
    with pytest.raises(ConfigError, match="generation_kwargs has num_beams"):
        model_of(runs / "transformer").generate_until(requests(("The", {"num_beams": 3})), disable_tqdm=True)


def command(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import sys\n{before}\nfrom lmkit.lm_eval.__main__ import main\nsys.exit(main())"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_from_the_command_line(runs: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    done = command(
        *("--model", "lmkit", "--model_args", f"run={runs / 'transformer'}", "--device", "cpu"),
        *("--tasks", "local_wikitext,local_choice", "--include_path", str(tasks), "--output_path", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text(encoding="utf-8"))["results"]
    expected = eval_ppl.run(
        EvalPplConfig(
            run=existing(runs / "transformer"), protocol=LmEvalWikitextProtocolConfig(), device=CPU, split="test"
        )
    )["ppl"]
    assert results["local_wikitext"]["word_perplexity,none"] == pytest.approx(expected, rel=1e-6)
    assert f"|{results['local_choice']['acc,none']:6.4f}|" in done.stdout.replace(" ", "")


def test_a_missing_run_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's command line is left out: it reads all of its tasks first."""
    theirs, registry = pytest.importorskip("lm_eval.__main__"), pytest.importorskip("lm_eval.api.registry")
    from lmkit.lm_eval.__main__ import main

    def load() -> None:
        registry.get_model("lmkit").create_from_arg_obj({"run": "nowhere"}, {"device": "cuda:0", "batch_size": 1})

    monkeypatch.setattr(theirs, "cli_evaluate", load)
    assert main() == 4
    assert capsys.readouterr().err.startswith("error: run=")


def test_a_missing_harness_is_said_in_one_line() -> None:
    done = command("--model", "lmkit", before="sys.modules['lm_eval'] = None")
    assert (done.returncode, done.stderr) == (
        6,
        "error: python -m lmkit.lm_eval needs lm-evaluation-harness; pip install 'lmkit[lm-eval]'\n",
    )


def test_the_harness_finds_the_same_in_the_exported_folder(runs: Path, tasks: Path, tmp_path: Path) -> None:
    """The same weights through the harness's own model of the transformers library."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    export.run(ExportConfig(run=existing(runs / "transformer"), to=str(tmp_path / "out")))
    theirs = HFLM(pretrained=str(tmp_path / "out"), device="cpu", max_length=24, batch_size=2)
    ours = model_of(runs / "transformer")
    name, key = "local_wikitext", "word_perplexity,none"
    expected, found = (evaluate(model, tasks, name)["results"][name][key] for model in (theirs, ours))
    assert found == pytest.approx(expected, rel=1e-5)
    # Theirs puts the end token before an empty context only, ours before each that fits.
    pairs = requests((LONG, " ran"), (LONG + LONG, "xyz"), ("", "The cat"))
    for one, other in zip(theirs.loglikelihood(pairs), ours.loglikelihood(pairs), strict=True):
        assert other == (pytest.approx(one[0], abs=1e-4), one[1])
