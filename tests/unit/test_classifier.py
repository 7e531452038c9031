"""Classifier and regression models: padding, pooling, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmkit.config.model import Cell, ModelConfig, Positions, RecurrentConfig, RelganConfig, TransformerConfig
from lmkit.config.tasks import NetworkActivation, NetworkConfig, NetworkInit, Pooling
from lmkit.models.classifier import Classifier, Network, NumberRegressor, TextRegressor, pool

BACKBONES: list[ModelConfig] = [
    TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=24),
    TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=24, positions=Positions.learned, pre_norm=False),
    RecurrentConfig(d_embed=12, d_hidden=16, num_layers=2),
    RecurrentConfig(d_embed=12, d_hidden=16, num_layers=1, cell=Cell.gru),
]
NAMES = ["rotary", "learned", "lstm", "gru"]


def rows_of(lengths: list[int], width: int, filler: int) -> tuple[Tensor, Tensor]:
    """The same token ids in each row as far as its length goes, and filler behind."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.full((len(lengths), width), filler)
    for row, length in enumerate(lengths):
        tokens_BT[row, :length] = torch.randint(0, 9, (length,), generator=generator)
    return tokens_BT, torch.tensor(lengths)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("config", BACKBONES, ids=NAMES)
def test_padding_does_not_change_a_prediction(config: ModelConfig, pooling: Pooling) -> None:
    model = Classifier(config.build(9, seed=1), 3, pooling=pooling, dropout=0.5, seed=1).eval()
    torch.nn.init.normal_(model.head.weight)
    lengths = [3, 11, 1, 7]
    with torch.no_grad():
        expected = torch.cat(
            [
                model(*(part[row : row + 1] for part in (tokens[:, :length], real)))
                for row, length in enumerate(lengths)
                for tokens, real in [rows_of(lengths, 11, 0)]
            ]
        )
        for width, filler in ((11, 0), (11, 8), (20, 5)):
            found = model(*rows_of(lengths, width, filler))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", BACKBONES, ids=NAMES)
def test_what_a_classifier_says_depends_on_the_last_real_token(config: ModelConfig) -> None:
    model = Classifier(config.build(9, seed=1), 2, pooling=Pooling.last, dropout=0.0, seed=1).eval()
    tokens_BT, lengths_B = rows_of([6], 9, 0)
    other_BT = tokens_BT.clone()
    other_BT[0, 5] = (other_BT[0, 5] + 1) % 9
    assert not torch.allclose(model(tokens_BT, lengths_B), model(other_BT, lengths_B), atol=1e-6)


def test_the_mean_is_that_of_the_real_positions_and_last_is_the_last_of_them() -> None:
    hidden_BTD = torch.arange(24.0).view(2, 4, 3)
    lengths_B = torch.tensor([2, 4])
    assert torch.equal(pool(hidden_BTD, lengths_B, Pooling.last), torch.stack([hidden_BTD[0, 1], hidden_BTD[1, 3]]))
    mean = torch.stack([hidden_BTD[0, :2].mean(0), hidden_BTD[1].mean(0)])
    torch.testing.assert_close(pool(hidden_BTD, lengths_B, Pooling.mean), mean)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (NetworkActivation.relu, lambda x: x.clamp(min=0)),
        (NetworkActivation.tanh, lambda x: 2 * torch.sigmoid(2 * x) - 1),
        (NetworkActivation.sigmoid, lambda x: 1 / (1 + torch.exp(-x))),
    ],
)
def test_a_network_is_w2_act_w1_x_plus_b1_plus_b2(activation: NetworkActivation, function: object) -> None:
    network = Network(NetworkConfig(d_hidden=5, activation=activation), 3, seed=1)
    torch.nn.init.normal_(network.hidden.bias)
    torch.nn.init.normal_(network.out.bias)
    x_BP = torch.randn(4, 3)
    hidden = function(x_BP @ network.hidden.weight.T + network.hidden.bias)  # type: ignore[operator]
    torch.testing.assert_close(network(x_BP), (hidden @ network.out.weight.T + network.out.bias)[:, 0])


@pytest.mark.parametrize(
    ("init", "std"),
    [(NetworkInit.xavier, math.sqrt(2 / 700)), (NetworkInit.kaiming, math.sqrt(2 / 200)), (NetworkInit.normal, 0.01)],
)
def test_initial_weights_have_the_stated_variance_and_depend_on_the_seed_alone(init: NetworkInit, std: float) -> None:
    config = NetworkConfig(d_hidden=500, init=init)
    first, second = (Network(config, 200, seed=3) for _ in range(2))
    assert first.hidden.weight.std().item() == pytest.approx(std, rel=0.02)
    assert torch.equal(first.hidden.weight, second.hidden.weight)
    assert not torch.equal(first.hidden.weight, Network(config, 200, seed=4).hidden.weight)


def test_a_regression_reads_the_numbers_beside_the_text() -> None:
    config = NetworkConfig(d_hidden=4, activation=NetworkActivation.tanh)
    backbone = BACKBONES[2].build(9, seed=1)
    model = TextRegressor(backbone, config, 2, pooling=Pooling.mean, dropout=0.0, seed=1).eval()
    tokens_BT, lengths_B = rows_of([5, 5], 5, 0)
    numbers_BK = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    assert model(tokens_BT, lengths_B, numbers_BK).shape == (2,)
    same = model(tokens_BT[:1].expand(2, -1), lengths_B, numbers_BK)
    assert same[0] != same[1]
    other = model(tokens_BT, lengths_B, numbers_BK[:1].expand(2, -1))
    assert other[0] != other[1]
    alone = NumberRegressor(config, 2, seed=1)
    torch.testing.assert_close(alone(tokens_BT, lengths_B, numbers_BK), alone.network(numbers_BK))


@pytest.mark.parametrize("config", [BACKBONES[0], BACKBONES[2]], ids=["rotary", "lstm"])
def test_under_autocast_what_stands_on_the_backbone_computes_in_full_precision(config: ModelConfig) -> None:
    """bf16 would round a price to 0.4 % of its standard deviation, and read each number with three digits."""
    network, numbers_BK = NetworkConfig(d_hidden=8), torch.randn(2, 2)
    tokens_BT, lengths_B = rows_of([5, 3], 5, 0)
    parts = {"pooling": Pooling.last, "dropout": 0.0, "seed": 1}
    classifier = Classifier(config.build(9, seed=1), 3, **parts).eval()  # type: ignore[arg-type]
    regressor = TextRegressor(config.build(9, seed=1), network, 2, **parts).eval()  # type: ignore[arg-type]
    alone = NumberRegressor(network, 2, seed=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = [model.read(tokens_BT, lengths_B).float() for model in (classifier, regressor)]
        logits, texts = classifier(tokens_BT, lengths_B), regressor(tokens_BT, lengths_B, numbers_BK)
        numbers = alone(tokens_BT, lengths_B, numbers_BK)
    with torch.no_grad():
        assert torch.equal(logits, classifier.head(vectors[0]))
        assert torch.equal(texts, regressor.network(torch.cat([vectors[1], numbers_BK], 1)))
        assert torch.equal(numbers, alone.network(numbers_BK))


@pytest.mark.parametrize(
    "config",
    [
        RelganConfig(d_embed=12, num_filters=4, num_representations=2),
        RecurrentConfig(d_embed=12, d_hidden=16, num_softmaxes=2),
        RecurrentConfig(d_embed=12, d_hidden=16, cutoffs=[3, 6], tie_embeddings=False),
    ],
    ids=["gan", "mixture", "adaptive"],
)
def test_a_classifier_stands_on_any_language_model(config: ModelConfig) -> None:
    model = Classifier(config.build(9, seed=1), 3, pooling=Pooling.last, dropout=0.0, seed=1).eval()
    assert model(*rows_of([3, 5], 5, 0)).shape == (2, 3)
