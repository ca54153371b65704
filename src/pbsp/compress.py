"""The data flow of a compression, from a model and a text to the same model with packed layers."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.allocation import Plan, uniform_plan
from pbsp.binarization.planes import Planes
from pbsp.calibration.corpus import Corpus
from pbsp.calibration.moments import collect_moments
from pbsp.calibration.walk import Walk
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.errors import CalibrationError
from pbsp.integrations.transformers import PbspQuantizationConfig, attach, replace_module
from pbsp.methods.planes import PlaneFit
from pbsp.models.blocks import Block, decoder_blocks, linear_weight
from pbsp.models.precision import cast_stored, check_finite, storage_dtype
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import Pattern
from pbsp.report import Bits, CompressionReport, LayerReport
from pbsp.resources import peak_rss_bytes
from pbsp.solver.hessian import output_error

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

    Afterwards `model.save_pretrained` writes the packed file and `from_pretrained` reads it back.

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
    layers = tuple(_compress_blocks(model, blocks, corpus.tokens, plan, config, seconds=seconds, tell=tell))
    cast_stored(model, dtype)
    provenance = {"config": config.to_dict(), "calibration": corpus.describe(), "versions": _versions()}
    attach(model, PbspQuantizationConfig(left_uncompressed=plan.left_uncompressed, provenance=provenance))
    left_weights = sum(linear_weight(model.get_submodule(name)).numel() for name in plan.left_uncompressed)
    bits = Bits.over(layers, left_weights=left_weights, left_bits=16 * left_weights)
    return CompressionReport(
        nominal_bits=bits.nominal,
        stored_bits=bits.stored,
        layers=layers,
        left_uncompressed=plan.left_uncompressed,
        source=model.config.name_or_path or "",
        source_bytes=0,
        calibration=corpus.describe(),
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _compress_blocks(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens: Tensor,
    plan: Plan,
    config: Config,
    *,
    seconds: dict[str, float],
    tell: Progress,
) -> Iterator[LayerReport]:
    """Measure, solve and replace block after block; each is measured behind its compressed predecessors."""
    with _timed(seconds, "calibrate"):
        walk = Walk(model, blocks, tokens)
    original_inputs = config.inputs == "original"
    solved: dict[str, tuple[Planes, float]] = {}
    for index, block in enumerate(blocks):
        tell("compress", index, len(blocks))
        linears = {name: module for name, module in block.linears().items() if name in plan.patterns}
        with _timed(seconds, "calibrate"):
            moments = collect_moments(linears, partial(walk.run, index, block.module, keep=original_inputs))
        with _timed(seconds, "solve"):
            solved |= _solve_block(linears, moments, plan, config)
            for name, module in linears.items():
                planes, error = solved[plan.same_as.get(name, name)]
                bias = module.bias if isinstance(module.bias, Tensor) else None
                layer = PackedLinear.from_planes(planes, bias)
                replace_module(model, name, layer)
                yield LayerReport.of(name, layer, error)
            solved = {name: result for name, result in solved.items() if name in plan.same_as.values()}
        with _timed(seconds, "calibrate"):
            if not original_inputs:
                walk.run(index, block.module, keep=True)
    tell("compress", len(blocks), len(blocks))


def _solve_block(
    linears: dict[str, nn.Module], moments: dict[str, Tensor], plan: Plan, config: Config
) -> dict[str, tuple[Planes, float]]:
    """Planes and relative output error of each linear; those with one moment are solved as one matrix."""
    groups: dict[tuple[int, tuple[Pattern, ...]], list[str]] = {}
    for name in linears:
        if name in plan.same_as:
            continue
        if name not in moments:
            raise CalibrationError(f"{name} is never called on the calibration text, so it cannot be solved")
        groups.setdefault((id(moments[name]), plan.patterns[name]), []).append(name)
    results: dict[str, tuple[Planes, float]] = {}
    for (_, patterns), names in groups.items():
        weights = [linear_weight(linears[name]).float() for name in names]
        moment = moments[names[0]]
        method = PlaneFit(patterns, config.scale_block, config.damping, config.sweeps)
        try:
            planes = method.compress(torch.cat(weights), moment).split([len(weight) for weight in weights])
        except CalibrationError as error:
            raise CalibrationError(f"{', '.join(names)}: {error}") from None
        for name, weight, part in zip(names, weights, planes, strict=True):
            results[name] = part, output_error(weight, part.dense(), moment)
    return results


def _versions() -> dict[str, str]:
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
