"""What recovery wins, of planes and of NanoQuant: nothing tuned, blocks, the whole model, and both.

Runs `pbsp compress`, `recover` and `generate` as a user would. Folders and results stay in
OUT; what is there is not done again, and a step that was interrupted goes on. OUT/recovery.md is written
anew after each step.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pbsp.calibration.corpus import evaluation_windows
from pbsp.evaluation.kept import keep_predictions
from pbsp.evaluation.perplexity import evaluate
from pbsp.models.load import load_model

KINDS = {"none": "none", "block": "none", "model": "none", "both": "block"}
"""Kind → the one whose folder the whole model's tuning starts from, where it does."""

SIZES = {
    "planes": lambda bits: ["--bits", str(bits)],
    "nanoquant": lambda bits: ["--method", "nanoquant", "--set", f"bits={bits}", "--embeddings", "8"],
}
"""Method → what `pbsp compress` is told of it."""


class Recovery:
    """The points of one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output
        self.folder.mkdir(parents=True, exist_ok=True)

    def point(self, method: str, bits: float, kind: str) -> None:
        """Make a point's folder and measure it, unless that was done."""
        made = self.folder / f"{method}-{bits}-{kind}"
        result = Path(f"{made}.json")
        if result.is_file():
            return
        start = time.perf_counter()
        if not made.is_dir():
            self.make(method, bits, kind, made)
        found = {
            "seconds": time.perf_counter() - start,
            "texts": [self.evaluate(made, text) for text in self.options.texts],
            "answers": {prompt: self.answer(str(made), prompt) for prompt in self.options.prompts},
        }
        result.write_text(json.dumps(found, indent=1), encoding="utf-8")
        self.write()

    def make(self, method: str, bits: float, kind: str, made: Path) -> None:
        """Compress, or tune what was compressed before."""
        options = self.options
        text = ["--calibration", options.calibration, "-o", str(made), "--device", options.device]
        text += ["--resume"] if Path(f"{made}.unfinished").is_dir() else []
        if kind in ("none", "block"):
            taken = ["--samples", str(options.samples), "--context", str(options.context)]
            planned = self.folder / f"{method}-{bits}-none" / "plan.toml"  # measured once is enough
            known = method == "planes" and planned.is_file()
            size = ["--plan", str(planned)] if known else SIZES[method](bits)
            pbsp("compress", options.model, *size, "--recover", kind, *text, *taken)
        else:
            taken = ["--samples", str(options.tuned), "--context", str(options.tuned_context)]
            source = self.folder / f"{method}-{bits}-{KINDS[kind]}"
            pbsp("recover", str(source), "--against", options.model, *text, *taken)

    def evaluate(self, made: Path, text: str) -> dict[str, Any]:
        """Perplexity and KL on a text's first windows; the original runs once for all points."""
        options = self.options
        original = load_model(options.model, device=options.device)
        windows = evaluation_windows(
            text, original.tokenizer, original.model, context=options.eval_context, windows=options.windows
        )
        folder = self.folder / f"original-{Path(text).name}-{windows.digest[:8]}"
        _, predictions = keep_predictions(original.model, windows, folder)
        model = load_model(str(made), device=options.device).model
        print(f"evaluate {made} on {text}", flush=True)
        return evaluate(model, windows, original=predictions or original.model).to_json()

    def answer(self, model: str, prompt: str) -> str:
        """A greedy continuation."""
        shown = ["--raw", "--max-tokens", "30", "--device", self.options.device, "--json"]
        return json.loads(pbsp("generate", model, prompt, *shown))["text"]

    def write(self) -> None:
        """The table of all that is known."""
        texts = [Path(text).name for text in self.options.texts]
        lines = [f"| method | bits | tuned | seconds | {' | '.join(f'{text}, KL' for text in texts)} |"]
        lines.append("|---" * (4 + len(texts)) + "|")
        for method, bits, kind in points(self.options):
            file = self.folder / f"{method}-{bits}-{kind}.json"
            if file.is_file():
                found = json.loads(file.read_text(encoding="utf-8"))
                scores = [f"{t['perplexity']:.1f} ± {t['stderr']:.1f}, {t['kl']:.3f}" for t in found["texts"]]
                lines.append(
                    f"| {method} | {bits} | {kind} | {found['seconds']:.0f} | {' | '.join(scores)} |"
                )
                lines += [f"| | | {prompt} | | {answer!r} |" for prompt, answer in found["answers"].items()]
        (self.folder / "recovery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def points(options: argparse.Namespace) -> list[tuple[str, float, str]]:
    """Method, bits and kind of each."""
    sizes = [("planes", bits) for bits in options.bits] + [("nanoquant", bits) for bits in options.nanoquant]
    return [(method, bits, kind) for method, bits in sizes for kind in KINDS]


def pbsp(*arguments: str) -> str:
    """What the command prints; its progress goes to the terminal."""
    command = [sys.executable, "-m", "pbsp", *arguments]
    print(" ".join(command[2:]), flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="to evaluate on")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True)
    parser.add_argument("--calibration", required=True, help="to calibrate and tune on")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bits", nargs="*", type=float, default=[2.5, 1.5, 1.0])
    parser.add_argument("--nanoquant", nargs="*", type=float, default=[1.0], metavar="BITS")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tuned", type=int, default=192, help="windows for the whole model")
    parser.add_argument("--tuned-context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--eval-context", type=int, default=2048)
    parser.add_argument("--prompts", nargs="+", default=["The city of Paris is known for"])
    options = parser.parse_args()
    recovery = Recovery(options)
    for point in points(options):
        recovery.point(*point)
    recovery.write()


if __name__ == "__main__":
    main()
