"""Which choices of the paper's method matter: families of variants, by layer error, then by perplexity.

First every variant's layer error, as `layer_error.py` measures it but under moments of TEXT, which
nothing is calibrated on; then TEXT's perplexity for the best of each family, compressed through
`pbsp compare`. Everything finished is kept in OUT; the same command goes on. OUT/ablations.md is
written anew after each step.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from layer_error import LAYERS, original_moments
from pbsp.calibration.corpus import Corpus, evaluation_windows
from pbsp.calibration.windows import Windows
from pbsp.comparison.folder import ComparisonFolder
from pbsp.comparison.result import RowResult
from pbsp.comparison.rows import Row
from pbsp.comparison.run import compare
from pbsp.config import Config
from pbsp.models.blocks import linear_weight
from pbsp.models.load import LoadedModel, load_model
from pbsp.solver.hessian import output_error
from pbsp.storage.counting import count_bits

CONTEXT = 1024


@dataclass(frozen=True)
class Variant:
    """One way to compress, and what to calibrate it on.

    Attributes:
        row: see `Config.parse`.
        corpus: "c4", "wikitext2" or "self".
        samples: windows of 1024 tokens.
    """

    row: str
    corpus: str = "c4"
    samples: int = 16

    @property
    def name(self) -> str:
        """As the tables show it."""
        calibrated = "" if self.calibration == ("c4", 16) else f", {self.corpus} × {self.samples}"
        return Row(Config.parse(self.row)).name + calibrated

    @property
    def calibration(self) -> tuple[str, int]:
        """What variants must share to be compared in one folder."""
        return self.corpus, self.samples

    @property
    def shows_in_layers(self) -> bool:
        """Whether single layers tell it from the default, as they do not N per block or attention."""
        config = Config.parse(self.row)
        return config.coarse is None and config.moment_weighting == "plain"


def variants(*rows: str) -> list[Variant]:
    """Variants with the usual calibration."""
    return [Variant(row) for row in rows]


BASE = "pbsp 4:8"
FAMILIES: dict[str, list[Variant]] = {
    "steps": variants(BASE, f"{BASE} steps=one-shot", "prune-then-binarize 4:8 pruner=magnitude")
    + variants("prune-then-binarize 4:8 pruner=sparsegpt", "prune-then-binarize 4:8 pruner=wanda"),
    "score": variants(
        BASE, *(f"{BASE} score={s}" for s in ("random", "magnitude", "wanda", "si", "hessian"))
    ),
    "coarse": variants(BASE, f"{BASE} allocation=paper spread=1", f"{BASE} allocation=paper spread=2")
    + variants(f"{BASE} allocation=outliers spread=1"),
    "pruning type": variants(
        *(f"{BASE} steps=one-shot{pruning}" for pruning in ("", " pruning=unstructured", " pruning=columns"))
    ),
    "block": variants(BASE, *(f"{BASE} block={block}" for block in (32, 64, 256, 512))),
    "τ": variants(BASE, *(f"{BASE} updates={updates}" for updates in (1, 3, 10, 30))),
    "refresh": variants(BASE, f"{BASE} refresh=false"),
    "compensation": variants(BASE, f"{BASE} compensation=diagonal", f"{BASE} compensation=none"),
    "weighting": variants(BASE, f"{BASE} weighting=attention"),
    "N": variants(BASE, "pbsp 5:8", "pbsp 6:8", "pbsp 7:8", "pbsp 8:8"),
    "corpus": [Variant(BASE), Variant(BASE, "wikitext2"), Variant(BASE, "self")],
    "samples": [Variant(BASE, "c4", samples) for samples in (8, 16, 32, 64, 128)],
}
WHOLE = ("N",)
"""Families whose members differ in size: all of them are evaluated, not the best."""


class Ablations:
    """The measurements of one folder."""

    def __init__(self, loaded: LoadedModel, texts: dict[str, str], folder: Path) -> None:
        """`texts` names the file of each corpus, and of "text", what is evaluated on."""
        self.loaded, self.texts, self.folder = loaded, texts, folder
        self.file = folder / "layers.json"
        self.layers: dict[str, dict[str, float]] = (
            json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        )
        folder.mkdir(parents=True, exist_ok=True)

    @cache  # noqa: B019 - one object a run
    def windows(self, corpus: str, samples: int) -> Windows:
        """Calibration windows."""
        name = self.texts.get(corpus, corpus)
        return Corpus(name, samples, CONTEXT).windows(self.loaded.tokenizer, self.loaded.model)

    @cache  # noqa: B019
    def moments(self, corpus: str, samples: int) -> dict[str, torch.Tensor]:
        """Plain moments of the layers' inputs."""
        if corpus == "text":
            chosen = evaluation_windows(
                self.texts["text"], self.loaded.tokenizer, self.loaded.model, context=CONTEXT, windows=samples
            )
        else:
            chosen = self.windows(corpus, samples)
        return original_moments(self.loaded.model, chosen.tokens)

    def measure_layers(self, variant: Variant) -> None:
        """The variant's mean layer error and stored bits, unless they are there."""
        if variant.name in self.layers or not variant.shows_in_layers:
            return
        method = Config.parse(variant.row).build()
        found, wanted = self.moments(*variant.calibration), self.moments("text", 16)
        errors, bits, weights = [], 0, 0
        for layer in LAYERS:
            weight = linear_weight(self.loaded.model.get_submodule(layer))
            result = method.compress(weight, found[layer])
            errors.append(output_error(weight, result.dense(), wanted[layer]))
            bits += count_bits(result)
            weights += weight.numel()
        self.layers[variant.name] = {"error": sum(errors) / len(errors), "bits": bits / weights}
        self.file.write_text(json.dumps(self.layers, indent=1, ensure_ascii=False), encoding="utf-8")

    def best(self, family: str, count: int) -> list[Variant]:
        """Members to evaluate: those that layers cannot tell apart, and the best of the others."""
        members = FAMILIES[family]
        seen = [variant for variant in members if variant.shows_in_layers]
        chosen = sorted(seen, key=lambda variant: self.layers[variant.name]["error"])
        chosen = chosen if family in WHOLE else chosen[:count]
        return [variant for variant in members if variant in chosen or variant not in seen]

    def evaluate(self, chosen: Iterable[Variant], text: Windows) -> None:
        """Perplexity of all these, by calibration."""
        for calibration in dict.fromkeys(variant.calibration for variant in chosen):
            rows = {v.name: Row(Config.parse(v.row)) for v in chosen if v.calibration == calibration}
            folder = self.comparison(calibration).path
            print(f"{folder}: {', '.join(rows)}", flush=True)
            compare(
                self.loaded,
                list(rows.values()),
                folder,
                calibration=self.windows(*calibration),
                texts=[text],
                finished=lambda result, *_: self.write(result),
            )

    def comparison(self, calibration: tuple[str, int]) -> ComparisonFolder:
        """Where the variants calibrated so are compared."""
        return ComparisonFolder(self.folder / f"{calibration[0]}-{calibration[1]}")

    def write(self, finished: RowResult | None = None) -> None:
        """The table of all that is known."""
        if finished is not None:
            print(finished.name, finished.error or finished.evaluations[0].perplexity, flush=True)
        text = "\n".join(self.table()) + "\n"
        (self.folder / "ablations.md").write_text(text, encoding="utf-8")

    def table(self) -> Iterator[str]:
        """Lines of Markdown."""
        for family, members in FAMILIES.items():
            yield f"\n**{family}**\n"
            yield "| variant | stored bits | layer error | perplexity | loss − original's |"
            yield "|---|---|---|---|---|"
            for variant in members:
                layer = self.layers.get(variant.name)
                rows = self.comparison(variant.calibration).rows()
                result = rows.get(Row(Config.parse(variant.row)).name)
                bits = f"{layer['bits']:.3f}" if layer else ""
                error = f"{layer['error']:.4f}" if layer else ""
                yield f"| {variant.name} | {bits} | {error} | {_scores(result)} |"


def _scores(result: RowResult | None) -> str:
    if result is None or result.error is not None:
        return " | "
    one = result.evaluations[0]
    increase = one.loss_difference
    assert increase is not None
    assert increase.stderr is not None
    return f"{one.perplexity:.1f} ± {one.stderr:.1f} | {increase.mean:+.3f} ± {increase.stderr:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", metavar="TEXT", help="to evaluate on")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--c4", required=True, help="file to calibrate on")
    parser.add_argument("--wikitext2", required=True, help="another, of TEXT's kind")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--best", type=int, default=3, help="of each family, to evaluate; 0: layer errors only"
    )
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--eval-context", type=int, default=2048)
    options = parser.parse_args()
    loaded = load_model(options.model, dtype=torch.float32, device=options.device)
    texts = {"text": options.text, "c4": options.c4, "wikitext2": options.wikitext2}
    ablations = Ablations(loaded, texts, options.output)
    with torch.no_grad():
        for family in options.families:
            for variant in FAMILIES[family]:
                ablations.measure_layers(variant)
            ablations.write()
            print(f"layers of {family}: done", flush=True)
    if not options.best:
        return
    text = evaluation_windows(
        options.text,
        loaded.tokenizer,
        loaded.model,
        context=options.eval_context,
        windows=options.windows,
    )
    chosen = {v: None for family in options.families for v in ablations.best(family, options.best)}
    ablations.evaluate(list(chosen), text)
    ablations.write()


if __name__ == "__main__":
    main()
