"""Result files of lmms-eval 0.7, lm-evaluation-harness 0.4 and VLMEvalKit, laid out here as they write them."""

import csv
import json
import math

import pytest

from datalloy.errors import DataError
from datalloy.evaluators import TABLE_COLUMNS, read_results, table_text
from datalloy.evaluators.measure import Measure

LMMS = {
    "results": {
        "chartqa": {
            "alias": "chartqa",
            "relaxed_overall,none": 0.75,
            "samples": 40,
            "relaxed_overall_stderr,none": 0.0693375245281537,
            "relaxed_overall_stderr_clt,none": 0.0693375245281537,
            "relaxed_overall_stderr_clustered,none": "N/A",
        },
        "videos": {
            "alias": "videos",
            "acc,none": 0.5,
            "samples": 30,
            "acc_stderr,none": 0.09,
            "acc_stderr_clt,none": 0.09,
            "acc_stderr_clustered,none": 0.12,
        },
    },
    "group_subtasks": {"chartqa": [], "videos": []},
    "higher_is_better": {"chartqa": {"relaxed_overall": True}, "videos": {"acc": True}},
    "n-samples": {"chartqa": {"original": 2500, "effective": 40}},
    "config": {"model": "qwen2_5_vl", "model_args": "pretrained=merges/m1"},
    "lmms_eval_version": "0.7.3",
    "model_name": "merges/m1",
}
LM = {
    "results": {
        "chartqa": {
            "name": "chartqa",
            "alias": "chartqa",
            "sample_len": 20,
            "exact_match,none": 0.5,
            "exact_match_stderr,none": "N/A",
            "exact_match,strict": 0.45,
            "exact_match_stderr,strict": 0.11,
        },
        "wiki": {"name": "wiki", "alias": "wiki", "sample_len": 9, "word_perplexity,none": 12.5},
    },
    "groups": {"mmmu_val": {"name": "mmmu_val", "alias": "mmmu_val", "acc,none": 0.4, "acc_stderr,none": 0.02}},
    "higher_is_better": {"chartqa": {"exact_match": True}, "wiki": {"word_perplexity": False}},
    "n-samples": {"chartqa": {"original": 20, "effective": 20}},
    "config": {"model": "hf-multimodal"},
    "model_name": "org/model",
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- results of the harnesses


def test_lmms_eval_results(write):
    assert read_results(write("merges__m1/20260806_102030_results.json", LMMS)) == [
        Measure("lmms-eval", "merges/m1", "chartqa", "relaxed_overall", "none", 0.75, 0.0693375245281537, 40, True),
        Measure("lmms-eval", "merges/m1", "videos", "acc", "none", 0.5, 0.12, 30, True),
    ]


def test_lm_evaluation_harness_results_with_filters_and_groups(write):
    assert read_results(write("results_2026-08-21T10-56-54.123.json", LM)) == [
        Measure("lm-evaluation-harness", "org/model", "mmmu_val", "acc", "none", 0.4, 0.02, None, None),
        Measure("lm-evaluation-harness", "org/model", "chartqa", "exact_match", "none", 0.5, None, 20, True),
        Measure("lm-evaluation-harness", "org/model", "chartqa", "exact_match", "strict", 0.45, 0.11, 20, True),
        Measure("lm-evaluation-harness", "org/model", "wiki", "word_perplexity", "none", 12.5, None, 9, False),
    ]


def test_a_model_without_a_name_is_called_as_the_folder(write):
    path = write("m1/20260806_102030_results.json", {**LMMS, "model_name": ""})
    assert {measure.model for measure in read_results(path)} == {"m1"}


def test_a_value_that_is_not_finite_is_refused(write):
    broken = {"results": {"chartqa": {"acc,none": math.nan}}, "lmms_eval_version": "0.7.3"}
    with pytest.raises(DataError, match=r"chartqa has acc,none = nan; that evaluation failed"):
        read_results(write("20260806_102030_results.json", broken))


def test_a_metric_that_is_no_number_is_left_out_with_a_word(write, caplog):
    several = {"results": {"t": {"acc,none": 0.5, "by_type,none": {"a": 1}}}, "lmms_eval_version": "0.7.3"}
    assert [m.metric for m in read_results(write("20260806_102030_results.json", several))] == ["acc"]
    assert "by_type,none of t is {'a': 1}, no number; it is left out" in caplog.text


# --- samples of the harnesses


def lmms_sample(doc_id, **metrics):
    about = {"doc_id": doc_id, "target": "4", "filtered_resps": ["4"], "token_counts": [None], "doc_hash": "x"}
    return {**about, "input": "How many?", **metrics}


def test_lmms_eval_samples_give_mean_error_and_n(write):
    rows = [lmms_sample(i, acc=float(i < 3), split="human") for i in range(4)]
    (found,) = read_results(write("m1/20260806_102030_samples_chartqa.jsonl", lines(*rows)))
    assert found == Measure("lmms-eval", "m1", "chartqa", "acc", "none", 0.75, pytest.approx(0.25), 4, None)


def test_scores_in_a_dict_are_found(write):
    rows = [lmms_sample(i, perception={"score": i, "category": "c"}) for i in range(3)]
    (found,) = read_results(write("20260806_102030_samples_videos.jsonl", lines(*rows)))
    assert (found.metric, found.value, found.n) == ("perception", 1.0, 3)


def test_lm_evaluation_harness_samples_are_told_apart_by_filter(write):
    rows = [
        {"doc_id": i, "target": "4", "filter": name, "metrics": ["exact_match"], "doc": {"x": 1}, "exact_match": score}
        for i, scores in enumerate([(1.0, 0.0), (1.0, 1.0)])
        for name, score in zip(("none", "strict"), scores, strict=True)
    ]
    found = read_results(write("org__model/samples_chartqa_2026-08-21T10-56-54.123.jsonl", lines(*rows)))
    assert [(m.task, m.variant, m.value, m.standard_error, m.n) for m in found] == [
        ("chartqa", "none", 1.0, 0.0, 2),
        ("chartqa", "strict", 0.5, 0.5, 2),
    ]


def test_samples_of_several_filters_that_cannot_be_told_apart_are_refused(write):
    rows = [lmms_sample(0, acc=1.0), lmms_sample(0, acc=0.0)]
    with pytest.raises(DataError, match=r"jsonl:2: doc_id 0 comes a second time"):
        read_results(write("20260806_102030_samples_chartqa.jsonl", lines(*rows)))


def test_a_metric_of_some_answers_only_is_refused(write):
    rows = [lmms_sample(0, acc=1.0), lmms_sample(1, acc=None)]
    with pytest.raises(DataError, match="acc has a number for 1 of 2 answers"):
        read_results(write("20260806_102030_samples_chartqa.jsonl", lines(*rows)))


def test_samples_of_an_unknown_task_are_refused(write):
    with pytest.raises(DataError, match="not named as samples are"):
        read_results(write("mine.jsonl", lines(lmms_sample(0, acc=1.0))))


# --- VLMEvalKit


def test_multiple_choice_scores_by_split_and_category(write):
    table = '"split","Overall","AR","CP"\n"dev","0.71","0.5","0.9"\n"test","0.69","","0.8"\n'
    found = read_results(write("out/m1/T1/m1_MMBench_DEV_EN_acc.csv", table))
    assert [(m.model, m.task, m.variant, m.metric, m.value) for m in found] == [
        ("m1", "MMBench_DEV_EN", "dev", "Overall", 0.71),
        ("m1", "MMBench_DEV_EN", "dev", "AR", 0.5),
        ("m1", "MMBench_DEV_EN", "dev", "CP", 0.9),
        ("m1", "MMBench_DEV_EN", "test", "Overall", 0.69),
        ("m1", "MMBench_DEV_EN", "test", "CP", 0.8),
    ]
    assert {(m.standard_error, m.n, m.higher_is_better) for m in found} == {(None, None, None)}


def test_vqa_scores_in_per_cent_stay_in_per_cent(write):
    found = read_results(
        write("m1_ChartQA_TEST_acc.csv", '"test_human","test_augmented","Overall"\n"61.2","88","74.6"\n')
    )
    assert {m.metric: m.value for m in found} == {"test_human": 61.2, "test_augmented": 88.0, "Overall": 74.6}
    assert {(m.model, m.task) for m in found} == {("m1", "ChartQA_TEST")}


def test_json_scores_are_the_same_table(write):
    (found,) = read_results(write("m1_MathVista_acc.json", [{"split": "none", "Overall": 0.5}]))
    assert (found.task, found.metric, found.variant, found.value) == ("MathVista", "Overall", "none", 0.5)


@pytest.mark.parametrize(("name", "column"), [("exact_matching_result", "hit"), ("results", "eval_score")])
def test_single_answers_give_error_and_n(write, name, column):
    table = f"index\tsplit\t{column}\n" + "".join(f"{i}\tdev\t{int(i < 3)}\n" for i in range(4))
    (found,) = read_results(write(f"m1/m1_MMBench_{name}.tsv", table))
    assert found == Measure("VLMEvalKit", "m1", "MMBench", column, "dev", 0.75, pytest.approx(0.25), 4, True)


def test_an_answer_that_was_not_judged_is_refused(write):
    with pytest.raises(DataError, match=r"tsv:3: hit is '', must be a number"):
        read_results(write("m1/m1_MMBench_result.tsv", "index\thit\n0\t1\n1\t\n"))


# --- all of them


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("m1_MMBench_result.xlsx", "PK", "is a spreadsheet; save it as CSV"),
        ("x.txt", "x", "no result file that is known"),
        ("results.json", "{", "is not JSON"),
        ("results.json", "[1, 2]", "neither a results file of a harness nor a table"),
        ("m1_MMBench_acc.csv", '"split","Overall"\n', "has no rows"),
        ("m1_MMBench_acc.csv", "split,Overall\nnone\n", "rows of different lengths"),
        ("m1_MMBench_acc.csv", "split,Overall\nnone,bad\n", "holds no metric with a number"),
    ],
)
def test_other_files_are_refused_by_name(write, name, content, problem):
    with pytest.raises(DataError, match=problem) as caught:
        read_results(write(name, content))
    assert name in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nothing\.json"):
        read_results(tmp_path / "nothing.json")


def test_the_tidy_table_reads_back_as_it_was(write):
    measures = read_results(write("merges__m1/20260806_102030_results.json", LMMS))
    header, first, _ = list(csv.reader(table_text(measures).splitlines()))
    assert tuple(header) == TABLE_COLUMNS
    assert dict(zip(header, first, strict=True))["standard_error"] == "0.0693375245281537"
