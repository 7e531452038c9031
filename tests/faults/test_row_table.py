"""Every row of the project's fault table has a test, or a reason why it has none.

A test belongs to the rows whose numbers its name carries: test_row_19_..., test_rows_22_81_..., test_rows_1_to_10_...
ELSEWHERE names tests of rows under other names, WITHOUT_TEST says why a row has none.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
ALL_ROWS = range(1, 127)
LEAST = 125
"""So many rows had a test when this was last raised; the project asks for 100."""

ELSEWHERE = {
    16: ["unit/test_checkpoint.py::test_leaving_the_writer_waits_for_the_save_even_on_an_exception"],
    42: ["unit/test_runs.py::test_of_many_simultaneous_starts_exactly_one_runs"],
    43: ["unit/test_runs.py::test_runs_started_in_the_same_second_get_different_directories"],
    45: ["unit/test_prepared.py::test_processes_that_prepare_the_same_data_do_it_once"],
    47: ["unit/test_runs.py::test_a_lock_file_that_is_a_link_is_refused_and_its_target_untouched"],
    77: [
        "unit/test_runs.py::test_resuming_cuts_metrics_back_to_the_checkpoint_and_keeps_the_tail",
        "unit/test_runs.py::test_a_torn_last_line_is_cut_even_if_no_step_is",
    ],
    78: ["unit/test_batches.py::test_a_late_step_costs_no_more_than_an_early_one"],
    92: ["unit/test_runs.py::test_names_from_data_cannot_leave_the_root"],
    93: [
        "property/test_tokenizer_laws.py::test_ids_lie_in_the_vocabulary_and_text_never_makes_an_end_of_document",
        "unit/test_tokenizers.py::test_hf_byte_level_round_trips_and_keeps_special_looking_text_plain",
    ],
    100: ["unit/test_corpus.py::test_a_bad_record_is_named_by_its_line"],
    107: [
        "property/test_tokenizer_laws.py::test_lossless_tokenizers_round_trip_every_text",
        "property/test_tokenizer_laws.py::test_word_round_trips_to_the_canonical_text",
    ],
    108: [
        "unit/test_prepared.py::test_words_are_counted_and_unknown_ones_are_too",
        "unit/test_evaluation_scoring.py::test_the_summary_divides_the_same_nats_by_words_tokens_bytes_and_characters",
    ],
    109: [
        "property/test_eval_laws.py::test_each_token_is_scored_once_in_the_first_window_that_reaches_it",
        "property/test_eval_laws.py::test_sliding_windows_equal_a_loop_over_tokens_for_any_batch_size",
        "unit/test_evaluation_scoring.py::test_an_empty_text_and_foreign_tokens_are_refused",
    ],
    110: [
        "unit/test_generate.py::test_the_prompt_is_read_behind_an_eos_and_an_empty_one_is_that_eos",
        "unit/test_generate.py::test_of_a_prompt_that_is_too_long_the_last_tokens_are_kept",
        "unit/test_generate.py::test_no_new_tokens_give_an_empty_text_without_running_the_model",
        "unit/test_generate.py::test_the_smallest_contexts_work",
    ],
    112: [
        "unit/test_sampling.py::test_logits_that_are_not_finite_are_refused",
        "unit/test_generate.py::test_a_model_that_has_diverged_is_an_error",
    ],
    113: [
        "unit/test_generate.py::test_text_is_streamed_in_whole_characters",
        "property/test_tokenizer_laws.py::test_a_stream_gives_what_decode_gives",
    ],
    114: ["unit/test_loading.py::test_a_tokenizer_of_another_size_is_refused_with_both_sizes"],
    115: ["unit/test_generate.py::test_a_sample_depends_on_seed_prompt_and_its_number_only"],
    116: [
        "cli/test_cli_values.py::test_a_typo_gets_the_nearest_names",
        "cli/test_cli_values.py::test_only_the_keys_of_the_command_can_be_set",
    ],
    117: ["cli/test_cli_values.py::test_all_values_out_of_range_are_reported_at_once"],
    119: ["unit/test_device.py::test_what_is_not_there_is_refused_by_name"],
}

WITHOUT_TEST = {
    84: "no command reads a foreign .pt file (row 81 gives one to each of them)",
}


def names_in(path: Path) -> list[str]:
    """The names of the test functions in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def rows_in(name: str) -> set[int]:
    """The rows that a test's name carries."""
    match = re.match(r"test_rows?((?:_\d+(?:_to_\d+)?)+)_", name)
    rows: set[int] = set()
    for first, last in re.findall(r"_(\d+)(?:_to_(\d+))?", match[1] if match else ""):
        rows |= set(range(int(first), int(last or first) + 1))
    return rows


def rows_with_tests() -> dict[int, set[str]]:
    """Row -> its tests, in this folder by their names and elsewhere by the table."""
    found: dict[int, set[str]] = {row: set(tests) for row, tests in ELSEWHERE.items()}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name in names_in(path):
            for row in rows_in(name):
                found.setdefault(row, set()).add(f"{path.relative_to(TESTS).as_posix()}::{name}")
    return found


def test_names_of_tests_carry_their_rows() -> None:
    assert rows_in("test_row_19_every_flipped_bit") == {19}
    assert rows_in("test_rows_22_68_75_76_a_manifest") == {22, 68, 75, 76}
    assert rows_in("test_rows_1_to_10_killed_at") == set(range(1, 11))
    assert rows_in("test_rows_of_no_number") == rows_in("test_a_row_5") == set()


def test_every_row_has_a_test_or_a_reason_and_not_both() -> None:
    tested = rows_with_tests()
    assert set(tested) | set(WITHOUT_TEST) == set(ALL_ROWS), sorted(set(ALL_ROWS) - set(tested) - set(WITHOUT_TEST))
    assert set(tested) & set(WITHOUT_TEST) == set(), "has a test now: take the reason away"
    assert len(tested) >= LEAST


def test_every_test_that_the_table_names_exists() -> None:
    for tests in ELSEWHERE.values():
        for test in tests:
            path, _, name = test.partition("::")
            assert name in names_in(TESTS / path), test


def test_make_faults_runs_every_row() -> None:
    makefile = (TESTS.parent / "Makefile").read_text(encoding="utf-8")
    names = set(re.findall(r"[\w/]+\.py", makefile.partition("FAULTS_ELSEWHERE :=")[2].partition("#")[0]))
    files = {test.partition("::")[0] for tests in rows_with_tests().values() for test in tests}
    for file in files:
        folder, _, name = file.rpartition("/")
        assert folder in ("faults", "golden") or {file, name.removeprefix("test_")} & names, file
