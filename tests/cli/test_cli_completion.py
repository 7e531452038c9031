"""Tab completion: the candidates, and the scripts of the shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmkit import cli, presets
from lmkit.completion import SCRIPTS, candidates
from lmkit.keys import keys_of


def complete(line: str) -> list[str]:
    return candidates(["--line", line]).splitlines()


def test_commands_and_options_come_first() -> None:
    assert set(cli.COMMANDS) < set(complete("lmkit "))
    assert complete("lmkit pre") == ["prepare", "pretrain"]
    assert complete("lmkit --v") == ["--version"]
    assert complete("lmkit --completion ") == list(SCRIPTS)
    assert complete("lmkit help gen") == ["generate"]
    assert complete("lmkit nonsense ") == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_group_preset_and_key_is_offered(command: str) -> None:
    offered = complete(f"lmkit {command} ")
    for name in [*presets.groups_of(command), *keys_of(command, {})]:
        assert f"{name}=" in offered
    assert len(offered) == len(set(offered))
    for group in presets.groups_of(command):
        assert complete(f"lmkit {command} {group}=") == [f"{group}={name}" for name in presets.names_in(group)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lmkit pretrain dataset=pt", ["dataset=ptb"]),
        ("lmkit pretrain model.activation=s", ["model.activation=silu", "model.activation=sigmoid"]),
        ("lmkit pretrain resume=", ["resume=true", "resume=false"]),
        ("lmkit pretrain dataset=ptb dataset.name=p", ["dataset.name=ptb"]),
        ("lmkit pretrain dataset=hub dataset.name=", []),
        ("lmkit pretrain dataset=jsonl dataset.te", ["dataset.text_field=", "dataset.test_fraction="]),
        ("lmkit pretrain dataset.te", []),
        ("lmkit pretrain model=lstm model.ce", ["model.cell="]),
        ("lmkit pretrain recipe=ptb_cpu_10min model.ce", ["model.cell="]),
        ("lmkit pretrain model=lstm model.num_h", []),
        ("lmkit eval-ppl ru", ["run=", "run.root=", "run.path=", "run.checkpoint=", "run.allow_nonfinite="]),
        ("lmkit pretrain ru", ["run.root=", "run.dir=", "run.lock=", "run.allow_data_change="]),
        ("lmkit pretrain --mu", ["--multirun"]),
        ("lmkit pretrain --cfg ", ["job"]),
        ("lmkit pretrain --model ti", ["tiny"]),
        ("lmkit pretrain --model=ti", ["--model=tiny"]),
        ("lmkit pretrain --train.max-steps ", []),
        ("lmkit pretrain --resu", ["--resume"]),
        ("lmkit pretrain -m model=tiny,sm", ["model=tiny,small"]),
        ("lmkit pretrain model=tiny,sm", []),
        ("lmkit pretrain -m model=tiny,lstm model.ce", ["model.cell="]),
        ("lmkit pretrain model=typo model.num_kv", ["model.num_kv_heads="]),
        ("lmkit generate --pr", ["--prompt", "--prompt-file"]),
        ("lmkit generate --prompt ", []),
        ("lmkit generate --prompt 'the comp", []),
        ("lmkit generate --prompt 'it = x' max", ["max_new_tokens="]),
        ("lmkit pretrain run.dir='my runs' model=ti", ["model=tiny"]),
    ],
)
def test_what_is_offered_depends_on_the_line_so_far(line: str, expected: list[str]) -> None:
    assert complete(line) == expected


@pytest.mark.parametrize("option", ["--prompt-file prompt.txt", "--prompt-file=prompt.txt"])
def test_a_prompt_is_not_read_while_its_line_is_typed(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    assert complete(f"lmkit generate {option} max") == ["max_new_tokens="]


def test_the_words_may_also_come_one_by_one() -> None:
    assert candidates(["lmkit", "pretrain", "model=ti"]) == "model=tiny\n"
    assert candidates(["lmkit", "pretrain", ""]) == candidates(["--line", "lmkit pretrain "])


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_of_a_shell_is_printed(lmkit: Any, shell: str) -> None:
    assert lmkit("--completion", shell) == 0
    assert lmkit.out == SCRIPTS[shell]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_of_a_shell_is_valid(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(SCRIPTS[shell], encoding="utf-8", newline="\n")
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


BASH = """\
source "$1"
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE}
    IFS=$' ' read -r -a COMP_WORDS <<< "${COMP_LINE//=/ = }"
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    COMPREPLY=(stale)
    _lmkit "$2" "${COMP_WORDS[COMP_CWORD]}" ""
    (IFS=,; echo "${COMPREPLY[*]}")
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_words_with_an_equals_sign(tmp_path: Path) -> None:
    program = tmp_path / "lmkit"
    text = f'#!/bin/sh\nexec "{sys.executable}" -m lmkit "$@"\n'
    program.write_text(text, encoding="utf-8", newline="\n")
    program.chmod(0o755)
    (tmp_path / "script").write_text(SCRIPTS["bash"], encoding="utf-8", newline="\n")
    expected = {
        "lmkit gen": "generate",
        "lmkit pretrain model=ti": "tiny",
        "lmkit pretrain model=": ",".join(presets.names_in("model")),
        "lmkit pretrain model=lstm model.ce": "model.cell=",
        "lmkit pretrain run.root=/etc/ho": "",
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", str(tmp_path / "script"), str(program)],
        input="".join(f"{line}\n" for line in expected),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
    )
    assert done.stdout.splitlines() == list(expected.values())
    assert done.stderr == ""
