"""What a compressed model's folder holds, counted from the files themselves."""

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pbsp.errors import FormatError, ModelError
from pbsp.pruning.pattern import format_patterns
from pbsp.report import Bits, LayerReport
from pbsp.save import REPORT_FILE
from pbsp.storage.bits import CODES, OFFSETS, SCALES, nominal_bits
from pbsp.storage.checkpoint import LayerEntry, StoredTensor, read_headers
from pbsp.storage.folder import folder_bytes

_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Inspection:
    """Sizes of a compressed model.

    Attributes:
        nominal_bits, stored_bits: see `report.Bits`; counted from the files.
        file_bytes: all files of the folder.
        bytes_by_kind: the same bytes by what they hold.
        source_bytes: the weights file that was compressed, where the report knows it.
        layers: the packed layers; their output errors are those that `compress` recorded, NaN if it did not.
    """

    nominal_bits: float
    stored_bits: float
    file_bytes: int
    bytes_by_kind: dict[str, int]
    source_bytes: int | None
    layers: tuple[LayerReport, ...]
    left_uncompressed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def inspect_folder(folder: Path) -> Inspection:
    """Count what `folder` stores.

    Raises:
        ModelError: the folder is not a model compressed by pbsp.
        FormatError: its files are damaged.
    """
    config = _compressed_config(folder)
    entries = {n: LayerEntry.from_dict(n, e) for n, e in config.quantization_config["layers"].items()}
    left = dict(config.quantization_config["left_uncompressed"])
    sizes = folder_bytes(folder)
    files = [name for name in sizes if name.endswith(".safetensors")]
    tensors = {tensor.key: tensor for tensor in read_headers(str(folder / name) for name in files)}
    recorded = _recorded(folder)
    errors = {layer["name"]: layer["output_error"] for layer in recorded.get("layers", [])}
    layers = tuple(_layer(name, entry, tensors, errors) for name, entry in entries.items())
    kinds = _bytes_by_kind(tensors, set(entries), left=set(left), embeddings=_embedding_keys(config))
    kinds["file headers"] = sum(sizes[name] for name in files) - sum(kinds.values())
    kinds["tokenizer, configuration, report"] = sum(sizes.values()) - sum(sizes[name] for name in files)
    left_weights = sum(math.prod(tensors[f"{name}.weight"].shape) for name in left)
    left_bits = 8 * kinds["linears left uncompressed"]
    bits = Bits.over(layers, left_weights=left_weights, left_bits=left_bits)
    return Inspection(
        nominal_bits=bits.nominal,
        stored_bits=bits.stored,
        file_bytes=sum(sizes.values()),
        bytes_by_kind=kinds,
        source_bytes=recorded.get("source_bytes"),
        layers=layers,
        left_uncompressed=left,
    )


def _compressed_config(folder: Path) -> PretrainedConfig:
    """The model's config; ModelError unless pbsp compressed it."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "pbsp":
        raise ModelError(f"{folder} is not compressed by pbsp; `pbsp compress {folder} -o OUT` does that")
    return config


def _recorded(folder: Path) -> dict[str, Any]:
    """What `compress` recorded beside the model; empty if the file was not kept."""
    path = folder / REPORT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _layer(
    name: str, entry: LayerEntry, tensors: dict[str, StoredTensor], errors: dict[str, float]
) -> LayerReport:
    stored = [tensors.get(f"{name}.{suffix}") for suffix in (CODES, SCALES, OFFSETS)]
    if None in stored:
        raise FormatError(
            f"{name}: a packed tensor is missing from the model's files; the model is incomplete"
        )
    return LayerReport(
        name=name,
        pattern=format_patterns(entry.patterns),
        out_features=entry.out_features,
        in_features=entry.in_features,
        nominal_bits=nominal_bits(entry.patterns),
        stored_bits=8 * sum(_bytes(t) for t in stored if t) / (entry.out_features * entry.in_features),
        output_error=errors.get(name, math.nan),
    )


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]


def _bytes_by_kind(
    tensors: dict[str, StoredTensor], packed: set[str], *, left: set[str], embeddings: set[str]
) -> dict[str, int]:
    """Tensor bytes by kind."""
    kinds = dict.fromkeys(
        (
            "plane codes",
            "plane scales",
            "embeddings and head",
            "linears left uncompressed",
            "norms and biases",
        ),
        0,
    )
    for key, tensor in tensors.items():
        layer, _, suffix = key.rpartition(".")
        if layer in packed and suffix == CODES:
            kind = "plane codes"
        elif layer in packed and suffix in (SCALES, OFFSETS):
            kind = "plane scales"
        elif key in embeddings:
            kind = "embeddings and head"
        elif layer in left and suffix == "weight":
            kind = "linears left uncompressed"
        else:
            kind = "norms and biases"
        kinds[kind] += _bytes(tensor)
    return kinds


def _embedding_keys(config: PretrainedConfig) -> set[str]:
    """Names of the input and output embeddings' weights, and of learned positions."""
    config = copy.deepcopy(config)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
    }
