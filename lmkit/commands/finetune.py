"""lmkit finetune: teach a run a task or more text, with the run's tokenizer, as a new run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lmkit.commands.forgetting import Forgetting, corpus_of
from lmkit.commands.new_data import DATA_ORDER
from lmkit.commands.place import Place, check_data, deal, here
from lmkit.commands.predict import check_prediction, predict_file
from lmkit.commands.training import Job, execute, open_run
from lmkit.config.adapter import AdapterConfig
from lmkit.config.chat import ChatTaskConfig, InstructTaskConfig, PreferTaskConfig
from lmkit.config.check import Problems
from lmkit.config.commands import FinetuneConfig
from lmkit.config.model import ModelConfig
from lmkit.config.plain import kind_of, to_plain
from lmkit.config.softmax import ADDED_TO_LOSS, AdaptiveSoftmaxConfig
from lmkit.config.tasks import ClassifyTaskConfig, LmTaskConfig, RegressTaskConfig, RowsTaskConfig, TaskConfig
from lmkit.config.training import STREAM_KEYS, ExistingRunConfig, check_length
from lmkit.console import Console
from lmkit.data.prepared import prepare
from lmkit.device import Device
from lmkit.distributed import World
from lmkit.errors import CheckpointError, ConfigError
from lmkit.hf.adapters import Origin, write_adapter
from lmkit.loading import LoadedRun, find_checkpoint, load_hf, load_run
from lmkit.lora import adapter_tensors, layers_to_adapt
from lmkit.store import storage
from lmkit.store.browse import read_newest_config, readable
from lmkit.store.checkpoint import BEST, load_checkpoint, resolve_checkpoint
from lmkit.store.found import FoundRun, absolute, read_info
from lmkit.store.runs import Run
from lmkit.tasks import Task, classify, regress
from lmkit.tasks.instruct import build_instruct
from lmkit.tasks.language import LanguageModelling
from lmkit.tasks.prefer import build_prefer
from lmkit.tokenizers import ByteTokenizer
from lmkit.tuning import choose_trainable, language_model_in


@dataclass(frozen=True)
class SetUp:
    """What finetuning begins with."""

    task: Task
    model: nn.Module
    model_config: ModelConfig
    base: LoadedRun | None
    """None: nothing but the data is needed, as for task=regress without text."""


def run(cfg: FinetuneConfig) -> dict[str, Any]:
    """Train, and return what was written to the new run's result.json; predict=FILE alone only predicts."""
    if cfg.predict is not None and isinstance(cfg.task, LmTaskConfig):
        return predict_file(cfg, cfg.run)
    if cfg.predict is not None:
        check_prediction(cfg)  # before the training, not after it
    with here(cfg) as place:
        return _run(replace(cfg, train=deal(cfg.train, place.world)), place)


def _run(cfg: FinetuneConfig, place: Place) -> dict[str, Any]:
    world, device, console = place.world, place.device, place.console
    _check_use(cfg)
    start = _started_alike(cfg, world, console)
    begin = world.first_alone(lambda: set_up(start, device, console))
    cfg = replace(cfg, task=start.task)  # with the template of a chat written out
    if begin.base is not None and not isinstance(cfg.task, RowsTaskConfig):
        _say_if_shorter(cfg.train.seq_len, begin.base, console)
    corpus = None if begin.base is None else corpus_of(begin.base)
    dataset = cfg.dataset  # what eval-ppl takes by default
    if begin.base is not None and not isinstance(cfg.task, LmTaskConfig):
        dataset = begin.base.dataset
    forgetting = None
    if begin.base is not None and world.is_first:
        rows = cfg.train.micro_batch_size or cfg.train.batch_size
        forgetting = Forgetting.watch(begin.base, corpus, device=device, micro_batch_size=rows, console=console)
    with open_run(cfg, begin.task.data_name, kind_of(begin.model_config), place) as this_run:
        stored = {
            "command": "finetune",
            "vocab_size": begin.task.tokenizer.vocab_size,
            **to_plain(cfg),
            "dataset": to_plain(dataset),
            "model": to_plain(begin.model_config),
            "base": None if begin.base is None else str(begin.base.checkpoint),
            "base_sha256": None if begin.base is None else begin.base.checkpoint_digest,
            "corpus": None if corpus is None else to_plain(corpus),
        }
        if isinstance(cfg.task, RowsTaskConfig) and begin.base is not None and begin.base.context is not None:
            stored["train"]["seq_len"] = begin.base.context  # what the language model inside was trained on
        if fitted := begin.task.fitted():
            stored["fitted"] = fitted
        if begin.base is not None and _had_learnt_more(begin.base.config):
            stored["base_had_base"] = True
        job = Job(cfg, this_run, begin.task, begin.model, begin.model_config, stored, place, forgetting)
        result = execute(job)
        if cfg.adapter is not None and begin.base is not None and world.is_first:
            _save_adapter(cfg.adapter, cfg.task, this_run, begin.model, begin.base, console)
    if cfg.predict is None or not world.is_first:
        return result
    trained = ExistingRunConfig(root=cfg.run.root, path=str(this_run.path))
    return {**result, "prediction": predict_file(cfg, trained)}


def _save_adapter(
    adapter: AdapterConfig, task: TaskConfig, run: Run, model: nn.Module, base: LoadedRun, console: Console
) -> None:
    """Write the adapter of the run's best checkpoint into the run, with what a task put on the language model."""
    weights = load_checkpoint(resolve_checkpoint(FoundRun(run.path), BEST, console.warn), with_optimizer=False).model
    found = language_model_in(model)
    prefix = found[0] if found is not None else ""
    beside = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    origin = Origin(str(base.checkpoint), base.checkpoint_digest, prefix, to_plain(task))
    folder = run.path / "adapter"
    with storage.resource_errors("save the adapter", folder):
        write_adapter(folder, adapter, {**adapter_tensors(weights), **beside}, origin)
    console.say(f"adapter: {folder}, as the peft library writes them")


def set_up(cfg: FinetuneConfig, device: Device, console: Console) -> SetUp:
    """Build task and model, and choose what of the model is trained. Raises LmkitError where things do not fit."""
    _check_softmax(cfg)
    begin = _begin(cfg, device, console)
    choose_trainable(begin.model, cfg.adapter, cfg.tune, seed=cfg.seed)
    num_trained = sum(p.numel() for p in begin.model.parameters() if p.requires_grad)
    num_all = sum(p.numel() for p in begin.model.parameters())
    if num_trained < num_all:
        console.say(f"training {num_trained:,} of {num_all:,} parameters ({100 * num_trained / num_all:.2f} %)")
    return begin


def _check_softmax(cfg: FinetuneConfig) -> None:
    """ConfigError for what ``softmax`` adds to a loss that is not over the vocabulary, where it would do nothing."""
    if isinstance(cfg.task, LmTaskConfig):
        return
    kind, rule = kind_of(cfg.softmax), f"has no use with task={kind_of(cfg.task)}: leave it out"
    instructs = isinstance(cfg.task, InstructTaskConfig)
    with Problems() as check:
        check(kind == "exact" or (instructs and kind == "adaptive"), "softmax", kind, rule)
        if not instructs:
            check.unused("softmax", cfg.softmax, ADDED_TO_LOSS, rule)


def _check_use(cfg: FinetuneConfig) -> None:
    """ConfigError for what would do nothing: what needs another key, what ``train`` and ``eval`` say of a stream of
    tokens where the task reads rows, and what ``softmax`` says of the output layer.

    Asked of what is to be trained now only: a step of an older run that was given such keys can still be replayed.
    """
    unused = f"has no use with task={kind_of(cfg.task)}"
    with Problems() as check:
        cfg.train.note_unused(check)
        if not isinstance(cfg.task, LmTaskConfig):
            check.unused("train", cfg.train, STREAM_KEYS, f"{unused}: leave it out")
            check.unused("eval", cfg.eval, ("sample_tokens",), f"{unused}: leave it out")
        if isinstance(cfg.task, RowsTaskConfig):
            check.unused("train", cfg.train, ("seq_len",), f"{unused}, whose texts task.max_tokens cuts: leave it out")
        if isinstance(cfg.softmax, AdaptiveSoftmaxConfig):
            rule = "has no use in finetuning, where the output layer is that of the run: leave it out"
            check.unused("softmax", cfg.softmax, ("cutoffs", "div_value"), rule)


def _had_learnt_more(config: Mapping[str, Any]) -> bool:
    """Whether a run did not begin with random weights, or went on with other data, by what it has stored of itself."""
    began_elsewhere = config.get("base") is not None or (config.get("init") or {}).get("weights") is not None
    return began_elsewhere or DATA_ORDER in config


def _say_if_shorter(seq_len: int, base: LoadedRun, console: Console) -> None:
    """Say it where a Transformer's new run will be read in shorter windows than the one that it starts from."""
    if base.context is not None and seq_len < base.context:
        console.say(
            f"train.seq_len={seq_len}: the new run will be evaluated, and generate, with windows of {seq_len} tokens"
            f" ({base.path}: {base.context})"
        )


def _begin(cfg: FinetuneConfig, device: Device, console: Console) -> SetUp:
    """Load the base run and the data, and build the task."""
    if isinstance(cfg.task, RegressTaskConfig) and cfg.task.text is None:
        return _numbers(cfg.task, cfg, console)
    if cfg.init.hf_name is not None:
        base = load_hf(cfg.init.hf_name, cfg.dataset, device=device, console=console)
    else:
        base = load_run(_start_of(cfg), device=device, console=console, inside=True)
    if base.model_config.trains_by_counting:
        raise ConfigError(f"run={base.path} is an n-gram model, which cannot be finetuned", "name a neural run")
    if cfg.adapter is not None:
        _check_adapter(cfg.adapter, base)
    if isinstance(cfg.task, LmTaskConfig):
        return SetUp(_language(cfg, base, console), base.model, base.model_config, base)
    if isinstance(cfg.task, ClassifyTaskConfig):
        task = classify.build_task(cfg.task, base.model, base.tokenizer, cfg.train, console, seed=cfg.seed)
        return SetUp(task, task.model, base.model_config, base)
    if isinstance(cfg.task, RegressTaskConfig):
        regression = regress.build_task(cfg.task, base.model, base.tokenizer, cfg.train, console, seed=cfg.seed)
        return SetUp(regression, regression.model, base.model_config, base)
    if isinstance(cfg.task, ChatTaskConfig):
        if isinstance(cfg.task, InstructTaskConfig):
            return SetUp(build_instruct(cfg, cfg.task, base, console), base.model, base.model_config, base)
        if isinstance(cfg.task, PreferTaskConfig):
            return SetUp(build_prefer(cfg, cfg.task, base, device, console), base.model, base.model_config, base)
    raise TypeError(f"no task for {type(cfg.task).__name__}")


def _check_adapter(adapter: AdapterConfig, base: LoadedRun) -> None:
    """ConfigError for an adapter that has no place in the base, before anything is prepared."""
    if base.model_config.objective == "gan":
        raise ConfigError(
            f"adapter has no use with {base.path}, which was trained with objective=gan: only its discriminator has"
            " linear layers",
            "leave it out",
        )
    layers_to_adapt(base.model, adapter)


def _started_alike(cfg: FinetuneConfig, world: World, console: Console) -> FinetuneConfig:
    """The configuration with the checkpoint to start from, which the first process chooses for all: another run may
    finish, or this one save, before the next one looks."""
    numbers_only = isinstance(cfg.task, RegressTaskConfig) and cfg.task.text is None
    if world.size == 1 or cfg.init.hf_name is not None or numbers_only:
        return cfg
    path = world.tell(lambda: str(find_checkpoint(_start_of(cfg), console)[1]))
    return replace(cfg, run=replace(cfg.run, path=path))


def _start_of(cfg: FinetuneConfig) -> ExistingRunConfig:
    """The checkpoint to start from: a run that goes on without run= keeps its own, whatever was finished since.

    Raises CheckpointError if that is gone.
    """
    if not cfg.resume or cfg.run.dir is None or cfg.run.path is not None:
        return cfg.run
    run_dir = absolute(cfg.run.dir)
    _, config = read_newest_config(run_dir)
    base = (config or readable(read_info, run_dir)).get("base")  # run.json: it was killed before its first checkpoint
    if not isinstance(base, str):
        return cfg.run
    if not os.path.isdir(base):
        raise CheckpointError(
            f"{base}, from which {run_dir} began, is not there any more",
            "bring it back, or name it where it is now: run=DIR",
        )
    return replace(cfg.run, path=base)


def _numbers(task_config: RegressTaskConfig, cfg: FinetuneConfig, console: Console) -> SetUp:
    """Regression on numbers alone: no run is needed; the byte tokenizer stands in, since every checkpoint has one."""
    for key, named in (("run", cfg.run.path), ("init", cfg.init.weights)):
        if named is not None:
            console.warn(f"{key}={named} is not used: task.text names no column of text, so numbers alone are read")
    task = regress.build_task(task_config, None, ByteTokenizer(), cfg.train, console, seed=cfg.seed)
    return SetUp(task, task.model, task_config.network, None)


def _language(cfg: FinetuneConfig, base: LoadedRun, console: Console) -> Task:
    check_length(cfg.train.seq_len, base.model.context)
    prepared = prepare(cfg.dataset, base.tokenizer, console)
    check_data(prepared, base.model_config, cfg.train.seq_len)
    train = prepared.splits["train"]
    if train.num_unk:
        console.say(f"train: {100 * train.num_unk / train.num_tokens:.1f} % of the tokens are <unk>")
    carries_state = base.model_config.carries_state
    task = LanguageModelling(base.model, prepared, cfg.train, cfg.softmax, seed=cfg.seed, carries_state=carries_state)
    share = cfg.task.replay if isinstance(cfg.task, LmTaskConfig) else 0.0
    if share > 0:
        corpus = corpus_of(base)
        if corpus is None:
            raise ConfigError(
                f"task.replay={share}: it is not known what run={base.path} was trained on", "set it to 0"
            )
        task.replay(prepare(corpus, base.tokenizer, console), share)
    return task
