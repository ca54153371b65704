"""The data flow of a recovery: from a compressed model and its original to the same model, tuned."""

import time
from dataclasses import asdict, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from pbsp.block_run import Progress
from pbsp.calibration.windows import Windows
from pbsp.compress import versions
from pbsp.errors import ConfigError, ModelError
from pbsp.evaluation.perplexity import check_fit
from pbsp.integrations.transformers import PbspQuantizationConfig, attach
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.models.experts import split_experts
from pbsp.models.precision import cast_stored, weights_digest
from pbsp.models.products import products_dtype
from pbsp.packed_linear import PackedLinear
from pbsp.recovery.model import MODEL_TUNING, recover_model
from pbsp.recovery.tunable import Tuning
from pbsp.report import CompressionReport
from pbsp.resources import peak_rss_bytes
from pbsp.unfinished import Unfinished


def recover(
    model: PreTrainedModel,
    original: PreTrainedModel,
    report: CompressionReport,
    *,
    windows: Windows,
    tuning: Tuning = MODEL_TUNING,
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
) -> CompressionReport:
    """Tune a compressed model, in place, until its predictions are near the original's.

    Codes, scales, norms and biases change, not their sizes: `save_compressed` writes as many bytes as before.

    Args:
        model: made by `compress`, loaded or not; see `tunable` for what is tuned.
        original: what it was made from, on the same device, in evaluation mode.
        report: of the compression; the layers' output errors are those of before.
        windows: calibration text; see `recover_model`.
        tuning: see `Tuning`.
        dtype: the 16-bit type of what is not packed.
        progress: told what is done.
        unfinished: where to keep the state, and to find an earlier run's with the same settings.

    Raises:
        ModelError: the model is not compressed, or not from `original`.
        ConfigError: a rate or the number of epochs is out of range, or the earlier run had other settings.
        CorpusError, CalibrationError: see `recover_model`.
    """
    _check_tuning(tuning)
    split_experts(original)
    _check_pair(model, original)
    check_fit(model, windows.context, int(windows.tokens.max()))
    described = {
        "tuning": asdict(tuning),
        "calibration": windows.describe(),
        "versions": versions(),
    }
    kept = None
    if unfinished:
        unfinished.claim(_settings(model, original, tuning, windows))
        kept = unfinished.tuning
    start = time.perf_counter()
    distilled = recover_model(
        model,
        original,
        windows.tokens,
        tuning,
        progress=progress and (lambda done, total: progress("tune", done, total)),
        kept=kept,
    )
    seconds = time.perf_counter() - start
    cast_stored(model, dtype)
    config = model.config.quantization_config
    provenance = {**config.provenance, "recovered": described}
    attach(model, PbspQuantizationConfig(left_uncompressed=config.left_uncompressed, provenance=provenance))
    return replace(
        report,
        distilled=distilled,
        seconds={"recover": seconds},
        peak_rss_bytes=peak_rss_bytes(),
    )


def _check_tuning(tuning: Tuning) -> None:
    if tuning.epochs < 1:
        raise ConfigError(f"{tuning.epochs} epochs; at least 1 is needed")
    for name, rate in (("rate", tuning.rate), ("code_rate", tuning.code_rate)):
        if rate is not None and not 0 <= rate < 1:
            raise ConfigError(f"{name} is {rate}; it must be at least 0 and below 1")


def _check_pair(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Raise ModelError unless the one can be the other's compressed form."""
    if not isinstance(getattr(model.config, "quantization_config", None), PbspQuantizationConfig):
        raise ModelError("the model to tune is not compressed by pbsp; compress it first")
    kinds = [found.config.model_type for found in (model, original)]
    if kinds[0] != kinds[1]:
        raise ModelError(f"the compressed model is a {kinds[0]} and the original a {kinds[1]}; name its own")
    weights: dict[str, nn.Module] = {}
    for block in decoder_blocks(original):
        weights |= block.linears()
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        shape = (module.out_features, module.in_features)
        found = tuple(linear_weight(weights[name]).shape) if name in weights else None
        if found != shape:
            there = "lacks it" if found is None else f"has {found[0]}x{found[1]}"
            raise ModelError(
                f"{name} is {shape[0]}x{shape[1]} in the compressed model and the original {there}; "
                "name the model that it was made from"
            )


def _settings(
    model: PreTrainedModel, original: PreTrainedModel, tuning: Tuning, windows: Windows
) -> dict[str, str]:
    """All that the result depends on, by name."""
    return {
        **{name.replace("_", " "): str(value) for name, value in asdict(tuning).items()},
        "rate": "by divergence" if tuning.rate is None else str(tuning.rate),
        "computed in": str(model.dtype).removeprefix("torch."),
        "products tuned in": str(products_dtype(model.dtype, model.device)).removeprefix("torch."),
        "device": model.device.type,
        "calibration text": windows.text,
        "calibration windows": f"{len(windows)} of {windows.context} tokens",
        "calibration seed": str(windows.seed),
        **{f"version of {name}": found for name, found in versions().items()},
        "model digest": weights_digest(model)[:16],
        "original's digest": weights_digest(original)[:16],
        "calibration digest": windows.digest[:16],
    }
