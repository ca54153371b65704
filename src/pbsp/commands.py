"""What the subcommands do after parsing: load, call the library once, print a table or JSON."""

import dataclasses
import json as json_format
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers import PreTrainedModel

from pbsp.calibration.corpus import SELF, Corpus, evaluation_windows
from pbsp.calibration.texts import read_text
from pbsp.compress import compress
from pbsp.config import Config, read_config_file
from pbsp.errors import ConfigError
from pbsp.evaluation.perplexity import evaluate
from pbsp.evaluation.report import evaluation_table
from pbsp.generation import check_request, generate
from pbsp.inspection import Inspection, inspect_folder
from pbsp.models.gguf import BUILTIN
from pbsp.models.load import load_model
from pbsp.resources import peak_rss_bytes
from pbsp.save import check_target, save_compressed
from pbsp.tables import bytes_table, layer_table, summary_table

_WIDTH_OF_FILES = 120
_STAGES = {"sample": "sampling text", "compress": "compressing blocks", "evaluate": "evaluating"}


def run_compress(
    source: str,
    output: str,
    *,
    settings: dict[str, Any],
    text: dict[str, Any],
    config_file: str | None,
    device: str,
    overwrite: bool,
    json: bool,
) -> None:
    """`pbsp compress`; everything that can be wrong with the request is found before the model loads."""
    filed_settings, filed_text = read_config_file(Path(config_file)) if config_file else ({}, {})
    config = Config.from_dict({**filed_settings, **settings})
    corpus = _corpus(source, {**filed_text, **text})
    _check_text(corpus.name)
    check_target(Path(output), source=source, overwrite=overwrite)
    loaded = load_model(source, device=device)
    if config.dtype == "auto" and loaded.source_dtype is not None:
        config = dataclasses.replace(config, dtype=loaded.source_dtype)
    with _bars() as progress:
        report = compress(loaded.model, loaded.tokenizer, config, corpus=corpus, progress=progress)
    report = dataclasses.replace(
        report,
        source=source,
        source_bytes=loaded.source_bytes,
        seconds={**loaded.seconds, **report.seconds},
    )
    start = time.perf_counter()
    save_compressed(loaded.model, loaded.tokenizer, output, report, overwrite=overwrite)
    seconds = {**report.seconds, "save": time.perf_counter() - start}
    found = inspect_folder(Path(output))
    if json:
        values = {
            **report.to_dict(),
            **found.to_dict(),
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        _print_json(values)
        return
    _print_tables(summary_table(found))
    print(_calibrated_on(report.calibration))
    _print_left(found)
    spent = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items() if value >= 0.05)
    print(f"{spent}; peak memory {peak_rss_bytes() / 1e9:.2f} GB; written to {output}")


def run_evaluate(
    source: str,
    *,
    text: str,
    windows: int,
    context: int,
    against: str | None,
    seed: int,
    device: str,
    dtype: str,
    json: bool,
) -> None:
    """`pbsp evaluate`."""
    Corpus(text, windows or 1, context, seed)  # refuses numbers out of range before anything is loaded
    _check_text(text)
    loaded = load_model(source, device=device, dtype=dtype)
    original = load_model(against, device=device, dtype=dtype) if against else None
    if text == SELF and original is None and getattr(loaded.model, "is_quantized", False):
        raise ConfigError("text `self` is sampled from the original; name it with --against")
    with _bars() as progress:
        chosen = evaluation_windows(
            text,
            loaded.tokenizer,
            original.model if original else loaded.model,
            context=context,
            windows=windows or None,
            seed=seed,
            progress=lambda done, total: progress("sample", done, total),
        )
        result = evaluate(
            loaded.model,
            chosen,
            original=original.model if original else None,
            progress=lambda done, total: progress("evaluate", done, total),
        )
    seen = chosen.were_calibrated_on(_calibration(loaded.model))
    if json:
        _print_json(
            {"model": source, "against": against, **result.to_json(), "calibrated_on_this_text": seen}
        )
        return
    _print_tables(evaluation_table({source: result}))
    if seen:
        print("Warning: the model was calibrated on this very text; the numbers flatter it.")


def run_inspect(folder: str, *, json: bool) -> None:
    """`pbsp inspect`."""
    found = inspect_folder(Path(folder))
    if json:
        _print_json(found.to_dict())
        return
    _print_tables(layer_table(found.layers))
    _print_left(found)
    _print_tables(bytes_table(found), summary_table(found))


def run_generate(
    source: str,
    prompt: str,
    *,
    raw: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    json: bool,
) -> None:
    """`pbsp generate`."""
    check_request(max_tokens=max_tokens, temperature=temperature, seed=seed)
    loaded = load_model(source, device=device)
    answer = generate(
        loaded.model,
        loaded.tokenizer,
        prompt,
        raw=raw,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    if json:
        _print_json({"model": source, "prompt": prompt, **dataclasses.asdict(answer)})
    else:
        print(answer.text)


def _corpus(source: str, text: dict[str, Any]) -> Corpus:
    """The calibration text; what was not given depends on whether the model is the small built-in one."""
    small = source == BUILTIN
    defaults = {
        "calibration": SELF if small else "c4",
        "samples": 32 if small else 128,
        "context": 512 if small else 2048,
    }
    values = {**defaults, **text}
    return Corpus(values.pop("calibration"), **values)


def _check_text(name: str) -> None:
    """Read a file once before the model is loaded, to refuse a bad one; other texts are too far away."""
    if name not in (SELF, "c4", "wikitext2"):
        read_text(name, part="calibration", characters=None, seed=0)


def _calibration(model: PreTrainedModel) -> dict[str, Any] | None:
    """What the model says it was calibrated on; None for an uncompressed one."""
    quantization = getattr(model.config, "quantization_config", None)
    return getattr(quantization, "provenance", {}).get("calibration")


@contextmanager
def _bars() -> Iterator[Any]:
    """A progress callback (stage, done, total) that draws a bar with an ETA on stderr per stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def _calibrated_on(calibration: dict[str, Any]) -> str:
    extent = f"{calibration['windows']} windows of {calibration['context']} tokens"
    note = f" ({calibration['note']})" if calibration["note"] else ""
    return f"calibrated on {calibration['text']}: {extent}{note}, seed {calibration['seed']}"


def _print_left(found: Inspection) -> None:
    for name, reason in found.left_uncompressed.items():
        print(f"left uncompressed: {name}: {reason}")


def _print_tables(*tables: Table) -> None:
    """Tables on stdout, wide enough for their content where no terminal says otherwise."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    console.print(*tables)


def _print_json(values: dict[str, Any]) -> None:
    print(json_format.dumps(values, indent=1, allow_nan=False))
