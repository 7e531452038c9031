"""LSTM and GRU follow their cell equations, and each dropout drops what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lmkit.config.model import Cell, RecurrentConfig
from lmkit.models.dropout import embed_with_dropout, locked_dropout
from lmkit.models.mogrifier import MogrifierLSTM
from lmkit.models.recurrent import Recurrent, RecurrentState

VOCAB, BATCH, TIME = 19, 3, 7
NO_DROPOUT = {"dropout_input": 0.0, "dropout_hidden": 0.0, "dropout_output": 0.0}


def build(cell: Cell = Cell.lstm, **changes: float) -> Recurrent:
    settings = {"d_embed": 6, "d_hidden": 10, **NO_DROPOUT, **changes}
    return Recurrent(RecurrentConfig(cell=cell, **settings), VOCAB, seed=3)  # type: ignore[arg-type]


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(1))


def by_the_equations(model: Recurrent, tokens_BT: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Hidden vectors, last h and last c of every layer, one time step after the other.

    LSTM: i, f, o = sigmoid(...), g = tanh(...), c = f c + i g, h = o tanh(c).
    GRU, reset gate after the product: n = tanh(W x + b + r (U h + b')), h = (1 - z) n + z h.
    """
    x_BTD = model.embedding.weight[tokens_BT]
    last_h, last_c = [], []
    for layer in model.layers:
        w_in, w_hh = layer.weight_ih_l0, layer.weight_hh_l0
        b_in, b_hh = layer.bias_ih_l0, layer.bias_hh_l0
        assert isinstance(w_in, Tensor)
        assert isinstance(w_hh, Tensor)
        h = torch.zeros(len(x_BTD), w_hh.shape[1])
        c = torch.zeros_like(h)
        outputs = []
        for t in range(x_BTD.shape[1]):
            from_x, from_h = x_BTD[:, t] @ w_in.T + b_in, h @ w_hh.T + b_hh
            if model.config.cell is Cell.lstm:
                i, f, g, o = (from_x + from_h).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, 1), from_h.chunk(3, 1)
                z = (z_x + z_h).sigmoid()
                n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
                h = (1 - z) * n + z * h
            outputs.append(h)
        x_BTD = torch.stack(outputs, 1)
        last_h.append(h)
        last_c.append(c)
    return x_BTD, last_h, last_c


@pytest.mark.parametrize("rank", [None, 2])
def test_a_mogrifier_gates_input_and_state_in_turn(rank: int | None) -> None:
    """Melis et al. 2020, equations 5 and 6, for odd and even rounds, then the LSTM cell."""
    model = build(mogrifier_rounds=3, mogrifier_rank=rank, num_layers=1).eval()  # type: ignore[arg-type]
    (layer,) = model.layers
    x_BTD = model.embedding.weight[tokens()]
    h, c, outputs = torch.zeros(BATCH, 6), torch.zeros(BATCH, 6), []
    q1, r2, q3 = (
        gate.weight if rank is None else gate[1].weight @ gate[0].weight  # type: ignore[union-attr, index]
        for gate in layer.rounds  # type: ignore[union-attr]
    )
    for t in range(TIME):
        x = 2 * torch.sigmoid(h @ q1.T) * x_BTD[:, t]
        h = 2 * torch.sigmoid(x @ r2.T) * h
        x = 2 * torch.sigmoid(h @ q3.T) * x
        i, f, g, o = (x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T).chunk(4, 1)  # type: ignore[operator, union-attr]
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    torch.testing.assert_close(model(tokens())[0], torch.stack(outputs, 1))


def test_a_mogrifier_without_rounds_is_pytorchs_lstm() -> None:
    torch.manual_seed(0)
    plain, ours = nn.LSTM(5, 7), MogrifierLSTM(5, 7, 0, None)
    ours.load_state_dict(plain.state_dict())
    x_TBI, before = torch.randn(4, 3, 5), (torch.randn(1, 3, 7), torch.randn(1, 3, 7))
    for a, b in zip(ours(x_TBI, before)[1], plain(x_TBI, before)[1], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours(x_TBI)[0], plain(x_TBI)[0])


@pytest.mark.parametrize("cell", list(Cell))
def test_hidden_vectors_states_and_gradients_follow_the_cell_equations(cell: Cell) -> None:
    model = build(cell, num_layers=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name:
                p.uniform_(-0.5, 0.5)
    hidden_BTD, state = model(tokens())
    expected_BTD, last_h, last_c = by_the_equations(model, tokens())
    torch.testing.assert_close(hidden_BTD, expected_BTD)
    for ours, theirs in zip(state.hidden, last_h, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(state.cell, last_c if cell is Cell.lstm else [], strict=True):
        torch.testing.assert_close(ours, theirs)
    wanted = [p for name, p in model.named_parameters() if not name.startswith("head.bias")]
    weights = torch.linspace(-1, 1, hidden_BTD.numel()).view(hidden_BTD.shape)
    ours_grad = torch.autograd.grad((hidden_BTD * weights).sum(), wanted)
    theirs_grad = torch.autograd.grad((expected_BTD * weights).sum(), wanted)
    for ours, theirs in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_forget_gate_starts_open_and_all_other_biases_at_zero() -> None:
    model = build(Cell.lstm)
    for layer, width in zip(model.layers, (10, 6), strict=True):
        total = layer.bias_ih_l0 + layer.bias_hh_l0
        expected = torch.zeros(4 * width)
        expected[width : 2 * width] = 1.0
        torch.testing.assert_close(total, expected, check_dtype=False)
    assert model.head.bias is not None
    assert (model.head.bias == 0).all()


@pytest.mark.parametrize("cell", list(Cell))
def test_hidden_to_hidden_matrices_start_orthogonal(cell: Cell) -> None:
    for layer in build(cell).layers:
        w_hh = layer.weight_hh_l0
        assert isinstance(w_hh, Tensor)
        for block in w_hh.split(w_hh.shape[1]):
            torch.testing.assert_close(block @ block.T, torch.eye(len(block)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_last_layer_is_as_wide_as_the_embedding_it_is_tied_to(num_layers: int) -> None:
    model = build(num_layers=num_layers)
    assert model(tokens())[0].shape == (BATCH, TIME, 6)
    assert model.head.weight is model.embedding.weight
    assert not build(tie_embeddings=False).head.weight.equal(model.embedding.weight)


@pytest.mark.parametrize("cell", list(Cell))
def test_every_dropout_is_off_in_evaluation(cell: Cell) -> None:
    rates = dict.fromkeys(
        ["dropout_embed", "dropout_input", "dropout_hidden", "dropout_output", "dropout_recurrent"], 0.5
    )
    dropped, plain = build(cell, **rates).eval(), build(cell).eval()
    assert torch.equal(dropped(tokens())[0], plain(tokens())[0])
    assert not torch.equal(dropped.train()(tokens())[0], plain(tokens())[0])


@pytest.mark.parametrize(
    "name", ["dropout_embed", "dropout_input", "dropout_hidden", "dropout_output", "dropout_recurrent"]
)
def test_each_dropout_is_a_function_of_the_global_seed(name: str) -> None:
    model = build(**{name: 0.5})
    torch.manual_seed(0)
    first = model(tokens())[0]
    torch.manual_seed(0)
    assert torch.equal(model(tokens())[0], first)
    assert not torch.equal(model(tokens())[0], first)


def test_output_dropout_uses_one_mask_for_all_time_steps_and_one_for_each_row() -> None:
    torch.manual_seed(0)
    zero_BTD = build(dropout_output=0.5, d_embed=40)(tokens())[0] == 0
    assert torch.equal(zero_BTD, zero_BTD[:, :1].expand_as(zero_BTD))
    assert not torch.equal(zero_BTD[0], zero_BTD[1])


def test_locked_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = locked_dropout(torch.ones(2, 100, 1000), 0.3)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)


def test_word_type_dropout_drops_every_occurrence_of_a_word_and_no_other() -> None:
    model = build(dropout_embed=0.5)
    torch.manual_seed(0)
    embedded_TBD = embed_with_dropout(tokens().T, model.embedding.weight, 0.5)
    dropped_TB = (embedded_TBD == 0).all(-1)
    dropped_ids = set(tokens().T[dropped_TB].tolist())
    assert dropped_ids
    assert not dropped_ids & set(tokens().T[~dropped_TB].tolist())
    kept = embedded_TBD[~dropped_TB]
    torch.testing.assert_close(kept, 2 * model.embedding.weight[tokens().T[~dropped_TB]])


def test_weight_drop_uses_one_mask_for_the_whole_sequence_and_leaves_the_weights_alone() -> None:
    model = build(dropout_recurrent=0.5, num_layers=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(tokens())[0].square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    grad = model.layers[0].weight_hh_l0.grad
    assert isinstance(grad, Tensor)
    share = float((grad == 0).float().mean())
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("cell", list(Cell))
def test_a_state_survives_being_turned_into_named_tensors_and_back(cell: Cell) -> None:
    model = build(cell)
    state = model(tokens())[1]
    back = model.state_from_tensors(state.tensors())
    assert isinstance(back, RecurrentState)
    assert all(a is b for a, b in zip(back.hidden + back.cell, state.hidden + state.cell, strict=True))
    assert len(back.cell) == (2 if cell is Cell.lstm else 0)


@pytest.mark.parametrize("cell", list(Cell))
def test_a_detached_state_cuts_the_graph_and_keeps_the_values(cell: Cell) -> None:
    state = build(cell)(tokens())[1]
    cut = state.detach()
    for before, after in zip(state.hidden + state.cell, cut.hidden + cut.cell, strict=True):
        assert before.requires_grad
        assert not after.requires_grad
        assert torch.equal(before, after)
