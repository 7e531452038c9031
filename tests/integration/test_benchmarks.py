"""The benchmark scripts refuse to compare unlike work and count what they say they count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lmkit.arguments import parse
from lmkit.composing import compose
from lmkit.config.commands import PretrainConfig

SCRIPTS = Path(__file__).parents[2] / "scripts"

CHILD = """
import argparse, sys
sys.path.insert(0, {scripts!r})
from peers import Work, serve
parser = argparse.ArgumentParser()
parser.add_argument("--serve")
parser.add_argument("--extra", type=int)
parser.add_argument("--made", default="")
args = parser.parse_args()
print("something that a library says")
other = args.serve == "other"
serve(Work(lambda: 100 + other * args.extra, 1000, digest=lambda: args.made * other, memory=lambda: 2_000_000))
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import peers

    yield peers
    sys.modules.pop("peers")


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "child.py"
    path.write_text(CHILD.format(scripts=str(SCRIPTS)), encoding="utf-8")
    return str(path)


def test_every_way_is_measured_in_every_round_and_the_rows_hold_speed_and_memory(
    peers: ModuleType, script: str, tmp_path: Path
) -> None:
    found = peers.measure_in_turns(["one", "other"], script, ["--extra", "0"], 2)
    assert [len(peer.seconds) for peer in found] == [3, 3]
    peers.write_rows(tmp_path / "rows.json", [peer.row(batch=1) for peer in found])
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [(row["name"], row["num_tokens"], row["batch"]) for row in rows] == [("one", 100, 1), ("other", 100, 1)]
    assert all(row["tokens_per_s"] > 0 and row["peak_bytes"] == 2_000_000 for row in rows)


def test_the_memory_of_a_way_is_the_peak_of_its_process_unless_it_says_otherwise(peers: ModuleType) -> None:
    assert peers.Work(int, 1000).memory() > 1e6


def test_ways_that_make_different_numbers_of_tokens_are_refused(peers: ModuleType, script: str) -> None:
    with pytest.raises(SystemExit, match="'one': 100, 'other': 101"):
        peers.measure_in_turns(["one", "other"], script, ["--extra", "1"], 1)


def test_ways_that_make_as_many_tokens_but_others_are_refused(peers: ModuleType, script: str) -> None:
    with pytest.raises(SystemExit, match=r"not the same ones: \{'one': '', 'other': 'else'\}"):
        peers.measure_in_turns(["one", "other"], script, ["--extra", "0", "--made", "else"], 1)


def test_models_whose_sizes_are_more_than_one_percent_apart_are_refused(peers: ModuleType) -> None:
    def sizes(*counts: int) -> list[object]:
        return [peers.Peer(str(i), None, num_parameters=count) for i, count in enumerate(counts)]

    peers.refuse_unlike_parameters(sizes(1000, 1010))
    with pytest.raises(SystemExit, match="1011"):
        peers.refuse_unlike_parameters(sizes(1000, 1011))


def test_the_speed_is_the_median_of_the_rounds_after_the_first(peers: ModuleType) -> None:
    fast = peers.Peer("fast", None, num_tokens=100, seconds=[9.0, 1.0, 2.0, 50.0])
    slow = peers.Peer("slow", None, num_tokens=100, seconds=[9.0, 3.0, 4.0, 50.0])
    assert fast.tokens_per_s() == 50.0
    assert fast.ratio_to(slow) == 2.0


@pytest.fixture
def bench_train(peers: ModuleType) -> Iterator[ModuleType]:
    import bench_train

    yield bench_train
    sys.modules.pop("bench_train")


TINY = {"layers": 1, "width": 16, "heads": 2, "context": 8, "vocabulary": 50, "batch": 2}


def start(bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Call the script with the tiny shape, two steps a round and the words."""
    shape = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *shape, "--steps", "2", "--threads", "1", *words])
    bench_train.main()


def built(bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The work that the process of a way builds."""
    works: list[Any] = []
    monkeypatch.setattr(bench_train, "serve", works.append)
    start(bench_train, monkeypatch, *words)
    return works[0]


@pytest.fixture
def made_up(bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way has 1,000 parameters and makes 32 tokens in 2 s; products make 10^6 operations in 1 s."""

    def peer(name: str, num_tokens: int, seconds: float) -> Any:
        return bench_train.Peer(name, None, 1000, num_tokens, peak_bytes=5_000_000, seconds=[9.0, seconds, seconds])

    monkeypatch.setattr(bench_train, "is_installed", lambda name: True)
    monkeypatch.setattr(bench_train.Peer, "start", lambda name, script, arguments: peer(name, 1_000_000, 1.0))
    monkeypatch.setattr(
        bench_train, "measure_in_turns", lambda names, *_, beside=None: [peer(name, 32, 2.0) for name in names]
    )


# torch's own LSTM in bf16 needs a CPU that multiplies bf16
@pytest.mark.parametrize(("family", "precision"), [("transformer", "fp32"), ("transformer", "bf16"), ("lstm", "fp32")])
def test_ways_of_training_do_the_same_work(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    words = ("--family", family, "--model", "gpt2", "--precision", precision, "--micro_batch", "1")
    works = [built(bench_train, monkeypatch, "--serve", way, *words) for way in ("lmkit", "plain")]
    assert [work.run() for work in works] == [2 * 2 * 8] * 2
    assert works[0].num_parameters == pytest.approx(works[1].num_parameters, rel=0.01)
    assert all(work.memory() > 1e6 for work in works)


WATCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("when torch is loaded:", os.environ.get("GOMP_SPINCOUNT"))

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runs = runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("way", "rounds"), [("lmkit", "1000"), ("plain", "None")])
def test_threads_wait_as_those_of_the_command_do_and_otherwise_as_is_usual(
    way: str, rounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP reads it once, when torch is loaded."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS), prepend=os.pathsep)
    shape = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    words = [str(SCRIPTS / "bench_train.py"), "--serve", way, *shape]
    done = subprocess.run([sys.executable, "-c", WATCH, *words], input="", capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"when torch is loaded: {rounds}\n")
    assert json.loads(done.stdout.splitlines()[-1])["num_parameters"] > 0


def test_the_usual_loop_takes_its_batches_to_the_device_as_lmkit_does(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card a batch that is not pinned would make the loop wait for it in each step."""
    from lmkit.data import batches

    taken: list[tuple[int, ...]] = []

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        taken.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(batches, "to_device", to_device)
    built(bench_train, monkeypatch, "--serve", "plain").run()
    assert taken == [(2, 9)] * 2


@pytest.mark.parametrize("compile", ["off", "on"])
def test_models_of_all_ways_are_compiled_or_none(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch, compile: str
) -> None:
    compiled: list[Any] = []

    def recorded(function: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", recorded)
    monkeypatch.setattr("lmkit.device.compiler_lack", lambda **_: None)  # nothing is compiled, whatever it takes
    for way in ("lmkit", "plain"):
        assert built(bench_train, monkeypatch, "--serve", way, "--compile", compile).run() == 2 * 2 * 8
    assert len(compiled) == (2 if compile == "on" else 0)


def test_the_clock_waits_for_a_card_whose_own_memory_counts(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("waited"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)

    def run() -> int:
        calls.append("ran")
        return 7

    work = bench_train.on_device(bench_train.Work(run, 3), "cuda")
    assert (work.run(), work.num_parameters, work.memory()) == (7, 3, 123)
    assert calls == ["ran", "waited"]
    assert bench_train.on_device(bench_train.Work(run, 3), "cpu").run() == 7
    assert calls == ["ran", "waited", "ran"]


def test_rows_of_training_say_what_was_trained_where(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch, made_up: None, tmp_path: Path
) -> None:
    words = ("--device", "cuda", "--precision", "bf16", "--compile", "on", "--micro_batch", "1")
    start(bench_train, monkeypatch, *words, "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    flops = 6 * 1000 + 12 * 1 * 16 * 8
    common = {"tokens_per_s": 16.0, "peak_bytes": 5_000_000, "num_parameters": 1000, "num_tokens": 32, "threads": 1}
    common |= {"family": "transformer", "precision": "bf16", "device": "cuda", "compile": "on", **TINY}
    common |= {"flops_per_s": 16.0 * flops, "matrix_share": pytest.approx(16.0 * flops / 1e6)}
    assert rows == [
        {"name": "lmkit", "block": "llama", "micro_batch": 1, **common},
        {"name": "plain", "block": "gpt2", "micro_batch": 2, **common},
        {"name": "transformers", "block": "gpt2", "micro_batch": 2, **common},
    ]


def test_rows_of_scaling_say_what_was_varied_and_the_whole_shape(
    bench_train: ModuleType, monkeypatch: pytest.MonkeyPatch, made_up: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_train, "draw", lambda rows, path: None)
    start(bench_train, monkeypatch, "--family", "lstm", "--scaling", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    points = [(name, value) for name, values in bench_train.GRID.items() for value in values]
    assert [(row["varied"], row["value"]) for row in rows] == points
    assert all({key: row[key] for key in TINY} == {**TINY, row["varied"]: row["value"]} for row in rows)
    assert {(row["name"], row["family"], row["block"], row["device"]) for row in rows} == {
        ("lmkit", "lstm", "lstm", "cpu")
    }
    assert all(row["tokens_per_s"] == 16.0 and row["peak_bytes"] == 5_000_000 for row in rows)


def test_the_shape_of_gpt2_is_that_of_the_preset(bench_train: ModuleType) -> None:
    config = OmegaConf.to_object(compose(parse("pretrain", ["model=gpt2"])))
    assert isinstance(config, PretrainConfig)
    shape = bench_train.SIZES["gpt2_124m"]
    assert bench_train.lmkit_config("transformer", shape, "gpt2") == replace(config.model, d_ff=4 * 768)
    assert shape.vocabulary == 50_257


def test_the_plot_of_scaling_shows_every_point(bench_train: ModuleType, tmp_path: Path) -> None:
    from matplotlib import pyplot

    rows = [
        {"varied": name, "value": value, "tokens_per_s": 10.0 * value, "peak_bytes": 1e6 * value}
        for name, values in bench_train.GRID.items()
        for value in values
    ]
    try:
        bench_train.draw(rows, tmp_path / "scaling.png")
        for axes in pyplot.gcf().axes:
            low, high = axes.get_ylim()
            (line,) = axes.get_lines()
            assert all(low <= y <= high for y in line.get_ydata())
    finally:
        pyplot.close("all")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def bench_prepare(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, str(SCRIPTS / "bench_prepare.py"), "--text", str(path), "--tokenizers", "sentencepiece"]
    command += ["--vocab-size", "300", "--rounds", "1", "--json", str(folder / "rows.json")]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def test_preparation_is_measured_beside_a_library_that_makes_the_same_ids(tmp_path: Path) -> None:
    text = "the cat sat on the mat\n\n  a hat\tand a bat\n" * 50
    done = bench_prepare(text, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    names = ["lmkit, trained", "lmkit, cached", "lmkit", "sentencepiece, 1 thread", "sentencepiece, 2 threads"]
    assert [row["name"] for row in rows] == names
    assert len({row["num_tokens"] for row in rows}) == 1
    assert all(row["tokens_per_s"] > 0 and row["peak_bytes"] > 1e6 and row["mb_per_s"] > 0 for row in rows)
    assert {(row["tokenizer"], row["num_bytes"]) for row in rows} == {("sentencepiece", len(text))}
    assert all(name in done.stdout for name in names)


def test_a_text_that_the_library_encodes_otherwise_is_refused(tmp_path: Path) -> None:
    done = bench_prepare("the cat sat on the mat\n" * 50 + "a blank: \N{LOWER ONE EIGHTH BLOCK}\n", tmp_path)
    assert done.returncode == 1
    assert "the ways did not make the same number of tokens" in done.stderr
    assert not (tmp_path / "rows.json").exists()


def test_the_memory_of_preparing_made_up_words_is_a_row_too(peers: ModuleType, tmp_path: Path) -> None:
    import bench_prepare

    sys.modules.pop("bench_prepare")
    text = bench_prepare.write_words(tmp_path / "words.txt", 20_000)
    row = bench_prepare.measure_memory(text, "byte")
    assert row["name"] == "lmkit, trained"
    assert row["num_bytes"] == text.stat().st_size >= 20_000
    assert row["num_tokens"] == row["num_bytes"] + 3  # each split ends with a token
    assert row["peak_bytes"] >= row["peak_bytes_alone"] > 0
    assert row["tokens_per_s"] > 0
    assert row["mb_per_s"] > 0


@pytest.fixture
def bench_scaling(peers: ModuleType) -> Iterator[ModuleType]:
    import bench_scaling

    yield bench_scaling
    sys.modules.pop("bench_scaling")


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    script.main()


def test_rows_of_several_processes_and_what_is_computed_lie_side_by_side(
    bench_scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds = iter([100.0, 150.0, 120.0, 160.0])

    def train(processes: int, *_: Any) -> dict[str, Any]:
        return {
            "tokens_per_s": next(speeds),
            "peak_bytes": 1000 * processes,
            "num_tokens": 640,
            "num_parameters": 50,
        }

    monkeypatch.setattr(bench_scaling, "train", train)
    monkeypatch.setattr(bench_scaling, "time_collectives", lambda *_: {"agree_ms": 0.5, "sum_gradients_ms": 1.0})
    words = ("--processes", "1", "2", "--rounds", "2", "--json", str(tmp_path / "rows.json"))
    call(bench_scaling, monkeypatch, *words)
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    one, two = (row for row in rows if not row["computed"])
    assert (one["name"], one["tokens_per_s"], one["peak_bytes"]) == ("lmkit, 1 process", 120.0, 1000)
    assert (two["name"], two["tokens_per_s"], two["peak_bytes"]) == ("lmkit, 2 processes", 160.0, 2000)
    assert (one["ratio"], two["ratio"]) == (1.0, pytest.approx(160 / 120))
    assert (one["num_parameters"], two["sum_gradients_ms"]) == (50, 1.0)
    computed = [row for row in rows if row["computed"]]
    assert len(computed) == len(bench_scaling.MODELS) * len(bench_scaling.NETWORKS)
    assert all(row["name"].startswith("computed: ") and row["tokens_per_s"] > 0 for row in computed)
    assert {row["peak_bytes"] for row in computed} == {None}


def test_any_number_of_processes_takes_its_share_of_the_batch_at_once(
    bench_scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In micro-batches of a few rows, which several processes share, one process alone would look slow."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="no further")

    monkeypatch.setattr(bench_scaling.subprocess, "run", run)
    with pytest.raises(SystemExit, match="no further"):
        bench_scaling.train(1, tmp_path / "text.txt", tmp_path / "run", 20, "tiny", None)
    assert "train.batch_size=32" in commands[0]
    assert not any("micro_batch" in word for word in commands[0])


def test_runs_that_trained_other_numbers_of_tokens_are_refused(
    bench_scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train(processes: int, *_: Any) -> dict[str, Any]:
        return {"tokens_per_s": 1.0, "peak_bytes": 1, "num_tokens": 640 * processes, "num_parameters": 50}

    monkeypatch.setattr(bench_scaling, "train", train)
    with pytest.raises(SystemExit, match=r"1: \[\(50, 640\)\], 2: \[\(50, 1280\)\]"):
        call(bench_scaling, monkeypatch, "--processes", "1", "2", "--rounds", "1")


def test_what_is_computed_alone_is_written_as_rows(
    bench_scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(bench_scaling, monkeypatch, "--computed-only", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert rows[0]["name"] == "computed: GPT-2 124M, 64 GPUs, 10 Gb/s"
    assert all(row["computed"] and {"tokens_per_s", "peak_bytes", "efficiency"} <= row.keys() for row in rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bench_train", ["--rounds", "0"]),
        ("bench_train", ["--steps", "-1"]),
        ("bench_generate", ["--rounds", "0"]),
        ("bench_generate", ["--batch"]),
        ("bench_prepare", ["--copies", "0"]),
        ("bench_scaling", ["--rounds", "0"]),
        ("bench_scaling", ["--steps", "3"]),
    ],
)
def test_numbers_that_leave_nothing_to_take_a_median_of_are_refused_before_any_work(
    name: str, words: list[str]
) -> None:
    done = subprocess.run([sys.executable, SCRIPTS / f"{name}.py", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"argument {words[0]}" in done.stderr.replace("--rounds/--repeat", "--rounds")


# The table of results


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import results

    yield results
    sys.modules.pop("results")


def test_runs_of_one_name_and_long_lists_of_words_have_results_of_their_own(
    results: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of multiruns are all named 0, 1, 2 ...; and what was there was told by the start of a long name."""
    numbers: dict[str, float] = {}

    def run(command: list[str], **_: Any) -> None:
        words = " ".join(word for word in command if not word.startswith("output="))
        path = Path(command[-1].removeprefix("output="))
        assert not path.exists()
        numbers[words] = 100.0 + len(numbers)
        path.write_text(json.dumps({"ppl": numbers[words]}), encoding="utf-8")

    monkeypatch.setattr(results.subprocess, "run", run)
    folders = [tmp_path / f"{'a long name ' * 8}{letter}" / "0" for letter in "abc"]
    words = [f"--run={folder.parent.name[-1]}={folder}" for folder in folders]
    words += ["--ways", "static,ensemble", "--out", str(tmp_path / "out")]
    call(results, monkeypatch, *words)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and ".00" in line]
    assert len(numbers) == 2 * 5
    assert len({cell for line in table for cell in line.split("|")[2:4]}) == 10
    call(results, monkeypatch, *words)  # all of it is there
    assert len(numbers) == 2 * 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "runs/A"], "--run needs NAME=RUN"),
        (["--run", "a=x", "--run", "a=y"], "each with a name of its own"),
        (["--run", "a=x", "--ways", "static,cahce"], "--ways cahce is unknown: choose from static, cache"),
    ],
)
def test_words_that_would_leave_rows_out_are_refused(
    results: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        call(results, monkeypatch, *words)
    assert said in capsys.readouterr().err
