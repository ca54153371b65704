"""What `pbsp compress` does after parsing: load the model, compress it, save it, say what became of it."""

import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pbsp.allocation.planfile import plan_text, read_plan
from pbsp.calibration.corpus import Corpus, check_text
from pbsp.commands.calibration import calibrated_on, calibration_corpus
from pbsp.commands.console import bars, parse_size, print_json, print_tables
from pbsp.commands.folders import check_folders, unfinished_of
from pbsp.commands.inspect import print_left
from pbsp.commands.tables import preview_table, summary_table
from pbsp.compress import check_ranks, compress
from pbsp.config import Config, read_config_file, with_settings
from pbsp.distributed import device_of_rank, joined
from pbsp.errors import ConfigError
from pbsp.inspection import Inspection, inspect_folder
from pbsp.methods.table import packs
from pbsp.models.load import LoadedModel, load_model
from pbsp.models.memory import check_memory
from pbsp.preview import preview
from pbsp.report import CompressionReport
from pbsp.resources import peak_rss_bytes
from pbsp.save import save_compressed
from pbsp.unfinished import Unfinished


def run_compress(
    source: str,
    output: str | None,
    *,
    settings: dict[str, Any],
    hyperparameters: list[str],
    text: dict[str, Any],
    config_file: str | None,
    device: str,
    memory: str,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    json: bool,
) -> None:
    """`pbsp compress`; everything that can be wrong with the request is found before the model loads."""
    filed_settings, filed_text = read_config_file(Path(config_file)) if config_file else ({}, {})
    if "file_size" in settings:
        settings = {**settings, "file_size": parse_size(settings["file_size"])}
    if "plan" in settings:
        settings = {**settings, "plan": read_plan(Path(settings["plan"]))}
    config = Config.from_dict(with_settings({**filed_settings, **settings}, hyperparameters))
    if not packs(config.build()):
        raise ConfigError(
            f"method {config.method} has no packed layout here, so its result cannot be saved; "
            "measure it with pbsp compare"
        )
    corpus = calibration_corpus(source, {**filed_text, **text})
    device = device_of_rank(device)
    check_memory(memory)
    with joined(device) as ranks:
        check_ranks(config, corpus.samples, ranks)
        if ranks.size > 1 and (dry_run or memory == "blocks"):
            what = "a dry run is" if dry_run else "reading block by block is"
            raise ConfigError(f"{what} of one process: start it without torchrun")
        if ranks.first:
            check_text(corpus.name)
            if not dry_run:
                check_folders(source, output, overwrite=overwrite, resume=resume)
        memory = memory if ranks.size == 1 else "whole"
        tokens = corpus.samples * corpus.context * (2 if config.recovers_blocks else 1)
        loaded = ranks.after_first(lambda: load_model(source, device=device, memory=memory, tokens=tokens))
        config = config.for_source(loaded.source_dtype)
        if output is None or dry_run:
            _dry_run(loaded, config, corpus, json=json)
            return
        unfinished = Unfinished(unfinished_of(output)) if ranks.first else None
        with (
            unfinished.cleared_if_empty() if unfinished else nullcontext(),
            bars(shown=ranks.first) as progress,
        ):
            report = compress(
                loaded.model,
                loaded.tokenizer,
                config,
                corpus=corpus,
                progress=progress,
                unfinished=unfinished,
                ranks=ranks,
            )
    if unfinished is None:
        return
    report = dataclasses.replace(
        report,
        source=source,
        source_bytes=loaded.source_bytes,
        seconds={**loaded.seconds, **report.seconds},
    )
    start = time.perf_counter()
    save_compressed(
        loaded.model, loaded.tokenizer, output, report, overwrite=overwrite, unfinished=unfinished
    )
    unfinished.remove()
    seconds = {**report.seconds, "save": time.perf_counter() - start}
    report = dataclasses.replace(report, seconds=seconds, peak_rss_bytes=peak_rss_bytes())
    _print_compressed(report, inspect_folder(Path(output)), output, json=json)


def _print_compressed(report: CompressionReport, found: Inspection, output: str, *, json: bool) -> None:
    if json:
        print_json({**report.to_dict(), **found.to_dict(), "seconds": report.seconds})
        return
    print_tables(summary_table(found))
    print(calibrated_on(report.calibration))
    print_left(found)
    for name, reason in report.uncalibrated.items():
        print(f"without a calibration of its own: {name}: {reason}")
    if report.expected_loss is not None and not report.tried:
        print("the plan was not tried on a copy: that takes the whole model in memory, twice")
    print(_per_block(report))
    spent = ", ".join(f"{stage} {value:.1f} s" for stage, value in report.seconds.items() if value >= 0.05)
    several = f" of the first of {report.processes} processes" if report.processes > 1 else ""
    print(f"{spent}; peak memory{several} {report.peak_rss_bytes / 1e9:.2f} GB; written to {output}")


def _dry_run(loaded: LoadedModel, config: Config, corpus: Corpus, *, json: bool) -> None:
    """Print what a compression would do, and the size of what it would write."""
    with bars() as progress:
        estimate = preview(loaded.model, loaded.tokenizer, config, corpus=corpus, progress=progress)
    if json:
        print_json({"source": loaded.source, "source_bytes": loaded.source_bytes, **estimate.to_dict()})
        return
    print_tables(preview_table(estimate, loaded.source_bytes))
    print(plan_text(estimate.layers), end="")


def _per_block(report: CompressionReport) -> str:
    """How long the blocks took, and how the model was held."""
    seconds = [block.seconds for block in report.blocks]
    held = "read block by block" if report.memory == "blocks" else "in memory as a whole"
    mean = sum(seconds) / len(seconds)
    return f"{len(seconds)} blocks, {mean:.1f} s each and {max(seconds):.1f} s at most; model {held}"
