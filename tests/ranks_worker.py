"""What tests of several processes run in each: `torchrun ranks_worker.py FOLDER` writes what it finds."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch

import pbsp
from pbsp.calibration.attention import ValueMoments
from pbsp.calibration.moments import collect_block_moments
from pbsp.calibration.walk import Walk
from pbsp.calibration.windows import Windows
from pbsp.distributed import ALONE, joined
from pbsp.models.blocks import decoder_blocks
from pbsp.save import save_compressed
from pbsp.unfinished import Unfinished
from starving import starving_model
from tiny import tiny_model, tiny_tokens

CASES = {
    "attention": ("llama", {"pattern": "4:8+2:8"}),
    "original inputs": ("llama", {"pattern": "2:8", "inputs": "original"}),
    "budget": ("llama", {"bits": 2.5}),
    "gradient": ("llama", {"pattern": "4:8", "weighting": "gradient"}),
    "experts": ("starving", {"pattern": "4:8"}),
    "budget of experts": ("starving", {"bits": 2.5}),
    "outliers": ("llama", {"method": "stbllm", "pattern": "4:8"}),
    "paper": (
        "llama",
        {"method": "pbsp", "pattern": "4:8", "allocation": "paper", "options": {"updates": 1}},
    ),
    "one plain run": ("gpt2", {"pattern": "4:8", "weighting": "plain"}),
    "self": ("llama", {"pattern": "2:8"}),
}
"""Name → model and settings; each is compressed by all processes together, and by each alone."""


class Stopped(Exception):  # noqa: N818
    """Stands for a crash."""


def windows(count=11):
    return Windows(tiny_tokens(count, 16), text="random", split="test", text_digest="0")


def fresh(name):
    return starving_model() if name == "starving" else tiny_model(name)


def compressed(case, ranks):
    name, settings = CASES[case]
    model = fresh(name)
    corpus = pbsp.corpus("self", samples=3, context=16) if case == "self" else windows()
    return model, pbsp.compress(model, None, pbsp.Config(**settings), corpus=corpus, ranks=ranks)


def differences(case, ranks):
    """Between what all processes make together and what one makes alone."""
    model, report = compressed(case, ranks)
    lone_model, lone = compressed(case, ALONE)
    pairs = list(zip(model.state_dict().values(), lone_model.state_dict().values(), strict=True))
    errors = [
        abs(one.output_error - other.output_error) / other.output_error
        for one, other in zip(report.layers, lone.layers, strict=True)
    ]
    return {
        "numbers": sum(one.numel() for one, _ in pairs),
        "differing": sum(int((one != other).sum()) for one, other in pairs),
        "error": max(errors),
        "patterns": [layer.pattern for layer in report.layers] == [layer.pattern for layer in lone.layers],
        "uncalibrated": report.uncalibrated == lone.uncalibrated,
        "starved": len(report.uncalibrated),
        "processes": report.processes,
        "calibration": report.calibration == lone.calibration,
    }


def kept_run(folder, ranks, *, stop):
    """A compression kept in a folder, ended early before the second block if it is to `stop`."""

    def progress(stage, done, total):
        if stop and stage == "compress" and done == 1:
            raise Stopped

    model = tiny_model()
    settings = {"corpus": windows(), "progress": progress, "ranks": ranks}
    kept = Unfinished(folder / "kept") if ranks.first else None
    report = pbsp.compress(model, None, pbsp.Config(pattern="4:8"), unfinished=kept, **settings)
    if ranks.first:
        save_compressed(model, None, folder / "resumed", report)


def resumed(folder, ranks):
    """Stopped and gone on with by all processes; beside it, what one makes alone."""
    with suppress(Stopped):
        kept_run(folder, ranks, stop=True)
    kept_run(folder, ranks, stop=False)
    if ranks.first:
        model = tiny_model()
        report = pbsp.compress(model, None, pbsp.Config(pattern="4:8"), corpus=windows())
        save_compressed(model, None, folder / "alone", report)


@torch.no_grad()
def attended(ranks):
    """The largest relative difference of value moments over drawn query rows, together and alone."""
    found = []
    for some in (ranks, ALONE):
        model, tokens = tiny_model(), tiny_tokens(5, 32)
        own, blocks = some.part(len(tokens)), decoder_blocks(model)
        walk = Walk(model, blocks, tokens[own.start : own.stop])
        moments = collect_block_moments(
            walk,
            0,
            blocks[0],
            blocks[0].linears(),
            weighting="attention",
            keep=False,
            query_rows=8,
            ranks=some,
        )
        assert not moments.plain_because
        parts = moments.inputs[f"{blocks[0].name}.self_attn.v_proj"].parts
        found.append(torch.stack([part.moment for part in parts]))
    return float((found[0] - found[1]).norm() / found[1].norm())


@torch.no_grad()
def disagreeing(ranks):
    """Why the values cannot be weighted, where only the last process has a reason."""
    model = tiny_model()
    blocks = decoder_blocks(model)
    walk, values = Walk(model, blocks, tiny_tokens(1)), ValueMoments(blocks[0])
    with values.watching():
        walk.run(0, blocks[0].module, keep=False)
    if ranks.rank == ranks.size - 1:
        values.reason = "it cannot"
    values.add_ranks(ranks)
    return values.reason


def exchanged(ranks):
    """Bfloat16 tensors that go to the first process and back to where they were."""
    every = [torch.full((2, 3), float(index), dtype=torch.bfloat16) for index in range(5)]
    own = [every[index] for index in ranks.part(5)]
    collected = ranks.collect(own)
    back = ranks.scatter(collected)
    whole = not ranks.first or all(map(torch.equal, collected, every))
    return whole and len(back) == len(own) and all(map(torch.equal, back, own))


def main():
    folder = Path(sys.argv[1])
    with joined("cpu") as ranks:
        found: dict[str, object] = {"attended": attended(ranks), "disagreeing": disagreeing(ranks)}
        found["exchanged"] = all(ranks.gather(exchanged(ranks)))
        found["spread"] = ranks.spread([1, 5, 2, 2], lambda task: task * 10)
        resumed(folder, ranks)
        found |= {case: differences(case, ranks) for case in CASES}
        found["same everywhere"] = all(one == found for one in ranks.gather(found))
        if ranks.first:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
