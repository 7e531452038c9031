"""The sentence VAE: closed forms, bounds against numerical integration, and what is left of it without latent units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lmkit.config.machine import Precision
from lmkit.config.model import RecurrentConfig, VaeLstmConfig
from lmkit.config.objectives import Anneal, VaeObjectiveConfig
from lmkit.data.sentences import Sentences
from lmkit.device import Device
from lmkit.errors import ConfigError
from lmkit.evaluation.latent import LatentScores, score_sentences
from lmkit.evaluation.plan import Segments, unbroken
from lmkit.evaluation.scoring import score
from lmkit.horizon import Horizon
from lmkit.models.base import IGNORE
from lmkit.models.recurrent import Recurrent
from lmkit.models.vae import GivenLatent, Posterior, VaeLstm

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
VOCAB, EOS = 7, 0
TOKENS = np.array([3, 1, 4, 0, 2, 0, 5, 6, 1, 1, 2, 0, 6, 3, 0, 4, 4, 0], dtype=np.uint8)


def sentences(longest: int | None = None) -> Sentences:
    return Sentences.of(TOKENS, np.arange(VOCAB) == EOS, EOS, longest)


def tiny(d_latent: int = 2, *, sharp: float = 1.0, **values: float) -> VaeLstm:
    """A model whose decoder listens to its latent vector; ``sharp`` scales what the posterior makes of a sentence."""
    config = VaeLstmConfig(d_embed=6, d_encoder=5, d_latent=d_latent, **values)  # type: ignore[arg-type]
    model = VaeLstm(config, VOCAB, seed=3)
    with torch.no_grad():
        model.embedding.weight.mul_(5)
        if model.posterior is not None and model.skip is not None:
            model.posterior.weight.mul_(sharp)
            model.skip.weight.mul_(2)
    return model.eval()


def exact_nats(model: VaeLstm, chosen: int) -> float:
    """-log p(x) of a sentence by integrating over a grid of two latent units."""
    axis = torch.linspace(-7, 7, 141)
    grid = torch.cartesian_prod(axis, axis)
    batch = sentences().batch(np.array([chosen]))
    with torch.no_grad():
        hidden, _ = model(batch.inputs_BT.expand(len(grid), -1), model.start(grid))
        targets = batch.targets_BT.expand(len(grid), -1)
        nats = model.head.score(hidden.flatten(0, 1), targets.reshape(-1)).nats_N.view(targets.shape).sum(1)
    log_prior = -0.5 * grid.square().sum(1) - math.log(2 * math.pi)
    return -float(torch.logsumexp((log_prior - nats).double(), 0) + 2 * math.log(0.1))


def scored(model: VaeLstm, num_samples: int, *, seed: int = 1, batch_size: int = 64) -> LatentScores:
    return score_sentences(model, sentences(), num_samples=num_samples, seed=seed, batch_size=batch_size, device=CPU)


def test_the_kl_is_never_negative_and_zero_only_at_the_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_var = torch.randn(50, 9, generator=generator), 3 * torch.randn(50, 9, generator=generator)
    assert bool((Posterior(mean, log_var).kl_BZ() > 0).all())
    assert float(Posterior(torch.zeros(1, 3), torch.zeros(1, 3)).kl_BZ().abs().max()) == 0.0
    almost = Posterior(torch.zeros(1, 1), torch.full((1, 1), 1e-4))
    assert float(almost.kl_BZ()) >= 0.0


def test_the_closed_form_of_the_kl_is_the_mean_of_the_log_ratio_of_densities() -> None:
    generator = torch.Generator().manual_seed(1)
    posterior = Posterior(torch.tensor([[0.7, -1.2]]).double(), torch.tensor([[-1.0, 0.4]]).double())
    noise = torch.randn(200_000, 2, generator=generator).double()
    ratio = -posterior.log_ratio(posterior.draw(noise))
    assert float(ratio.mean()) == pytest.approx(float(posterior.kl_BZ().sum()), abs=0.01)


def test_log_ratio_is_that_of_torchs_densities() -> None:
    posterior = Posterior(torch.tensor([[0.7, -1.2]]), torch.tensor([[-1.0, 0.4]]))
    z = torch.tensor([[0.1, 2.0]])
    std = torch.exp(0.5 * posterior.log_var_BZ)
    prior, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(posterior.mean_BZ, std)
    expected = (prior.log_prob(z) - q.log_prob(z)).sum()  # type: ignore[no-untyped-call]
    assert float(posterior.log_ratio(z)) == pytest.approx(float(expected), abs=1e-5)


def test_elbo_below_importance_weighted_bound_below_the_integrated_likelihood() -> None:
    model = tiny(sharp=4.0)
    exact = np.array([exact_nats(model, s) for s in range(len(sentences()))])
    few = [scored(model, 4, seed=seed) for seed in range(60)]
    elbo = np.mean([s.reconstruction_S + s.kl_S for s in few], 0)
    bound = np.mean([s.bound_S for s in few], 0)
    assert bool((elbo > bound + 0.01).all())
    assert bool((bound > exact).all())


def test_with_many_samples_the_bound_is_the_integrated_likelihood() -> None:
    model = tiny(sharp=1.5)
    exact = np.array([exact_nats(model, s) for s in range(len(sentences()))])
    assert np.abs(scored(model, 4000).bound_S - exact).max() < 0.05


def test_the_bound_is_tighter_on_average_the_more_samples_it_takes() -> None:
    model = tiny(sharp=4.0)
    means = [np.mean([scored(model, k, seed=seed).bound_S.sum() for seed in range(80)]) for k in (1, 4, 16, 64)]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[-1] > 0.5


def test_the_bound_of_one_sample_is_that_samples_elbo() -> None:
    model = tiny(sharp=2.0)
    batch = sentences().batch(np.arange(len(sentences())))
    with torch.no_grad():
        posterior = model.encode(batch.targets_BT)
    found = np.mean([scored(model, 1, seed=seed).bound_S for seed in range(600)], 0)
    elbo = np.mean([s.reconstruction_S + s.kl_S for s in (scored(model, 1, seed=seed) for seed in range(600))], 0)
    assert np.abs(found - elbo).max() < 0.4
    assert posterior.mean_BZ.shape == (len(sentences()), 2)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 500])
def test_scores_do_not_depend_on_how_many_rows_are_read_at_once(batch_size: int) -> None:
    model = tiny()
    whole, cut = scored(model, 9), scored(model, 9, batch_size=batch_size)
    for name in ("reconstruction_S", "kl_S", "bound_S", "mean_SZ", "log_var_SZ"):
        assert np.allclose(getattr(whole, name), getattr(cut, name), atol=1e-5), name


def test_scoring_uses_no_global_random_numbers_and_leaves_the_mode() -> None:
    model = tiny().train()
    torch.manual_seed(5)
    first = scored(model, 3)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert model.training
    torch.manual_seed(6)
    assert np.array_equal(first.bound_S, scored(model, 3).bound_S)


def test_without_latent_units_every_bound_is_the_likelihood_of_an_lstm() -> None:
    model = tiny(d_latent=0)
    lstm = Recurrent(RecurrentConfig(d_embed=6, num_layers=1), VOCAB, seed=3).eval()
    names = {"embedding.weight": "embedding.weight", "head.weight": "head.weight", "head.bias": "head.bias"}
    names |= {f"decoder.{n}_l0": f"layers.0.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    lstm.load_state_dict({names[name]: value for name, value in model.state_dict().items()})
    segments = Segments.ending_with(TOKENS == EOS, EOS)
    nats_N = score(lstm, TOKENS, unbroken(segments), seq_len=64, batch_size=2, device=CPU).nats_N
    per_sentence = np.add.reduceat(nats_N.astype(np.float64), segments.begins_S)
    found = scored(model, 10)
    assert np.allclose(found.bound_S, per_sentence, atol=1e-4)
    assert np.allclose(found.reconstruction_S, per_sentence, atol=1e-4)
    assert not found.kl_S.any()
    assert (found.active_units, found.mutual_information(1)) == (0, 0.0)


def test_a_decoder_that_ignores_the_latent_vector_has_the_likelihood_itself_under_the_prior_as_posterior() -> None:
    model = tiny()
    with torch.no_grad():
        for part in (model.initial, model.skip, model.posterior):
            assert part is not None
            for p in part.parameters():
                p.zero_()
        model.decoder.weight_ih_l0[:, 6:] = 0.0  # type: ignore[operator]
    plain = tiny(d_latent=0)
    state = {n: v for n, v in model.state_dict().items() if n in plain.state_dict()}
    state["decoder.weight_ih_l0"] = state["decoder.weight_ih_l0"][:, :6]
    plain.load_state_dict(state)
    assert np.allclose(scored(model, 5).bound_S, scored(plain, 1).bound_S, atol=1e-5)


def test_units_are_active_where_the_posterior_mean_varies() -> None:
    mean = np.zeros((100, 3))
    mean[:, 0] = np.linspace(-1, 1, 100)
    mean[:, 1] = 7.0
    zeros = np.zeros(100)
    scores = LatentScores(zeros, zeros, zeros, mean, np.zeros((100, 3)), np.ones(100, np.int64))
    assert scores.active_units == 1


def test_mutual_information_is_the_log_of_the_number_of_sentences_that_the_posteriors_tell_apart() -> None:
    def information(mean: np.ndarray, log_var: float) -> float:
        log_vars = np.full(mean.shape, log_var)
        kl = (0.5 * (mean**2 + np.exp(log_vars) - log_vars - 1)).sum(1)
        zeros = np.zeros(len(mean))
        return LatentScores(zeros, kl, zeros, mean, log_vars, np.ones(len(mean), np.int64)).mutual_information(1)

    apart = np.arange(40.0)[:, None]
    assert information(apart, -12.0) == pytest.approx(math.log(40), abs=0.15)
    two = np.repeat([-1.0, 1.0], 400)[:, None]
    assert information(two, -6.0) == pytest.approx(math.log(2), abs=0.08)
    assert information(np.zeros((500, 2)), 0.0) == pytest.approx(0.0, abs=1e-9)


def test_padding_changes_neither_posterior_nor_words() -> None:
    model = tiny()
    batch = sentences().batch(np.arange(len(sentences())))
    together = model.encode(batch.targets_BT)
    for s in range(len(sentences())):
        alone = model.encode(sentences().batch(np.array([s])).targets_BT)
        assert torch.allclose(alone.mean_BZ[0], together.mean_BZ[s], atol=1e-6)
        assert torch.allclose(alone.log_var_BZ[0], together.log_var_BZ[s], atol=1e-6)


def test_stepwise_decoding_with_the_state_is_one_whole_forward() -> None:
    model = tiny()
    latent = torch.tensor([[1.0, -2.0], [0.3, 0.1]])
    tokens = torch.tensor([[0, 3, 1, 4], [0, 5, 5, 2]])
    whole, _ = model(tokens, model.start(latent))
    state, pieces = model.start(latent), []
    for position in range(4):
        hidden, state = model(tokens[:, position : position + 1], state)
        pieces.append(hidden)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-6)
    given, _ = GivenLatent(model, latent[1])(tokens[1:])
    assert torch.allclose(given, whole[1:], atol=1e-6)
    swapped, _ = model(tokens, model.start(latent).select(torch.tensor([1, 0])))
    assert not torch.allclose(swapped, whole)


def test_no_state_is_the_centre_of_the_prior() -> None:
    model = tiny()
    tokens = torch.tensor([[0, 3, 1]])
    assert torch.equal(model(tokens)[0], model(tokens, model.start(torch.zeros(1, 2)))[0])


def test_word_dropout_hides_single_words_from_the_decoder_and_only_in_training() -> None:
    model = tiny(dropout_word=0.5, dropout_input=0.0, dropout_output=0.0)
    x_TBD = torch.ones(200, 10, 6)
    dropped = model._without_words(x_TBD)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    assert bool((dropped.amin(-1) == dropped.amax(-1)).all())
    assert float(dropped.mean()) == pytest.approx(0.5, abs=0.05)
    tokens = torch.tensor([[0, 3, 1, 4, 2, 6]])
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_in_training_the_output_before_its_dropout_comes_along_for_tar() -> None:
    model = tiny(dropout_input=0.0, dropout_output=0.5).train()
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 3, 1, 4, 2, 6], [0, 5, 5, 2, 1, 3]])
    dropped_BTD, state = model(tokens, model.start(torch.ones(2, 2)))
    assert state.undropped_BTD is not None
    kept = dropped_BTD != 0
    assert torch.allclose(dropped_BTD[kept], 2.0 * state.undropped_BTD[kept])
    assert 0 < int(kept.sum()) < kept.numel()
    assert bool((state.undropped_BTD != 0).all())
    assert state.detach().undropped_BTD is None
    assert model.eval()(tokens)[1].undropped_BTD is None


def test_the_weight_of_the_kl_grows_as_configured() -> None:
    linear = VaeObjectiveConfig(beta=2.0, anneal_share=0.5)
    assert [linear.weight(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 1.0, 2.0, 2.0]
    cyclical = VaeObjectiveConfig(anneal=Anneal.cyclical, cycles=2, anneal_share=0.5)
    assert [cyclical.weight(p) for p in (0.0, 0.125, 0.25, 0.49, 0.5, 0.625)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    thirds = VaeObjectiveConfig(anneal=Anneal.cyclical, cycles=3, anneal_share=0.5)
    assert [thirds.weight(Horizon(1 / n).progress(n // 3)) for n in range(3, 300, 3)] == [0.0] * 99
    assert VaeObjectiveConfig(anneal=Anneal.none).weight(0.0) == 1.0
    after = VaeObjectiveConfig(plain_share=0.5, anneal_share=0.5)
    assert [after.is_plain(p) for p in (0.0, 0.49, 0.5, 1.0)] == [True, True, False, False]
    assert [after.weight(p) for p in (0.0, 0.5, 0.625, 0.75, 1.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_all_wrong_values_are_named_at_once() -> None:
    wrong = r"objective\.beta=-1.*anneal_share=0.*target_nats=-1.*objective\.plain_share=1.*objective\.num_samples=0"
    with pytest.raises(ConfigError, match=wrong):
        VaeObjectiveConfig(beta=-1, anneal_share=0, target_nats=-1, plain_share=1, num_samples=0)
    with pytest.raises(ConfigError, match=r"model\.d_latent=-1.*model\.dropout_word=1"):
        VaeLstmConfig(d_latent=-1, dropout_word=1.0)


def test_a_decoder_told_to_ignore_its_latent_vector_does_and_can_learn_to_listen() -> None:
    model = tiny()
    batch = sentences().batch(np.arange(3))
    z_BZ = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    model.ignore_latent()
    assert torch.equal(model(batch.inputs_BT, model.start(z_BZ))[0], model(batch.inputs_BT)[0])
    hidden, _ = model(batch.inputs_BT, model.start(z_BZ))
    hidden.square().sum().backward()
    assert model.skip is not None
    assert model.initial is not None
    for listens in (model.skip.weight, model.initial.weight, model.decoder.weight_ih_l0[:, 6:]):
        assert not listens.any()
    assert all(bool(w.grad is not None and w.grad.any()) for w in (model.skip.weight, model.initial.weight))
    assert model.decoder.weight_ih_l0.grad is not None
    assert bool(model.decoder.weight_ih_l0.grad[:, 6:].any())


def test_the_encoder_reads_only_real_tokens() -> None:
    model = tiny()
    targets: Tensor = torch.tensor([[3, 1, EOS, IGNORE, IGNORE]])
    assert torch.allclose(model.encode(targets).mean_BZ, model.encode(targets[:, :3]).mean_BZ, atol=1e-6)
