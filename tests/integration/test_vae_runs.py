"""objective=vae from a raw file to numbers and sentences: learning, resuming, the three ways to write, and refusals."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import assert_same, signal_after, tensors_in

from lmkit import cli
from lmkit.commands import eval_ppl, generate, pretrain, replay
from lmkit.config.commands import EvalPplConfig, PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig, WordTokenizerConfig
from lmkit.config.evaluation import SentenceProtocolConfig, StreamProtocolConfig
from lmkit.config.generation import GenerateConfig, VaeGenerateConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import VaeLstmConfig
from lmkit.config.objectives import VaeObjectiveConfig
from lmkit.config.optimization import AdamwConfig
from lmkit.config.softmax import SampledSoftmaxConfig, SoftmaxConfig
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.errors import ConfigError, StoppedError
from lmkit.store.browse import read_summary
from lmkit.store.checkpoint import load_checkpoint
from lmkit.store.found import read_metrics
from lmkit.store.manifest import step_directory

CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
TOPICS = [["red", "green", "blue"], ["one", "two", "three"], ["cat", "dog", "bird"], ["salt", "oil", "rice"]]
MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose sentences each speak of one of four things: two bits that a latent vector can hold."""
    folder, generator = tmp_path_factory.mktemp("topics"), random.Random(1)
    for number in range(12):
        lines = [" ".join(generator.choices(generator.choice(TOPICS), k=6)) for _ in range(60)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def vae(config: MakeConfig, topics: Path) -> MakeConfig:
    """A maker of small VAE configurations."""

    def make(**values: Any) -> PretrainConfig:
        model = VaeLstmConfig(d_embed=16, d_encoder=16, d_latent=values.pop("d_latent", 3), dropout_word=0.2)
        objective = VaeObjectiveConfig(
            free_nats=1.5,
            target_nats=values.pop("target_nats", 0.0),
            num_samples=8,
            anneal_share=0.2,
            plain_share=values.pop("plain_share", 0.0),
        )
        made = config(**({"max_steps": 12, "batch_size": 16, "seq_len": 32} | values))
        return replace(
            made,
            dataset=TextConfig(path=str(topics), valid_fraction=0.2),
            tokenizer=WordTokenizerConfig(),
            model=model,
            objective=objective,
            optimizer=AdamwConfig(lr=2e-2),
        )

    return make


def run_dir(cfg: PretrainConfig) -> str:
    assert cfg.run.dir is not None
    return cfg.run.dir


@pytest.fixture(scope="session")
def trained(topics: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run trained by the command line, long enough to have learnt the topics."""
    path = str(tmp_path_factory.mktemp("vae") / "run")
    words = f"model=vae_lstm objective=vae dataset=text dataset.path={topics} dataset.valid_fraction=0.2 tokenizer=word"
    words += " model.d_embed=16 model.d_encoder=16 model.d_latent=3 model.dropout_input=0 model.dropout_output=0"
    words += " objective.free_nats=2 objective.num_samples=16 optimizer.lr=0.02 train.max_steps=300 train.batch_size=32"
    words += f" device=cpu device.threads=1 run.dir={path}"
    assert cli.main(["pretrain", *words.split()]) == 0
    return path


def test_it_learns_what_a_sentence_is_about(trained: str) -> None:
    cfg = EvalPplConfig(run=ExistingRunConfig(path=trained), split="valid", device=CPU, latent_samples=64)
    found = eval_ppl.run(cfg)
    # A word costs log 3 nats once the topic is known; the topic log 4 nats a sentence; the end nothing.
    ideal = 6 * 1.0986 + 1.3863
    assert ideal < found["bound_nats"] < ideal + 0.6
    assert found["bound_nats"] < found["negative_elbo_nats"]
    assert found["mutual_information_nats"] > 0.9
    assert found["active_units"] >= 2
    assert found["kl_nats"] > 1.2


def test_what_is_cut_from_long_sentences_is_told(vae: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.run(vae(max_steps=1, seq_len=7))
    assert "were cut" not in capsys.readouterr().err
    pretrain.run(vae(run="cut", max_steps=1, seq_len=5))
    told = capsys.readouterr().err
    found = re.search(r"(\d+) of (\d+) sentences \(lines\) were cut after train.seq_len=5 tokens: (\d+) tokens", told)
    assert found is not None
    assert found[1] == found[2]
    assert int(found[3]) == 2 * int(found[1])


def test_every_perplexity_of_it_is_marked_as_a_bound(
    trained: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "numbers.json"
    words = f"eval-ppl run={trained} split=valid device=cpu device.threads=1 latent_samples=4 output={output}"
    assert cli.main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("<=" in line for line in lines if "perplexity" in line and "protocol" not in line)
    assert any("UPPER BOUND by 4 importance samples" in line for line in lines)
    assert '"kind": "bound"' in output.read_text(encoding="utf-8")
    assert "ppl" not in {line.split('"')[1] for line in output.read_text(encoding="utf-8").splitlines() if ": " in line}


def test_it_reconstructs_what_a_sentence_is_about(trained: str) -> None:
    for topic in TOPICS:
        cfg = generation(trained, VaeGenerateConfig(reconstruct=" ".join(topic * 2)))
        (result,) = generate.run(cfg, [""])
        assert set(result["text"].split()) <= set(topic)


def test_the_ends_of_an_interpolation_are_the_reconstructions(trained: str) -> None:
    first, last = " ".join(TOPICS[0] * 2), " ".join(TOPICS[1] * 2)
    line = VaeGenerateConfig(interpolate_from=first, interpolate_to=last, steps=5)
    results = generate.run(generation(trained, line), [""])
    assert [r["share"] for r in results] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for result, text in ((results[0], first), (results[-1], last)):
        (again,) = generate.run(generation(trained, VaeGenerateConfig(reconstruct=text)), [""])
        assert again["text"] == result["text"]


def test_sentences_from_the_prior_differ_repeat_by_seed_and_can_be_begun(
    trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"generate run={trained} --num-samples 12 --seed 3 device=cpu device.threads=1"
    assert cli.main(words.split()) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) == 12
    assert len(set(first.splitlines())) > 6
    assert cli.main(words.split()) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*words.split(), "--prompt", "red"]) == 0
    assert all(line.startswith("red ") for line in capsys.readouterr().out.splitlines())
    assert cli.main([*words.split(), "--prompt", "zebra red", "--prompt", "red zebra"]) == 0
    assert capsys.readouterr().err.count("not in the vocabulary, read as <unk>: zebra") == 2


def generation(path: str, vae: VaeGenerateConfig) -> GenerateConfig:
    return GenerateConfig(run=ExistingRunConfig(path=path), vae=vae, device=CPU, max_new_tokens=12)


def test_a_stopped_and_resumed_run_ends_with_the_same_bits(vae: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vae(run="whole", micro_batch_size=8)
    pretrain.run(whole)
    cut = vae(run="cut", micro_batch_size=8)
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(StoppedError):
            pretrain.run(cut)
    pretrain.run(replace(cut, resume=True))
    assert_same(tensors_in(Path(run_dir(whole))), tensors_in(Path(run_dir(cut))))


def test_the_sampled_softmax_ends_exact_and_a_budget_knows_where_the_time_of_a_step_changes(vae: MakeConfig) -> None:
    """The first of them turns exact while the decoder learns alone, the second behind that."""
    cfg = vae(plain_share=0.5)
    prepared, _ = pretrain.prepare_data(cfg, Console())

    def found(softmax: SoftmaxConfig) -> tuple[list[float], set[float]]:
        own = replace(cfg, softmax=softmax)
        model = pretrain.build_model(own, None, prepared.tokenizer.vocab_size)
        task, losses = pretrain.build_task(own, model, prepared), []
        for progress in (0.2, 0.4, 0.6, 0.8):
            torch.manual_seed(1)
            batch = task.batches[0].cut(slice(0, 2), torch.device("cpu"))
            losses.append(float(task.loss(model.train(), batch, None, progress)[0].detach()))
        return losses, set(task.pace_changes_at)

    exact, changes = found(SoftmaxConfig())
    assert changes == {0.5}
    for exact_from, ends_exact in ((0.3, [False, True, True, True]), (0.7, [False, False, False, True])):
        losses, changes = found(SampledSoftmaxConfig(num_frequent=1, num_sampled=1, exact_from=exact_from))
        assert [loss == expected for loss, expected in zip(losses, exact, strict=True)] == ends_exact
        assert changes == {exact_from, 0.5}


def test_in_its_plain_part_the_decoder_learns_alone(vae: MakeConfig) -> None:
    cfg = vae(plain_share=0.75)
    pretrain.run(replace(cfg, save=replace(cfg.save, every_steps=3, keep=10)))
    paths = (Path(run_dir(cfg)) / "checkpoints" / step_directory(step) for step in (3, 9, 12))
    early, late, end = (load_checkpoint(path, with_optimizer=False).model for path in paths)
    encoder = [name for name in early if name.startswith(("encoder.", "posterior."))]
    assert encoder
    assert all(torch.equal(early[name], late[name]) for name in encoder)
    assert not any(torch.equal(late[name], end[name]) for name in encoder)
    assert not torch.equal(early["decoder.weight_hh_l0"], late["decoder.weight_hh_l0"])
    listens = [(weights["skip.weight"], weights["decoder.weight_ih_l0"][:, 16:]) for weights in (early, late, end)]
    assert [any(bool(w.any()) for w in both) for both in listens] == [False, False, True]


@pytest.mark.parametrize(("d_latent", "adds"), [(0, False), (3, True)])
def test_nats_that_are_free_are_counted_in_the_loss_only_where_there_are_latent_units(
    vae: MakeConfig, d_latent: int, adds: bool
) -> None:
    losses = []
    for target in (0.0, 40.0):
        cfg = vae(run=f"target{target}", d_latent=d_latent, target_nats=target, max_steps=6)
        pretrain.run(replace(cfg, log=replace(cfg.log, every_steps=1)))
        losses.append([row["loss"] for row in read_metrics(Path(run_dir(cfg))) if "loss" in row][-1])
    assert (losses[1] > losses[0] + 1.0) is adds
    assert adds or losses[1] == losses[0]


def test_validation_does_not_disturb_training(vae: MakeConfig) -> None:
    often, seldom = vae(run="often"), vae(run="seldom")
    pretrain.run(often)
    pretrain.run(replace(seldom, eval=replace(seldom.eval, every_steps=12)))
    first, second = tensors_in(Path(run_dir(often))), tensors_in(Path(run_dir(seldom)))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_step_can_be_replayed(vae: MakeConfig) -> None:
    cfg = vae()
    pretrain.run(cfg)
    found = replay.replay(Path(run_dir(cfg)), 9, Console())
    assert found["step"] == 9
    assert all(row["nats_per_token"] > 0 for row in found["rows"])


@pytest.mark.parametrize("words", ["model=vae_lstm", "objective=vae", "objective=vae model=tiny"])
def test_objective_and_model_must_fit(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", *words.split()]) == 2
    assert "does not train this model, which needs objective=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("anneal", "needs"),
    [
        ("none", {"anneal_share=0.5": "linear or cyclical", "cycles=2": "cyclical"}),
        ("linear", {"cycles=2": "cyclical"}),
    ],
)
def test_how_the_kl_term_grows_is_refused_where_it_does_not(
    anneal: str, needs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["dataset=ptb", f"dataset.path={tmp_path / 'none'}", f"run.dir={tmp_path / 'run'}", "device=cpu"]
    keys = ["objective.anneal_share=0.5", "objective.cycles=2", f"objective.anneal={anneal}"]
    assert cli.main(["pretrain", "objective=vae", "model=vae_lstm", *place, *keys]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert all(f"objective.{key} needs objective.anneal={kind}" in found for key, kind in needs.items())
    assert found.count("needs objective.anneal") == len(needs)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("vae", ["recipe=ptb_vae"]),
        ("gan", ["objective=gan", "model=relgan", "dataset=ptb"]),
    ],
)
def test_how_a_stream_of_tokens_is_cut_is_refused_where_sentences_are_read(
    objective: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the corpus is looked for, which is not there."""
    keys = ["train.order=lanes", "train.shuffle=blocks", "train.seq_len_jitter=true", "eval.sample_tokens=60"]
    place = [f"dataset.path={tmp_path / 'none'}", f"run.dir={tmp_path / 'run'}", "device=cpu"]
    assert cli.main(["pretrain", *words, *place, *keys]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert all(f"{key} has no use with objective={objective}" in found for key in keys)


def test_what_needs_the_probability_of_single_words_is_refused_by_name(trained: str, tmp_path: Path) -> None:
    base = EvalPplConfig(run=ExistingRunConfig(path=trained), split="valid", device=CPU, latent_samples=2)
    with pytest.raises(ConfigError, match=r"temperature, mix, word_probs, protocol cannot be used"):
        eval_ppl.run(
            replace(base, temperature="2", mix=["kn5"], word_probs=str(tmp_path / "w"), protocol=StreamProtocolConfig())
        )
    with pytest.raises(ConfigError, match=r"^weights, bootstrap cannot be used"):
        eval_ppl.run(replace(base, weights="equal", bootstrap=50))
    eval_ppl.run(replace(base, protocol=SentenceProtocolConfig(), temperature="1.0"))


def test_commands_that_need_a_language_model_refuse_it(
    trained: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(f"finetune run={trained} dataset=pydocs run.dir={tmp_path / 'new'}".split()) == 2
    assert "is a sentence VAE" in capsys.readouterr().err


def test_vae_keys_are_refused_where_they_have_no_use(
    trained: str, config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = config(run="plain", max_steps=2)
    pretrain.run(plain)
    with pytest.raises(ConfigError, match="which is no sentence VAE"):
        generate.run(generation(run_dir(plain), VaeGenerateConfig(reconstruct="a")), [""])
    with pytest.raises(ConfigError, match=r"latent_samples=64 has no use with .*, which is no sentence VAE"):
        eval_ppl.run(EvalPplConfig(run=ExistingRunConfig(path=run_dir(plain)), device=CPU, latent_samples=64))
    with pytest.raises(ConfigError, match="belong to sentences from the prior"):
        generate.run(generation(trained, VaeGenerateConfig(reconstruct="red")), ["one"])
    assert cli.main(["generate", f"run={trained}", "vae.interpolate_from=red"]) == 2
    assert "vae.interpolate_to" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["red", ""])
def test_what_has_no_latent_units_reconstructs_nothing(text: str, vae: MakeConfig) -> None:
    cfg = vae(d_latent=0, max_steps=2)
    pretrain.run(cfg)
    for asked in (VaeGenerateConfig(reconstruct=text), VaeGenerateConfig(interpolate_from=text, interpolate_to=text)):
        with pytest.raises(ConfigError, match="has no latent units"):
            generate.run(generation(run_dir(cfg), asked), [""])


def test_other_tokenizers_read_lines_too(vae: MakeConfig) -> None:

    cfg = vae(max_steps=2)
    result = pretrain.run(replace(cfg, tokenizer=ByteTokenizerConfig(), run=replace(cfg.run, dir=run_dir(cfg) + "b")))
    assert result["num_words"] == result["num_sentences"] * 7
    assert result["word_ppl_bound"] > 1


def test_lists_of_runs_show_no_perplexity_for_what_is_only_a_bound(vae: MakeConfig, config: MakeConfig) -> None:
    bound, exact = vae(run="bound", max_steps=2), config(run="exact", max_steps=2)
    pretrain.run(bound)
    pretrain.run(exact)
    found = read_summary(Path(run_dir(bound)))
    assert (found.token_ppl, found.word_ppl, found.objective) == (None, None, "vae")
    assert found.best_valid_loss is not None
    assert read_summary(Path(run_dir(exact))).token_ppl is not None
