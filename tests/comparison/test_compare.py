import importlib.util
import json

import pytest

import pbsp
from pbsp.calibration.windows import Windows
from pbsp.comparison import run
from pbsp.comparison.folder import ComparisonFolder
from pbsp.comparison.plots import write_plots
from pbsp.comparison.rows import parse_rows
from pbsp.comparison.run import compare
from pbsp.comparison.table import markdown
from pbsp.errors import ConfigError, OutputError
from pbsp.models.load import load_model
from tiny import tiny_model, tiny_tokenizer, tiny_tokens


def windows(count=3, seed=0, text="random"):
    return Windows(tiny_tokens(count, seed=seed), text=text, split="none", text_digest=str(seed))


CALIBRATION = windows(4, seed=1)
TEXTS = [windows(3, seed=2, text="one"), windows(2, seed=3, text="two")]
ROWS = "planes 4:8, gptq bits=4, stbllm 4:8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(model):
    return load_model(model)


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory):
    """A finished comparison and its folder, which no test changes."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    return compared(loaded, folder, ROWS, keep_models=True), folder


def compared(loaded, folder, rows=ROWS, **settings):
    settings = {"calibration": CALIBRATION, "texts": TEXTS, **settings}
    return compare(loaded, parse_rows(rows), folder, **settings)


def counted(monkeypatch, *, crash_at=None):
    """The methods that `compress` is called with from now on; it is killed at one of the calls."""
    calls, compress = [], run.compress

    def counting(model, tokenizer, config, **settings):
        calls.append(config.method)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        return compress(model, tokenizer, config, **settings)

    monkeypatch.setattr(run, "compress", counting)
    return calls


def test_numbers_are_those_of_compress_save_and_evaluate(model, loaded, finished, tmp_path):
    found, _ = finished
    for row in found.rows:
        alone = load_model(model)
        report = pbsp.compress(alone.model, alone.tokenizer, pbsp.Config(**row.config), corpus=CALIBRATION)
        assert (row.nominal_bits, row.stored_bits) == (report.nominal_bits, report.stored_bits)
        assert row.counted != report.packed
        if report.packed:
            pbsp.save_compressed(alone.model, None, tmp_path / row.method, report)
            assert row.file_bytes == (tmp_path / row.method / "model.safetensors").stat().st_size
            alone = load_model(str(tmp_path / row.method))
        else:
            alone.model.float()
        for text, evaluation in zip(TEXTS, row.evaluations, strict=True):
            expected = pbsp.evaluate(alone.model, text, original=loaded.model)
            assert evaluation.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
            assert evaluation.kl.mean == pytest.approx(expected.kl.mean, rel=1e-4)
            assert evaluation.top1 == expected.top1
            assert evaluation.text == text.text
    assert [one.perplexity for one in found.original.evaluations] == [
        pbsp.evaluate(loaded.model, text).perplexity for text in TEXTS
    ]


def test_counted_bytes_are_those_of_the_layers_and_of_all_else(loaded, finished):
    row = next(row for row in finished[0].rows if row.counted)
    layers = sum(layer["out_features"] * layer["in_features"] for layer in row.report["layers"])
    everything = sum(parameter.numel() for parameter in loaded.model.parameters())  # a tied weight once
    expected = 2 * (everything - layers) + row.stored_bits * layers / 8
    assert row.file_bytes == pytest.approx(expected, abs=1)
    assert finished[0].original.file_bytes == 4 * everything
    assert finished[0].original.bits == 32


def test_rows_are_sorted_by_stored_bits_and_tables_hold_them(finished):
    found, folder = finished
    bits = [row.stored_bits for row in found.rows]
    assert bits == sorted(bits)
    table = json.loads((folder / "table.json").read_text())
    assert [row["name"] for row in table["rows"]] == [row.name for row in found.rows]
    assert table["original"]["evaluations"][0]["perplexity"] == found.original.evaluations[0].perplexity
    text = (folder / "table.md").read_text()
    assert text == markdown(found)
    lines = text.splitlines()
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert lines[2].startswith("| original | 32 | 32 |")
    assert "calibrated on random (none): 4 windows of 32 tokens" in text
    assert "evaluated on two" in text
    assert "*: no layout" in text


def test_models_are_kept_where_asked_for(finished):
    folder = finished[1]
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["planes_4-8", "stbllm_4-8"]
    assert pbsp.inspect_folder(folder / "models" / "planes_4-8").file_bytes > 0
    assert not list(folder.glob(".*"))


def test_finished_rows_are_not_done_again_and_others_can_be_added(loaded, finished, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    first = compared(loaded, tmp_path / "out", "gptq bits=4, rtn")
    assert calls == ["gptq", "rtn"]
    again = compared(loaded, tmp_path / "out", "gptq bits=4, rtn")
    assert calls == ["gptq", "rtn"]
    assert again == first
    more = compared(loaded, tmp_path / "out", "rtn, gptq bits=2")
    assert calls == ["gptq", "rtn", "gptq"]
    assert {row.name for row in more.rows} == {"gptq bits=4", "rtn", "gptq bits=2"}
    alone = next(row for row in finished[0].rows if row.method == "gptq")
    assert next(row for row in more.rows if row.name == alone.name).evaluations == alone.evaluations


def test_a_killed_comparison_goes_on_where_it_was(loaded, tmp_path, monkeypatch):
    calls = counted(monkeypatch, crash_at=2)
    with pytest.raises(KeyboardInterrupt):
        compared(loaded, tmp_path / "out", "rtn, planes 4:8, gptq bits=4")
    assert [path.stem for path in (tmp_path / "out" / "rows").iterdir()] == ["rtn"]
    assert json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]["name"] == "rtn"
    found = compared(loaded, tmp_path / "out", "rtn, planes 4:8, gptq bits=4")
    assert calls == ["rtn", "planes", "planes", "gptq"]
    assert len(found.finished) == 3
    assert not (tmp_path / "out" / "models").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_row_that_cannot_be_done_is_recorded_and_tried_again(loaded, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    found = compared(loaded, tmp_path / "out", "planes 1:7 block=7, rtn")
    assert [row.name for row in found.rows] == ["rtn", "planes 1:7 block=7"]
    assert "no layer can take 1:7" in found.failed[0].error
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| planes 1:7 block=7 | failed |" in text
    assert "planes 1:7 block=7: failed: no layer can take 1:7" in text
    compared(loaded, tmp_path / "out", "planes 1:7 block=7, rtn")
    assert calls == ["planes", "rtn", "planes"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"calibration": windows(5, seed=1)}, "calibration windows is 4 there and 5 here; name a new"),
        ({"calibration": windows(4, seed=9)}, r"another comparison: calibration digest is \w+ there"),
        ({"texts": TEXTS[:1]}, "texts is one, two there and one here; text windows is 3, 2 there"),
        ({"texts": [TEXTS[0], windows(2, seed=7, text="two")]}, r"comparison: texts digest is"),
    ],
)
def test_other_windows_in_the_same_folder_are_refused_by_name(loaded, finished, changed, message):
    with pytest.raises(ConfigError, match=message):
        compared(loaded, finished[1], **changed)


def test_another_model_in_the_same_folder_is_refused(finished, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="model digest is"):
        compared(load_model(str(tmp_path / "other")), finished[1])


def test_wrong_folders_and_texts_are_refused(loaded, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="holds no comparison"):
        compared(loaded, tmp_path / "mine")
    with pytest.raises(OutputError, match="is a file"):
        compared(loaded, tmp_path / "mine" / "thesis.txt")
    with pytest.raises(ConfigError, match="one and again have the same windows"):
        compared(loaded, tmp_path / "out", texts=[TEXTS[0], windows(3, seed=2, text="again")])
    with pytest.raises(ConfigError, match="no text"):
        compared(loaded, tmp_path / "out", texts=[])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_original_is_not_changed(loaded, finished):
    for name, parameter in tiny_model().named_parameters():
        assert parameter.equal(loaded.model.get_parameter(name)), name


def test_progress_goes_from_row_to_row(loaded, tmp_path):
    steps, done = [], []
    compared(
        loaded,
        tmp_path / "out",
        "rtn, planes 1:7 block=7, gptq",
        progress=steps.append,
        finished=lambda result, *counts: done.append((result.name, *counts)),
    )
    assert done == [("rtn", 1, 3), ("planes 1:7 block=7", 2, 3), ("gptq", 3, 3)]
    passed = [step.finished + step.share for step in steps]
    assert passed == sorted(passed)
    assert passed[-1] == 3
    assert list(dict.fromkeys(step.row for step in steps)) == ["original", "rtn", "gptq"]
    assert list(dict.fromkeys(step.stage for step in steps if step.row == "rtn")) == [
        "compress",
        "evaluate one",
        "evaluate two",
    ]


def test_plots_are_written_and_one_of_blocks_only_where_they_differ(loaded, finished, tmp_path):
    found, folder = finished
    assert write_plots(ComparisonFolder(folder), found) == ["perplexity.png", "importance.png"]
    for name in ("perplexity.png", "importance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    alike = compared(loaded, tmp_path / "out", "rtn")
    assert write_plots(ComparisonFolder(tmp_path / "out"), alike) == ["perplexity.png"]


def test_without_matplotlib_no_plot_is_written(finished, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert write_plots(ComparisonFolder(finished[1]), finished[0]) == []
