"""What the subcommands do after parsing: load, call the library once, print a table or JSON."""

import dataclasses
import json as json_format
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
from transformers import PreTrainedModel

from pbsp.calibration.corpus import SELF, Corpus, evaluation_windows
from pbsp.compress import compress
from pbsp.config import Config, read_config_file
from pbsp.errors import ConfigError
from pbsp.evaluation.perplexity import evaluate
from pbsp.evaluation.report import evaluation_table
from pbsp.generation import Answer, generate
from pbsp.inspection import inspect_folder
from pbsp.models.gguf import BUILTIN
from pbsp.models.load import load_model
from pbsp.resources import peak_rss_bytes
from pbsp.save import save_compressed
from pbsp.storage.folder import check_output
from pbsp.tables import bytes_table, layer_table, summary_table

_STAGES = {"sample": "sampling text", "compress": "compressing blocks", "evaluate": "evaluating"}


def run_compress(
    source: str,
    output: str,
    *,
    settings: dict[str, Any],
    config_file: str | None,
    text: dict[str, Any],
    device: str,
    overwrite: bool,
    json: bool,
) -> None:
    """`pbsp compress`; everything that can be wrong with the request is found before the model loads."""
    from_file = read_config_file(Path(config_file)) if config_file else {}
    config = Config.from_dict({**from_file, **settings})
    corpus = _corpus(source, text)
    check_output(Path(output), overwrite=overwrite)
    loaded = load_model(source, device=device)
    if config.dtype == "auto" and loaded.source_dtype is not None:
        config = dataclasses.replace(config, dtype=loaded.source_dtype)
    with _bars() as progress:
        report = compress(loaded.model, loaded.tokenizer, config, corpus=corpus, progress=progress)
    start = time.perf_counter()
    report = dataclasses.replace(
        report,
        source=source,
        source_bytes=loaded.source_bytes,
        seconds={**loaded.seconds, **report.seconds},
    )
    save_compressed(loaded.model, loaded.tokenizer, output, report, overwrite=overwrite)
    found = inspect_folder(Path(output))
    seconds = {**report.seconds, "save": time.perf_counter() - start}
    if json:
        values = {
            **report.to_dict(),
            **found.to_dict(),
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        _print_json(values)
        return
    console = Console()
    console.print(summary_table(found))
    if report.calibration["note"]:
        console.print(f"calibrated on {report.calibration['note']}")
    for name, reason in found.left_uncompressed.items():
        console.print(f"left uncompressed: {name}: {reason}")
    spent = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items() if value)
    console.print(f"{spent}; peak memory {peak_rss_bytes() / 1e9:.2f} GB; written to {output}")


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
    console = Console()
    console.print(evaluation_table({source: result}))
    if seen:
        console.print("Warning: the model was calibrated on this very text; the numbers flatter it.")


def run_inspect(folder: str, *, json: bool) -> None:
    """`pbsp inspect`."""
    found = inspect_folder(Path(folder))
    if json:
        _print_json(found.to_dict())
        return
    console = Console()
    console.print(layer_table(found.layers))
    for name, reason in found.left_uncompressed.items():
        console.print(f"left uncompressed: {name}: {reason}")
    console.print(bytes_table(found))
    console.print(summary_table(found))


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
    loaded = load_model(source, device=device)
    answer: Answer = generate(
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
        "name": SELF if small else "c4",
        "samples": 32 if small else 128,
        "context": 512 if small else 2048,
    }
    return Corpus(**{**defaults, **{name: value for name, value in text.items() if value is not None}})


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
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def _print_json(values: dict[str, Any]) -> None:
    print(json_format.dumps(values, indent=1))
