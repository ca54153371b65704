"""Mean relative output error of 12 linears of SmolLM2-135M, for a list of methods.

Blocks 3, 12 and 24, linears q, o, gate and down; plain moments of the original on the first 16×1024
tokens of a text. This is the number that solvers are compared by; it takes seconds a pattern.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pbsp.calibration.moments import collect_moments
from pbsp.config import Config
from pbsp.models.blocks import linear_weight
from pbsp.models.load import load_model
from pbsp.solver.hessian import output_error
from pbsp.storage.counting import count_bits

LAYERS = [
    f"model.layers.{block}.{linear}"
    for block in (3, 12, 24)
    for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]
PLANES = "2:16 1:4 2:8 4:16 8:8 3:8 4:8 5:8 2:8+2:8 4:8+2:8 4:8+4:8 3:8+3:8+1:8"
METHODS = [f"planes {pattern}" for pattern in PLANES.split()]
METHODS += [f"pbsp {pattern}" for pattern in ("4:8", "5:8", "6:8", "8:8")]


def original_moments(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    linears = {name: model.get_submodule(name) for name in LAYERS}

    def run() -> None:
        for window in tokens:
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)

    return collect_moments(linears, run)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", type=Path, help="calibration text, read as it is")
    parser.add_argument("--methods", nargs="+", default=METHODS, help='as "pbsp 6:8 updates=10"')
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loaded = load_model("smollm2-135m", dtype=torch.float32, device="cpu")
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids
    moments = original_moments(loaded.model, torch.tensor(ids[: 16 * 1024]).view(16, 1024))
    for text in options.methods:
        method = Config.parse(text).build()
        errors, bits, weights, seconds = [], 0, 0, 0.0
        for name in LAYERS:
            weight = linear_weight(loaded.model.get_submodule(name))
            start = time.perf_counter()
            result = method.compress(weight, moments[name])
            seconds += time.perf_counter() - start
            errors.append(output_error(weight, result.dense(), moments[name]))
            bits += count_bits(result)
            weights += weight.numel()
        row = {
            "method": text,
            "stored_bits": round(bits / weights, 4),
            "error": round(sum(errors) / len(errors), 5),
            "seconds": round(seconds, 2),
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(row) if options.json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
