"""What `pbsp recover` does after parsing: load both models, tune the one, save it, say what it gained."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pbsp.calibration.corpus import check_text
from pbsp.commands.calibration import calibrated_on, calibration_corpus
from pbsp.commands.console import bars, print_json, print_tables
from pbsp.commands.folders import check_folders, unfinished_of
from pbsp.commands.tables import summary_table
from pbsp.errors import FormatError
from pbsp.inspection import inspect_folder, recorded_report
from pbsp.models.load import load_model
from pbsp.recover import recover
from pbsp.recovery.tunable import Tuning
from pbsp.report import CompressionReport
from pbsp.save import save_compressed
from pbsp.unfinished import Unfinished


def run_recover(
    folder: str,
    output: str,
    *,
    against: str,
    text: dict[str, Any],
    tuning: Tuning,
    device: str,
    overwrite: bool,
    resume: bool,
    json: bool,
) -> None:
    """`pbsp recover`; everything that can be wrong with the request is found before the models load."""
    corpus = calibration_corpus(against, text)
    check_text(corpus.name)
    inspect_folder(Path(folder))
    recorded = recorded_report(Path(folder))
    if not recorded:
        raise FormatError(f"{folder} lacks the report that pbsp compress wrote beside the model")
    report = CompressionReport.from_dict(recorded)
    check_folders(folder, output, overwrite=overwrite, resume=resume, work="tuning")
    compressed = load_model(folder, device=device)
    original = load_model(against, device=device)
    dtype = getattr(torch, compressed.source_dtype or "float16")
    unfinished = Unfinished(unfinished_of(output))
    with unfinished.cleared_if_empty(), bars() as progress:
        windows = corpus.windows(original.tokenizer, original.model)
        report = recover(
            compressed.model,
            original.model,
            report,
            windows=windows,
            tuning=tuning,
            dtype=dtype,
            progress=progress,
            unfinished=unfinished,
        )
    save_compressed(compressed.model, compressed.tokenizer, output, report, overwrite=overwrite)
    unfinished.remove()
    found = inspect_folder(Path(output))
    assert report.distilled is not None
    if json:
        print_json(
            {
                **found.to_dict(),
                "distilled": dataclasses.asdict(report.distilled),
                "calibration": windows.describe(),
                "seconds": report.seconds,
                "peak_rss_bytes": report.peak_rss_bytes,
            }
        )
        return
    print_tables(summary_table(found))
    gained = report.distilled
    print(
        f"KL to the original on {gained.held_out_tokens:,} held-out tokens: {gained.before:.3f} before, "
        f"{gained.after:.3f} after {gained.steps} steps on {gained.tokens:,} tokens"
    )
    print(calibrated_on(windows.describe()).replace("calibrated", "tuned", 1))
    print(
        f"{report.seconds['recover']:.1f} s; peak memory {report.peak_rss_bytes / 1e9:.2f} GB; "
        f"written to {output}"
    )
