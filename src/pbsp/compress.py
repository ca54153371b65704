"""The data flow of a compression, from a model and a text to the same model with packed layers."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.allocation import Plan, uniform_plan
from pbsp.binarization.planes import Planes
from pbsp.calibration.corpus import Corpus
from pbsp.calibration.moments import collect_moments
from pbsp.calibration.walk import Walk
from pbsp.config import Config
from pbsp.errors import CalibrationError, ConfigError, ModelError
from pbsp.integrations.transformers import PbspQuantizationConfig, attach, replace_module
from pbsp.methods.planes import PlaneFit
from pbsp.models.blocks import Block, decoder_blocks, linear_weight
from pbsp.packed_linear import PackedLinear
from pbsp.pruning.pattern import format_patterns
from pbsp.report import CompressionReport, LayerReport
from pbsp.resources import peak_rss_bytes
from pbsp.solver.hessian import output_error
from pbsp.storage.bits import nominal_bits, stored_bits

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config | None = None,
    *,
    corpus: Corpus | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Replace the linear layers of the model's decoder blocks by packed N:M binary planes, in place.

    Afterwards `model.save_pretrained` writes the packed file and `from_pretrained` reads it back.

    Args:
        model: a causal language model in evaluation mode; a float32 or 16-bit one.
        tokenizer: turns the corpus into tokens; not needed for `self`.
        config: see `Config`.
        corpus: the calibration text; by default `self`, 32 windows of 512 sampled from the model.
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
    seconds = dict.fromkeys(("sample", "calibrate", "solve"), 0.0)
    blocks = decoder_blocks(model)
    plan = uniform_plan(blocks, config.patterns, strict=config.strict)
    _check_weights(model)
    linear_weights = sum(linear_weight(m).numel() for block in blocks for m in block.linears().values())
    with _timed(seconds, "sample"):
        windows = corpus.windows(tokenizer, model, progress=lambda done, total: tell("sample", done, total))
    layers = _compress_blocks(
        model, blocks, windows.tokens, plan=plan, config=config, seconds=seconds, tell=tell
    )
    model.to(_storage_dtype(model, config.dtype))
    provenance = {"config": config.to_dict(), "calibration": windows.describe(), "versions": _versions()}
    attach(model, PbspQuantizationConfig(left_uncompressed=plan.left_uncompressed, provenance=provenance))
    return _report(
        layers, plan, linear_weights=linear_weights, calibration=windows.describe(), seconds=seconds
    )


def _compress_blocks(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens: Tensor,
    *,
    plan: Plan,
    config: Config,
    seconds: dict[str, float],
    tell: Progress,
) -> list[LayerReport]:
    """Measure, solve and replace block after block; each is measured behind its compressed predecessors."""
    with _timed(seconds, "calibrate"):
        walk = Walk(model, blocks, tokens)
    original_inputs = config.inputs == "original"
    shared: dict[str, tuple[Planes, float]] = {}
    layers: list[LayerReport] = []
    for index, block in enumerate(blocks):
        tell("compress", index, len(blocks))
        linears = {name: module for name, module in block.linears().items() if name in plan.patterns}
        with _timed(seconds, "calibrate"):
            run = partial(walk.run, index, block.module, keep=original_inputs)
            moments = collect_moments(linears, run)
        with _timed(seconds, "solve"):
            for name, module in linears.items():
                first = plan.same_as.get(name, name)
                planes, error = shared.get(first) or _solve(name, module, moments.get(name), plan, config)
                if first in plan.same_as.values():
                    shared[first] = planes, error
                layer = PackedLinear.from_planes(planes, module.bias)
                replace_module(model, name, layer)
                layers.append(_layer_report(name, layer, error))
        with _timed(seconds, "calibrate"):
            if not original_inputs:
                walk.run(index, block.module, keep=True)
    tell("compress", len(blocks), len(blocks))
    return layers


def _solve(
    name: str, module: nn.Module, moment: Tensor | None, plan: Plan, config: Config
) -> tuple[Planes, float]:
    """The planes of one linear and their relative output error; errors name the layer."""
    if moment is None:
        raise CalibrationError(f"{name} is never called on the calibration text, so it cannot be solved")
    weight = linear_weight(module).float()
    method = PlaneFit(plan.patterns[name], config.scale_block, config.damping, config.sweeps)
    try:
        planes = method.compress(weight, moment)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from None
    return planes, output_error(weight, planes.dense(), moment)


def _layer_report(name: str, layer: PackedLinear, error: float) -> LayerReport:
    weights = layer.out_features * layer.in_features
    return LayerReport(
        name=name,
        pattern=format_patterns(layer.patterns),
        out_features=layer.out_features,
        in_features=layer.in_features,
        nominal_bits=nominal_bits(layer.patterns),
        stored_bits=stored_bits(layer.packed_tensors()) / weights,
        output_error=error,
    )


def _report(
    layers: list[LayerReport],
    plan: Plan,
    *,
    linear_weights: int,
    calibration: dict[str, Any],
    seconds: dict[str, float],
) -> CompressionReport:
    compressed = sum(layer.weights for layer in layers)
    layer_bits = sum(layer.stored_bits * layer.weights for layer in layers)
    left_bits = 16 * (linear_weights - compressed)
    return CompressionReport(
        nominal_bits=sum(layer.nominal_bits * layer.weights for layer in layers) / compressed,
        stored_bits=(layer_bits + left_bits) / linear_weights,
        layers=tuple(layers),
        left_uncompressed=plan.left_uncompressed,
        calibration=calibration,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _check_weights(model: PreTrainedModel) -> None:
    """Raise ModelError if a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise ModelError(
                f"{name.removesuffix('.weight')}: {bad} of {parameter.numel()} weights are NaN or infinite"
            )


def _storage_dtype(model: PreTrainedModel, requested: str) -> torch.dtype:
    """The 16-bit type of what stays uncompressed (see `Config.dtype`)."""
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    largest = max(float(parameter.abs().max()) for parameter in floating)
    fits = largest <= torch.finfo(torch.float16).max
    if requested == "float16" and not fits:
        raise ConfigError(f"dtype float16 cannot hold a weight of {largest:.3g}; use bfloat16")
    if requested != "auto":
        return getattr(torch, requested)
    if model.dtype in (torch.float16, torch.bfloat16):
        return model.dtype
    return torch.float16 if fits else torch.bfloat16


def _versions() -> dict[str, str]:
    """What the result depends on besides the settings."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("pbsp", "torch", "transformers")
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the wall time of the block to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - start
