"""Seconds and peak memory of `pbsp compress` on a model of 7B shapes, read block by block, and what follows.

Makes a Llama of random weights in bfloat16 (hidden 4096, intermediate 11008, 32 heads, vocabulary 32000; 2.1
GB with 4 blocks) and a text of random letters, runs the command in a process of its own, and prints each
block's time, the process's peak memory, and an estimate for 7B, 13B and 70B. Solving takes as long on random
weights as on trained ones; quality cannot be read off them. docs/results.md, section "Large models".

    python benchmarks/large_model.py FOLDER [--blocks 4] [--samples 8] [--context 512] [--pattern 4:8]
        [--sweeps 3] [--weighting auto]
"""

import argparse
import json
import math
import multiprocessing
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
TOKENS = 128 * 2048
HEAD = 128
LARGER = {  # blocks, hidden, intermediate, key and value features, vocabulary
    "7B": (32, 4096, 11008, 4096, 32000),
    "13B": (40, 5120, 13824, 5120, 32000),
    "70B": (80, 8192, 28672, 1024, 32000),
}


def make_model(folder: Path, blocks: int) -> None:
    """Write the model; its weights are all in memory while this runs."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, num_key_value_heads=32, dtype="bfloat16")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)


def run(folder: Path, more: list[str]) -> dict[str, Any]:
    """The command's JSON, with the operating system's count of its peak memory and of its processor time."""
    command = [sys.executable, "-m", "pbsp", "compress", str(folder / "model"), "-o", str(folder / "out")]
    command += [
        "--calibration",
        str(folder / "text.txt"),
        "--memory",
        "blocks",
        "--overwrite",
        "--json",
        *more,
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(done.stdout), "wall": wall, "processor": processor}


def estimate(found: dict[str, Any], tokens: int, *, by_head: bool) -> None:
    """Print what larger models would take by the measured blocks: time by operations, memory by tensors.

    On a shared machine wall times say little: they are scaled to the processor's time.
    """
    here = block_work(4096, 11008, 4096, by_head=by_head)
    share = found["processor"] / found["wall"]
    calibrate, solve = (
        share * found["seconds"][stage] / len(found["blocks"]) for stage in ("calibrate", "solve")
    )
    rest = found["peak_rss_bytes"] - tensor_bytes(here)
    print(
        f"one block on an unshared core: calibrate {calibrate:.0f} s on {tokens} tokens, solve {solve:.0f} s"
    )
    print(f"peak: {tensor_bytes(here) / 1e9:.2f} GB are the tensors counted, {rest / 1e9:.2f} the rest")
    for name, (blocks, hidden, inner, keys, vocabulary) in LARGER.items():
        work = block_work(hidden, inner, keys, by_head=by_head)
        calibrating = blocks * calibrate * (TOKENS / tokens) * (work["passes"] / here["passes"]) / 3600
        solving = blocks * solve * (work["sweeps"] / here["sweeps"]) / 3600
        peak = max(tensor_bytes(work), 8 * vocabulary * hidden + 4 * work["weights"]) + rest
        whole = 4 * (blocks * work["weights"] + 2 * vocabulary * hidden + TOKENS * hidden)
        print(
            f"{name}: calibrate {calibrating:.1f} h on {TOKENS:,} tokens, solve {solving:.1f} h; "
            f"peak {peak / 1e9:.1f} GB; in memory as a whole {whole / 1e9:.0f} GB and what solving takes"
        )


def block_work(hidden: int, inner: int, keys: int, *, by_head: bool) -> dict[str, float]:
    """What a block's time and memory grow with; values may have a moment for each head."""
    rows = [hidden] * 2 + [keys] * 2 + [inner] * 2 + [hidden]
    columns = [hidden] * 6 + [inner]
    weights = sum(map(math.prod, zip(rows, columns, strict=True)))
    heads = keys // HEAD if by_head else 0
    # Of the inputs of q, k and v; of o; of gate and up; of down.
    moments = (3 + heads) * hidden**2 + inner**2
    sweeps = sum(r * c**2 for r, c in zip(rows, columns, strict=True)) + (3 + heads) * hidden**3 + inner**3
    return {
        "weights": weights,
        "moments": moments,
        "passes": 2 * weights + moments,
        "sweeps": sweeps,
        "widest": inner**2,
        "down": hidden * inner,
    }


def tensor_bytes(work: dict[str, float]) -> float:
    """A block in 16 bits, and either all its moments or what solving the widest linear holds.

    That is its moment, the damped one and its factor in float64, the factor in float32, and the weights.
    """
    solving = (4 + 8 + 8 + 4) * work["widest"] + 4 * work["down"]
    return 2 * work["weights"] + max(4 * work["moments"], solving)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--pattern", default="4:8")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--weighting", default="auto")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if not (given.folder / "model").is_dir():
        make = multiprocessing.get_context("spawn").Process(
            target=make_model, args=(given.folder / "model", given.blocks)
        )
        make.start()
        make.join()  # in a process of its own, so that its memory is not counted
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=2 * given.samples * given.context)
    (given.folder / "text.txt").write_text("".join(letters))
    text = ["--samples", str(given.samples), "--context", str(given.context), "--pattern", given.pattern]
    text += ["--set", f"sweeps={given.sweeps}", "--weighting", given.weighting]
    found = run(given.folder, text)
    for block in found["blocks"]:
        print(
            f"{block['name']}: {block['seconds']:.0f} s, peak so far {block['peak_rss_bytes'] / 1e9:.2f} GB"
        )
    print(", ".join(f"{stage} {value:.0f} s" for stage, value in found["seconds"].items()))
    print(f"wall {found['wall']:.0f} s, processor {found['processor']:.0f} s")
    print(f"peak memory {found['peak_rss_bytes'] / 1e9:.2f} GB, files {found['file_bytes']:,} bytes")
    estimate(found, given.samples * given.context, by_head=given.weighting in ("auto", "attention"))


if __name__ == "__main__":
    main()
