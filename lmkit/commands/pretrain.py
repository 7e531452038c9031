"""lmkit pretrain: train a model from scratch on a corpus, by gradient or by counting; prepares what is missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from lmkit.commands.place import Place, check_data, deal, here
from lmkit.commands.training import Job, build_trainer, execute, open_run
from lmkit.config.check import Problems
from lmkit.config.commands import PretrainConfig
from lmkit.config.model import HeadConfig, ModelConfig, TransformerConfig, with_regularisers
from lmkit.config.objectives import GanObjectiveConfig, VaeObjectiveConfig
from lmkit.config.plain import kind_of, to_plain
from lmkit.config.softmax import ADDED_TO_LOSS, AdaptiveSoftmaxConfig, SoftmaxConfig
from lmkit.config.training import STREAM_KEYS
from lmkit.console import Console
from lmkit.data.prepared import PreparedData, prepare
from lmkit.errors import ConfigError
from lmkit.heads import SoftmaxHead
from lmkit.hf import ImportedModel, import_hf, resolve_hf
from lmkit.models.base import Head, LanguageModel
from lmkit.models.gan import Relgan
from lmkit.models.output import head_of
from lmkit.models.vae import VaeLstm
from lmkit.objectives import check_head
from lmkit.planning import plan
from lmkit.tasks import Task
from lmkit.tasks.gan import AdversarialSentences
from lmkit.tasks.language import LanguageModelling
from lmkit.tasks.sentences import SentenceTask
from lmkit.tasks.vae import SentenceVae


def run(cfg: PretrainConfig) -> dict[str, Any]:
    """Train, and return what was written to the run's result.json."""
    with here(cfg) as place:
        return _run(replace(cfg, train=deal(cfg.train, place.world)), place)


def _run(cfg: PretrainConfig, place: Place) -> dict[str, Any]:
    world, console = place.world, place.console
    _check_use(cfg)
    _check_softmax(cfg)
    prepared, imported = world.first_alone(lambda: prepare_data(cfg, console))
    vocab_size = prepared.tokenizer.vocab_size
    if imported is not None:
        cfg = replace(cfg, model=imported.model_config)
    check_data(prepared, cfg.model, cfg.train.seq_len)
    cfg = replace(cfg, model=with_head(cfg.model, cfg.softmax, vocab_size))
    if cfg.plan and not world.is_first:
        return {}
    if cfg.plan:
        return _plan(cfg, prepared, imported, place)
    with open_run(cfg, prepared.name, kind_of(cfg.model), place) as this_run:
        model = build_model(cfg, imported, vocab_size)
        del imported  # its weights are in the model now
        stored = {"command": "pretrain", "vocab_size": vocab_size, **to_plain(cfg)}
        task = build_task(cfg, model, prepared)
        if isinstance(task, SentenceTask) and (note := task.cut_note()):
            console.warn(note)
        job = Job(cfg, this_run, task, model, cfg.model, stored, place)
        return execute(job)


def _check_use(cfg: PretrainConfig) -> None:
    """Raise ConfigError for keys that would do nothing with what is trained or what it starts from, before any work."""
    counts = cfg.model.trains_by_counting
    learner = "a model that counts" if counts else f"objective={cfg.objective.name}"
    rule = f"has no use with {learner}: leave it out"
    with Problems() as check:
        cfg.train.note_unused(check)
        if isinstance(cfg.objective, VaeObjectiveConfig):
            cfg.objective.note_unused(check)
        if counts or cfg.objective.name != "lm":
            check.unused("train", cfg.train, STREAM_KEYS, rule)
            check.unused("eval", cfg.eval, ("sample_tokens",), rule)
        if counts:
            check.unused("train", cfg.train, ("average", "ema_decay"), rule)
            check(kind_of(cfg.softmax) == "exact", "softmax", kind_of(cfg.softmax), rule)
            check.unused("softmax", cfg.softmax, ADDED_TO_LOSS, rule)
            check.unused("init", cfg.init, ("embeddings", "output_bias"), rule)
        if isinstance(cfg.softmax, AdaptiveSoftmaxConfig) and isinstance(cfg.model, HeadConfig):
            for name in ("cutoffs", "div_value"):
                check.unused("model", cfg.model, (name,), f"is what softmax=adaptive sets: use softmax.{name}")
        elif isinstance(cfg.model, HeadConfig) and not cfg.model.cutoffs:
            check.unused("model", cfg.model, ("div_value",), "needs softmax=adaptive: set softmax.div_value with it")
        if cfg.init.weights is not None:
            beside = f"has no use with init.weights={cfg.init.weights}"
            transformer = isinstance(cfg.model, TransformerConfig)
            check(transformer, "model", kind_of(cfg.model), f"{beside}, which is a Transformer: leave it out")
            check.unused("init", cfg.init, ("embeddings", "output_bias"), f"{beside}: leave it out")


def _check_softmax(cfg: PretrainConfig) -> None:
    """Raise ConfigError if the loss cannot train the model's output layer, as far as that is known before any work."""
    if cfg.init.weights is not None:
        head: type[Head] = SoftmaxHead  # that of whatever can be imported
    else:
        head = head_of(with_head(cfg.model, cfg.softmax, 100))  # of any size: which cutoffs there are does not matter
    check_head(cfg.softmax, head)


def _plan(cfg: PretrainConfig, prepared: PreparedData, imported: ImportedModel | None, place: Place) -> dict[str, Any]:
    """Say what the run would take; nothing is written."""
    if cfg.model.trains_by_counting:
        raise ConfigError("plan=true: a model that counts takes seconds", "leave plan out")
    if place.world.shards and place.world.size > 1:
        raise ConfigError("plan=true does not know what a model in pieces takes", "plan with parallel=ddp")
    model = build_model(cfg, imported, prepared.tokenizer.vocab_size)
    trainer = build_trainer(cfg, build_task(cfg, model, prepared), model, place.device, None)
    rows = list(plan(trainer, cfg.train, cfg.eval, cfg.save, num_processes=place.world.size).rows())
    place.console.table("Plan", rows)
    return dict(rows)


def prepare_data(cfg: PretrainConfig, console: Console) -> tuple[PreparedData, ImportedModel | None]:
    """The data, and the model of ``init.weights``, whose tokenizer they are prepared with, if there is one.

    It is that of its folder, but for the regularisers that ``model`` sets.
    """
    if cfg.init.hf_name is None:
        return prepare(cfg.dataset, cfg.tokenizer, console), None
    imported = import_hf(resolve_hf(cfg.init.hf_name))
    console.say(f"model and tokenizer: {cfg.init.hf_name}, {imported.family}")
    imported = replace(imported, model_config=with_regularisers(imported.model_config, cfg.model))
    return prepare(cfg.dataset, imported.tokenizer, console), imported


def build_model(cfg: PretrainConfig, imported: ImportedModel | None, vocab_size: int) -> LanguageModel:
    """The model before the first step, but for what its task takes from the text."""
    return cfg.model.build(vocab_size, seed=cfg.seed) if imported is None else imported.build(seed=cfg.seed)


def with_head(model: ModelConfig, softmax: SoftmaxConfig, vocab_size: int) -> ModelConfig:
    """The model with the output layer that the loss asks for. Raises ConfigError if it cannot have it."""
    if not isinstance(softmax, AdaptiveSoftmaxConfig):
        return model
    if not isinstance(model, HeadConfig):
        raise ConfigError(f"softmax=adaptive cannot train model={kind_of(model)}", "use softmax=exact")
    cutoffs = softmax.cutoffs or [max(1, vocab_size * 2 // 25), max(2, vocab_size // 4)]
    return replace(model, cutoffs=list(cutoffs), div_value=softmax.div_value)


def build_task(cfg: PretrainConfig, model: LanguageModel, prepared: PreparedData) -> Task:
    """What the run learns."""
    if isinstance(cfg.objective, VaeObjectiveConfig):
        vae = cast(VaeLstm, model)
        return SentenceVae(vae, prepared, cfg.train, cfg.softmax, cfg.objective, seed=cfg.seed, init=cfg.init)
    if isinstance(cfg.objective, GanObjectiveConfig):
        gan = cast(Relgan, model)
        return AdversarialSentences(gan, prepared, cfg.train, cfg.softmax, cfg.objective, seed=cfg.seed, init=cfg.init)
    return LanguageModelling(
        model,
        prepared,
        cfg.train,
        cfg.softmax,
        seed=cfg.seed,
        carries_state=cfg.model.carries_state,
        init=cfg.init if cfg.init.weights is None else None,
    )
