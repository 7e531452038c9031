"""LSTM and GRU language models with locked dropout, weight drop and tied weights.

Sources: Hochreiter & Schmidhuber 1997 and Gers et al. 2000 (LSTM), Cho et al. 2014 (GRU), Gal & Ghahramani 2016
(variational dropout: one mask for all time steps), Merity et al. 2018 (AWD-LSTM: weight drop, word-type dropout),
Press & Wolf 2017 (tied weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmkit.config.model import Cell, RecurrentConfig
from lmkit.models.base import LanguageModel, State, seeded_generator
from lmkit.models.cells import GRU, LSTM
from lmkit.models.dropout import dropout, embed_with_dropout, locked_dropout
from lmkit.models.mogrifier import MogrifierLSTM
from lmkit.models.output import build_head


@dataclass(frozen=True)
class RecurrentState(State):
    """hidden: one (B, D) tensor a layer; cell: the same for an LSTM, empty for a GRU."""

    hidden: tuple[Tensor, ...]
    cell: tuple[Tensor, ...]
    undropped_BTD: Tensor | None = None

    def detach(self) -> RecurrentState:
        return RecurrentState(tuple(h.detach() for h in self.hidden), tuple(c.detach() for c in self.cell))

    def select(self, rows: Tensor) -> RecurrentState:
        return RecurrentState(tuple(h[rows] for h in self.hidden), tuple(c[rows] for c in self.cell))

    def tensors(self) -> dict[str, Tensor]:
        named = {f"hidden.{layer}": h for layer, h in enumerate(self.hidden)}
        return named | {f"cell.{layer}": c for layer, c in enumerate(self.cell)}


@torch.no_grad()
def initialise(model: nn.Module, seed: int, is_table: Callable[[str], bool], *, is_lstm: bool) -> None:
    """Normal(0, 0.1) for the matrices whose names are those of tables (embedding, head), Normal(0, 1/sqrt(fan-in)) for
    others, orthogonal hidden-to-hidden matrices (Saxe et al. 2014), biases 0, but 1 for an LSTM's forget gates
    (Jozefowicz et al. 2015, section 3)."""
    for name, p in model.named_parameters():
        generator = seeded_generator(seed, name)
        if p.ndim == 1:
            p.zero_()
            if is_lstm and ".bias_ih" in name:
                p[len(p) // 4 : len(p) // 2] = 1.0
        elif ".weight_hh" in name:
            for block in torch.split(p, p.shape[1]):
                nn.init.orthogonal_(block, generator=generator)
        else:
            std = 0.1 if is_table(name) else 1 / math.sqrt(p.shape[1])
            p.copy_(torch.randn(p.shape, generator=generator) * std)


class Recurrent(LanguageModel):
    """Embedding, recurrent layers, tied softmax. The state is always returned, so that training can carry it."""

    def __init__(self, config: RecurrentConfig, vocab_size: int, *, seed: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, None
        last = config.num_layers - 1
        widths = [config.d_embed] + [config.d_hidden] * last + [config.d_embed]
        self.embedding = nn.Embedding(vocab_size, config.d_embed)
        self.layers = nn.ModuleList(build_layer(config, widths[i], widths[i + 1]) for i in range(config.num_layers))
        self.head = build_head(config, self.embedding, tied=config.tie_embeddings, bias=True)
        is_lstm = config.cell is Cell.lstm
        initialise(self, seed, lambda name: ".weight_ih" not in name and ".rounds." not in name, is_lstm=is_lstm)

    def forward(
        self, tokens_BT: Tensor, state: RecurrentState | None = None, *, use_state: bool = False
    ) -> tuple[Tensor, RecurrentState]:
        """As LanguageModel.forward; dropout masks are drawn from torch's global generator."""
        config, drop = self.config, self.training
        x_TBD = embed_with_dropout(tokens_BT.T, self.embedding.weight, config.dropout_embed if drop else 0.0)
        x_TBD = locked_dropout(x_TBD, config.dropout_input if drop else 0.0)
        hidden, cell = [], []
        for i, layer in enumerate(self.layers):
            x_TBD, h_BD, c_BD = self._run_layer(layer, x_TBD, state, i)
            hidden.append(h_BD)
            if c_BD is not None:
                cell.append(c_BD)
            if i + 1 < len(self.layers):
                x_TBD = locked_dropout(x_TBD, config.dropout_hidden if drop else 0.0)
        dropped_TBD = locked_dropout(x_TBD, config.dropout_output if drop else 0.0)
        state = RecurrentState(tuple(hidden), tuple(cell), x_TBD.transpose(0, 1) if drop else None)
        return dropped_TBD.transpose(0, 1), state

    def _run_layer(
        self, layer: nn.Module, x_TBD: Tensor, state: RecurrentState | None, index: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Outputs, last hidden and (LSTM) last cell of one layer; in training its hidden-to-hidden matrix has drops."""
        p = self.config.dropout_recurrent if self.training else 0.0
        weights = {"weight_hh_l0": dropout(layer.weight_hh_l0, p)} if p > 0.0 else {}  # type: ignore[arg-type]
        before: Any = None if state is None else state.hidden[index][None]
        if state is not None and state.cell:
            before = (before, state.cell[index][None])
        y_TBD, after = torch.func.functional_call(layer, weights, (x_TBD, before))
        if self.config.cell is Cell.lstm:
            return y_TBD, after[0][0], after[1][0]
        return y_TBD, after[0], None

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> RecurrentState:
        """The inverse of RecurrentState.tensors."""
        layers = range(self.config.num_layers)
        cells = tuple(tensors[f"cell.{i}"] for i in layers) if self.config.cell is Cell.lstm else ()
        return RecurrentState(tuple(tensors[f"hidden.{i}"] for i in layers), cells)


def build_layer(config: RecurrentConfig, width_in: int, width: int) -> nn.Module:
    """One recurrent layer."""
    if config.mogrifier_rounds > 0:
        return MogrifierLSTM(width_in, width, config.mogrifier_rounds, config.mogrifier_rank)
    return LSTM(width_in, width) if config.cell is Cell.lstm else GRU(width_in, width)


def has_recurrent_layers(model: nn.Module) -> bool:
    """Whether the model has layers for which torch's compiler (2.13) does little: it steps out of its graph for each
    that cuDNN computes, and writes a Mogrifier's loop over the positions out, which takes minutes for each length."""
    return any(isinstance(module, nn.RNNBase | MogrifierLSTM) for module in model.modules())
