"""Each family with each optimizer, and every option in between: killed (kill -9) twice and continued, the same bytes.

tests/integration/test_resume.py stops runs by a signal that they notice; here they do not. The kills come at chosen
steps, so that each run is resumed in the middle, while the save of the step before may still be under way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from harness import Lmkit, Start, digests, names

from lmkit.models.ngram import KneserNey
from lmkit.store import saving
from lmkit.store.found import read_info, read_metrics, read_result
from lmkit.store.listing import list_checkpoints
from lmkit.store.manifest import step_of
from lmkit.store.runs import Run
from lmkit.train import Trainer

CONFIGS = Path(__file__).parent.parent.parent / "configs"
STEPS = 12
KILLS = (6, 10)
"""Steps completed when a run is killed."""
PACE = ["eval.every_steps=2", "save.every_steps=2"]
TRANSFORMER = [
    "model=tiny", "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.context=16",
    "model.dropout=0.1",
]  # fmt: skip
LSTM = [
    "model=lstm", "model.d_embed=16", "model.d_hidden=24", "model.num_layers=2", "model.dropout_embed=0.1",
    "model.dropout_recurrent=0.2",
]  # fmt: skip
OPTIMIZERS = ["sgd", "adagrad", "adadelta", "rmsprop", "adam", "adamw", "nadam", "muon", "schedule_free"]
OPTIONS = {
    "accumulation": ["train.micro_batch_size=2"],
    "plateau": ["schedule=plateau", "schedule.patience=0"],
    "workers": ["train.workers=3"],
    "average": ["train.ema_decay=0.8"],
    "sampled": ["softmax=sampled", "softmax.num_frequent=20", "softmax.num_sampled=20"],
    "swa": ["train.average=swa", "train.swa_start=0.3"],
}
SMALL = [
    "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.context=16", "model.dropout=0.1",
    "model.attention_dropout=0.1",
]  # fmt: skip
EVERYTHING = ["accumulation", "plateau", "workers", "average", "sampled"]
"""What can be had at once."""
OTHERS = {
    "gru": ["model=gru", "model.d_embed=16", "model.d_hidden=16", "optimizer.clip_norm=0.1"],
    "gpt2": ["model=gpt2", *SMALL, "train.seq_len=8"],
    "vanilla": ["model=vanilla", *SMALL, "schedule=inverse_sqrt"],
    "bf16": [*TRANSFORMER, "device.precision=bf16", "schedule=wsd"],
    "lstm windows": [*LSTM, "train.order=windows", "init.embeddings=cooccurrence"],
    "mogrifier": ["model=mogrifier", "model.d_embed=16", "model.d_hidden=16", "model.mogrifier_rank=4"],
    "awd_lstm": [
        "model=awd_lstm", "model.d_embed=16", "model.d_hidden=24", "softmax=ar_tar", "train.average=nt_asgd",
        "train.seq_len_jitter=true", "train.shuffle=blocks", "optimizer=sgd",
    ],
    "transformer_xl": ["model=transformer_xl", *SMALL, "model.memory_tokens=16"],
    "mixture": [*TRANSFORMER, "model.num_softmaxes=3", "softmax.label_smoothing=0"],
    "adaptive": [*LSTM, "model.tie_embeddings=false", "softmax=adaptive", "softmax.cutoffs=[20,60]"],
    "vae": [
        "tokenizer=word", "objective=vae", "model=vae_lstm", "model.d_embed=16", "model.d_encoder=16",
        "model.d_latent=3", "objective.num_samples=4",
    ],
    "gan": [
        "tokenizer=word", "objective=gan", "model=relgan", "model.d_embed=16", "model.num_filters=8",
        "model.num_representations=2", "model.d_representation=4", "objective.pretrain_share=0.6",
        "objective.num_samples=8",
    ],
    "lstm everything": [
        *LSTM, *(word for name in EVERYTHING for word in OPTIONS[name]), "optimizer=sgd", "optimizer.momentum=0.9",
        "optimizer.nesterov=true", "train.spike_nats=20", "train.nonfinite=skip",
    ],
}  # fmt: skip


def matrix() -> dict[str, list[str]]:
    """Name -> words: all pairs of family and optimizer, with the options in turn, and some more."""
    cases = {}
    for shift, (family, model) in enumerate({"transformer": TRANSFORMER, "lstm": LSTM}.items()):
        for number, optimizer in enumerate(OPTIMIZERS):
            option = list(OPTIONS)[(number + 2 * shift) % len(OPTIONS)]
            words = [*model, f"optimizer={optimizer}", *OPTIONS[option]]
            if optimizer == "schedule_free":  # averages itself, and has no schedule
                words = [*model, f"optimizer={optimizer}", "schedule=constant"]
            cases[f"{family} {optimizer} {option}"] = words
    return cases | OTHERS


def test_the_matrix_has_every_family_and_every_optimizer() -> None:
    chosen = {word for words in matrix().values() for word in words} | {"model=kn5"}  # counted: see below
    for group, others in {"model": {"small", "medium", "large"}, "optimizer": {"adamw_finetune"}}.items():
        presets = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
        assert presets - others == {word.partition("=")[2] for word in chosen if word.startswith(f"{group}=")}


def without_model(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("model")]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(step: int) -> None:
    """In a child: die when so many steps are completed."""
    train_step = Trainer.train_step

    def dying(self: Trainer, batch: object) -> object:
        if self.state.step == step:
            die()
        return train_step(self, batch)  # type: ignore[arg-type]

    Trainer.train_step = dying  # type: ignore[method-assign,assignment]


@pytest.mark.slow
@pytest.mark.parametrize("words", matrix().values(), ids=matrix())
def test_rows_34_73_a_run_that_is_killed_twice_ends_with_the_bytes_of_one_that_was_not(
    words: list[str], small: list[str], start: Start, tmp_path: Path
) -> None:
    if "optimizer=schedule_free" in words:
        pytest.importorskip("schedulefree")
    words = [*without_model(small), *PACE, *words]
    check_killed_twice(words, start, tmp_path)


def check_killed_twice(words: list[str], start: Start, tmp_path: Path) -> None:
    """Run the words whole, and in pieces between two kills."""
    alone = start(*words, f"run.dir={tmp_path}/alone")
    assert alone.wait() == 0, alone.text
    run_dir, saved = tmp_path / "run", 0
    for step in (*KILLS, None):
        setup = [] if step is None else [partial(die_after_step, step)]
        child = start(*words, f"run.dir={run_dir}", "resume=true", setup=setup)
        assert child.wait() == (0 if step is None else -signal.SIGKILL), child.text
        assert ("resuming" in child.text) == (saved > 0)
        assert saved == 0 or f"after step {saved}" in child.text
        saved = max(step_of(name) or 0 for name in names(run_dir))
        assert step is None or step - 4 <= saved <= step
    assert digests(run_dir) == digests(tmp_path / "alone")
    assert [row["step"] for row in read_metrics(run_dir) if "loss" in row] == list(range(1, STEPS + 1))


def save_dearly() -> None:
    """In a child: after the first save there is no time for another one."""
    saving.may_save = lambda cost_s, *_: cost_s == 0.0  # type: ignore[assignment]


def test_row_34_killed_while_a_copy_waits_to_be_saved(small: list[str], start: Start, tmp_path: Path) -> None:
    words = [*small, "eval.every_steps=2"]
    alone = start(*words, f"run.dir={tmp_path}/alone")
    assert alone.wait() == 0, alone.text
    run_dir = tmp_path / "run"
    child = start(*words, f"run.dir={run_dir}", setup=[save_dearly, partial(die_after_step, 9)])
    assert child.wait() == -signal.SIGKILL, child.text
    assert [step_of(name) for name in names(run_dir)] == [2]
    child = start(*words, f"run.dir={run_dir}", "resume=true", setup=[save_dearly])
    assert child.wait() == 0, child.text
    assert "after step 2" in child.text
    assert digests(run_dir) == digests(tmp_path / "alone")


REVIEWS = [
    {"text": f"a {word} film of {number}", "label": word, "n": number, "prompt": f"is {number} {word}?",
     "response": "yes", "chosen": "yes", "rejected": "no"}
    for number in range(20) for word in ("good", "bad")
]  # fmt: skip
TUNED = {
    "lm": ["task=lm", "task.replay=0.5", "train.seq_len=16"],
    "lora": ["task=lm", "adapter=lora", "adapter.rank=2", "train.seq_len=16"],
    "dora": ["task=lm", "adapter=dora", "adapter.rank=2", "train.seq_len=16"],
    "classify": ["task=classify", "task.data={data}"],
    "regress": ["task=regress", "task.data={data}", "task.text=text", "task.target=n"],
    "instruct": ["task=instruct", "task.data={data}", "train.seq_len=32"],
    "prefer": ["task=prefer", "task.data={data}", "train.seq_len=32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("words", TUNED.values(), ids=TUNED)
def test_row_34_a_finetuned_run_that_is_killed_twice_ends_with_the_bytes_of_one_that_was_not(
    words: list[str], small: list[str], corpus: Path, start: Start, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in REVIEWS), encoding="utf-8", newline="\n")
    base = start(*without_model(small), *TRANSFORMER, "model.context=64", f"run.dir={tmp_path}/base")
    assert base.wait() == 0, base.text
    words = ["finetune", f"run={tmp_path}/base", *(word.format(data=data) for word in words), *PACE]
    if words[2] == "task=lm":
        words += ["dataset=text", f"dataset.path={corpus}"]
    words += ["train.batch_size=4", "train.max_steps=12", "log.every_steps=1", "device=cpu", "device.threads=1"]
    check_killed_twice(words, start, tmp_path)


def test_row_34_a_finetuned_run_that_is_killed_before_its_first_checkpoint_keeps_the_base_that_it_began_with(
    trained: Path, corpus: Path, start: Start, lmkit: Lmkit, tmp_path: Path
) -> None:
    run_dir = tmp_path / "tuned"
    words = ["finetune", "task=lm", "dataset=text", f"dataset.path={corpus}", "train.batch_size=4", "train.seq_len=16"]
    words += ["train.max_steps=4", "device=cpu", "device.threads=1", f"run.root={tmp_path}", f"run.dir={run_dir}"]
    child = start(*words, setup=[partial(die_after_step, 2)])
    assert child.wait() == -signal.SIGKILL, child.text
    assert names(run_dir) == []
    newer = Path(shutil.copytree(trained, tmp_path / "newer"))
    result = json.loads((newer / "result.json").read_bytes())
    (newer / "result.json").write_text(json.dumps({**result, "ended": "9999"}), encoding="utf-8")
    base = Path((read_info(run_dir) or {})["base"])
    assert base.parent == trained / "checkpoints"
    other = next(path for path in list_checkpoints(trained) if path != base)
    refused = lmkit(*words, "resume=true", f"run={other}")
    assert refused.code == 2, refused.err
    assert "cannot be resumed because this changed: base_sha256: " in refused.error
    assert refused.error.endswith(f", or go on from what this one began with: {base}")
    done = lmkit(*words, "resume=true")
    assert done.code == 0, done.err
    assert f"run: {trained}, checkpoint {base.name}\n" in done.err
    (newest,) = list_checkpoints(run_dir)
    assert json.loads((newest / "config.json").read_bytes())["base"] == str(base)


def die_counting() -> None:
    """In a child: die when the counting begins."""
    KneserNey.fit = lambda *args, **keywords: die()  # type: ignore[assignment,method-assign]


def die_before_result() -> None:
    """In a child: die when everything is saved but the result is not written."""
    Run.write_result = lambda *args, **keywords: die()  # type: ignore[assignment,method-assign]


def test_row_34_a_model_that_is_counted_can_be_killed_too(small: list[str], start: Start, tmp_path: Path) -> None:
    words = [*without_model(small), "model=kn5"]
    alone = start(*words, f"run.dir={tmp_path}/alone")
    assert alone.wait() == 0, alone.text
    run_dir = tmp_path / "run"
    for setup in ([die_counting], [die_before_result], []):
        child = start(*words, f"run.dir={run_dir}", "resume=true", setup=setup)
        assert child.wait() == (-signal.SIGKILL if setup else 0), child.text
    assert digests(run_dir) == digests(tmp_path / "alone")
    numbers = [read_result(tmp_path / name) or {} for name in ("alone", "run")]
    assert numbers[0]["token_ppl"] == numbers[1]["token_ppl"]
