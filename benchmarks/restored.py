"""Where a compressed model's loss comes from: kinds of layers, and depths, put back to the original.

For each group in turn its layers get the original's weights while all others stay compressed. Printed is what
the loss on TEXT then falls by, and the group's share of all such falls.
"""

import argparse
import json
import re

import torch

from pbsp.calibration.corpus import evaluation_windows
from pbsp.evaluation.perplexity import mean_loss
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.models.load import load_model

DEPTHS = 6


def groups(layers: list[list[str]]) -> dict[str, dict[str, list[str]]]:
    """Sort → group → names of layers, of the layers of each block."""
    kinds: dict[str, list[str]] = {}
    depths: dict[str, list[str]] = {}
    for index, names in enumerate(layers):
        part = index * DEPTHS // len(layers)
        first, last = -(-part * len(layers) // DEPTHS), -(-(part + 1) * len(layers) // DEPTHS) - 1
        for name in names:
            kinds.setdefault(re.sub(r"\.\d+", "", name).rsplit(".", 1)[-1], []).append(name)
            depths.setdefault(f"blocks {first} to {last}", []).append(name)
    return {"kind": kinds, "depth": depths}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", metavar="COMPRESSED", help="what pbsp compress wrote")
    parser.add_argument("text", metavar="TEXT", help="to measure on")
    parser.add_argument("--model", default="smollm2-135m", help="the original")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    original = load_model(options.model, dtype=torch.float32, device="cpu")
    model = load_model(options.folder, dtype=torch.float32, device="cpu").model
    model.dequantize(torch.float32)
    sized = {"context": options.context, "windows": options.windows}
    windows = evaluation_windows(options.text, original.tokenizer, original.model, **sized).tokens.long()
    layers = [list(block.linears()) for block in decoder_blocks(original.model)]
    base = mean_loss(model, windows)
    found: dict[str, dict[str, float]] = {}
    for sort, members in groups(layers).items():
        found[sort] = {}
        for group, names in members.items():
            weights = {name: linear_weight(model.get_submodule(name)) for name in names}
            kept = {name: weight.clone() for name, weight in weights.items()}
            for name, weight in weights.items():
                weight.copy_(linear_weight(original.model.get_submodule(name)))
            found[sort][group] = base - mean_loss(model, windows)
            for name, weight in weights.items():
                weight.copy_(kept[name])
            if not options.json:
                print(f"{sort} {group}: {found[sort][group]:.4f} nats", flush=True)
    if options.json:
        print(json.dumps({"loss": base, "original": mean_loss(original.model, windows), "falls": found}))
        return
    print(f"loss {base:.4f}, of the original {mean_loss(original.model, windows):.4f} nats per token")
    for sort, falls in found.items():
        whole = sum(falls.values())
        print(f"{sort}: " + ", ".join(f"{group} {fall / whole:.1%}" for group, fall in falls.items()))


if __name__ == "__main__":
    main()
