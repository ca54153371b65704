"""Does the expected loss of a layer predict what compressing it alone costs? Rank correlations.

Every STEP-th linear layer is fitted alone, at --planes, under the original's moments of the calibration
text, and the KL divergence from the original is measured on TEXT. Compared are the expected loss that
plans are made by, the layer's plain output error, its relative one, and the paper's block importance.
"""

import argparse
import json
from pathlib import Path

import torch

from pbsp.calibration.corpus import Corpus, evaluation_windows
from pbsp.calibration.importance import block_cosines
from pbsp.calibration.moments import collect_moments
from pbsp.calibration.sensitivity import Sensitivity, measure_sensitivities
from pbsp.calibration.walk import Walk
from pbsp.evaluation.kept import keep_predictions
from pbsp.evaluation.perplexity import evaluate
from pbsp.methods.planes import PlaneFit
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.models.load import load_model
from pbsp.pruning.pattern import parse_patterns
from pbsp.solver.hessian import output_error

PREDICTORS = ("expected loss", "output error", "relative output error", "block importance")


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def rank_correlation(first: list[float], second: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", metavar="TEXT", help="to measure on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the original's passes")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--planes", default="2:8")
    parser.add_argument("--step", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8, help="calibration windows of 1024 tokens")
    parser.add_argument("--windows", type=int, default=2, help="of 1024 tokens, to measure on")
    options = parser.parse_args()
    loaded = load_model("smollm2-135m", dtype=torch.float32, device="cpu")
    model = loaded.model
    blocks = decoder_blocks(model)
    tokens = Corpus(options.calibration, options.samples, 1024).windows(loaded.tokenizer, model).tokens
    text = evaluation_windows(options.text, loaded.tokenizer, model, context=1024, windows=options.windows)
    _, original = keep_predictions(model, text, options.output, progress=None)
    modules = {name: module for block in blocks for name, module in block.linears().items()}
    chosen = list(modules)[:: options.step]
    cosines = block_cosines(model, blocks, tokens)
    importance = {name: 1 - c for block, c in zip(blocks, cosines, strict=True) for name in block.linears()}
    sensitivities: dict[str, Sensitivity] = {}
    measure_sensitivities(
        model,
        blocks,
        tokens,
        lambda name, found: sensitivities.update({name: found}) if name in chosen else None,
    )
    walk = Walk(model, blocks, tokens)
    method = PlaneFit(parse_patterns(options.planes), sweeps=1)
    columns: dict[str, list[float]] = {name: [] for name in (*PREDICTORS, "KL", "loss")}
    for index, block in enumerate(blocks):
        linears = {name: module for name, module in block.linears().items() if name in chosen}
        moments = collect_moments(
            linears, lambda index=index, block=block: walk.run(index, block.module, keep=True)
        )
        for name, module in linears.items():
            weight = linear_weight(module).clone()
            found = method.compress(weight, moments[name]).dense()
            change = weight - found
            rows = sensitivities[name].row_losses(change, torch.arange(len(weight)))
            linear_weight(module).copy_(found)
            measured = evaluate(model, text, original=original or loaded.model)
            linear_weight(module).copy_(weight)
            assert measured.kl is not None
            assert measured.loss_difference is not None
            values = (
                float(rows.sum()),
                float(((change @ moments[name]) * change).sum()),
                output_error(weight, found, moments[name]),
                importance[name],
                measured.kl.mean,
                measured.loss_difference.mean,
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            shown = dict(zip(columns, values, strict=True))
            print(name, json.dumps({key: float(f"{value:.4g}") for key, value in shown.items()}), flush=True)
    for target in ("KL", "loss"):
        for name in PREDICTORS:
            found = rank_correlation(columns[name], columns[target])
            print(f"rank correlation of {name} with {target}: {found:.3f}")


if __name__ == "__main__":
    main()
