import importlib.util
import json

import pytest

import pbsp.commands.compare
from pbsp.cli import main
from tiny import tiny_model, tiny_tokenizer

CALIBRATION = ["--calibration", "self", "--samples", "2", "--context", "16"]
NUMBERS = [*CALIBRATION, "--windows", "2", "--eval-context", "32"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return folder


def run(capsys, work, out, methods, *options):
    """Exit code, stdout and stderr of `pbsp compare`."""
    text = ["--text", str(work / "text.txt"), *NUMBERS]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(work / "model"), "-o", str(out), "--methods", methods, *text, *options])
    return ended.value.code, *capsys.readouterr()


def test_compare_prints_a_table_and_where_it_is(capsys, work, tmp_path):
    code, output, errors = run(capsys, work, tmp_path / "out", "planes, rtn", "--patterns", "2:8,4:8")
    assert code == 0
    for part in (
        "original",
        "planes 2:8",
        "planes 4:8",
        "rtn",
        "evaluated on text.txt",
        "table.md, perplexity.png",
    ):
        assert part in output
    assert [line.split(":")[0] for line in errors.splitlines()] == ["1 of 3", "2 of 3", "3 of 3"]
    assert {"compare.json", "table.md", "table.json", "perplexity.png", "rows", "cache"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    code, again, errors = run(capsys, work, tmp_path / "out", "planes, rtn", "--patterns", "2:8,4:8")
    assert (code, again, errors) == (0, output, "")


def test_json_is_one_object_with_the_numbers_of_compress_and_evaluate(capsys, work, tmp_path):
    model, text = str(work / "model"), str(work / "text.txt")
    code, output, _ = run(capsys, work, tmp_path / "out", "planes 4:8", "--json")
    assert code == 0
    (row,) = json.loads(output)["rows"]
    assert output == (tmp_path / "out" / "table.json").read_text(encoding="utf-8") or json.loads(
        output
    ) == json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    with pytest.raises(SystemExit):
        main(["compress", model, "-o", str(tmp_path / "alone"), "--pattern", "4:8", *CALIBRATION, "--json"])
    report = json.loads(capsys.readouterr().out)
    arguments = ["--text", text, "--windows", "2", "--context", "32", "--against", model, "--json"]
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "alone"), *arguments])
    alone = json.loads(capsys.readouterr().out)
    assert row["stored_bits"] == report["stored_bits"]
    assert row["calibration"] == report["calibration"]
    assert row["evaluations"][0]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert row["evaluations"][0]["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    assert row["evaluations"][0]["digest"] == alone["digest"]


def test_failed_rows_leave_the_others_and_only_failed_ones_are_an_error(capsys, work, tmp_path):
    code, output, errors = run(capsys, work, tmp_path / "out", "planes 1:7 block=7, rtn")
    assert code == 0
    assert "planes 1:7 block=7: failed: no layer can take 1:7" in output
    assert "1 of 2: planes 1:7 block=7: failed" in errors
    code, _, errors = run(capsys, work, tmp_path / "out", "planes 1:7 block=7")
    assert code == 2
    assert errors.splitlines()[-1].startswith("pbsp: no row succeeded; planes 1:7 block=7: no layer can take")


def test_without_matplotlib_one_line_says_so(capsys, work, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, output, _ = run(capsys, work, tmp_path / "out", "rtn")
    assert code == 0
    assert "no plots: matplotlib is not installed" in output
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ("foo", [], "row 'foo': method is 'foo'"),
        ("rtn, rtn", [], "are the same"),
        ("planes", ["--patterns", "9:8"], "keeps 9 of 8"),
        ("rtn", ["--text", "missing.txt"], "there is no file missing.txt"),
        ("rtn", ["--calibration", "missing.txt"], "there is no file missing.txt"),
        ("rtn", ["--samples", "0"], "0 windows"),
        ("rtn", ["--eval-context", "1"], "context of 1"),
        ("rtn", ["--seed", "-1"], "seed is -1"),
    ],
)
def test_a_wrong_request_is_refused_before_the_model_loads(
    capsys, work, tmp_path, monkeypatch, methods, options, message
):
    monkeypatch.setattr(pbsp.commands.compare, "load_model", lambda *_, **__: pytest.fail("loaded"))
    code, output, errors = run(capsys, work, tmp_path / "out", methods, *options)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused_in_one_line(capsys, work, tmp_path):
    assert run(capsys, work, tmp_path / "out", "rtn")[0] == 0
    code, output, errors = run(capsys, work, tmp_path / "out", "rtn", "--windows", "3")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "text windows is 2 there and 3 here" in errors
