"""Typed configuration: dataclasses with values only. Importing this package imports neither torch nor Hydra.

The dataclasses stand apart from the code they configure, so that ``lmkit --help`` and ``--cfg job`` need not load
torch; ``build`` methods import the code when it is needed. The line of text under each field is its help in ``--help``.
"""

from __future__ import annotations

from lmkit.config import (
    adapter,
    chat,
    commands,
    data,
    evaluation,
    export,
    generation,
    loggers,
    machine,
    model,
    objectives,
    optimization,
    parallel,
    softmax,
    tasks,
)

ROOTS: dict[str, type] = {
    "prepare": commands.PrepareConfig,
    "pretrain": commands.PretrainConfig,
    "finetune": commands.FinetuneConfig,
    "eval-ppl": commands.EvalPplConfig,
    "generate": generation.GenerateConfig,
    "export": export.ExportConfig,
}
"""Subcommand -> root dataclass."""

SCHEMAS: dict[str, dict[str, type]] = {
    "dataset": {
        "pydocs": data.PydocsConfig,
        "benchmark": data.BenchmarkConfig,
        "text": data.TextConfig,
        "jsonl": data.JsonlConfig,
        "hub": data.HubConfig,
    },
    "tokenizer": {
        "word": data.WordTokenizerConfig,
        "char": data.CharTokenizerConfig,
        "byte": data.ByteTokenizerConfig,
        "sentencepiece": data.SentencePieceTokenizerConfig,
        "hf": data.HfTokenizerConfig,
    },
    "model": {
        "transformer": model.TransformerConfig,
        "recurrent": model.RecurrentConfig,
        "ngram": model.NgramConfig,
        "vae_lstm": model.VaeLstmConfig,
        "relgan": model.RelganConfig,
        "network": tasks.NetworkConfig,
    },
    "objective": {
        "lm": objectives.ObjectiveConfig,
        "vae": objectives.VaeObjectiveConfig,
        "gan": objectives.GanObjectiveConfig,
    },
    "optimizer": {
        "sgd": optimization.SgdConfig,
        "adagrad": optimization.AdagradConfig,
        "adadelta": optimization.AdadeltaConfig,
        "rmsprop": optimization.RmspropConfig,
        "adam": optimization.AdamConfig,
        "adamw": optimization.AdamwConfig,
        "nadam": optimization.NadamConfig,
        "schedule_free": optimization.ScheduleFreeConfig,
        "muon": optimization.MuonConfig,
    },
    "schedule": {
        "constant": optimization.ConstantConfig,
        "cosine": optimization.CosineConfig,
        "linear": optimization.LinearConfig,
        "wsd": optimization.WsdConfig,
        "step_decay": optimization.StepDecayConfig,
        "inverse_sqrt": optimization.InverseSqrtConfig,
        "plateau": optimization.PlateauConfig,
    },
    "softmax": {
        "exact": softmax.SoftmaxConfig,
        "sampled": softmax.SampledSoftmaxConfig,
        "adaptive": softmax.AdaptiveSoftmaxConfig,
    },
    "adapter": {"lora": adapter.AdapterConfig},
    "task": {
        "lm": tasks.LmTaskConfig,
        "classify": tasks.ClassifyTaskConfig,
        "regress": tasks.RegressTaskConfig,
        "instruct": chat.InstructTaskConfig,
        "prefer": chat.PreferTaskConfig,
    },
    "protocol": {
        "stream": evaluation.StreamProtocolConfig,
        "mikolov": evaluation.MikolovProtocolConfig,
        "sentence": evaluation.SentenceProtocolConfig,
        "awd_lstm": evaluation.AwdLstmProtocolConfig,
        "transformer_xl": evaluation.TransformerXlProtocolConfig,
        "hf_strided": evaluation.HfStridedProtocolConfig,
        "lm_eval_wikitext": evaluation.LmEvalWikitextProtocolConfig,
        "gpt2_paper": evaluation.Gpt2PaperProtocolConfig,
    },
    "dynamic": {
        "sgd": evaluation.DynamicSgdConfig,
        "rms": evaluation.DynamicRmsConfig,
    },
    "cache": {
        "unigram": evaluation.UnigramCacheConfig,
        "neural": evaluation.NeuralCacheConfig,
    },
    "logger": {
        "none": loggers.LoggerConfig,
        "tensorboard": loggers.TensorboardLoggerConfig,
        "wandb": loggers.WandbLoggerConfig,
        "mlflow": loggers.MlflowLoggerConfig,
        "trackio": loggers.TrackioLoggerConfig,
    },
    "device": {"device": machine.DeviceConfig},
    "parallel": {
        "none": parallel.ParallelConfig,
        "ddp": parallel.DdpConfig,
        "fsdp": parallel.FsdpConfig,
    },
}
"""Group -> schema name -> dataclass: the one table from names to classes."""
