"""What ``lmkit runs ACTION`` takes: no groups and presets, only names of runs and a few options."""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_ROOT = "runs"
"""Folder in which runs are looked for by their bare names."""
DEFAULT_PLOT = "curves.png"
DEFAULT_REPORT = "report.html"
DEFAULT_STEPS = 12
LEAST_STEPS = 4
"""Fewer leave no room for a checkpoint, a kill after it, and an end after that."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """One action, as parsing, help and completion know it."""

    summary: str
    """One line."""
    words: str
    """What follows it, as it is written in the usage."""
    least: int = 1
    """Words that it needs."""
    most: int | None = 1
    """Words that it takes; None for any number."""
    options: dict[str, str] = field(default_factory=dict)
    """Option -> its help; an option that takes a value is written with it: ``--steps N``, ``to=FILE.png``."""
    details: str = ""
    """More text for its own help."""

    @property
    def takes_file(self) -> bool:
        """Whether ``to=FILE`` says where it writes."""
        return any(option.startswith("to=") for option in self.options)


ACTIONS = {
    "ls": Action(
        summary="list the runs in a folder, the newest last",
        words="[ROOT]",
        least=0,
        options={"--json": "one JSON object a line, with every value in full"},
        details=f"ROOT is {DEFAULT_ROOT} by default; folders of runs in it are listed, too. The status is running (its "
        "lock is held), finished, stopped (on request, and saved), diverged, or crashed (killed, or an error). The "
        "perplexity is the lowest on valid so far, per original word where the number of words is known, otherwise per "
        "token. Times are local.",
    ),
    "show": Action(
        summary="what a run is: command, configuration, checkpoints, last numbers",
        words="RUN",
        details="Checkpoints are looked at, not hashed: lmkit runs verify does that.",
    ),
    "diff": Action(
        summary="what differs between two runs, in configuration and in numbers",
        words="RUN RUN",
        least=2,
        most=2,
    ),
    "compare": Action(
        summary="numbers of several runs side by side, and which settings differ",
        words="RUN RUN [RUN ...]",
        least=2,
        most=None,
        details="Losses and perplexities can be compared under the same letter only: runs of the same data and the "
        "same tokenizer share one. The lowest under each letter has a star.",
    ),
    "plot": Action(
        summary="draw the loss curves of runs into one PNG",
        words="RUN [RUN ...]",
        most=None,
        options={"to=FILE.png": f"the file to write (default: {DEFAULT_PLOT} here)"},
    ),
    "report": Action(
        summary="write one HTML page about a run: curves, samples, incidents, configuration",
        words="RUN",
        options={"to=FILE.html": f"the file to write (default: {DEFAULT_REPORT} in the run)"},
        details="The page is one file that loads nothing else: it can be mailed, archived and opened from the disk.",
    ),
    "sweep": Action(
        summary="what has become of the jobs of a multirun (-m), the best, and how to retry the rest",
        words="DIR",
        details="DIR is the run.dir of the multirun. Jobs that differ in nothing but the seed are folded: mean and "
        "sample standard deviation of their lowest validation losses. Finished jobs are skipped when the sweep is "
        "started again.",
    ),
    "verify": Action(
        summary="hash every file of every checkpoint again and name what is damaged",
        words="RUN [RUN ...]",
        most=None,
        details="RUN may also be a checkpoint, or a copy of one. Exits with 0 if every checkpoint is whole, with 4 "
        "otherwise or if there is none. Litter of killed processes is harmless: it is removed when the run goes on.",
    ),
    "verify-resume": Action(
        summary="kill a short copy of a training, resume it, and compare every byte",
        words="[pretrain|finetune] [GROUP=NAME] [KEY=VALUE] ...",
        least=0,
        most=None,
        options={"--steps N": f"optimizer steps of the copy (at least {LEAST_STEPS}; default {DEFAULT_STEPS})"},
        details="The words are those of lmkit pretrain, or of lmkit finetune after its name. It trains them twice for "
        "a few steps in a temporary folder (TMPDIR moves it): once undisturbed, and once killed with kill -9 in the "
        "middle, after a checkpoint, and "
        "resumed. Weights, optimizer and counters of the two final checkpoints must be the same bytes. Exits with 0 if "
        "they are, with 4 if not, naming the first tensor that differs. What ends or names a run (train.max_steps, "
        "train.budget, run.dir and the like) is set by the copy.",
    ),
    "replay": Action(
        summary="do one step of a run again and show its loss and its batch, row by row",
        words="RUN step=K",
        least=2,
        most=2,
        details="Trains from the newest checkpoint before the step up to it. The run directory is only read. "
        "On the same machine and versions the numbers are those of the run, bit for bit, unless it was trained by the "
        "clock (train.budget: the learning rate only comes close) or by several processes (other roundings).",
    ),
    "pin": Action(
        summary="keep a checkpoint for good, whatever comes after it",
        words="RUN step=K",
        least=2,
        most=2,
        details="A pinned checkpoint is never removed to make room for newer ones. Works while the run trains, too.",
    ),
    "unpin": Action(
        summary="take that back",
        words="RUN step=K",
        least=2,
        most=2,
        details="The run removes the checkpoint when it saves next, unless it is one of the newest or the best.",
    ),
    "rm": Action(
        summary="remove runs, after asking",
        words="RUN [RUN ...]",
        most=None,
        options={"--yes": "do not ask"},
        details="A run that is in use is refused, and then nothing is removed. An rm that was killed leaves a folder "
        "whose name begins with .trash-: the next rm beside it removes the rest.",
    ),
}
"""Name -> action, in the order in which they are listed."""


@dataclass(kw_only=True)
class RunsConfig:
    """lmkit runs: look at runs, check them, and tidy them up."""

    action: str
    """A name in ACTIONS."""
    words: list[str] = field(default_factory=list)
    """What follows it: runs and the like; for verify-resume the words of pretrain or finetune."""
    json: bool = False
    """ls: print JSON lines."""
    yes: bool = False
    """rm: do not ask."""
    to: str | None = None
    """plot, report: the file to write."""
    steps: int = DEFAULT_STEPS
    """verify-resume: optimizer steps of the short copy."""
    help: bool = False
    """Show the help of the action instead."""
    debug: bool = False
    """Show the traceback of an error."""
