"""lmkit runs compare, plot, report and sweep on run directories made by hand: what they say and refuse to say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import open_run, save_checkpoint

from lmkit import cli
from lmkit.commands.runs_page import Chart, RunPage, render, thinned
from lmkit.store.checkpoint import Snapshot
from lmkit.store.sweeps import Job, begin, note_failure

HOSTILE = "</script><script>document.title = 'hacked'</script><img src=http://example.com/x.png>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

Lmkit = Callable[..., int]
Output = pytest.CaptureFixture[str]


@pytest.fixture
def lmkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lmkit:
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main(["runs", *words])


def make_run(
    name: str,
    losses: dict[int, float],
    *,
    data: str = "d",
    seed: int = 1,
    config: dict[str, Any] | None = None,
    words: int | None = 100,
    unknown: int = 0,
    finished: bool = True,
    command: str = "pretrain",
) -> Path:
    """A run in runs/ with a checkpoint of its last step."""
    path, last = Path("runs") / name, max(losses)
    stored = {
        "command": command,
        "dataset": {"kind": "text", "path": "notes"},
        "tokenizer": {"kind": "byte"},
        "model": {"kind": "transformer", "d_model": 32},
        "train": {"seq_len": 16},
        "seed": seed,
        **(config or {}),
    }
    with open_run(path) as run:
        run.begin(seed=seed, command=["lmkit", command], digests={"data": data * 64, "tokenizer": "t" * 64})
        for step in range(1, last + 1):
            run.log_metrics(
                {"step": step, "loss": 5.0 - 0.1 * step, "lr": 0.01, "grad_norm": 1.0, "tokens_per_s": 100.0 + step}
            )
            if step in losses:
                run.log_metrics({"step": step, "valid_loss": losses[step]})
        save_checkpoint(run, Snapshot(last, {"w": torch.ones(4, 5)}, {}, {"step": last}, stored), keep=2)
        if finished:
            run.journal("finished", {"step": last})
            numbers = {} if words is None else {"num_words": words, "num_tokens": 2 * words, "num_bytes": 10 * words}
            end = {"step": last, "elapsed_s": 90.0, "bits_per_byte": 1.25, "num_unk": unknown}
            run.write_result({"dataset": "text", "num_parameters": 20, **end, **numbers})
    return path


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return re.split(r"  +", line.strip())[1:]


# compare


def test_runs_on_the_same_tokens_are_compared_and_the_lowest_has_a_star(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a", {2: 3.0, 4: 2.5})
    make_run("b", {2: 2.0, 4: 2.2}, seed=2)
    assert lmkit("compare", "a", "b") == 0
    out = capsys.readouterr().out
    assert row_of(out, "same text and tokens") == ["A", "A"]
    assert row_of(out, "valid loss, best") == ["2.5000", "2.0000 *"]
    assert row_of(out, "at step") == ["4", "2"]
    assert row_of(out, "valid loss, last") == ["2.5000", "2.2000"]
    assert row_of(out, "ppl per word, best") == ["148.41", "54.60 *"]
    assert row_of(out, "tokens/s (median)") == ["102.50", "102.50"]
    assert row_of(out, "time") == ["1m 30s", "1m 30s"]
    assert "NOT comparable" not in out
    assert row_of(out, "seed") == ["1", "2"]
    assert "dataset.path" not in out


def test_other_data_are_never_compared_however_low_the_loss(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a", {2: 3.0})
    make_run("b", {2: 2.0}, data="e", config={"dataset": {"kind": "text", "path": "other"}}, words=77)
    make_run("c", {2: 2.9})
    assert lmkit("compare", "a", "b", "c") == 0
    out = capsys.readouterr().out
    assert row_of(out, "same text and tokens") == ["A", "B", "A"]
    assert row_of(out, "valid loss, best") == ["3.0000", "2.0000", "2.9000 *"]
    assert row_of(out, "same words") == ["A", "B", "A"]
    assert "NOT comparable per token under different letters" in out
    assert "under different letters: another text, or more of it read as <unk> (A: runs/a, runs/c; B: runs/b)" in out


def test_another_tokenizer_is_compared_per_word_only(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a", {2: 3.0})
    make_run("b", {2: 2.0}, data="e", config={"tokenizer": {"kind": "char"}})
    assert lmkit("compare", "a", "b") == 0
    out = capsys.readouterr().out
    assert row_of(out, "valid loss, best") == ["3.0000", "2.0000"]
    assert row_of(out, "same words") == ["A", "A"]
    assert row_of(out, "ppl per word, best") == ["403.43", "54.60 *"]
    assert "per word under different letters" not in out


def test_a_run_that_reads_more_words_as_unknown_is_not_compared_with_one_that_reads_them(
    lmkit: Lmkit, capsys: Output
) -> None:
    few = {"tokenizer": {"kind": "word", "vocab_size": 50}}
    make_run("spelled", {2: 3.0})
    make_run("few", {2: 2.0}, data="e", config=few, unknown=40)
    assert lmkit("compare", "spelled", "few") == 0
    out = capsys.readouterr().out
    assert row_of(out, "same words") == ["A", "B"]
    assert "*" not in out
    ptb = {"dataset": {"kind": "benchmark", "name": "ptb"}}
    make_run("bytes", {2: 3.0}, config=ptb)
    make_run("all", {2: 2.5}, data="e", config={**ptb, "tokenizer": {"kind": "word", "vocab_size": None}}, unknown=7)
    make_run("some", {2: 2.0}, data="f", config={**ptb, **few}, unknown=40)
    assert lmkit("compare", "bytes", "all", "some") == 0
    assert row_of(capsys.readouterr().out, "same words") == ["A", "A", "B"]


def test_a_benchmark_set_is_the_same_words_wherever_it_lies_and_other_text_is_not(lmkit: Lmkit, capsys: Output) -> None:
    for kind, words in (("benchmark", ["A", "A"]), ("text", ["A", "B"])):
        for name, path in (("a", "here"), ("b", None)):
            dataset = {"kind": kind, "name": "wikitext2_raw", "path": path}
            make_run(f"{kind}_{name}", {2: 3.0}, data={"a": "d", "b": "e"}[name], config={"dataset": dataset})
        assert lmkit("compare", f"{kind}_a", f"{kind}_b") == 0
        assert row_of(capsys.readouterr().out, "same words") == words


def test_validation_with_a_carried_memory_is_told_from_that_of_windows(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a", {2: 3.0})
    make_run("b", {2: 2.0}, config={"model": {"kind": "transformer", "d_model": 32, "memory_tokens": 64}})
    assert lmkit("compare", "a", "b") == 0
    said = "64 tokens in each layer, across all segments, windows of 16 tokens side by side"
    assert f"under A validation saw different text before a token: {said}" in capsys.readouterr().out


def test_a_run_without_numbers_is_shown_with_gaps(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a", {2: 3.0})
    with open_run(Path("runs/new")) as run:
        run.begin(seed=1, command=["lmkit", "pretrain"], digests={})
    (Path("runs/new") / "metrics.jsonl").write_bytes(b'{"step": 1, "valid_loss": NaN}\nnot json\n')
    assert lmkit("compare", "a", "new") == 0
    assert row_of(capsys.readouterr().out, "valid loss, best")[1] == "-"


def test_the_numbers_of_an_earlier_end_are_not_shown_as_those_of_a_run_that_goes_on(
    lmkit: Lmkit, capsys: Output
) -> None:
    path, _ = make_run("a", {2: 3.0, 4: 2.5}), make_run("b", {2: 3.0, 4: 2.6})

    def look() -> tuple[str, str, str, str]:
        """Of the first run: its time, what its result is called and of which step it is, and its bits per byte."""
        assert lmkit("compare", "a", "b") == 0
        (time, _) = row_of(capsys.readouterr().out, "time")
        assert lmkit("show", "a") == 0
        shown = capsys.readouterr().out
        ((title, step),) = re.findall(r"^  (.* \(valid\)) +(.*)bits_per_byte 1.2500", shown, re.MULTILINE)
        assert lmkit("report", "a", "to=a.html") == 0
        page = Path("a.html").read_text(encoding="utf-8")
        return time, title, step, "1.2500" if "1.2500" in page else "nothing"

    assert look() == ("1m 30s", "result (valid)", "", "1.2500")
    with open_run(path, resume=True) as run:
        run.begin(seed=1, command=["lmkit"], digests={"data": "d" * 64, "tokenizer": "t" * 64})
        run.journal("changed", {"keys": ["train.max_steps: 4 -> 8"]})
        assert look() == ("-", "earlier end (valid)", "step 4, ", "nothing")
        run.log_metrics({"step": 6, "loss": 2.0, "elapsed_s": 150.0})
        assert look() == ("2m 30s", "earlier end (valid)", "step 4, ", "nothing")
    assert look() == ("2m 30s", "earlier end (valid)", "step 4, ", "nothing")  # killed


def test_the_words_of_an_end_on_other_data_are_not_those_of_a_run_that_goes_on(lmkit: Lmkit, capsys: Output) -> None:
    order = {"data_order": {"number": 1, "first_step": 2, "data": "d" * 64}}
    path, _ = make_run("a", {2: 3.0, 4: 2.5}, config=order), make_run("b", {4: 2.5})
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    result |= {"step": 2, "dataset": "another", "num_words": 7, "best_valid_loss": 3.0}
    (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert lmkit("compare", "a", "b") == 0
    out = capsys.readouterr().out
    assert row_of(out, "ppl per word, best") == ["-", "148.41"]
    assert row_of(out, "same words") == ["A", "A"]
    assert row_of(out, "dataset") == ["text", "text"]


def test_losses_that_are_no_nats_per_token_are_not_called_so(lmkit: Lmkit, capsys: Output) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        make_run(name, {2: 0.25}, seed=seed, command="finetune", config={"task": {"kind": "classify"}}, words=None)
    begin(Path("runs"), ["lmkit"], [Job("a", {"seed": "1"}), Job("b", {"seed": "2"})])
    for words in (["compare", "a", "b"], ["diff", "a", "b"], ["sweep", "runs"], ["report", "a", "to=a.html"]):
        assert lmkit(*words) == 0
    out = capsys.readouterr().out
    assert "1 - task.metric on valid" in out
    assert re.search(r"^- +2 +0.2500 +0.0000 +-$", out, re.MULTILINE)  # seeds folded: no perplexity
    for text in (out, Path("a.html").read_text(encoding="utf-8")):
        assert "nats per token" not in text
        assert "1.2840" not in text  # exp(0.25)
    assert lmkit("ls", "--json") == 0
    (row, _) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["best_valid_loss"], row["best_valid_nats_per_token"]) == (0.25, None)


def test_examples_and_pairs_are_not_called_tokens(lmkit: Lmkit, capsys: Output) -> None:
    make_run("text", {2: 3.0})
    for name, task in (("classes", "classify"), ("answers", "prefer")):
        make_run(name, {2: 0.25}, command="finetune", config={"task": {"kind": task}}, words=None)
        result = Path("runs", name, "result.json")
        unit = {"classify": "examples", "prefer": "pairs"}[task]
        result.write_text(json.dumps({**json.loads(result.read_text()), f"trained_{unit}": 60}), encoding="utf-8")
    assert lmkit("compare", "text", "classes", "answers") == 0
    out = capsys.readouterr().out
    assert row_of(out, "tokens/s (median)") == ["101.50", "-", "-"]
    assert row_of(out, "examples/s (median)") == ["-", "101.50", "-"]
    assert row_of(out, "examples trained on") == ["-", "60", "-"]
    assert row_of(out, "pairs trained on") == ["-", "-", "60"]
    assert lmkit("diff", "text", "classes") == 0
    out = capsys.readouterr().out
    assert row_of(out, "tokens/s (median)") == ["101.50", "-"]
    assert row_of(out, "examples/s (median)") == ["-", "101.50"]
    assert row_of(out, "result: trained_examples") == ["-", "60"]
    assert lmkit("report", "classes", "to=a.html") == 0
    page = Path("a.html").read_text(encoding="utf-8")
    assert "examples trained on" in page
    assert "training examples per second" in page
    assert "tokens/s" not in page


# plot


def test_curves_of_several_runs_are_one_picture(lmkit: Lmkit, capsys: Output) -> None:
    make_run("a", {2: 3.0, 4: 2.5})
    make_run("b", {2: 2.0, 4: 2.2})
    assert lmkit("plot", "a", "b", "to=both.png") == 0
    assert Path("both.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out.strip().endswith("both.png")


def test_each_run_has_one_colour_and_its_own_names() -> None:
    from lmkit.plots import _run_colors

    curves = {name: ([1.0], [2.0]) for name in ("train a", "valid a", "train b", "valid b")}
    colors = _run_colors(curves)
    assert set(colors) == {"a", "b"}
    assert len(set(colors.values())) == 2
    assert _run_colors({name: ([1.0], [2.0]) for name in ("train loss", "valid loss")}) == {}


def test_nothing_to_draw_and_a_place_that_is_not_there_are_errors(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a", {2: 3.0})
    assert lmkit("plot", "a", "to=no/such/folder.png") == 2
    assert lmkit("plot", "a", "to=") == 2
    (path / "metrics.jsonl").unlink()
    assert lmkit("plot", "a") == 4
    assert "no losses in metrics.jsonl" in capsys.readouterr().err


# report


class Tags(HTMLParser):
    """The tags of a page, each closed as it was opened, and the addresses in it."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def tags_of(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_the_report_shows_curves_samples_incidents_configuration_and_protocol(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a", {2: 3.0, 4: 2.5})
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        for row in ({"step": 2, "sample": "once upon"}, {"step": 4, "sample": HOSTILE}, {"step": 4, "sample": 5}):
            metrics.write(json.dumps(row) + "\n")
    with (path / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write(
            json.dumps({"time": "2026-01-02T03:04:05", "event": "nonfinite", "step": 3, "file": HOSTILE}) + "\n"
        )
    assert lmkit("report", "a") == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    page = (path / "report.html").read_text(encoding="utf-8")
    tags = tags_of(page)
    assert tags.seen.count("figure") == 4
    assert "script" not in tags.seen
    assert "img" not in tags.seen
    assert tags.addresses == []
    for text in (
        "once upon",
        "2026-01-02 03:04:05",
        "nonfinite",
        "d" * 64,
        "windows of 16 tokens",
        "model.d_model",
        "2.5000",
    ):
        assert text in page, text


def test_a_damaged_or_empty_run_still_has_a_page(lmkit: Lmkit) -> None:
    path = make_run("a", {2: 3.0})
    for name in ("run.json", "result.json", "metrics.jsonl", "journal.jsonl"):
        (path / name).write_bytes(b"\xff{")
    assert lmkit("report", "a", "to=page.html") == 0
    assert "<figure" not in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_link_in_place_of_the_report_leaves_its_target_alone(lmkit: Lmkit, capsys: Output) -> None:
    path = make_run("a", {2: 3.0}) / "report.html"
    victim = Path("victim").absolute()
    victim.write_text("precious", encoding="utf-8")
    path.symlink_to(victim)
    assert lmkit("report", "a") == 0
    assert capsys.readouterr().out == f"wrote {path.parent.resolve() / path.name}\n"
    assert victim.read_text(encoding="utf-8") == "precious"
    assert not path.is_symlink()


def test_values_that_are_not_finite_are_left_out_of_a_chart_and_counted() -> None:
    nan, inf = float("nan"), float("inf")
    curves = {"train": ([1, 2, 3, 4], [2.0, nan, inf, 1.0]), "valid": ([2], [1.5])}
    page = render(RunPage("t", "l", [], [], [Chart("loss", "Loss", "nats", curves)], [], [], [], [], ""))
    tags_of(page)
    assert "2 values that are not finite are left out" in page
    assert "nan" not in page.split("<svg")[1].split("</svg>")[0]
    flat = Chart("lr", "Rate", "", {"lr": ([5], [0.0])}, from_zero=True)
    tags_of(render(RunPage("t", "l", [], [], [flat], [], [], [], [], "")))


def test_a_long_curve_keeps_its_lowest_and_highest_points() -> None:
    points = [(float(i), float(i % 97)) for i in range(20_000)] + [(20_000.0, -5.0), (20_001.0, 500.0)]
    kept = thinned(points)
    assert len(kept) <= 600
    assert kept == sorted(kept)
    assert {(20_000.0, -5.0), (20_001.0, 500.0)} <= set(kept)


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium or chrome here")
def test_a_browser_draws_the_report_without_a_complaint(lmkit: Lmkit, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = make_run("a", {step: 3.0 - 0.02 * step for step in range(2, 60, 4)})
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps({"step": 2, "sample": HOSTILE}) + "\n")
    assert lmkit("report", "a", "to=page.html") == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--enable-logging=stderr", "--hide-scrollbars", "--window-size=1200,1400", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        "--blink-settings=preferredColorScheme=1",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom"]
    page = (tmp_path / "page.html").as_uri()
    done = subprocess.run(
        [str(BROWSER), *flags, page], capture_output=True, encoding="utf-8", errors="replace", timeout=300
    )
    if "Numbers" not in done.stdout:
        pytest.skip(f"{BROWSER} shows no local page here")
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "<title>a: transformer" in done.stdout
    pixels = (imread(str(tmp_path / "page.png"))[..., :3] * 255).round().astype(int)
    colours = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    for colour in (
        0x3B6FB5,
        0xD1495B,
    ):  # the training curve and that of validation: the page's policy lets the style in
        assert (colours == colour).sum() > 100


# sweep


def make_sweep() -> None:
    """lr x seed: two done, one done, one stopped half way, and one that has not begun."""
    jobs = []
    for number, (lr, seed) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]):
        jobs.append(Job(str(number), {"optimizer.lr": str(lr), "seed": str(seed)}))
    begin(Path("runs"), ["lmkit", "pretrain", "-m", "optimizer.lr=1,2,3", "seed=1,2", "run.dir=runs"], jobs)
    make_run("0", {2: 2.0}, seed=1)
    make_run("1", {2: 2.2}, seed=2)
    make_run("2", {2: 1.9}, seed=1)
    make_run("3", {2: 5.0}, seed=2, finished=False)
    note_failure(Path("runs"), jobs[4], 3, "the dataset has no valid split", pytest.fail)


def test_a_sweep_shows_each_job_the_best_and_the_seeds_folded(lmkit: Lmkit, capsys: Output) -> None:
    make_sweep()
    assert lmkit("sweep", "runs") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert re.match(r"0 +optimizer.lr=1 seed=1 +done +2 +2.0000 +7.3891$", lines[1])
    assert re.match(r"2 +optimizer.lr=2 seed=1 +done +2 +1.9000 +6.6859 +best$", lines[3])
    assert re.match(r"3 +optimizer.lr=2 seed=2 +failed \(crashed\)", lines[4])
    assert re.match(
        r"4 +optimizer.lr=3 seed=1 +not started +- +- +- +exit 3: the dataset has no valid split$", lines[5]
    )
    assert re.search(r"^optimizer.lr=1 +2 +2.1000 +0.1414 +8.1662$", out, re.MULTILINE)
    assert re.search(r"^optimizer.lr=2 +1 +1.9000 +- +6.6859 +best$", out, re.MULTILINE)
    assert "5 jobs: 3 done, 1 failed, 1 not started" in out
    assert lines[-1].strip() == "lmkit pretrain -m optimizer.lr=1,2,3 seed=1,2 run.dir=runs resume=true"


def test_a_job_that_was_stopped_on_request_has_not_failed_and_is_one_to_go_on_with(
    lmkit: Lmkit, capsys: Output
) -> None:
    jobs = [Job(str(seed), {"seed": str(seed)}) for seed in (1, 2)]
    begin(Path("runs"), ["lmkit", "pretrain", "-m", "seed=1,2", "run.dir=runs"], jobs)
    make_run("1", {2: 2.0})
    note_failure(Path("runs"), jobs[1], 6, "the disk was full", pytest.fail)  # before it was started again
    path = make_run("2", {2: 2.0}, seed=2, finished=False)
    with open_run(path, resume=True) as run:
        run.journal("stopped", {"signal": "SIGTERM", "step": 2})
    assert lmkit("sweep", "runs") == 0
    out = capsys.readouterr().out
    assert re.search(r"^2 +seed=2 +stopped +2 +2\.0000 +7\.3891$", out, re.MULTILINE)
    assert "2 jobs: 1 done, 1 stopped" in out
    assert out.endswith(" -m seed=1,2 run.dir=runs resume=true\n")


def test_the_command_that_retries_a_sweep_names_the_folder_that_it_is_in_now(lmkit: Lmkit, capsys: Output) -> None:
    make_sweep()
    Path("runs").rename("moved")
    assert lmkit("sweep", "moved") == 0
    retry = capsys.readouterr().out.splitlines()[-1].strip()
    assert retry == "lmkit pretrain -m optimizer.lr=1,2,3 seed=1,2 run.dir=moved resume=true"


def test_jobs_of_different_data_have_no_common_best(lmkit: Lmkit, capsys: Output) -> None:
    begin(Path("runs"), ["lmkit"], [Job(str(n), {"tokenizer": t}) for n, t in enumerate(["byte", "char"])])
    make_run("0", {2: 2.0})
    make_run("1", {2: 1.0}, data="e")
    assert lmkit("sweep", "runs") == 0
    out = capsys.readouterr().out
    assert "best" not in out
    assert "NOT compared" in out
    assert "retry" not in out


def test_a_folder_of_runs_without_a_sweep_is_told_apart_by_its_settings(lmkit: Lmkit, capsys: Output) -> None:
    make_run("x", {2: 2.0}, config={"model": {"kind": "transformer", "d_model": 16}})
    make_run("y", {2: 1.0}, config={"model": {"kind": "transformer", "d_model": 64}})
    assert lmkit("sweep", "runs") == 0
    assert re.search(r"^y +model.d_model=64 +done .* best$", capsys.readouterr().out, re.MULTILINE)
    assert lmkit("sweep", "nothing-here") == 4


def test_a_damaged_sweep_file_is_named(lmkit: Lmkit, capsys: Output) -> None:
    Path("runs").mkdir()
    (Path("runs") / "sweep.json").write_text('{"jobs": [3], "command": []}', encoding="utf-8")
    assert lmkit("sweep", "runs") == 4
    assert "sweep.json is damaged" in capsys.readouterr().err


# a sweep that is started again

WORDS = ["pretrain", "-m", "dataset=text", "tokenizer=byte", "model=tiny", "device=cpu", "train.max_steps=2"]
WORDS += ["train.batch_size=2", "train.seq_len=8", "run.dir=jobs", "model.d_model=16", "model.num_layers=1"]
WORDS += ["model.num_heads=2", "device.threads=1"]


def test_finished_jobs_are_skipped_and_failed_ones_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, f"dataset.path={corpus}", "seed=1,2", "train.nonfinite=stop", "optimizer.lr=0.001"]
    blocker = tmp_path / "jobs" / "1"
    blocker.mkdir(parents=True)
    (blocker / "foreign.txt").write_text("in the way", encoding="utf-8")
    assert cli.main(words) == 2
    assert cli.main(["runs", "sweep", "jobs"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^0 +seed=1 +done", table, re.MULTILINE)
    assert re.search(r"^1 +seed=2 +not started .*exit 2: run.dir=", table, re.MULTILINE)
    shutil.rmtree(blocker)
    before = (tmp_path / "jobs" / "0" / "metrics.jsonl").stat().st_mtime_ns
    assert cli.main([*words, "resume=true"]) == 0
    said = capsys.readouterr().err
    assert "job 1 of 2: finished before, skipped: " in said
    assert (tmp_path / "jobs" / "0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert (tmp_path / "jobs" / "1" / "result.json").exists()
    assert cli.main(words) == 0  # all are done: nothing is left to do, and nothing is in the way
    assert capsys.readouterr().err.count("skipped") == 2


def test_another_sweep_in_the_same_folder_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output, corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "jobs", ["lmkit"], [Job("0", {"seed": "1"}), Job("1", {"seed": "2"})])
    assert cli.main([*WORDS, f"dataset.path={corpus}", "seed=1,3"]) == 2
    assert "jobs holds a sweep of other jobs" in capsys.readouterr().err
    assert not (tmp_path / "jobs" / "0").exists()
