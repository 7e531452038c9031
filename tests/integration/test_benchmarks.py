"""The benchmark scripts refuse to compare unlike work and count what they say they count."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

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
    with pytest.raises(SystemExit, match="not the same ones: {'one': '', 'other': 'else'}"):
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


def test_the_plot_of_scaling_shows_every_point(peers: ModuleType, tmp_path: Path) -> None:
    import bench_train
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
        sys.modules.pop("bench_train")
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
