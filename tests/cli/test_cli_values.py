"""Keys and values: what is set, what is refused, and what is said about it."""

from __future__ import annotations

import os
import typing
from typing import Any

import pytest

from lmkit.keys import keys_of

TEXTS = [
    "two words",
    "a,b,c",
    "a=b=c",
    "(round) [square] {curly}",
    'it\'s "quoted"',
    "-leading dash",
    "--option",
    "我喜欢学习",
    "naïve ∀x",
    "back\\slash",
    "#hash: yes",
    "$HOME",
    "%s %(x)s",
    "a\ttab",
    "line\nbreak",
    "true",
    "1.5",
    "[1,2]",
    "  edges  ",
    "x" * 10_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t[:20]))
def test_a_text_arrives_as_it_was_written(lmkit: Any, text: str) -> None:
    config = lmkit.config("pretrain", "dataset=jsonl", f"dataset.text_field={text}", "--run.root", text)
    assert config.dataset.text_field == text
    assert config.run.root == text


def test_a_path_may_begin_with_the_home_folder(lmkit: Any) -> None:
    config = lmkit.config("pretrain", "dataset.path=~/data", "run.dir=~/a~b", "dataset=jsonl", "dataset.text_field=~/x")
    assert config.dataset.path == os.path.join(os.path.expanduser("~"), "data")
    assert config.run.dir == os.path.join(os.path.expanduser("~"), "a~b")
    assert config.dataset.text_field == "~/x"


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a${seed}", "${"])
def test_nothing_is_interpolated(lmkit: Any, value: str) -> None:
    assert "not allowed" in lmkit.refused("pretrain", f"run.root={value}")


@pytest.mark.parametrize(
    "word",
    [
        *("_target_=os.system", "model._target_=os.system", "+x=1", "++seed=1", "~model", "~seed=1", "+x"),
        *("hydra=1", "hydra.run.dir=x", "=1", "model.=1", ".seed=1", "seed.x=1", "train=3", "model@x=a", "seed[0]=1"),
    ],
)
def test_only_the_keys_of_the_command_can_be_set(lmkit: Any, word: str) -> None:
    assert word.partition("=")[0] in lmkit.refused("pretrain", word)


def test_words_of_all_forms_set_a_key(lmkit: Any) -> None:
    forms = [["train.max_steps=7"], ["--train.max_steps=7"], ["--train.max_steps", "7"], ["--train.max-steps", "7"]]
    for form in forms:
        assert lmkit.config("pretrain", *form).train.max_steps == 7
    assert lmkit.config("pretrain", "--model", "tiny").model.d_model == 128
    assert lmkit.config("pretrain", "--model=tiny", "--optimizer", "sgd").optimizer.lr == 1.0


def test_a_run_is_named_by_its_directory(lmkit: Any) -> None:
    for words in (["run=runs/a b"], ["run.path=runs/a b"], ["--run", "runs/a b"], ["--run=runs/a b"]):
        assert lmkit.config("eval-ppl", *words).run.path == "runs/a b"
    assert lmkit.config("finetune", "run=old", "run.dir=new").run.dir == "new"


def test_a_run_to_make_and_a_run_to_use_are_not_confused(lmkit: Any) -> None:
    assert "run.dir=DIR" in lmkit.refused("pretrain", "run=x")
    for command in ("eval-ppl", "generate"):
        assert "run=DIR" in lmkit.refused(command, "run.dir=x")


def test_the_last_of_several_values_wins(lmkit: Any) -> None:
    config = lmkit.config("pretrain", "seed=1", "model=tiny", "seed=3", "--seed", "2", "model=medium")
    assert (config.seed, config.model.d_model) == (2, 512)


@pytest.mark.parametrize("word", ["true", "True", "yes", "on", "1"])
def test_true_has_several_spellings(lmkit: Any, word: str) -> None:
    assert lmkit.config("prepare", f"force={word}").force is True
    assert lmkit.config("prepare", "--force", word).force is True


@pytest.mark.parametrize("word", ["false", "No", "off", "0"])
def test_false_has_several_spellings(lmkit: Any, word: str) -> None:
    assert lmkit.config("prepare", f"force={word}").force is False
    assert lmkit.config("prepare", "--force", word).force is False


def test_a_flag_needs_no_value(lmkit: Any) -> None:
    config = lmkit.config("pretrain", "--resume", "model=tiny", "run.dir=x", "--model.tie-embeddings", "no")
    assert config.resume is True
    assert config.model.d_model == 128
    assert config.model.tie_embeddings is False
    assert lmkit.config("prepare", "--force").force is True


def test_beside_a_folder_that_brings_its_model_only_regularisers_of_the_model_can_be_set(lmkit: Any) -> None:
    start = ["pretrain", "init=hf:x"]
    message = lmkit.refused(*start, "model.d_model=64", "model.drop_path=0.1", "model.dropout=0")
    assert "model.d_model=64 has no use with init.weights=hf:x" in message
    assert "model.dropout=0 has no use with init.weights=hf:x" in message  # the folder's cannot be told from it
    assert "model.drop_path=0.1" not in message
    assert lmkit.config(*start, "model.dropout=0.2", "model=gpt2").model.dropout == 0.2
    assert lmkit.config("pretrain", "init=null", "model.d_model=64").model.d_model == 64


def test_beside_a_folder_that_brings_its_tokenizer_none_can_be_chosen(lmkit: Any) -> None:
    message = lmkit.refused("pretrain", "init=hf:x", "tokenizer=sentencepiece", "tokenizer.vocab_size=300")
    for word in ("tokenizer=sentencepiece", "tokenizer.vocab_size=300"):
        assert f"{word} has no use with init.weights=hf:x, which brings a tokenizer" in message
    assert lmkit.config("pretrain", "init=hf:x", "dataset=ptb").init.weights == "hf:x"  # whose tokenizer is word


def test_a_task_that_reads_rows_takes_no_corpus(lmkit: Any) -> None:
    words = ["finetune", "task=classify", "task.data=x.csv"]
    message = lmkit.refused(*words, "dataset=text", "dataset.path=notes")
    for word in ("dataset=text", "dataset.path=notes"):
        assert f"{word} has no use with task=classify, which reads task.data" in message
    assert lmkit.config(*words, "init=hf:x", "dataset=ptb").init.weights == "hf:x"  # its corpus, as far as is known
    assert lmkit.config("finetune", "dataset=text", "dataset.path=notes").dataset.path == "notes"


@pytest.mark.parametrize(
    "word", ["init=hf:x", "run.dir=new", "adapter=lora", "tune.last_layers=1", "tune.layer_decay=0.5"]
)
def test_what_only_predicts_takes_nothing_that_trains_or_names_another_model(lmkit: Any, word: str) -> None:
    said = lmkit.refused("finetune", "predict=new.csv", word)
    assert "has no use with predict=FILE and no task" in said
    assert word.partition("=")[0] in said
    task = ["task=classify", "task.data=x.csv"]
    assert lmkit.config("finetune", "predict=new.csv", word, *task).predict == "new.csv"


def test_null_and_lists(lmkit: Any) -> None:
    assert lmkit.config("pretrain", "optimizer.clip_norm=null").optimizer.clip_norm is None
    assert lmkit.config("generate", "stop=a,b c").stop == ["a", "b c"]
    assert lmkit.config("generate", "stop=[a, b]").stop == ["a", "b"]
    assert lmkit.config("generate", "stop=\n").stop == ["\n"]
    assert lmkit.config("generate", "stop=").stop == []
    adaptive = ["model.tie_embeddings=false", "softmax=adaptive"]
    for text in ("[20, 60]", "20,60"):
        assert lmkit.config("pretrain", *adaptive, f"softmax.cutoffs={text}").softmax.cutoffs == [20, 60]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["seed=3.5"], ["seed=3.5", "int"]),
        (["seed=1e3"], ["seed=1e3", "int"]),
        (["seed="], ["seed= ", "int"]),
        (["seed=null"], ["seed=null", "int"]),
        (["save.keep=1"], ["save.keep=1", ">= 2"]),
        (["softmax=adaptive", "softmax.cutoffs=[20,x]"], ["softmax.cutoffs=[20,x]", "list of int"]),
        (["--seed", "-1"], ["seed=-1", ">= 0"]),
        (["train.max_steps=x"], ["train.max_steps=x", "int or null"]),
        (["model.dropout=lots"], ["model.dropout=lots", "float"]),
        (["train.max_epochs=nan"], ["train.max_epochs=nan", "> 0"]),
        (["optimizer.lr=inf"], ["optimizer.lr=inf", "finite"]),
        (["resume=maybe"], ["resume=maybe", "true or false"]),
        (["model.activation=rleu"], ["model.activation=rleu", "relu, gelu", "did you mean relu?"]),
        (["run.root=null"], ["run.root=null", "text"]),
        (["run.dir="], ["run.dir=", "empty"]),
        (["dataset.path="], ["dataset.path=", "empty"]),
        (["train.budget=soon"], ["train.budget=soon", "10m"]),
        (["run.root=???"], ["run.root=???: ??? stands for a value that must be given"]),
        (["resume=true"], ["resume=true", "run.dir=DIR"]),
        (["train.max_epochs=1e308"], ["train.max_epochs=1e+308", "at most 1e+09"]),
        ([f"train.budget={'9' * 400}"], ["train.budget=999", "10m"]),
        ([f"train.time_limit={'9' * 400}d"], ["train.time_limit=999", "3d"]),
        (["device.threads=100000"], ["device.threads=100000", "1 and 1024"]),
        (["parallel=ddp", "parallel.timeout_s=1e15"], ["parallel.timeout_s=", "at most 1e9"]),
        (["seed=9223372036854775808"], ["seed=9223372036854775808", "below 2^63"]),
        ([f"train.max_steps={'9' * 400}"], ["train.max_steps=999", "(400 characters)", "below 2^63"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_it_must_be(
    lmkit: Any, words: list[str], parts: list[str]
) -> None:
    message = lmkit.refused("pretrain", *words)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("pretrain", {}),
        *(("pretrain", {"optimizer": name}) for name in ("sgd", "adam", "rmsprop", "adagrad", "adadelta", "muon")),
        ("finetune", {"task": "prefer"}),
        ("eval-ppl", {"dynamic": "rms", "cache": "neural"}),
        ("generate", {}),
    ],
)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_number_is_infinite_since_a_checkpoint_could_not_hold_it(
    lmkit: Any, command: str, groups: dict[str, str], value: str
) -> None:
    words = [f"{group}={name}" for group, name in groups.items()] + ["task.data=x"] * ("task" in groups)
    numbers = [key for key, hint in keys_of(command, groups).items() if float in (hint, *typing.get_args(hint))]
    assert numbers
    for key in numbers:
        assert f"{key}={value} " in lmkit.refused(command, *words, f"{key}={value}")


def test_the_tokens_of_a_page_need_the_page(lmkit: Any) -> None:
    assert "report_tokens=100 needs report=FILE" in lmkit.refused("eval-ppl", "report_tokens=100")
    assert lmkit.config("eval-ppl", "report_tokens=100", "report=x.html").report_tokens == 100


def test_an_empty_path_may_be_null_only_where_null_is_a_value(lmkit: Any) -> None:
    assert lmkit.refused("pretrain", "run.root=") == "run.root= is empty: give a path"
    assert lmkit.refused("pretrain", "run.dir=") == "run.dir= is empty: give a path, or null"
    assert lmkit.refused("finetune", "task=classify", "task.data=") == "task.data= is empty: give a path"


@pytest.mark.parametrize("value", ["???", "a,???", "[???]"])
def test_what_stands_for_a_missing_value_is_not_said_to_be_missing(lmkit: Any, value: str) -> None:
    assert "stands for a value that must be given, and cannot be one" in lmkit.refused("generate", f"stop={value}")
    assert lmkit.config("generate", "system=why,???", "chat=true").system == "why,???"
    assert lmkit("generate", "--stop", "???", "--prompt", "???") == 0
    assert (lmkit.configs[0].stop, lmkit.prompts) == (["???"], [["???"]])


def test_two_outputs_do_not_go_into_one_file(lmkit: Any) -> None:
    said = lmkit.refused("eval-ppl", "output=out", "word_probs=out", "report=x.html")
    assert said == "word_probs=out is the file of output, too: name another"


def test_negative_and_scientific_numbers(lmkit: Any) -> None:
    assert lmkit.config("pretrain", "--optimizer.lr", "1e-3").optimizer.lr == 1e-3
    assert "-0.5" in lmkit.refused("pretrain", "--model.dropout", "-0.5")


def test_a_long_value_is_cut_in_the_message(lmkit: Any) -> None:
    message = lmkit.refused("pretrain", "seed=" + "9a" * 5000)
    assert "(10000 characters)" in message
    assert len(message) < 400


def test_a_message_is_one_printable_line(lmkit: Any) -> None:
    message = lmkit.refused("pretrain", "seed=a\nb\x1b[31m", "model=\x07")
    assert "\x1b" not in message
    assert "\x07" not in message


def test_bytes_that_are_not_utf8_do_not_stop_a_message(lmkit: Any) -> None:
    assert lmkit.refused("pretrain", "seed=\udcff")
    assert lmkit.refused("pr\udcfe")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["dataset=hub"], ["dataset.name must be given", "dataset.name=VALUE"]),
        (["tokenizer=hf"], ["tokenizer.path must be given"]),
        (["dataset=hub", "tokenizer=hf"], ["dataset.name must", "tokenizer.path must"]),
    ],
)
def test_what_must_be_given_is_asked_for(lmkit: Any, words: list[str], parts: list[str]) -> None:
    message = lmkit.refused("pretrain", *words)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["pretrian"], "did you mean pretrain?"),
        (["eval_ppl"], "did you mean eval-ppl?"),
        (["--hlep"], "did you mean --help?"),
        (["help", "pretrian"], "did you mean pretrain?"),
        (["--help", "pretrian"], "did you mean pretrain?"),
        (["pretrain", "--hlep"], "unknown option --hlep: did you mean --help?"),
        (["pretrain", "--resum"], "did you mean resume?"),
        (["pretrain", "--mulitrun", "model=tiny"], "unknown option --mulitrun: did you mean --multirun?"),
        (["pretrain", "--mulitrun", "--seed", "1"], "did you mean --multirun?"),
        (["pretrain", "--confg", "job"], "did you mean --cfg?"),
        (["generate", "--num-sample"], "did you mean num_samples"),
        (["finetune", "model=small"], "finetune takes the model from the run"),
        (["finetune", "tokenizer.path=x"], "finetune takes the tokenizer from the run"),
        (["eval-ppl", "optimizer=sgd"], "eval-ppl takes no optimizer"),
        (["prepare", "model=tiny"], "prepare takes no model"),
        (["prepare", "run=x"], "neither uses nor makes a run: leave out run"),
        (["prepare", "run.dir=x"], "neither uses nor makes a run: leave out run.dir"),
        (["model=tiny", "pretrain"], "lmkit COMMAND KEY=VALUE"),
        (["pretrain", "modle=tiny"], "did you mean model?"),
        (["pretrain", "model=tny"], "did you mean tiny?"),
        (["pretrain", "model="], "choose from awd_lstm, gpt2, gru"),
        (["pretrain", "dataset=wikitext-2"], "did you mean wikitext2"),
        (["pretrain", "train.max_step=3"], "did you mean train.max_steps?"),
        (["pretrain", "--max-steps", "3"], "did you mean train.max_steps?"),
        (["pretrain", "--train.max-stepz=3"], "did you mean train.max_steps?"),
        (["pretrain", "model.cell=gru"], "not a key of model=small but of model=awd_lstm, model=gru, model=lstm"),
        (["eval-ppl", "dataset.path=x"], "add dataset=NAME"),
        (["pretrain", "tiny"], "did you mean model=tiny?"),
        (["pretrain", "resume"], "write resume=true"),
        (["pretrain", "model"], "write model=NAME"),
        (["pretrain", "nonsense"], "lmkit pretrain --help"),
        (["eval-ppl", "."], ". has no key: did you mean run=.?"),
        (["pretrain", "."], "lmkit pretrain --help"),
        (["pretrain", "-x"], "unknown option -x"),
        (["pretrain", "-n", "3"], "unknown option -n"),
        (["pretrain", "--seed"], "--seed needs a value"),
        (["generate", "--promt", "hello"], "did you mean --prompt?"),
        (["generate", "prompt=hello"], "did you mean --prompt?"),
        (["generate", "--top_k", "5"], "did you mean --top-k or sampling.top_k?"),
        (["generate", "the company"], "--prompt TEXT"),
        (["generate", "--prompt"], "--prompt needs a value"),
        (["generate", "--prompt-file"], "for example --prompt-file prompt.txt"),
        (["generate", "dataset=ptb"], "unknown key 'dataset'"),
        (["pretrain", "--cfg"], "--cfg job"),
        (["pretrain", "--cfg", "hydra"], "--cfg job"),
        (["--completion"], "bash or zsh or fish"),
        (["--completion", "tcsh"], "bash or zsh or fish"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_typo_gets_the_nearest_names(lmkit: Any, words: list[str], part: str) -> None:
    assert part in lmkit.refused(*words)


def test_all_mistakes_are_reported_at_once(lmkit: Any) -> None:
    message = lmkit.refused(
        "pretrain", "-x", "model=tny", "optimiser=adam", "model.d_model=7", "seed=x", "train.max_stepz=1", "foo"
    )
    for part in ("-x", "model=tny", "optimiser", "seed=x", "train.max_stepz", "'foo'"):
        assert part in message
    assert "model.d_model" not in message  # which model it is about is not known


def test_all_mistakes_of_a_multirun_are_reported_at_once_and_each_only_once(lmkit: Any) -> None:
    message = lmkit.refused("pretrain", "-m", "model=tiny,tny", "seed=1,x", "train.batch_size=4,0")
    for part in ("model=tny is unknown", "seed=x must be int", "train.batch_size=0 must be"):
        assert message.count(part) == 1


def test_all_values_out_of_range_are_reported_at_once(lmkit: Any) -> None:
    message = lmkit.refused(
        "pretrain", "seed=-1", "train.batch_size=0", "model.d_model=7", "dataset.cleaning.min_chars=-1"
    )
    for part in ("seed=-1", "train.batch_size=0", "model.d_model=7", "dataset.cleaning.min_chars=-1"):
        assert message.count(part + " must") == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["schedule=plateau", "schedule.factor=1"], "schedule.factor=1 must be above 0 and below 1"),
        (["schedule=step_decay", "schedule.factor=0"], "schedule.factor=0 must be above 0 and below 1"),
        (["train.ema_decay=1"], "train.ema_decay=1 must be above 0 and below 1, or null"),
        (["train.spike_nats=inf"], "train.spike_nats=inf must be > 0 and finite, or null"),
        (["model.norm_eps=1"], "model.norm_eps=1 must be above 0 and below 1"),
        (["optimizer.weight_decay=inf"], "optimizer.weight_decay=inf must be >= 0 and finite"),
        (["model=vae_lstm", "objective=vae", "objective.beta=inf"], "objective.beta=inf must be >= 0 and finite"),
        (["model=vae_lstm", "objective=vae", "objective.free_nats=inf"], "free_nats=inf must be >= 0 and finite"),
        (["model=relgan", "objective=gan", "objective.generator_lr=inf"], "generator_lr=inf must be > 0 and finite"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_value_that_is_refused_is_not_in_the_range_that_is_named(lmkit: Any, words: list[str], part: str) -> None:
    assert part in lmkit.refused("pretrain", *words)


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_that_goes_on_has_to_be_named_and_only_such_a_one_has_other_data(lmkit: Any, command: str) -> None:
    message = lmkit.refused(command, "resume=true", "seed=-1")
    assert message == "seed=-1 must be >= 0; resume=true needs run.dir=DIR, the run to continue"
    message = lmkit.refused(command, "run.dir=x", "run.allow_data_change=true")
    assert message == "run.allow_data_change=true needs resume=true"
    assert lmkit.config(command, "run.dir=x", "run.allow_data_change=true", "resume=true").resume
