import gzip
import hashlib
import json

import pytest
import torch

from pbsp.calibration import texts
from pbsp.calibration.corpus import Corpus, corpus, evaluation_windows
from pbsp.calibration.windows import draw_windows
from pbsp.errors import ConfigError, CorpusError
from tiny import tiny_model, tiny_tokenizer

MODEL = tiny_model()
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def ids(text):
    return tiny_tokenizer()(text).input_ids


def calibration(path, *, samples=4, context=8, seed=0, tokenizer=TOKENIZER):
    return corpus(str(path), samples, context, seed).windows(tokenizer, MODEL)


@pytest.fixture
def letters(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_bytes("".join(chr(97 + index % 26) for index in range(83)).encode())
    return path


def test_evaluation_takes_the_first_windows_in_order_and_drops_the_partial_one(letters):
    stream = torch.tensor(ids(letters.read_text()))
    every = evaluation_windows(str(letters), TOKENIZER, MODEL, context=8, windows=None)
    assert torch.equal(every.tokens, stream[:80].view(10, 8))
    assert every.note == ""
    first = evaluation_windows(str(letters), TOKENIZER, MODEL, context=8, windows=3)
    assert torch.equal(first.tokens, stream[:24].view(3, 8))
    assert first.note == "first 3 of 10 windows"


def test_calibration_draws_different_whole_windows_in_the_order_of_the_text(letters):
    every = evaluation_windows(str(letters), TOKENIZER, MODEL, context=8, windows=None).tokens.tolist()
    drawn = calibration(letters, samples=6)
    positions = [every.index(window) for window in drawn.tokens.tolist()]
    assert positions == sorted(set(positions))
    assert len(positions) == 6
    assert drawn.digest == calibration(letters, samples=6).digest
    assert drawn.digest != calibration(letters, samples=6, seed=1).digest


def test_draw_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    draw_windows(torch.arange(20).view(10, 2), 3, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_fewer_samples_than_asked_for_are_counted(letters):
    drawn = calibration(letters, samples=128)
    assert len(drawn) == 10
    assert drawn.note == "10 of 128 samples"
    assert drawn.describe()["requested"] == 128


def test_digests_are_of_the_tokens_and_of_the_text(letters, tmp_path):
    drawn = calibration(letters)
    flat = b"".join(int(token).to_bytes(4, "little") for token in drawn.tokens.flatten())
    assert drawn.digest == hashlib.sha256(flat).hexdigest()
    assert drawn.text_digest == hashlib.sha256(letters.read_bytes()).hexdigest()
    packed = tmp_path / "other.txt.gz"
    packed.write_bytes(gzip.compress(letters.read_bytes()))
    assert calibration(packed).text_digest == drawn.text_digest
    assert calibration(packed).text == "other.txt.gz"


def test_calibrating_on_the_evaluated_text_is_noticed(letters, tmp_path):
    evaluated = evaluation_windows(str(letters), TOKENIZER, MODEL, context=8)
    other = tmp_path / "other.txt"
    other.write_text("x" * 100)
    assert evaluated.were_calibrated_on(json.loads(json.dumps(calibration(letters).describe())))
    assert not evaluated.were_calibrated_on(calibration(other).describe())
    assert not evaluated.were_calibrated_on(None)


def test_plain_text_is_read_as_it_is(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b" = Title = \r\n\n \tend\n")
    windows = evaluation_windows(str(path), TOKENIZER, MODEL, context=20)
    assert windows.tokens[0].tolist() == ids(" = Title = \r\n\n \tend\n")


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json.gz"])
def test_json_lines_are_joined_by_the_eos(tmp_path, ending):
    rows = ["ab", "c\u2028d", "", "efg"]
    data = "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows).encode() + b"\n\n"
    path = tmp_path / f"rows{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    windows = evaluation_windows(str(path), TOKENIZER, MODEL, context=13)
    expected = [*ids("ab"), EOS, *ids("c\u2028d"), EOS, *ids("efg"), EOS]
    assert windows.tokens[0].tolist() == expected


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_the_tokenizers_doing_alike_in_calibration_and_evaluation(letters, adds_bos):
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    drawn = calibration(letters, samples=99, tokenizer=tokenizer)
    evaluated = evaluation_windows(str(letters), tokenizer, MODEL, context=8)
    assert torch.equal(drawn.tokens, evaluated.tokens)
    assert (int(drawn.tokens[0, 0]) == tokenizer.bos_token_id) == adds_bos


FAULTS = {
    "empty.txt": (b"", "is empty"),
    "short.txt": (b"abc", r"has 3 tokens, fewer than one window of 8; .*at most 3"),
    "latin.txt": (b"caf\xe9 au lait", "not UTF-8 text: byte 0xe9 at offset 3"),
    "binary.bin": (b"ab\0c" * 9, "binary file: it has a zero byte at offset 2"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "field.jsonl": (
        b'{"text": "a"}\n\n{"body": "b", "id": 1}',
        "line 3 has no string under `text` .*body, id",
    ),
    "list.jsonl": (b"[1]", "line 1 has no string"),
    "null.jsonl": (b'{"text": null}', "line 1 has no string"),
    "blank.jsonl": (b'{"text": ""}\n', "no text in any of its rows"),
    "cut.txt.gz": (gzip.compress(b"hello" * 99)[:-9], "not a whole gzip file"),
    "plain.txt.gz": (b"not compressed", "not a whole gzip file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_unusable_file_is_one_clear_line(tmp_path, name):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    for read in (calibration, lambda path: evaluation_windows(str(path), TOKENIZER, MODEL, context=8)):
        with pytest.raises(CorpusError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_told_apart(tmp_path):
    with pytest.raises(CorpusError, match=r"there is no file wikitext; .*self, c4, wikitext2"):
        calibration("wikitext")
    with pytest.raises(CorpusError, match="is a folder"):
        calibration(tmp_path)


def test_ptb_is_refused_and_file_named():
    with pytest.raises(CorpusError, match="FILE"):
        calibration("ptb")


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_offline_corpus_names_self_and_file(monkeypatch, name):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CorpusError, match=r"`self`.*FILE") as caught:
        calibration(name)
    assert "\n" not in str(caught.value)


def test_wikitext2_joins_rows_and_calibrates_on_another_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {"train": ["", " = A = \n", "", " one two three \n"], "test": [" other \n", "", " words \n"]}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: {"text": rows[split]})
    drawn = calibration("wikitext2", samples=1, context=28)
    assert drawn.tokens[0].tolist() == ids("\n\n = A = \n\n\n\n\n one two three \n")[:28]
    evaluated = evaluation_windows("wikitext2", TOKENIZER, MODEL, context=8)
    assert (drawn.split, evaluated.split) == ("train", "test")
    assert evaluated.tokens[0].tolist() == ids(" other \n")


def test_c4_is_streamed_only_as_far_as_needed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen = []

    class Rows:
        def shuffle(self, *, seed, buffer_size):
            return self

        def __iter__(self):
            for index in range(1000):
                seen.append(index)
                yield {"text": f"document {index} " * 4}

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Rows())
    windows = evaluation_windows("c4", TOKENIZER, MODEL, context=16, windows=2)
    assert len(windows) == 2
    assert windows.note == "first 2 windows"
    assert len(seen) < 10
    assert texts.read_text("c4", part="evaluation", characters=None, seed=0).whole


def test_no_tokenizer_points_to_self(letters):
    with pytest.raises(CorpusError, match=r"no tokenizer .*`self`"):
        calibration(letters, tokenizer=None)


def test_context_beyond_the_models_positions_is_refused(letters):
    with pytest.raises(CorpusError, match="windows of 129 tokens do not fit a model of 128 positions"):
        evaluation_windows(str(letters), TOKENIZER, MODEL, context=129)


def test_tokens_that_the_model_lacks_are_refused(letters):
    small = tiny_model()
    small.config.vocab_size = 50
    with pytest.raises(CorpusError, match="knows only 50"):
        Corpus(str(letters), 2, 8).windows(TOKENIZER, small)


@pytest.mark.parametrize("numbers", [(0, 8, 0), (1, 1, 0), (1, 8, -1)])
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ConfigError):
        corpus("self", *numbers)
