"""What the pages say can be typed is understood: commands, keys, presets, targets of make and scripts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lmkit import presets
from lmkit.arguments import parse
from lmkit.cli import COMMANDS
from lmkit.composing import compose, to_dataclass
from lmkit.data.benchmarks import BENCHMARKS
from lmkit.errors import LmkitError
from lmkit.keys import every_key
from lmkit.runs_line import parse_runs
from lmkit.sweep import SEARCH, combinations

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [
    *(page for page in PAGES if page.name != "experiments.md"),
    *sorted((ROOT / "configs" / "recipe").glob("*.yaml")),
]
"""Not what tells of the past, where a key may have had another name."""
KEYS = {key for command in COMMANDS for key in every_key(command)}
PARTS = {key.partition(".")[0] for key in KEYS if "." in key}
GROUPS = {group: presets.names_in(group) for command in COMMANDS for group in presets.groups_of(command)}
ENDINGS = re.compile(r".*\.(csv|gguf|gz|html|json|jsonl|md|old|onnx|png|py|safetensors|sh|txt|yaml)")
"""What ends the name of a file, not of a key."""


def commands_in(page: Path) -> list[list[str]]:
    """The words behind ``lmkit`` of each command in a page's blocks; ``...`` stands for words that are left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [match[1] for line in lines if (match := re.match(r"(?:\$ |.* -m )?lmkit (.*)", line))]
    return [[word for word in shlex.split(words, comments=True) if word != "..."] for words in found]


def understand(command: str, words: list[str]) -> None:
    """Compose each job of a command, as far as that can be done without files, launchers and sweepers."""
    if command == "runs":
        runs = parse_runs(words)
        if runs.action != "verify-resume":
            return
        command, *words = runs.words if runs.words[0] in COMMANDS else ["pretrain", *runs.words]
    line = parse(command, words)
    line.values = {key: value for key, value in line.values.items() if not SEARCH.fullmatch(value)}
    for job in combinations(line) if line.multirun else [line]:
        to_dataclass(compose(job))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_understood(page: Path) -> None:
    for command, *words in commands_in(page):
        try:
            understand(command, words)
        except LmkitError as error:
            pytest.fail(f"lmkit {shlex.join([command, *words])}: {error}")


def test_commands_are_found_in_whatever_form_they_are_written() -> None:
    assert len(commands_in(README)) >= 10
    assert ["runs", "verify", "runs/demo"] in commands_in(ROOT / "docs" / "running.md")
    assert ["pretrain", "parallel=ddp", "run.dir=runs/two"] in commands_in(ROOT / "docs" / "running.md")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_the_keys_and_presets_that_a_text_names_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./])[a-z]\w*(?:\.[a-z0-9_]+)+", text)
    keys = {key for key in named if key.partition(".")[0] in PARTS and not ENDINGS.fullmatch(key)}
    assert keys <= KEYS, sorted(keys - KEYS)
    for group, names in re.findall(rf"(?<![\w.])({'|'.join(GROUPS)})=([\w|-]+)", text):
        for name in names.split("|"):
            assert name.isupper() or presets.preset_name(group, name) in GROUPS[group], f"{group}={name}"


def test_every_preset_stands_in_the_readme_or_the_page_of_its_command() -> None:
    text = README.read_text(encoding="utf-8") + (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for group, names in GROUPS.items():
        for name in names:
            forms = (f"`{name}`", f"`{name.replace('_', '-')}`", f"`{group}={name}`")
            assert any(form in text for form in forms), f"{group}={name}"


def test_the_readme_says_where_each_benchmark_set_is_looked_for() -> None:
    text = README.read_text(encoding="utf-8")
    for known in BENCHMARKS.values():
        for part in (f"{known.folder}/", known.repo, *(known.files.format(split=split) for split in known.expected)):
            assert f"`{part}`" in text, part


def test_the_readme_has_every_exit_code() -> None:
    codes = {kind.exit_code for kind in LmkitError.__subclasses__()}
    rows = re.findall(r"^\| (\d+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(map(int, rows)) == sorted({0, 1, 130, *codes})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_scripts_pages_and_headings_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = set(re.findall(r"`make ([a-z-]+)", text))
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        named |= set(re.findall(r"^make ([a-z-]+)", block, re.MULTILINE))
    assert named <= set(targets)
    scripts = {path.name for path in (ROOT / "scripts").iterdir()}
    assert set(re.findall(r"\b(?:bench|check|make)_\w+\.py\b", text)) <= scripts
    for link, heading in re.findall(r"\]\(([\w./]*)(?:#([\w-]+))?\)", text):
        named_page = page.parent / link if link else page
        assert named_page.is_file(), link
        titles = re.findall(r"^#+ (.+)$", named_page.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]  # as GitHub makes them
        assert heading in ("", *anchors), f"{link}#{heading}"


def test_the_example_in_python_runs() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    made: dict[str, Any] = {}
    exec(example, made)
    assert made["model"].vocab_size == made["data"].tokenizer.vocab_size
