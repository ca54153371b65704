import dataclasses
import gzip
import io
import json
import logging
import os
import random
import socket
import sys
from pathlib import Path

import numpy
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console

from pbsp.calibration.corpus import Corpus
from pbsp.compress import compress
from pbsp.config import Config
from pbsp.errors import ConfigError, CorpusError, ModelError
from pbsp.evaluation.report import tasks_table
from pbsp.evaluation.result import Estimate
from pbsp.evaluation.task_files import TASK_FILES
from pbsp.evaluation.tasks import TaskResult, evaluate_tasks, load_tasks
from pbsp.integrations import lm_eval as harness
from pbsp.save import save_compressed
from saved import load, packed_linears
from tiny import tiny_model, tiny_tokenizer

ANSWERS = ["iron", "a cold wet stone", "sky", "some of the oldest wood"]
ARC = [
    {
        "id": str(index),
        "question": f"What is {thing}?",
        "choices": {"text": ANSWERS[index % 3 :], "label": list("ABCD")[: len(ANSWERS) - index % 3]},
        "answerKey": "AB"[index % 2],
    }
    for index, thing in enumerate(("grey", "old", "far up", "hard", "soft", "here"))
]
PIQA = [
    {"goal": goal, "sol1": "use a knife", "sol2": second, "label": index % 2}
    for index, (goal, second) in enumerate((("cut", "sing"), ("cook", "wait until it is done"), ("go", "é")))
]
WINOGRANDE = [
    {"sentence": "Ann met Bea when _ was ill.", "option1": "Ann", "option2": "Bea", "answer": "1"},
    {"sentence": "The box held no hat as _ was small.", "option1": "it", "option2": "that", "answer": "2"},
]
HELLASWAG = {
    "activity_label": "Roofs",
    "ctx_a": "A man sits [title] Look up",
    "ctx_b": "he",
    "endings": ["sings.", "[step] Falls."],
    "label": "1",
}
LAMBADA = {"text": "one two three"}


@pytest.fixture
def files(tmp_path):
    """A folder of three tasks, one of them packed."""
    write(tmp_path / "arc_easy.test.jsonl", ARC)
    write(tmp_path / "winogrande_xl.dev.jsonl", WINOGRANDE)
    lines = "".join(json.dumps(row) + "\n" for row in PIQA)
    (tmp_path / "piqa.valid.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sharp_model(name="llama"):
    """The tiny model with predictions that differ between tokens."""
    model = tiny_model(name)
    model.get_output_embeddings().weight.data *= 20
    return model


def log_likelihood(model, tokenizer, prompt, continuation):
    """Of the continuation's tokens, one after the other."""
    tokens, known = tokenizer(prompt + continuation).input_ids, len(tokenizer(prompt).input_ids)
    total = 0.0
    for position in range(known, len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:position]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[tokens[position]])
    return total


def by_hand(requests, score):
    """Right answers by log-likelihood, and by log-likelihood per character of the choice."""
    right, right_by_length = [], []
    for pairs, lengths, answer in requests:
        values = torch.tensor([score(*pair) for pair in pairs])
        right.append(float(values.argmax() == answer))
        right_by_length.append(float((values / torch.tensor(lengths)).argmax() == answer))
    return Estimate.of(right), Estimate.of(right_by_length)


def arc_requests():
    for row in ARC:
        choices = row["choices"]["text"]
        pairs = [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in choices]
        yield pairs, [len(choice) for choice in choices], "ABCD".index(row["answerKey"])


def piqa_requests():
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        pairs = [(f"Question: {row['goal']}\nAnswer:", f" {choice}") for choice in choices]
        yield pairs, [len(choice) for choice in choices], row["label"]


def winogrande_requests():
    for row in WINOGRANDE:
        before, after = row["sentence"].split("_")
        pairs = [(before + row[option], after) for option in ("option1", "option2")]
        yield pairs, [1, 1], int(row["answer"]) - 1


@pytest.mark.parametrize("adds_bos", [False, True])
def test_accuracies_are_those_of_log_likelihoods_found_by_hand(files, adds_bos):
    model, tokenizer = sharp_model(), tiny_tokenizer(adds_bos=adds_bos)
    arc, piqa, winogrande = evaluate_tasks(
        model, tokenizer, ["arc_easy", "piqa", "winogrande"], files=files, batch=3
    )
    requested = (arc_requests(), piqa_requests(), winogrande_requests())
    for found, requests in zip((arc, piqa, winogrande), requested, strict=True):
        acc, acc_norm = by_hand(requests, lambda *pair: log_likelihood(model, tokenizer, *pair))
        assert found.acc.mean == pytest.approx(acc.mean)
        assert found.acc.stderr == pytest.approx(acc.stderr)
        if found is winogrande:
            assert found.acc_norm is None
        else:
            assert found.acc_norm.mean == pytest.approx(acc_norm.mean)
            assert found.acc_norm.stderr == pytest.approx(acc_norm.stderr)
    assert 0 < arc.acc.mean < 1
    assert arc.acc != arc.acc_norm
    assert [one.documents for one in (arc, piqa, winogrande)] == [6, 3, 2]
    assert {(one.shots, one.source, one.cut, one.dtype) for one in (arc, piqa)} == {
        (0, "local files", 0, "float32")
    }


def test_rows_are_asked_as_the_official_tasks_ask(tmp_path):
    write(tmp_path / "arc_easy.test.jsonl", ARC[:1])
    write(tmp_path / "piqa.valid.jsonl", PIQA[:1])
    write(tmp_path / "winogrande_xl.dev.jsonl", WINOGRANDE[:1])
    write(tmp_path / "hellaswag.val.jsonl", [HELLASWAG])
    write(tmp_path / "lambada_openai.test.jsonl", [LAMBADA])
    asked = {
        "arc_easy": [("Question: What is grey?\nAnswer:", f" {choice}") for choice in ANSWERS],
        "piqa": [("Question: cut\nAnswer:", " use a knife"), ("Question: cut\nAnswer:", " sing")],
        "winogrande": [("Ann met Bea when Ann", " was ill."), ("Ann met Bea when Bea", " was ill.")],
        "hellaswag": [
            ("Roofs: A man sits. Look up He", " sings."),
            ("Roofs: A man sits. Look up He", "  Falls."),
        ],
        "lambada_openai": [("one two", " three")],
    }
    tasks = load_tasks(list(asked), files=tmp_path).definitions["tasks"]
    with harness.quiet_harness():
        for name, requests in asked.items():
            tasks[name].build_all_requests()
            assert [instance.args for instance in tasks[name].instances] == requests, name


def test_only_the_first_documents_are_scored(files):
    model, tokenizer = sharp_model(), tiny_tokenizer()
    (found,) = evaluate_tasks(model, tokenizer, ["arc_easy"], files=files, limit=2)
    assert (found.documents, found.documents_in_all) == (2, 6)
    write(files / "arc_easy.test.jsonl", ARC[:2])
    (alone,) = evaluate_tasks(model, tokenizer, ["arc_easy"], files=files)
    assert found == dataclasses.replace(alone, documents_in_all=6)
    (one,) = evaluate_tasks(model, tokenizer, ["arc_easy"], files=files, limit=1)
    assert one.acc.stderr is None
    assert one.digest != found.digest


@pytest.mark.parametrize("batch", [1, 50])
def test_batch_size_does_not_change_the_result(files, batch):
    seen = []
    arguments = (sharp_model(), tiny_tokenizer(), ["arc_easy", "piqa"])
    found = evaluate_tasks(
        *arguments, files=files, batch=batch, progress=lambda done, total: seen.append((done, total))
    )
    assert found == evaluate_tasks(*arguments, files=files)
    requests = sum(len(row["choices"]["text"]) for row in ARC) + 2 * len(PIQA)
    assert seen == [(done, requests) for done in range(1, requests + 1)]


def test_a_packed_model_scores_as_the_dense_one_of_its_weights(files, tmp_path):
    model, tokenizer = sharp_model("llama-untied"), tiny_tokenizer()
    report = compress(model, tokenizer, Config(), corpus=Corpus("self", 2, 16))
    save_compressed(model, tokenizer, tmp_path / "out", report)
    packed = load(tmp_path / "out", dtype=torch.float32)
    found = evaluate_tasks(packed, tokenizer, ["arc_easy", "piqa"], files=files)
    assert packed_linears(packed)
    assert found == evaluate_tasks(packed.dequantize(), tokenizer, ["arc_easy", "piqa"], files=files)


def test_nothing_of_the_callers_changes_and_nothing_is_printed_or_asked_of_the_net(files, capfd, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    model, tokenizer = tiny_model("gpt2").train(), tiny_tokenizer()
    environment, level = dict(os.environ), logging.getLogger("lm_eval").level
    states = random_states()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    evaluate_tasks(model, tokenizer, ["arc_easy", "winogrande"], files=files)
    assert random_states()[1:] == states[1:]  # beartype, which checks the types in tests, draws from Python's
    assert model.training
    assert tokenizer.pad_token is None
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert (dict(os.environ), logging.getLogger("lm_eval").level) == (environment, level)
    assert capfd.readouterr() == ("", "")
    assert asked == []


def random_states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_seeds_inside_are_lm_evals_and_the_callers_states_come_back():
    states = random_states()
    for _ in range(2):
        with harness.harness_seeds():
            drawn = random.random(), numpy.random.random(), float(torch.rand(()))
        assert drawn == (random.Random(0).random(), *numpy.random.RandomState(1234).random(1), drawn[2])
        assert drawn[2] == float(torch.rand((), generator=torch.Generator().manual_seed(1234)))
    assert random_states() == states


def test_prompts_that_lose_their_beginning_are_counted(files):
    write(files / "piqa.valid.jsonl", [*PIQA, {**PIQA[0], "goal": "x" * 120}])
    (found,) = evaluate_tasks(sharp_model(), tiny_tokenizer(), ["piqa"], files=files)
    assert found.cut == 2
    assert "2 of piqa" in table_text(("ours", found))


def test_outputs_that_are_not_finite_and_unfit_models_are_errors(files):
    broken = tiny_model()
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="18 of 18 log-likelihoods are not finite"):
        evaluate_tasks(broken, tiny_tokenizer(), ["arc_easy"], files=files)
    with pytest.raises(ModelError, match="no tokenizer"):
        evaluate_tasks(tiny_model(), None, ["arc_easy"], files=files)
    with pytest.raises(ConfigError, match="batch of 0"):
        evaluate_tasks(tiny_model(), tiny_tokenizer(), ["arc_easy"], files=files, batch=0)
    write(files / "piqa.valid.jsonl", [{**PIQA[0], "sol2": "x" * 200}])
    with pytest.raises(CorpusError, match="201 tokens do not fit a model of 128 positions"):
        evaluate_tasks(tiny_model(), tiny_tokenizer(), ["piqa"], files=files)
    small = tiny_model()
    small.config.vocab_size = 10
    with pytest.raises(CorpusError, match="knows only 10"):
        evaluate_tasks(small, tiny_tokenizer(), ["winogrande"], files=files)


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ([], {}, "no task is named"),
        (["arc_easy", ""], {}, "no task is named"),
        (["arc_easy"], {"limit": 0}, "limit is 0"),
        (["mmlu"], {}, "task 'mmlu' cannot be read from files; those that can: arc_challenge"),
        (["rte"], {}, "holds neither rte.dev.jsonl nor rte.dev.jsonl.gz"),
        (["rte"], {"files": Path("nowhere")}, "nowhere is not a folder"),
    ],
)
def test_wrong_requests_are_refused(files, tasks, options, message):
    with pytest.raises((ConfigError, CorpusError), match=message):
        load_tasks(tasks, **{"files": files, **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "has no rows"),
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 lacks goal, sol1, sol2, label; task piqa reads goal"),
        (json.dumps(PIQA[0]) + '\n{"goal": "a"}', "line 2 lacks sol1, sol2, label"),
        (json.dumps({**PIQA[0], "label": 2}), "line 1 has no right answer"),
        (json.dumps({**PIQA[0], "label": -1}), "line 1 has no right answer"),
        (json.dumps({**PIQA[0], "sol1": ""}), "line 1 has no right answer"),
        (json.dumps({**PIQA[0], "goal": None}), "line 1 lacks goal"),
        (
            json.dumps(PIQA[0]) + "\n" + json.dumps({**PIQA[1], "goal": 5}),
            "rows of task piqa are not as lm-eval",
        ),
    ],
)
def test_rows_that_the_task_cannot_take_are_named(files, content, message):
    (files / "piqa.valid.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_tasks(["piqa"], files=files)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("arc_easy", {**ARC[0], "answerKey": "E"}),
        ("winogrande", {**WINOGRANDE[0], "answer": ""}),
        ("winogrande", {**WINOGRANDE[0], "sentence": "no blank"}),
        ("hellaswag", {**HELLASWAG, "label": ""}),
        ("lambada_openai", {"text": ""}),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": "true"}),
    ],
)
def test_rows_without_a_right_answer_are_named(tmp_path, task, row):
    write(tmp_path / f"{TASK_FILES[task].stem}.jsonl", [row])
    with pytest.raises(CorpusError, match=f"line 1 has no right answer among whole choices for task {task}"):
        load_tasks([task], files=tmp_path)


def test_unknown_official_names_get_the_nearest_ones(monkeypatch):
    index = harness.TaskManager(
        include_defaults=False, include_path=[Path(harness.lm_eval.__file__).parent / "tasks" / "arc"]
    )
    monkeypatch.setattr(harness, "TaskManager", lambda **_: index)  # the whole one takes 10 s to read
    with pytest.raises(ConfigError, match=r"no task 'arc_esy'; did you mean arc_easy"):
        load_tasks(["arc_esy"])
    with pytest.raises(ConfigError, match=r"no task 'zzzz'; `lm_eval ls tasks` lists all"):
        load_tasks(["zzzz"])


def test_data_that_the_hub_does_not_give_names_the_way_out(monkeypatch):
    def unreachable(*arguments, **settings):
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(harness, "snapshot_download", unreachable)
    with pytest.raises(CorpusError, match=r"arc_easy cannot be loaded from the Hub .*--task-files") as raised:
        load_tasks(["arc_easy"])
    assert "\n" not in str(raised.value)


def test_official_tasks_are_lm_evals_own(monkeypatch):
    """With the data given in place of the Hub's, all of the official definition is used."""
    rows = {"validation": PIQA, "train": [{**PIQA[0], "goal": "learn"}]}
    given = {split: harness.datasets.Dataset.from_list(content) for split, content in rows.items()}
    monkeypatch.setattr(harness, "snapshot_download", lambda *_, **__: None)
    monkeypatch.setattr(harness.datasets, "load_dataset", lambda path, **_: {"baber/piqa": given}[path])
    model, tokenizer = sharp_model(), tiny_tokenizer()
    (found,) = evaluate_tasks(model, tokenizer, ["piqa"])
    acc, acc_norm = by_hand(piqa_requests(), lambda *pair: log_likelihood(model, tokenizer, *pair))
    assert (found.acc.mean, found.acc_norm.mean) == pytest.approx((acc.mean, acc_norm.mean))
    assert (found.source, found.documents) == ("official", 3)


def test_groups_have_the_mean_of_their_documents(files, monkeypatch):
    model, tokenizer = sharp_model(), tiny_tokenizer()
    loaded = load_tasks(["arc_easy", "piqa"], files=files)
    results = evaluate_tasks(model, tokenizer, ["arc_easy", "piqa"], files=files)
    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = harness.lm_eval.api.group.Group.from_config(
        {"group": "both", "task": [], "aggregate_metric_list": metrics}
    )
    for task in loaded.definitions["tasks"].values():
        group.add(task)
    loaded.definitions["groups"] = {"both": group}
    monkeypatch.setattr("pbsp.evaluation.tasks.load_tasks", lambda *_, **__: loaded)
    *leaves, both = evaluate_tasks(model, tokenizer, ["both"])
    assert tuple(leaves) == results
    right = sum(result.acc.mean * result.documents for result in results)
    assert both.acc.mean == pytest.approx(right / 9)
    assert both.acc.stderr is not None
    assert (both.documents, both.digest) == (9, None)


def test_without_lm_eval_the_error_says_how_to_install_it(monkeypatch, files):
    monkeypatch.delitem(sys.modules, "pbsp.integrations.lm_eval")
    monkeypatch.delattr("pbsp.integrations.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'pip install "pbsp\[tasks\]"'):
        load_tasks(["arc_easy"], files=files)


def test_json_and_table_label_every_number(files):
    found = evaluate_tasks(sharp_model(), tiny_tokenizer(), ["arc_easy", "winogrande"], files=files, limit=2)
    arc, winogrande = (json.loads(json.dumps(one.to_json(), allow_nan=False)) for one in found)
    assert (arc["acc"], arc["acc_stderr"]) == (found[0].acc.mean, found[0].acc.stderr)
    assert {"acc_norm", "acc_norm_stderr", "documents", "shots", "source", "harness", "digest"} <= set(arc)
    assert winogrande["acc_norm"] is winogrande["acc_norm_stderr"] is None
    text = table_text(*(("ours", one) for one in found), *(("original", one) for one in found))
    for part in (
        "ours",
        "original",
        "arc_easy",
        f"{found[0].acc_norm.mean:.2%} ± {found[0].acc_norm.stderr:.2%}",
        "2 of 6",
        found[0].digest[:12],
        f"lm-eval {harness.VERSION}",
        "local files",
        "float32 on cpu",
    ):
        assert part in text


def table_text(*rows):
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(tasks_table(rows))
    return console.export_text()


def test_other_metrics_have_no_standard_error_of_ours(tmp_path):
    write(tmp_path / "lambada_openai.test.jsonl", [LAMBADA, {"text": "three two one"}])
    (found,) = evaluate_tasks(sharp_model(), tiny_tokenizer(), ["lambada_openai"], files=tmp_path)
    assert isinstance(found, TaskResult)
    assert set(found.metrics) == {"acc", "perplexity"}
    assert found.metrics["perplexity"].mean > 1
    assert found.metrics["perplexity"].stderr is None


@pytest.mark.skipif("PBSP_DATA" not in os.environ, reason="PBSP_DATA names no folder of task files")
def test_whole_task_files_are_read():
    counts = {"arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "hellaswag": 10042, "openbookqa": 500}
    counts |= {"rte": 277, "winogrande": 1267, "piqa": 1838, "lambada_openai": 5153}
    loaded = load_tasks(list(counts), files=Path(os.environ["PBSP_DATA"]))
    assert {name: len(task.task_docs) for name, task in loaded.definitions["tasks"].items()} == counts
