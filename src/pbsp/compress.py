"""The data flow of a compression, from a model and a text to the same model with packed layers."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.allocation.coarse import coarse_plan
from pbsp.allocation.plan import Plan, uniform_plan
from pbsp.calibration.corpus import Corpus
from pbsp.calibration.importance import block_cosines, outlier_ratios
from pbsp.calibration.moments import InputMoment, MomentPart, collect_block_moments
from pbsp.calibration.walk import Walk
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.errors import CalibrationError
from pbsp.integrations.transformers import PbspQuantizationConfig, attach, replace_module
from pbsp.models.blocks import Block, decoder_blocks, linear_weight
from pbsp.models.precision import cast_stored, check_finite, storage_dtype
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import Pattern, format_patterns
from pbsp.report import Bits, CompressionReport, LayerReport
from pbsp.resources import peak_rss_bytes
from pbsp.storage.layouts import Representation, is_packable, join

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config | None = None,
    *,
    corpus: Corpus | Windows | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Replace the linear layers of the model's decoder blocks by packed N:M binary planes, in place.

    Afterwards `model.save_pretrained` writes the packed file and `from_pretrained` reads it back. A method
    that has no packed layout leaves dense layers with the values it found; its bits are counted all the
    same, and the report says that the model is not packed.

    Args:
        model: a causal language model in evaluation mode, in float32 or a 16-bit type.
        tokenizer: turns the corpus into tokens; not needed for `self`.
        config: see `Config`.
        corpus: the calibration text, or windows taken from it before; by default `self`, 32 windows of
            512 tokens sampled from the model.
        progress: told what is done.

    Raises:
        ModelError: an unsupported architecture, or a NaN or infinite weight (names the layer).
        CorpusError: the text is missing, empty or too short.
        PatternError: no layer can take the pattern (`strict`: not every layer).
        CalibrationError: a layer cannot be solved (names the layer).
    """
    config = config or Config()
    corpus = corpus or Corpus("self", samples=32, context=512)
    tell = progress or (lambda stage, done, total: None)
    seconds: dict[str, float] = dict.fromkeys(("sample", "calibrate", "solve"), 0.0)
    blocks = decoder_blocks(model)
    plan = uniform_plan(blocks, config.patterns, strict=config.strict)
    check_finite(model)
    dtype = storage_dtype(model, config.dtype)
    with _timed(seconds, "sample"):
        if isinstance(corpus, Corpus):
            corpus = corpus.windows(tokenizer, model, progress=partial(tell, "sample"))
    coarse = None
    if config.coarse:
        with _timed(seconds, "calibrate"):
            importances = _importances(config.coarse, model, blocks, corpus.tokens)
        plan, coarse = coarse_plan(
            blocks,
            config.patterns[0],
            importances,
            rule=config.coarse,
            strict=config.strict,
            spread=config.spread,
        )
    run = _Run(model, blocks, plan, config, seconds, tell)
    layers = tuple(run.compress_blocks(corpus.tokens))
    cast_stored(model, dtype)
    provenance = {"config": config.to_dict(), "calibration": corpus.describe(), "versions": versions()}
    if run.packed:
        attach(model, PbspQuantizationConfig(left_uncompressed=plan.left_uncompressed, provenance=provenance))
    left_weights = sum(linear_weight(model.get_submodule(name)).numel() for name in plan.left_uncompressed)
    bits = Bits.over(layers, left_weights=left_weights, left_bits=16 * left_weights)
    return CompressionReport(
        nominal_bits=bits.nominal,
        stored_bits=bits.stored,
        layers=layers,
        left_uncompressed=plan.left_uncompressed,
        packed=run.packed,
        plain_moments=run.plain_because,
        coarse=coarse,
        source=model.config.name_or_path or "",
        source_bytes=0,
        calibration=corpus.describe(),
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


@dataclass
class _Run:
    """One pass over the blocks, and what it finds on the way."""

    model: PreTrainedModel
    blocks: list[Block]
    plan: Plan
    config: Config
    seconds: dict[str, float]
    tell: Progress
    plain_because: dict[str, str] = field(default_factory=dict)
    packed: bool = True

    def compress_blocks(self, tokens: Tensor) -> Iterator[LayerReport]:
        """Measure, solve and replace block after block, each behind its compressed predecessors."""
        with _timed(self.seconds, "calibrate"):
            walk = Walk(self.model, self.blocks, tokens)
        original_inputs = self.config.inputs == "original"
        solved: dict[str, tuple[Representation, float]] = {}
        for index, block in enumerate(self.blocks):
            self.tell("compress", index, len(self.blocks))
            linears = {name: module for name, module in block.linears().items() if name in self.plan.patterns}
            with _timed(self.seconds, "calibrate"):
                weighting = self.config.moment_weighting
                moments = collect_block_moments(
                    walk, index, block, linears, weighting=weighting, keep=original_inputs
                )
                self.plain_because |= moments.plain_because
            with _timed(self.seconds, "solve"):
                solved |= self._solve(linears, moments.inputs)
                for name, module in linears.items():
                    representation, error = solved[self.plan.same_as.get(name, name)]
                    yield self._replace(name, module, representation, error)
                solved = {
                    name: result for name, result in solved.items() if name in self.plan.same_as.values()
                }
            with _timed(self.seconds, "calibrate"):
                if not original_inputs:
                    walk.run(index, block.module, keep=True)
        self.tell("compress", len(self.blocks), len(self.blocks))

    def _replace(
        self, name: str, module: nn.Module, representation: Representation, error: float
    ) -> LayerReport:
        """Put the packed layer in the linear's place, or its values where no layout holds them."""
        if is_packable(representation):
            bias = module.bias if isinstance(module.bias, Tensor) else None
            layer = PackedLinear.of(representation, bias)
            replace_module(self.model, name, layer)
            return LayerReport.of(name, layer, error)
        self.packed = False
        linear_weight(module).copy_(representation.dense())
        pattern = format_patterns(self.plan.patterns[name]) or "dense"
        return LayerReport.of_values(name, representation, pattern, error)

    def _solve(
        self, linears: dict[str, nn.Module], moments: dict[str, InputMoment]
    ) -> dict[str, tuple[Representation, float]]:
        """Each linear's representation and relative output error.

        Rows with one moment are one matrix, unless the method looks at a linear as a whole.
        """
        weights: dict[str, Tensor] = {}
        groups: dict[tuple[int, tuple[Pattern, ...], str], list[tuple[str, MomentPart]]] = {}
        for name, module in linears.items():
            if name in self.plan.same_as:
                continue
            if name not in moments:
                raise CalibrationError(f"{name} is never called on the calibration text; it cannot be solved")
            weights[name] = linear_weight(module).float()
            apart = name if self.config.build(self.plan.patterns[name]).rows_interact else ""
            for part in moments[name].parts:
                key = id(part.moment), self.plan.patterns[name], apart
                groups.setdefault(key, []).append((name, part))
        pieces: dict[str, list[tuple[int, Representation]]] = {name: [] for name in weights}
        for (_, patterns, _), members in groups.items():
            rows = [weights[name][part.rows.start : part.rows.stop] for name, part in members]
            try:
                whole = self.config.build(patterns).compress(torch.cat(rows), members[0][1].moment)
            except CalibrationError as error:
                names = ", ".join(dict.fromkeys(name for name, _ in members))
                raise CalibrationError(f"{names}: {error}") from None
            for (name, part), piece in zip(members, whole.split([len(row) for row in rows]), strict=True):
                pieces[name].append((part.rows.start, piece))
        results: dict[str, tuple[Representation, float]] = {}
        for name, weight in weights.items():
            ordered = [piece for _, piece in sorted(pieces[name], key=lambda item: item[0])]
            representation = join(ordered)
            moment = moments[name]
            signal = moment.error(weight)
            error = moment.error(weight - representation.dense()) / signal if signal > 0 else 0.0
            results[name] = representation, error
        return results


def _importances(rule: str, model: PreTrainedModel, blocks: list[Block], tokens: Tensor) -> list[float]:
    """What a coarse allocation ranks the blocks by."""
    if rule == "outliers":
        return outlier_ratios(model, blocks, tokens)
    return [1 - cosine for cosine in block_cosines(model, blocks, tokens)]


def versions() -> dict[str, str]:
    """What the result depends on besides the settings."""
    packages = {name: version(name) for name in ("pbsp", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - start
