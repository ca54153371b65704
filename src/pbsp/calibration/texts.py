"""Texts: a file as it is, or a named corpus from the Hub as the papers of this field read it."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pbsp.errors import CorpusError
from pbsp.models.quiet import quiet_libraries

Part = Literal["calibration", "evaluation"]
NAMED = ("c4", "wikitext2", "ptb")
_JSON_LINES = (".jsonl", ".json")
_WAYS_OUT = "use `self` (text sampled from the model) or name a text FILE"


@dataclass(frozen=True)
class Text:
    """A text of one or more documents.

    Attributes:
        name: of the corpus, or of the file without its folder.
        split: the part of the corpus.
        documents: one for a plain text file, one a row for JSON lines.
        digest: SHA-256 of the uncompressed bytes of the file, or of the documents of a named corpus.
        whole: False if there is more of it than was read.
    """

    name: str
    split: str
    documents: tuple[str, ...]
    digest: str
    whole: bool = True


def read_text(name: str, *, part: Part, characters: int | None, seed: int) -> Text:
    """The text of a named corpus or file.

    Args:
        name: c4, wikitext2, or the path of a UTF-8 text: `.txt` or any other ending is read as it is,
            `.jsonl` and `.json` are one object a line with its text under `text`; `.gz` may follow.
        part: calibration reads a named corpus' training split, evaluation its validation (c4) or
            test split (wikitext2). A file has no splits.
        characters: enough of c4 to stop at; None reads the whole shard. Others are read whole.
        seed: shuffles c4 for calibration.

    Raises:
        CorpusError: the text is missing, empty, not text, or cannot be reached.
    """
    if name == "ptb":
        raise CorpusError(
            "ptb is on the Hub only as a script, which datasets no longer runs since version 4; "
            "name a FILE that holds its text"
        )
    if name == "wikitext2":
        return _wikitext2("train" if part == "calibration" else "test")
    if name == "c4":
        return _c4(part, characters, seed)
    return _file(name)


def _file(name: str) -> Text:
    path = Path(name).expanduser()
    content = file_content(name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    documents = tuple(_rows(name, content)) if kind in _JSON_LINES else (content,)
    if not any(documents):
        raise CorpusError(f"{name} has no text in any of its rows")
    return Text(path.name, "whole file", documents, hashlib.sha256(content.encode()).hexdigest())


def file_content(name: str) -> str:
    """The text of a UTF-8 file, unpacked if it ends in `.gz`; CorpusError if it has none or is damaged."""
    data = _bytes(name, Path(name).expanduser())
    if not data:
        raise CorpusError(f"{name} is empty")
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it, or name a text file"
        ) from None
    if "\0" in content:
        raise CorpusError(f"{name} is a binary file: it has a zero byte at offset {data.index(0)}")
    return content


def _bytes(name: str, path: Path) -> bytes:
    """The file's content, uncompressed."""
    if path.is_dir():
        raise CorpusError(f"{name} is a folder; name one text file in it")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" and data else data
    except FileNotFoundError:
        raise CorpusError(
            f"there is no file {name}; name an existing one, or one of self, {', '.join(NAMED)}"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{name} is not a whole gzip file: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name itself
        raise CorpusError(f"{name} cannot be read: {error}") from None


def _rows(name: str, content: str) -> Iterator[str]:
    """The texts of JSON lines."""
    for number, row in json_lines(name, content):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = f"its keys are {', '.join(row) or 'none'}" if isinstance(row, dict) else "it is no object"
            raise CorpusError(f"{name}, line {number} has no string under `text` ({keys})")
        yield text


def json_lines(name: str, content: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each line; it ends at a newline only, as JSON strings may hold other separators."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{name}, line {number} is not JSON: {error}") from None
        yield number, value


def _wikitext2(split: str) -> Text:
    """WikiText-2 raw, its rows joined by two newlines as GPTQ's scripts do."""
    with _hub("wikitext2", "Salesforce/wikitext") as datasets:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return _named("wikitext2", split, ["\n\n".join(rows["text"])])


def _c4(part: Part, characters: int | None, seed: int) -> Text:
    """The first shard of C4's English training or validation split, streamed until there is enough."""
    calibration = part == "calibration"
    shard = "en/c4-train.00000-of-01024.json.gz" if calibration else "en/c4-validation.00000-of-00008.json.gz"
    with _hub("c4", "allenai/c4") as datasets:
        rows = datasets.load_dataset("allenai/c4", data_files={"rows": shard}, split="rows", streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=10_000) if calibration else rows
        documents, missing = [], float("inf") if characters is None else characters
        for row in rows:
            documents.append(row["text"])
            missing -= len(row["text"])
            if missing <= 0:
                break
    split = "train, first shard" if calibration else "validation, first shard"
    return _named("c4", split, documents, whole=missing > 0)


@contextmanager
def _hub(name: str, repository: str) -> Iterator[Any]:
    """The datasets library, quiet; a Hub that cannot be reached is a CorpusError that names ways out.

    One small file is asked for first: offline that fails at once, where datasets retries for 24 s.
    """
    import datasets  # takes a second to import, and only named corpora need it
    from huggingface_hub import snapshot_download

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with quiet_libraries():
            snapshot_download(repository, repo_type="dataset", allow_patterns=["README.md"])
            yield datasets
    except OSError as error:  # every error of the two libraries that a missing network causes is one
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CorpusError(f"{name} cannot be loaded from the Hub ({reason}); {_WAYS_OUT}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()


def _named(name: str, split: str, documents: list[str], *, whole: bool = True) -> Text:
    digest = hashlib.sha256("\n".join(documents).encode()).hexdigest()
    return Text(name, split, tuple(documents), digest, whole)
