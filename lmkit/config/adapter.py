"""Configuration of what finetuning changes in a model: the ``adapter`` group, and ``tune`` for parts of the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmkit.config.check import Problems


@dataclass(kw_only=True)
class AdapterConfig:
    """Low-rank adapters: the model's weights stay as they are, and small matrices beside them are trained."""

    rank: int = 8
    """Rank of what is added to a weight matrix (>= 1)."""
    alpha: float = 16.0
    """What is added is multiplied by alpha / rank (> 0); with use_rslora by alpha / sqrt(rank)."""
    dropout: float = 0.0
    """Dropout on the adapter's input (0 <= p < 1)."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Linear layers that get an adapter: glob patterns of their names or ends of names, as in attention.qkv,feed_*."""
    use_rslora: bool = False
    """Rank-stabilised scaling, for larger ranks (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train the norm of each row of a weight matrix apart from its direction (DoRA; Liu et al. 2024)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(1, "adapter", self, "rank")
            check.positive("adapter", self, "alpha")
            check.below_one("adapter", self, "dropout")
            named = bool(self.targets) and all(self.targets)
            check(named, "adapter.targets", self.targets, "must name at least one layer, as in attention.*")


@dataclass(kw_only=True)
class TuneConfig:
    """Which parameters are trained, when, and how fast. Layers are counted from the embeddings up."""

    last_layers: int | None = None
    """Train the last k layers, what lies above them and nothing else (>= 0); tied embeddings stay; null: everything."""
    layer_decay: float = 1.0
    """Learning rate of each layer as a share of that of the layer above it (0 < d <= 1; Howard & Ruder 2018, 3.2)."""
    unfreeze: bool = False
    """Gradual unfreezing from the top, one more layer after each equal share of the run (Howard & Ruder 2018, 3.3)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(0, "tune", self, "last_layers", or_null=True)
            check(0 < self.layer_decay <= 1, "tune.layer_decay", self.layer_decay, "must be above 0 and at most 1")
