"""Perplexity and KL of the built-in model at several points, by the standard evaluation. Resumable.

Each point is compressed once into its own folder, with its times and memory; folders that are there
are not made again. Then all points are evaluated against the original in one pass over the text.

    python benchmarks/model_quality.py --calibration c4.jsonl --text wiki.test.raw --folder out/points
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pbsp

MODEL = "smollm2-135m"
POINTS = ["4:8+4:8", "4:8+2:8", "4:8", "2:8", "3:8+3:8+1:8"]


def compress_point(point: str, options: argparse.Namespace) -> Path:
    """Compress in a process of its own, so that its peak memory is its own; returns the folder."""
    pattern, *settings = point.split()
    folder = options.folder / point.replace(":", "-").replace(" ", "_")
    if not folder.exists():
        command = [sys.executable, "-m", "pbsp", "compress", MODEL, "-o", str(folder), "--json"]
        command += ["--pattern", pattern, *settings, "--calibration", options.calibration]
        command += ["--samples", str(options.samples), "--context", str(options.context)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        folder.with_suffix(".json").write_text(done.stdout)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--points", nargs="+", default=POINTS, help='a pattern, or "PATTERN --option value"')
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=40, help="of 2048 tokens; 0 for the whole text")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folders = {point: compress_point(point, options) for point in options.points}
    original = pbsp.load_model(MODEL)
    models = {"original": original.model}
    models |= {point: pbsp.load_model(str(folder)).model for point, folder in folders.items()}
    windows = pbsp.evaluation_windows(
        options.text, original.tokenizer, original.model, context=2048, windows=options.windows or None
    )
    results = pbsp.evaluate_all(models, windows, original=original.model)
    for point, result in results.items():
        row = {"point": point, **result.to_json()}
        if point in folders:
            report = json.loads(folders[point].with_suffix(".json").read_text())
            row |= {key: report[key] for key in ("nominal_bits", "stored_bits", "file_bytes", "seconds")}
            row["peak_rss_bytes"] = report["peak_rss_bytes"]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
