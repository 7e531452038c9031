"""Adversarial sentences: maximum likelihood first, then a generator against a discriminator. objective=gan.

Losses of the second part, with logits D and one real sentence beside each drawn one (Jolicoeur-Martineau 2018):
discriminator -log s(D(real) - D(drawn)), generator -log s(D(drawn) - D(real)), s the logistic function. Both in one
backward pass: the generator's loss sees constant parameters of the discriminator, the discriminator's constant samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lmkit.config.generation import SamplingConfig
from lmkit.config.objectives import GanObjectiveConfig
from lmkit.config.training import TrainConfig
from lmkit.console import format_number
from lmkit.data.batches import Batch, to_device
from lmkit.data.prepared import PreparedData
from lmkit.device import Device
from lmkit.evaluation.baselines import kn5_nats
from lmkit.evaluation.plan import Windows
from lmkit.evaluation.scoring import exp, perplexity
from lmkit.models.base import IGNORE, LanguageModel, State
from lmkit.models.gan import Relgan
from lmkit.rng import derive_key
from lmkit.sampling import sample
from lmkit.tasks.base import Validation
from lmkit.tasks.sentences import SentenceTask
from lmkit.tokenizers.lines import line_enders

LONGEST_SAMPLE = 100
"""Tokens after which a sampled sentence is cut."""
NUM_COUNTED = 1_000_000
"""Tokens of train and of valid that are looked at for the scores of samples."""


class AdversarialSentences(SentenceTask):
    """Trains a Relgan on sentences, each from an empty state; validated by what its sentences are worth.

    The loss that decides about the best checkpoint is the mean of two numbers, in nats per token: how surprising a
    5-gram model of train finds drawn sentences (quality), and how surprising a 5-gram model of drawn sentences finds
    valid (quality and diversity; "reverse LM score", Cifka et al. 2018).
    """

    model: Relgan
    config: GanObjectiveConfig
    pool_batches = 1  # in batches of one length a real sentence and a drawn one could be told apart by it

    @property
    def decoder(self) -> LanguageModel:
        return self.model.generator

    @cached_property
    def ends_V(self) -> Tensor:
        """Which types end a sentence: where eos ends documents, none that is learnt has one."""
        ends_V = line_enders(self.tokenizer)
        ends_V[self.tokenizer.eos_id] = True
        return torch.from_numpy(ends_V)

    def loss_scale(self, batch: Batch, progress: float) -> float:
        """The losses of the adversarial part are means over sentences, however many tokens these have."""
        return batch.num_targets / batch.num_rows if self.config.is_adversarial(progress) else 1.0

    def lr_scale(self, batch: Batch, progress: float) -> float:
        return self.config.generator_lr if self.config.is_adversarial(progress) else 1.0

    def lr_factors(self) -> dict[str, float]:
        """The discriminator only learns in the adversarial part, where ``lr_scale`` is meant for the generator."""
        factor = self.config.discriminator_lr / self.config.generator_lr
        names = (name for name, _ in self.model.named_parameters() if name.startswith("discriminator."))
        return {} if factor == 1.0 else dict.fromkeys(names, factor)

    def loss(
        self, forward: nn.Module, batch: Batch, state: State | None, progress: float
    ) -> tuple[Tensor, State | None]:
        """Nats of all targets; in the adversarial part the two losses of all sentences."""
        if not self.config.is_adversarial(progress):
            hidden_BTD, read = forward(batch.inputs_BT)
            return self.objective.at(progress).of_batch(self.model.head, hidden_BTD, read, batch.targets_BT), None
        generator, discriminator = adversarial_losses(
            self.model,
            batch,
            self.config.length,
            self.tokenizer.eos_id,
            self.config.inverse_temperature(progress),
            to_device(self.ends_V, batch.inputs_BT.device),
        )
        return (generator + discriminator) * batch.num_rows, None

    def length_limit(self, train: TrainConfig) -> tuple[str, str]:
        both = f"train.seq_len={train.seq_len} and objective.length={self.config.length}"
        return "train.seq_len or objective.length", both

    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        likelihood = self._likelihood(device, progress)
        drawn = draw_sentences(
            self.model,
            self.config.num_samples,
            eos_id=self.tokenizer.eos_id,
            seed=self.seed,
            device=device,
            ends_V=self.ends_V,
        )
        scores = lm_scores(drawn, self.prepared)
        word_ppl = exp(likelihood / self.prepared.splits["valid"].num_words)
        numbers = {**scores, "word_ppl": word_ppl, "num_samples": self.config.num_samples}
        return Validation(
            loss=(scores["lm_score"] + scores["reverse_lm_score"]) / 2,
            metrics={f"valid_{name}": value for name, value in numbers.items()},
            text=f"LM score {scores['lm_score']:.3f}  reverse LM score {scores['reverse_lm_score']:.3f} nats per token"
            f"  valid ppl {format_number(word_ppl)} per word",
            result={"dataset": self.prepared.name, "split": "valid", "protocol": "sentence", **numbers},
            rows=[
                (f"LM score of {self.config.num_samples} sentences", f"{scores['lm_score']:.4f} nats per token"),
                ("reverse LM score on valid", f"{scores['reverse_lm_score']:.4f} nats per token"),
                ("valid perplexity per word, sentence protocol", format_number(word_ppl)),
            ],
        )

    def _likelihood(self, device: Device, progress: Callable[[int], None]) -> float:
        """-log p of valid, each sentence from an empty state."""
        valid = self.valid
        windows = Windows(valid.begins_S, valid.begins_S, valid.ends_S, np.full(len(valid), valid.eos_id))
        tally = perplexity(
            self.model,
            valid.tokens,
            windows,
            seq_len=int(valid.lengths_S.max()),
            batch_size=64,
            device=device,
            progress=progress,
        )
        return tally.nats


def adversarial_losses(
    model: Relgan, batch: Batch, length: int, eos_id: int, inverse_temperature: float, ends_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean loss of the generator, whose gradient reaches it alone, and that of the discriminator, likewise.

    ends_V: as of ``Relgan.soft_sentences``.
    """
    judge = model.discriminator
    constants = {name: p.detach() for name, p in judge.named_parameters()}
    drawn_BTV = model.soft_sentences(batch.num_rows, length, eos_id, inverse_temperature, ends_V)
    targets_BT = batch.targets_BT[:, :length]
    targets_BT = F.pad(targets_BT, (0, length - targets_BT.shape[1]), value=IGNORE)  # as wide as what is drawn
    real_BT1 = (targets_BT != IGNORE)[:, :, None]
    real_BTE = judge.embedding(targets_BT.clamp(min=0)) * real_BT1
    fake_BTE = drawn_BTV @ constants["embedding.weight"]
    for_generator = torch.func.functional_call(judge, constants, (fake_BTE,))
    with torch.no_grad():
        real_logits = judge(real_BTE)
    generator = -F.logsigmoid(for_generator - real_logits).mean()
    fake_for_judge = judge(drawn_BTV.detach() @ judge.embedding.weight)
    discriminator = -F.logsigmoid(judge(real_BTE) - fake_for_judge).mean()
    return generator, discriminator


@torch.inference_mode()
def draw_sentences(
    model: LanguageModel,
    num_sentences: int,
    *,
    eos_id: int,
    seed: int,
    device: Device,
    sampling: SamplingConfig | None = None,
    ends_V: Tensor | None = None,
) -> list[NDArray[np.int64]]:
    """Sentences sampled from a language model, each from eos to the token that ends it, at most 100 tokens.

    A sentence depends on the seed and its number, and on how many are drawn at once (256).
    ends_V: bool, which types end one; None: eos alone.
    """
    was_training, found = model.training, []
    model.eval()
    for first in range(0, num_sentences, 256):
        number = min(256, num_sentences - first)
        generator = torch.Generator().manual_seed(derive_key(seed, "generate", "sentences", first))
        tokens_B1 = torch.full((number, 1), eos_id, device=device.torch_device)
        drawn, state, alive_B = [], None, torch.ones(number, dtype=torch.bool)
        for _ in range(LONGEST_SAMPLE):
            with device.autocast():
                hidden_BTD, state = model(tokens_B1, state, use_state=True)
                logits_BV = model.head.logits(hidden_BTD[:, -1])
            uniforms_B = torch.rand(number, dtype=torch.float64, generator=generator)
            next_B = sample(logits_BV.cpu(), sampling or SamplingConfig(), uniforms_B)
            drawn.append(torch.where(alive_B, next_B, -1))
            alive_B &= next_B != eos_id if ends_V is None else ~ends_V[next_B]
            if not alive_B.any():
                break
            tokens_B1 = next_B[:, None].to(device.torch_device)
        found += [row[row >= 0].numpy() for row in torch.stack(drawn, 1)]
    model.train(was_training)
    return found


def lm_scores(drawn: list[NDArray[np.int64]], prepared: PreparedData) -> dict[str, float]:
    """``lm_score``: nats per token of drawn sentences under a 5-gram model of train; ``reverse_lm_score``: of valid
    under a 5-gram model of the drawn ones. The lower, the better."""
    tokenizer, train = prepared.tokenizer, prepared.splits["train"].tokens[:NUM_COUNTED]
    samples, valid = np.concatenate(drawn), prepared.splits["valid"].tokens[:NUM_COUNTED]
    forward = kn5_nats(train, samples, tokenizer.eos_id, tokenizer.vocab_size)
    reverse = kn5_nats(samples, valid, tokenizer.eos_id, tokenizer.vocab_size)
    return {"lm_score": float(forward.mean()), "reverse_lm_score": float(reverse.mean())}
