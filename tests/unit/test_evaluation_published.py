"""Published results: the table that ships with the package, and places in it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lmkit.errors import DataError
from lmkit.evaluation.published import KINDS, PROTOCOLS, load, parse, published_kind, standing

HEADER = "dataset,model,params_millions,valid,test,kind,protocol,source"
ROW = "ptb,LSTM,24,60.0,57.3,static,mikolov,Someone 2017"


def test_the_shipped_table_holds_the_best_known_results_of_each_kind() -> None:
    best = {
        (dataset, kind): min(
            row.test for row in load() if (row.dataset, row.kind) == (dataset, kind) and row.test is not None
        )
        for dataset in ("ptb", "wikitext2", "wikitext103")
        for kind in ("static", "dynamic", "ensemble", "pretrained")
    }
    assert best == {
        ("ptb", "static"): 52.00,
        ("ptb", "dynamic"): 42.9,
        ("ptb", "ensemble"): 47.17,
        ("ptb", "pretrained"): 35.76,
        ("wikitext2", "static"): 57.85,
        ("wikitext2", "dynamic"): 38.0,
        ("wikitext2", "ensemble"): 53.09,
        ("wikitext2", "pretrained"): 18.34,
        ("wikitext103", "static"): 17.1,
        ("wikitext103", "dynamic"): 16.1,
        ("wikitext103", "ensemble"): 13.29,
        ("wikitext103", "pretrained"): 17.48,
    }


def test_every_kind_and_protocol_of_the_shipped_table_is_used_and_pretrained_models_are_set_apart() -> None:
    rows = load()
    assert {row.kind for row in rows} == set(KINDS)
    assert {row.protocol for row in rows} == set(PROTOCOLS)
    assert {row.protocol for row in rows if row.kind == "pretrained"} == {"gpt2-paper"}
    assert {row.kind for row in rows if row.protocol == "gpt2-paper"} == {"pretrained"}


def test_a_row_is_read_field_by_field_and_an_empty_number_is_none() -> None:
    (row,) = parse([HEADER, 'ptb,"LSTM, tied",,,57.3,static,mikolov,Someone 2017'])
    assert (row.dataset, row.model, row.kind, row.protocol) == ("ptb", "LSTM, tied", "static", "mikolov")
    assert (row.params_millions, row.ppl("valid"), row.ppl("test"), row.ppl("train")) == (None, None, 57.3, None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (ROW + ",more", "9 cells instead of 8"),
        ("", "0 cells instead of 8"),
        (ROW.replace("static", "guess"), "kind 'guess' is not one of static"),
        (ROW.replace("mikolov", "hearsay"), "protocol 'hearsay' is not one of mikolov"),
        (ROW.replace("57.3", "fifty"), "test 'fifty' is not a number above 1"),
        (ROW.replace("57.3", "nan"), "test 'nan' is not a number above 1"),
        (ROW.replace("57.3", "inf"), "test 'inf' is not a number above 1"),
        (ROW.replace("60.0", "1"), "valid '1' is not a number above 1"),
        (ROW.replace("24", "0"), "params_millions '0' is not a number above 0"),
        (ROW.replace("60.0,57.3", ","), "neither valid nor test is given"),
        (ROW.replace("Someone 2017", ""), "source is empty"),
        (ROW.replace("LSTM", " LSTM"), "a cell begins or ends with white space"),
        (ROW.replace("LSTM", "Other"), "Other is there twice"),
        (ROW.replace("LSTM", '"LSTM'), "unexpected end of data"),
    ],
)
def test_a_damaged_row_is_refused_by_the_number_of_its_line(line: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        parse([HEADER, ROW.replace("LSTM", "Other"), line])
    assert caught.value.problem.startswith("published.csv line 3: ")


@pytest.mark.parametrize("lines", [[], [ROW], [HEADER.replace("valid,test", "test,valid")]])
def test_a_table_without_the_right_columns_is_refused(lines: list[str]) -> None:
    with pytest.raises(DataError, match=r"published\.csv line [01]: the columns are"):
        parse(lines)


def test_a_number_stands_among_the_rows_of_its_own_dataset_protocol_and_kind_only() -> None:
    found = standing("ptb", "mikolov", "dynamic", "test", 47.5, neighbours=2)
    assert found is not None
    rows = [row for row in load() if (row.dataset, row.protocol, row.kind) == ("ptb", "mikolov", "dynamic")]
    lower = [row for row in rows if row.test is not None and row.test < 47.5]
    assert (found.rank, found.total) == (len(lower) + 1, len(rows) + 1) == (7, 11)
    assert [row.test for row in found.better] == [46.54, 47.3]
    assert [row.test for row in found.worse] == [47.69, 49.4]
    assert {row.kind for row in (*found.better, *found.worse)} == {"dynamic"}


def test_rows_without_a_number_for_the_split_take_no_part() -> None:
    valid = standing("wikitext2", "mikolov", "static", "valid", 62.0)
    test = standing("wikitext2", "mikolov", "static", "test", 62.0)
    assert valid is not None
    assert test is not None
    assert (valid.total, test.total) == (9, 12)
    assert [row.valid for row in valid.better] == [60.16, 60.29]


@pytest.mark.parametrize(("ppl", "rank"), [(1.0, 1), (42.9, 1), (42.91, 2), (1000.0, 11), (math.inf, 11)])
def test_an_equal_result_does_not_push_a_number_down_and_the_ends_have_one_side(ppl: float, rank: int) -> None:
    found = standing("ptb", "mikolov", "dynamic", "test", ppl)
    assert found is not None
    assert found.rank == rank
    assert len(found.better) == min(3, rank - 1)
    assert len(found.worse) == min(3, 11 - rank)


@pytest.mark.parametrize(
    ("dataset", "protocol", "kind", "split"),
    [
        ("mine", "mikolov", "static", "test"),
        ("ptb", "sentence", "static", "test"),
        ("ptb", "gpt2-paper", "static", "test"),
        ("ptb", "mikolov", "pretrained", "test"),
        ("ptb", "mikolov", "cache + dynamic", "test"),
        ("ptb", "mikolov", "static", "train"),
    ],
)
def test_a_number_that_nothing_published_compares_with_has_no_standing(
    dataset: str, protocol: str, kind: str, split: str
) -> None:
    assert standing(dataset, protocol, kind, split, 50.0) is None


PTB = {"kind": "benchmark", "name": "ptb", "path": None}
WIKITEXT2 = {"kind": "benchmark", "name": "wikitext2", "path": None}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"dataset": PTB}, "static"),
        ({"dataset": PTB | {"path": "elsewhere"}, "init": {"weights": None}}, "static"),
        ({"dataset": PTB, "base": "runs/a", "corpus": PTB, "task": {"kind": "lm"}}, "static"),
        ({"dataset": PTB, "base": "runs/b", "corpus": PTB, "base_had_base": True}, "pretrained"),
        ({"dataset": PTB, "data_order": {"number": 1, "first_step": 8, "data": "d" * 64}}, "pretrained"),
        ({"dataset": PTB, "init": {"weights": "hf:gpt2"}}, "pretrained"),
        ({"dataset": WIKITEXT2}, "pretrained"),
        ({"dataset": {"kind": "hub", "name": "ptb"}}, "pretrained"),
        ({"dataset": PTB, "base": "runs/a", "corpus": WIKITEXT2, "task": {"kind": "lm"}}, "pretrained"),
        ({"dataset": PTB, "base": "runs/a", "corpus": None, "task": {"kind": "lm"}}, "pretrained"),
        ({"dataset": PTB, "base": "runs/a", "corpus": PTB, "task": {"kind": "instruct"}}, "pretrained"),
    ],
)
def test_a_run_that_has_learnt_more_than_the_corpus_is_a_pretrained_one(config: dict[str, Any], kind: str) -> None:
    assert published_kind("static", config, "ptb") == kind
    expected = "dynamic" if kind == "static" else "pretrained + dynamic"
    assert published_kind("dynamic", config, "ptb") == expected


def test_what_is_not_a_number_has_no_place() -> None:
    with pytest.raises(ValueError, match="no place"):
        standing("ptb", "mikolov", "static", "test", math.nan)


def test_the_lines_name_protocol_and_kind_and_put_the_number_between_its_neighbours() -> None:
    found = standing("ptb", "mikolov", "cache", "test", 50.0)
    assert found is not None
    assert found.lines() == [
        "published cache results, ptb test, protocol mikolov: place 1 of 2, this one included",
        ">   50.00  this result",
        "    52.80  AWD-LSTM + cache, 24M parameters: Merity et al. 2017 (arXiv 1708.02182)",
    ]
