"""The main job on the built-in model: compress, save, load back, evaluate, generate; no network, no data.

Two points: the best text under three stored bits per weight, and a truly sub-1-bit file, which shows what
is lost at that size. Everything is measured on text that the original model wrote itself.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import pbsp
from pbsp.commands.tables import bytes_table, summary_table
from pbsp.evaluation.report import evaluation_table
from pbsp.generation import generate

MODEL = "smollm2-135m"
POINTS = {"under 3 bits": "e8-12+e8-8", "under 1 bit": "2:8"}
PROMPTS = ["What is the capital of France?"]
OUTPUT = Path("out")


def main() -> None:
    console = Console(width=110)
    start = time.perf_counter()
    original = pbsp.load_model(MODEL)
    model, tokenizer = original.model, original.tokenizer
    console.print(
        f"{MODEL}: {original.source_bytes / 1e6:.1f} MB as a 4-bit GGUF file; sampling its own text …"
    )
    calibration = pbsp.corpus("self", samples=20, context=128).windows(tokenizer, model)
    evaluation = pbsp.evaluation_windows("self", tokenizer, model, context=128, windows=12)
    compressed = {}
    for title, pattern in POINTS.items():
        folder = OUTPUT / pattern.replace(":", "-")
        shutil.rmtree(folder, ignore_errors=True)
        console.rule(f"{title}: {pattern}")
        source = pbsp.load_model(MODEL)
        # One sweep instead of three, and little text, as this is to end within minutes on two cores.
        config = pbsp.Config(pattern=pattern, options={"sweeps": 1})
        report = pbsp.compress(source.model, tokenizer, config, corpus=calibration)
        report = replace(report, source=MODEL, source_bytes=original.source_bytes)
        pbsp.save_compressed(source.model, tokenizer, folder, report)
        del source
        found = pbsp.inspect_folder(folder)
        console.print(summary_table(found), bytes_table(found))
        compressed[pattern] = pbsp.load_model(str(folder)).model
    console.rule("quality, on text sampled from the original")
    console.print(evaluation_table(pbsp.evaluate_all(compressed, evaluation, original=model)))
    console.rule("the same prompts")
    for prompt in PROMPTS:
        console.print(f"[bold]{prompt}")
        for name, speaker in {"original": model, **compressed}.items():
            answer = generate(speaker, tokenizer, prompt, max_tokens=30)
            console.print(f"  {name}: {answer.text!r}", markup=False)
    console.print(
        f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads; models are in {OUTPUT}/"
    )


if __name__ == "__main__":
    main()
