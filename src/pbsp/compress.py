"""The data flow of a compression, from a model and a text to the same model with packed layers."""

import copy
import platform
from functools import partial
from importlib.metadata import version

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.block_run import BlockRun, Progress, timed
from pbsp.calibration.corpus import Corpus
from pbsp.calibration.windows import Windows
from pbsp.config import Config
from pbsp.distributed import ALONE, Ranks
from pbsp.embedding_rounding import head_moment, round_head
from pbsp.errors import ConfigError
from pbsp.evaluation.perplexity import mean_loss
from pbsp.integrations.embeddings import pack_embeddings
from pbsp.integrations.transformers import PbspQuantizationConfig, attach
from pbsp.methods.table import packs
from pbsp.models.blocks import decoder_blocks, linear_weight
from pbsp.models.experts import split_experts
from pbsp.models.precision import cast_stored, check_finite, storage_dtype, weights_digest
from pbsp.models.products import products_dtype
from pbsp.models.shards import OUTSIDE, shards_of
from pbsp.planned import Planned
from pbsp.planning import MEASURED_WINDOWS, Measured, check_request, make_plan
from pbsp.recovery.model import MODEL_TUNING, recover_model
from pbsp.report import Bits, CompressionReport
from pbsp.resources import peak_rss_bytes
from pbsp.shared_unfinished import SharedUnfinished
from pbsp.unfinished import Unfinished


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config | None = None,
    *,
    corpus: Corpus | Windows | None = None,
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
    measured: Measured | None = None,
    ranks: Ranks = ALONE,
) -> CompressionReport:
    """Replace the linear layers of the model's decoder blocks by packed N:M binary planes, in place.

    Afterwards `model.save_pretrained` writes the packed file and `from_pretrained` reads it back. A method
    that has no packed layout leaves dense layers with the values it found; its bits are counted all the
    same, and the report says that the model is not packed.

    Args:
        model: a causal language model in evaluation mode, in float32 or a 16-bit type; or one that is
            read block by block (`load_model` with memory "blocks"), which needs `unfinished`, also to save.
        tokenizer: turns the corpus into tokens; not needed for `self`.
        config: see `Config`.
        corpus: the calibration text, or windows taken from it before; by default `self`, 32 windows of
            512 tokens sampled from the model.
        progress: told what is done.
        unfinished: where to keep every finished block, and to find those of an earlier run with the same
            settings, which are not done again; the result is the same. Only with a method that packs. Of
            several processes the first alone gives it.
        measured: pass the same to calls that differ in their config alone, and what several of them need for
            their plans is measured once.
        ranks: processes that share the work. All make this call, and all end with the compressed model.

    Raises:
        ConfigError: the earlier run had other settings (names what differs), or see `check_ranks`; or the
            model is read block by block and this cannot be done so.
        RankError: another process has ended, or was called with something else.
        ModelError: an unsupported architecture, or a NaN or infinite weight (names the layer).
        CorpusError: the text is missing, empty or too short (to tune the model: than two windows).
        PatternError: no layer can take the pattern (`strict`: not every layer).
        CalibrationError: a layer cannot be solved (names the layer).
    """
    config = config or Config()
    corpus = corpus or Corpus("self", samples=32, context=512)
    tell = progress or (lambda stage, done, total: None)
    seconds: dict[str, float] = dict.fromkeys(
        ("check", "sample", "plan", "calibrate", "solve", "recover", "keep"), 0.0
    )
    shards = shards_of(model)
    if shards:
        shards.scratch = _scratch(config, unfinished, ranks)
    split_experts(model)
    blocks = decoder_blocks(model)
    check_request(blocks, config)
    if isinstance(corpus, Corpus):
        corpus.check_model(model)
    with timed(seconds, "check"):
        check_finite(model)
        dtype = storage_dtype(model, config.dtype)
    with timed(seconds, "sample"):
        if isinstance(corpus, Corpus):
            corpus = ranks.from_first(
                partial(corpus.windows, tokenizer, model, progress=partial(tell, "sample"))
            )
    check_ranks(config, len(corpus), ranks)
    shared, kept = SharedUnfinished.of(unfinished, ranks), None
    if shared:
        shared.claim(_settings(model, config, corpus))
        kept = shared.plan()
    with timed(seconds, "plan"):
        if kept is None:
            planned = make_plan(
                *(model, blocks, config, corpus.tokens),
                progress=partial(tell, "plan"),
                measured=measured,
                ranks=ranks,
            )
        else:
            planned = Planned.from_dict(*kept)
    if shared and kept is None:
        shared.keep_plan(planned.to_dict(), planned.token_weights)
    plan = planned.plan
    teacher = copy.deepcopy(model) if config.recovers_model else None
    run = BlockRun(model, blocks, planned, config, seconds, tell, unfinished=shared, ranks=ranks)
    layers = tuple(run.compress_blocks(corpus.tokens))
    distilled = None
    if teacher is not None:
        with timed(seconds, "recover"):
            kept = unfinished and unfinished.tuning
            distilled = recover_model(
                model, teacher, corpus.tokens, MODEL_TUNING, progress=partial(tell, "tune"), kept=kept
            )
            del teacher
    if shards:
        shards.keep(OUTSIDE)
    moment = None
    if planned.embedding_bits == 4 and not shards:  # block by block there is no whole model to run
        some = corpus.tokens[:MEASURED_WINDOWS]
        with timed(seconds, "calibrate"):
            moment = head_moment(model, lambda: mean_loss(model, some))
    cast_stored(model, dtype)
    embeddings = "16 bit"
    if run.packed and planned.embedding_bits < 16:
        embeddings = pack_embeddings(
            model, dtype, planned.embedding_bits, round_head=partial(round_head, moment=moment)
        )
    provenance = {"config": config.to_dict(), "calibration": corpus.describe(), "versions": versions()}
    if run.packed:
        packed = PbspQuantizationConfig(left_uncompressed=plan.left_uncompressed, provenance=provenance)
        attach(model, packed, layers=run.forms)
    left_weights = sum(linear_weight(model.get_submodule(name)).numel() for name in plan.left_uncompressed)
    bits = Bits.over(layers, left_weights=left_weights, left_bits=16 * left_weights)
    return CompressionReport(
        nominal_bits=bits.nominal,
        stored_bits=bits.stored,
        layers=layers,
        left_uncompressed=plan.left_uncompressed,
        packed=run.packed,
        plain_moments=run.plain_because,
        uncalibrated=run.uncalibrated,
        coarse=planned.coarse,
        recovered=tuple(run.recovered),
        distilled=distilled,
        blocks=tuple(run.reports),
        memory="blocks" if shards else "whole",
        embeddings=embeddings,
        expected_loss=planned.expected_loss,
        tried=planned.tried,
        source=model.config.name_or_path or "",
        source_bytes=0,
        calibration=corpus.describe(),
        processes=ranks.size,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


def check_ranks(config: Config, windows: int, ranks: Ranks) -> None:
    """Raise ConfigError if the processes cannot share the work: a window each, and no recovery."""
    if ranks.size == 1:
        return
    if config.recover != "none":
        raise ConfigError(
            f"recover {config.recover} tunes on one window after the other, in one process; leave it out, or "
            "start without torchrun"
        )
    if windows < ranks.size:
        raise ConfigError(
            f"{ranks.size} processes cannot share {windows} calibration windows; start at most {windows}, or "
            "give more text and --samples"
        )


def _scratch(config: Config, unfinished: Unfinished | None, ranks: Ranks) -> str:
    """Where the hidden states of a model that is read block by block go; ConfigError if it cannot be."""
    if ranks.size > 1:
        raise ConfigError(
            f"each of {ranks.size} processes needs the whole model in memory; load it with memory whole"
        )
    if config.recovers_model:
        raise ConfigError(
            f"recover {config.recover} needs the compressed model and the original in memory, not one block; "
            "use recover block, or load the model with memory whole"
        )
    if unfinished is None:
        raise ConfigError(
            "a model that is read block by block needs a folder for its finished blocks; pass "
            "unfinished=pbsp.Unfinished(folder), or load it with memory whole"
        )
    if not packs(config.build()):
        raise ConfigError(
            f"method {config.method} has no packed layout, so its result has no place outside memory; load "
            "the model with memory whole"
        )
    return str(unfinished.folder)


def _settings(model: PreTrainedModel, config: Config, windows: Windows) -> dict[str, str]:
    """All that the result depends on, by name."""
    chosen = {name.replace("_", " "): str(value) for name, value in config.to_dict().items()}
    device = (shards_of(model) or model).device
    products = str(products_dtype(model.dtype, device)).removeprefix("torch.")
    tuned = {} if config.recover == "none" else {"products tuned in": products}
    return {
        **chosen,
        "computed in": str(model.dtype).removeprefix("torch."),
        **tuned,
        "device": device.type,
        "calibration text": windows.text,
        "calibration windows": f"{len(windows)} of {windows.context} tokens",
        "calibration seed": str(windows.seed),
        **{f"version of {name}": found for name, found in versions().items()},
        "model digest": weights_digest(model)[:16],
        "calibration digest": windows.digest[:16],
    }


def versions() -> dict[str, str]:
    """What the result depends on besides the settings."""
    packages = {name: version(name) for name in ("pbsp", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}
