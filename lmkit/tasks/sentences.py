"""What the tasks on sentences share: each line of a corpus is learnt alone."""

from __future__ import annotations

import hashlib

from lmkit.config.objectives import GanObjectiveConfig, VaeObjectiveConfig
from lmkit.config.softmax import SoftmaxConfig
from lmkit.config.start import InitConfig
from lmkit.config.training import TrainConfig
from lmkit.data.prepared import PreparedData, Split
from lmkit.data.sentences import POOL_BATCHES, SentenceBatches, Sentences
from lmkit.initialise import initialise_from_text, token_counts
from lmkit.models.base import LanguageModel
from lmkit.objectives import build_objective
from lmkit.tasks.base import Task
from lmkit.tokenizers import Tokenizer
from lmkit.tokenizers.lines import line_enders


def sentences_of(split: Split, tokenizer: Tokenizer, longest: int | None = None) -> Sentences:
    """The lines of a split; see Sentences.of."""
    return Sentences.of(split.tokens, line_enders(tokenizer), tokenizer.eos_id, longest)


class SentenceTask(Task):
    """No state goes from one sentence to the next: its first token is predicted from eos, and the token that ends it is
    a target too. In training, sentences are cut after ``train.seq_len`` tokens."""

    config: VaeObjectiveConfig | GanObjectiveConfig
    pool_batches = POOL_BATCHES
    """As of ``SentenceBatches``."""

    def __init__(
        self,
        model: LanguageModel,
        prepared: PreparedData,
        train: TrainConfig,
        softmax: SoftmaxConfig,
        config: VaeObjectiveConfig | GanObjectiveConfig,
        *,
        seed: int,
        init: InitConfig | None = None,
    ) -> None:
        """init: what ``begin`` takes from the text; None: the parameters stay as they are."""
        self.model, self.prepared, self.config, self.init, self.seed = model, prepared, config, init, seed
        self.tokenizer, self.data_name = prepared.tokenizer, prepared.name
        # another one than that of the text as a stream, since losses of the two cannot be compared
        self.data_digest = hashlib.sha256(f"{prepared.key}/sentences/{config.name}".encode()).hexdigest()
        self.counts_V = token_counts(prepared.splits["train"].tokens, prepared.tokenizer.vocab_size)
        self.objective = build_objective(softmax, self.counts_V)
        first_part = config.plain_share if isinstance(config, VaeObjectiveConfig) else config.pretrain_share
        self.pace_changes_at = (*self.objective.changes_at, first_part)
        whole = sentences_of(prepared.splits["train"], prepared.tokenizer)
        learnt = sentences_of(prepared.splits["train"], prepared.tokenizer, train.seq_len)
        self.longest, self.num_sentences = train.seq_len, len(whole)
        self.num_cut = int((whole.lengths_S > train.seq_len).sum())
        self.num_left_out = int(whole.lengths_S.sum() - learnt.lengths_S.sum())
        """Tokens of train that stand behind ``longest`` tokens of their sentence."""
        self.batches = SentenceBatches(learnt, train.batch_size, seed, pool_batches=self.pool_batches)
        self.num_targets = int(learnt.lengths_S.sum())
        self.valid = sentences_of(prepared.splits["valid"], prepared.tokenizer)

    @property
    def decoder(self) -> LanguageModel:
        """The part of the model whose embeddings and output layer may begin with what the text says."""
        return self.model

    def cut_note(self) -> str | None:
        """What is to be said of sentences of train that were cut; None: there are none."""
        if not self.num_cut:
            return None
        return (
            f"train: {self.num_cut} of {self.num_sentences} sentences (lines) were cut after"
            f" train.seq_len={self.longest} tokens: {self.num_left_out} tokens are not learnt"
        )

    def begin(self) -> None:
        if self.init is not None:
            tokens = self.prepared.splits["train"].tokens
            initialise_from_text(self.decoder, self.init, tokens, self.counts_V, seed=self.seed)
