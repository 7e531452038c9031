"""What runs on a card, without one: the device is torch's ``meta``, whose tensors have shapes and no numbers.

Each operation is looked at before it is made. One that takes tensors of the device and of the host at once fails, as it
would on a card, and so does one that makes float64, which Apple's lack. What reads numbers of the device is answered
with zeros, and noted, for there the host would wait, and so is a copy to the device that is not told to let it go on.
What only kernels for cards can show (their results, speed, half precision, compiled code) is not seen.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmkit import cli, device, revocable
from lmkit.arguments import parse
from lmkit.commands import training
from lmkit.composing import compose
from lmkit.config.commands import PretrainConfig
from lmkit.config.machine import DeviceConfig, Precision
from lmkit.device import Device
from lmkit.distributed import World
from lmkit.heads import SoftmaxHead
from lmkit.store import staging
from lmkit.train import StepReport, Trainer

META = torch.device("meta")
aten: Any = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy, aten._foreach_copy_)


class Card(TorchDispatchMode):
    """Context in which ``meta`` is a card."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """Where the host read numbers of the device, or gave it some and waited, as lines of the program."""
        self.all_of: Tensor | None = None
        """The newest answer whether something holds of all elements, which is read as true: all numbers are finite."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        with self:  # in inference mode operations come here that are made of others
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(t.is_meta for t in tensors):
            if packet is aten._to_copy and kwargs.get("device") == META and not kwargs.get("non_blocking"):
                self._note_wait()  # until the copy is made, which comes after all that the card was given before
            return func(*args, **kwargs)
        if packet is aten._local_scalar_dense:
            self._note_wait()
            return args[0] is self.all_of or torch.zeros((), dtype=args[0].dtype).item()
        if packet is aten._to_copy and kwargs.get("device", META).type == "cpu":
            self._note_wait()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if packet in (aten.copy_, aten._foreach_copy_):
            pairs = list(zip(args[0], args[1], strict=True)) if packet is aten._foreach_copy_ else [args[:2]]
            if any(source.is_meta and not copy.is_meta for copy, source in pairs):
                self._note_wait()
                for copy, _ in pairs:
                    copy.zero_()
                return args[0] if packet is aten.copy_ else None
        if packet is aten.nonzero:
            return self._places(args[0])
        if packet is aten.index:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            places = [self._places(mask) for mask in masks]
            args = (args[0], [place for p in places for place in p.T] or args[1])
            assert len(masks) in (0, len(args[1])), "masks beside other indices are not played"
        if packet not in COPIES:
            hosts = [tuple(t.shape) for t in tensors if not t.is_meta and t.ndim > 0]  # a card takes single numbers
            assert not hosts, f"{func} takes tensors of the host beside those of the card: {hosts}"
        result = func(*args, **kwargs)
        if packet is aten.all:
            self.all_of = result
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(t.is_meta and t.dtype is torch.float64 for t in made):  # on Apple's, tokens are drawn on the host
            where = innermost()
            assert where.startswith(("lmkit.sampling:", "lmkit.generate:")), f"{func} makes float64 in {where}"
        return result

    def _places(self, mask: Tensor) -> Tensor:
        """All places, for the host has to wait for their number."""
        self._note_wait()
        return torch.zeros(mask.numel(), mask.ndim, dtype=torch.int64, device=META)

    def _note_wait(self) -> None:
        self.waits.append(innermost())


def innermost() -> str:
    """Module and line of the innermost call that is the program's own."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_globals["__name__"].startswith("lmkit."):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_globals['__name__']}:{frame.f_lineno}"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """``device=cuda`` is ``meta`` there."""

    def resolve(config: DeviceConfig, world: World) -> Device:
        return Device(META, Precision.fp32, compile=False, fused=False, description="meta")

    monkeypatch.setattr(device, "_resolve_cuda", resolve)
    monkeypatch.setattr(training, "pays_to_read_late", lambda device: True)
    monkeypatch.setattr(revocable, "read_later", lambda flag: lambda: False)  # on a card it waits for an older step
    monkeypatch.setattr(staging, "_tied_names", same_objects)
    monkeypatch.setattr(torch, "autocast", autocast)
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_enabled(kind))
    with Card() as mode:
        yield mode


def autocast(kind: str, **options: Any) -> contextlib.AbstractContextManager[object]:
    """torch.autocast, which knows no ``meta``."""
    assert kind != "meta" or not options.get("enabled", True)
    return contextlib.nullcontext() if kind == "meta" else torch.amp.autocast(kind, **options)


def same_objects(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> the first name of the same tensor; ``meta`` has no addresses."""
    first: dict[int, str] = {}
    return {n: first[id(t)] for n, t in sorted(tensors.items()) if first.setdefault(id(t), n) != n}


@pytest.fixture
def waits_of_steps(card: Card, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Where the host waited within each update."""
    found: list[list[str]] = []
    train_step: Callable[..., StepReport] = Trainer.train_step

    def watched(trainer: Trainer, batch: Any) -> StepReport:
        before = len(card.waits)
        report = train_step(trainer, batch)
        found.append(card.waits[before:])
        return report

    monkeypatch.setattr(Trainer, "train_step", watched)
    return found


@pytest.fixture
def plans_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether cuDNN, which makes a plan for each shape, might compute the attention of each update."""
    found: list[bool] = []
    train_step: Callable[..., StepReport] = Trainer.train_step

    def watched(trainer: Trainer, batch: Any) -> StepReport:
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return train_step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", watched)
    return found


def run(*words: str) -> None:
    assert cli.main([*words, "debug=true"]) == 0


TRANSFORMER = ["model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.context=16"]
DROPOUT = [f"model.dropout_{where}=0.2" for where in ("embed", "input", "hidden", "output", "recurrent")]
RECURRENT = ["model.d_embed=16", "model.d_hidden=16", *DROPOUT]
MODELS = {
    "tiny": ["model=tiny", *TRANSFORMER, "model.num_kv_heads=1", "model.dropout=0.1", "model.attention_dropout=0.1"],
    "gpt2": ["model=gpt2", *TRANSFORMER, "model.dropout_embed=0.1", "model.dropout_locked=true", "model.drop_path=0.1"],
    "vanilla": ["model=vanilla", *TRANSFORMER],
    "transformer_xl": ["model=transformer_xl", *TRANSFORMER],
    "lstm": ["model=lstm", *RECURRENT],
    "gru": ["model=gru", *RECURRENT],
    "awd_lstm": ["model=awd_lstm", *RECURRENT, "softmax=ar_tar", "train.average=nt_asgd"],
    "mogrifier": ["model=mogrifier", *RECURRENT],
    "sampled": ["model=lstm", *RECURRENT, "softmax=sampled", "softmax.num_frequent=20", "softmax.num_sampled=20"],
    "adaptive": [
        "model=tiny",
        *TRANSFORMER,
        "model.tie_embeddings=false",
        "softmax=adaptive",
        "softmax.cutoffs=[20,60]",
    ],
    "mixture": ["model=tiny", *TRANSFORMER, "model.num_softmaxes=2", "train.ema_decay=0.9"],
    "activations": ["model=tiny", *TRANSFORMER, "softmax=ar_tar", "train.nonfinite=skip", "train.spike_nats=3"],
    "smoothed": ["model=tiny", *TRANSFORMER, "softmax.label_smoothing=0.1", "optimizer=muon", "train.average=swa"],
}
SIZES_ON_CARD = {"sampled": 2, "adaptive": 4}
"""How often a step of two micro-batches waits to know how many candidates, or targets of a cluster, there are."""
PROVED = ["tiny", "lstm", "adaptive", "mixture"]
"""One of each kind of state and of output layer: those of the others have the same checks."""
OPTIMIZERS = ["sgd", "adagrad", "adadelta", "rmsprop", "adam", "nadam", "muon"]
STEPS = ["train.max_steps=4", "train.batch_size=4", "train.micro_batch_size=2", "eval.every_steps=2"]
SHORT = [*STEPS, "train.seq_len=6"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Little of it: every operation on the card is looked at, which takes time."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"the cat sat on mat {n}.\n" for n in range(40)), encoding="utf-8")
    return ["dataset=text", f"dataset.path={file}"]


@pytest.fixture(scope="module")
def base(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to finetune, of the CPU."""
    path = tmp_path_factory.mktemp("base") / "run"
    words = ["model=tiny", *TRANSFORMER, "model.context=64", "train.seq_len=12", "train.max_steps=1", "device=cpu"]
    run("pretrain", *text, "tokenizer=byte", *words, f"run.dir={path}")
    return path


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_trained_scored_and_continued_on_the_card(
    model: str, text: list[str], waits_of_steps: list[list[str]], tmp_path: Path
) -> None:
    name = f"run.dir={tmp_path / 'run'}"
    run("pretrain", *text, "tokenizer=byte", *MODELS[model], *SHORT, "device=cuda", name)
    assert len(waits_of_steps) == 4
    if model in SIZES_ON_CARD:
        assert [len(waits) for waits in waits_of_steps[2:]] == [SIZES_ON_CARD[model]] * 2, waits_of_steps
    else:
        assert waits_of_steps[2:] == [[], []], "once the optimizer has its state, no step waits for the card"
    proofs = f"checks={'true' if model in PROVED else 'false'}"
    run("eval-ppl", f"run={tmp_path / 'run'}", "device=cuda", f"output={tmp_path / 'scores.json'}", proofs)
    assert json.loads((tmp_path / "scores.json").read_text())
    if model == "tiny":
        run("eval-ppl", f"run={tmp_path / 'run'}", "device=cuda", "temperature=valid", "checks=false")
    run("generate", f"run={tmp_path / 'run'}", "device=cuda", "--prompt", "the cat", "-n", "5")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("model", MODELS)
def test_every_model_reads_a_text_in_pieces_on_the_card(model: str) -> None:
    words = ["dataset=text", "tokenizer=byte", *MODELS[model], "device=cuda"]  # as above, so that it is composed once
    config = OmegaConf.to_object(compose(parse("pretrain", words)))
    assert isinstance(config, PretrainConfig)
    built, state = config.model.build(90, seed=1).to(META), None
    for length in (5, 3, 1):
        tokens_BT = torch.zeros(2, length, dtype=torch.int64, device=META)
        hidden_BTD, state = built(tokens_BT, state, use_state=True)
        assert built.head.logits(hidden_BTD[:, -1]).shape == (2, 90)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_without_waiting(
    optimizer: str, text: list[str], waits_of_steps: list[list[str]], tmp_path: Path
) -> None:
    words = ["model=tiny", *TRANSFORMER, f"optimizer={optimizer}"]
    run("pretrain", *text, "tokenizer=byte", *words, *SHORT, "device=cuda", f"run.dir={tmp_path / 'run'}")
    assert waits_of_steps[2:] == [[], []]


class Strides(TorchDispatchMode):
    """Context that notes from row to row how many bytes there are in each matrix of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.row_bytes: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        if func.overloadpacket in (aten.mm, aten.addmm):
            matrices = [t for t in (*args, result) if isinstance(t, Tensor) and t.ndim == 2]
            self.row_bytes.update(max(t.stride()) * t.element_size() for t in matrices)
        return result


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_the_products_of_the_head_each_row_begins_at_a_multiple_of_16_bytes(dtype: torch.dtype) -> None:
    head = SoftmaxHead(nn.Parameter(torch.empty(50_257, 32, dtype=dtype, device=META)))
    hidden_ND = torch.empty(300, 32, dtype=dtype, device=META, requires_grad=True)
    with Strides() as strides:
        head.loss(hidden_ND, torch.zeros(300, dtype=torch.int64, device=META)).backward()  # type: ignore[no-untyped-call]
    assert strides.row_bytes
    assert {row_bytes % 16 for row_bytes in strides.row_bytes} == {0}
    assert head.weight.grad is not None
    assert head.weight.grad.shape == head.weight.shape


PAIR_MODELS = {
    "vae": ["model=vae_lstm", "objective=vae", "model.d_embed=16", "model.d_encoder=16", "model.d_latent=3"],
    "gan": [
        *("model=relgan", "objective=gan", "objective.pretrain_share=0.25"),
        *("objective.length=8", "objective.num_samples=20"),
    ],
}


@pytest.mark.parametrize("model", PAIR_MODELS)
def test_models_of_sentences_are_trained_scored_and_drawn_from_on_the_card(
    model: str, text: list[str], waits_of_steps: list[list[str]], tmp_path: Path
) -> None:
    words = ["tokenizer=word", *PAIR_MODELS[model], *SHORT, "device=cuda", f"run.dir={tmp_path / 'run'}"]
    run("pretrain", *text, *words)
    assert waits_of_steps[2:] == [[], []]
    run("eval-ppl", f"run={tmp_path / 'run'}", "device=cuda")
    run("generate", f"run={tmp_path / 'run'}", "device=cuda", "-n", "5")


ANSWERS = {"response": "yes", "chosen": "yes", "rejected": "no"}
ROWS = [
    {"text": f"film {n}", "label": "good" if n % 2 else "bad", "n": n, "prompt": f"is {n} odd?", **ANSWERS}
    for n in range(40)
]
TASKS = {
    "lm": ["task=lm", "task.replay=0.5", "train.seq_len=12"],
    "lora": ["task=lm", "adapter=lora", "adapter.rank=2", "train.seq_len=12"],
    "dora": ["task=lm", "adapter=dora", "adapter.rank=2", "train.seq_len=12"],
    "classify": ["task=classify"],
    "regress": ["task=regress", "task.text=text", "task.target=n"],
    "instruct": ["task=instruct", "train.seq_len=32"],
    "prefer": ["task=prefer", "train.seq_len=32"],
}


PADDED = ["classify", "regress", "instruct", "prefer"]
"""The tasks whose batches are each as long as its longest row."""


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_finetuned_on_the_card(
    task: str, text: list[str], base: Path, waits_of_steps: list[list[str]], plans_of_steps: list[bool], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    words = [*TASKS[task], *(text if TASKS[task][0] == "task=lm" else [f"task.data={data}"])]
    run("finetune", f"run={base}", *words, *STEPS, "device=cuda", f"run.dir={tmp_path / 'run'}")
    assert len(waits_of_steps) == 4
    assert waits_of_steps[2:] == [[], []]
    assert plans_of_steps == [task not in PADDED] * 4
    assert torch.backends.cuda.cudnn_sdp_enabled()
