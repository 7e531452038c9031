"""The adversarial losses reach the right parameters, soft samples are samples, and BLEU is that of nltk."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from lmkit.config.machine import Precision
from lmkit.config.model import RelganConfig
from lmkit.config.objectives import GanObjectiveConfig
from lmkit.data.sentences import Sentences
from lmkit.device import Device
from lmkit.errors import ConfigError, DataError, ResourceError
from lmkit.evaluation.bleu import bleu, self_bleu
from lmkit.models.gan import Relgan
from lmkit.tasks.gan import adversarial_losses, draw_sentences

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
VOCAB, EOS = 9, 0
TOKENS = np.array([3, 1, 4, 0, 2, 0, 5, 6, 1, 1, 2, 0, 6, 3, 7, 8, 8, 8, 0, 4, 4, 0], dtype=np.uint8)


def tiny() -> Relgan:
    config = RelganConfig(d_embed=8, num_representations=3, d_representation=2, num_filters=12)
    return Relgan(config, VOCAB, seed=1)


def batch() -> object:
    sentences = Sentences.of(TOKENS, np.arange(VOCAB) == EOS, EOS)
    return sentences.batch(np.arange(len(sentences)))


def reached(model: Relgan, loss: torch.Tensor) -> set[str]:
    """Names of the parameters that a loss has a gradient for."""
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_each_adversarial_loss_reaches_its_own_part_only() -> None:
    model = tiny()
    for index, part in enumerate(("generator.", "discriminator.")):
        torch.manual_seed(0)
        losses = adversarial_losses(model, batch(), 5, EOS, 1.5)  # type: ignore[arg-type]
        names = reached(model, losses[index])
        assert names
        assert all(name.startswith(part) for name in names)


def test_a_real_sentence_is_judged_as_wide_as_a_drawn_one() -> None:
    """Else the filters would meet what is behind a sentence's end in drawn ones, and in no real one as long as its
    batch."""
    model, widths = tiny(), list[int]()

    def note(_: object, args: tuple[torch.Tensor]) -> None:
        widths.append(args[0].shape[1])

    model.discriminator.register_forward_pre_hook(note)
    for length in (3, 12):
        adversarial_losses(model, batch(), length, EOS, 1.5)  # type: ignore[arg-type]
    assert widths == [3] * 4 + [12] * 4


def test_one_backward_pass_gives_both_gradients() -> None:
    model, grads = tiny(), {}
    for which in ("generator", "discriminator", "both"):
        torch.manual_seed(0)
        generator, discriminator = adversarial_losses(model, batch(), 5, EOS, 1.5)  # type: ignore[arg-type]
        model.zero_grad(set_to_none=True)
        loss = {"generator": generator, "discriminator": discriminator, "both": generator + discriminator}[which]
        loss.backward()  # type: ignore[no-untyped-call]
        grads[which] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads["both"].keys() == grads["generator"].keys() | grads["discriminator"].keys()
    for name, grad in grads["both"].items():
        assert torch.allclose(grad, grads[name.partition(".")[0]][name], atol=1e-7)


def test_a_step_against_the_gradient_fools_the_discriminator_more() -> None:
    model = tiny()
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        torch.manual_seed(0)
        generator, _ = adversarial_losses(model, batch(), 6, EOS, 2.0)  # type: ignore[arg-type]
        optimizer.zero_grad()
        generator.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(generator.detach()))
    assert losses[-1] < losses[0] - 0.05


def test_the_discriminator_learns_to_tell_real_from_drawn() -> None:
    model = tiny()
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-2)
    for step in range(120):
        torch.manual_seed(step)
        _, discriminator = adversarial_losses(model, batch(), 7, EOS, 50.0)  # type: ignore[arg-type]
        optimizer.zero_grad()
        discriminator.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(discriminator.detach()) < 0.4


def test_soft_sentences_are_distributions_up_to_their_end_and_zero_behind_it() -> None:
    model = tiny().eval()
    torch.manual_seed(1)
    soft_BTV = model.soft_sentences(50, 12, EOS, 30.0)
    sums_BT = soft_BTV.sum(-1)
    for row, sums in zip(soft_BTV, sums_BT, strict=True):
        ends = (row.argmax(-1) == EOS) & (sums > 0.5)
        length = int(ends.int().argmax()) + 1 if ends.any() else 12
        assert torch.allclose(sums[:length], torch.ones(length), atol=1e-5)
        assert not sums[length:].any()


def test_sharp_soft_sentences_begin_with_words_as_often_as_the_generator_says() -> None:
    model = tiny().eval()
    torch.manual_seed(2)
    first = model.soft_sentences(20_000, 1, EOS, 1000.0)[:, 0].argmax(-1)
    share_V = torch.bincount(first, minlength=VOCAB) / len(first)
    hidden, _ = model(torch.tensor([[EOS]]))
    assert torch.allclose(share_V, torch.softmax(model.head.logits(hidden[0]), -1)[0], atol=0.015)


def test_drawn_sentences_end_with_eos_depend_on_the_seed_and_leave_the_global_generator() -> None:
    model = tiny().train()
    torch.manual_seed(3)
    first = draw_sentences(model, 300, eos_id=EOS, seed=1, device=CPU)
    after = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(2))
    assert model.training
    assert len(first) == 300
    assert all(len(ids) == 100 or ids[-1] == EOS for ids in first)
    assert all(EOS not in ids[:-1] for ids in first)
    again = draw_sentences(model, 300, eos_id=EOS, seed=1, device=CPU)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = draw_sentences(model, 300, eos_id=EOS, seed=2, device=CPU)
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_sentence_ends_with_whichever_type_ends_one() -> None:
    model, ends_V = tiny().eval(), torch.zeros(VOCAB, dtype=torch.bool)
    ends_V[[EOS, 4, 7]] = True
    drawn = draw_sentences(model, 300, eos_id=EOS, seed=1, device=CPU, ends_V=ends_V)
    assert all(len(ids) == 100 or ends_V[ids[-1]] for ids in drawn)
    assert not any(ends_V[ids[:-1]].any() for ids in drawn)
    assert {int(ids[-1]) for ids in drawn} >= {EOS, 4, 7}
    torch.manual_seed(1)
    for row in model.soft_sentences(50, 12, EOS, 30.0, ends_V):
        ends = ends_V[row.argmax(-1)] & (row.sum(-1) > 0.5)
        length = int(ends.int().argmax()) + 1 if ends.any() else 12
        assert not row[length:].any()
        assert row[:length].sum(-1).min() > 0.99


def test_the_gumbel_softmax_sharpens_from_one_to_the_end() -> None:
    config = GanObjectiveConfig(pretrain_share=0.5, sharpness=100.0)
    assert [config.is_adversarial(p) for p in (0.0, 0.49, 0.5, 1.0)] == [False, False, True, True]
    assert [config.inverse_temperature(p) for p in (0.2, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 10, 100])
    assert not GanObjectiveConfig(pretrain_share=1.0).is_adversarial(0.999)
    wrong = r"objective\.pretrain_share=2.*objective\.generator_lr=0.*objective\.discriminator_lr=-1.*sharpness=0"
    with pytest.raises(ConfigError, match=wrong):
        GanObjectiveConfig(pretrain_share=2, generator_lr=0, discriminator_lr=-1, sharpness=0)


def test_without_nltk_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.translate.bleu_score", None)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ResourceError, match=r"lmkit\[gan\]"):
        bleu([["a"]], [["a"]])


@pytest.mark.extra("gan")
def test_bleu_is_one_for_a_copy_and_self_bleu_for_samples_that_are_all_the_same() -> None:
    pytest.importorskip("nltk")
    text = ["the", "cat", "sat", "on", "the", "mat"]
    other = ["a", "dog", "ran", "under", "some", "tree"]
    assert bleu([text], [other, text]) == pytest.approx(dict.fromkeys((2, 3, 4, 5), 1.0))
    assert self_bleu([text, text, text])[5] == pytest.approx(1.0)
    assert self_bleu([text, other])[2] < 0.1
    with pytest.raises(DataError, match="at least two samples"):
        self_bleu([text])
    with pytest.raises(DataError, match="needs samples and references"):
        bleu([], [text])


def test_under_autocast_every_parameter_of_the_discriminator_learns() -> None:
    """The first pass over real sentences is without gradient; casts of weights made there must not be used again."""
    grads = []
    for enabled in (False, True):
        model = tiny()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = adversarial_losses(model, batch(), 5, EOS, 1.5)  # type: ignore[arg-type]
        grads.append(reached(model, losses[1]))
    assert grads[0] == grads[1]
