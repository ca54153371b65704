"""What a compressed model's folder holds, counted from the files themselves."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pbsp.compiled import kernel_of
from pbsp.errors import FormatError, ModelError
from pbsp.integrations.transformers import METHOD, PbspQuantizationConfig
from pbsp.models.experts import split_experts
from pbsp.models.folder import check_folder
from pbsp.models.load import LOAD_ERRORS, one_line
from pbsp.models.quiet import quiet_libraries
from pbsp.report import Bits, LayerReport
from pbsp.save import REPORT_FILE
from pbsp.storage.checkpoint import (
    LayerEntry,
    StoredTensor,
    check_layer_headers,
    read_headers,
    read_nominal_bits,
)
from pbsp.storage.folder import folder_bytes

_ITEM_BYTES = {  # by the names of safetensors
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_KINDS = (
    "embeddings and head",
    "linears left uncompressed",
    "norms and biases",
)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_OTHER = "routers and other matrices"  # only where there are some


@dataclass(frozen=True)
class Inspection:
    """Sizes of a compressed model.

    Attributes:
        nominal_bits, stored_bits: see `report.Bits`; counted from the files.
        file_bytes: all files of the folder.
        bytes_by_kind: the same bytes by what they hold.
        source_bytes: the weights file that was compressed, where the report knows it.
        kernels: what computes products with each layout on this machine's CPU, see `compiled`.
        layers: the packed layers; their output errors are those that `compress` recorded, NaN if it did not.
    """

    nominal_bits: float
    stored_bits: float
    file_bytes: int
    bytes_by_kind: dict[str, int]
    source_bytes: int | None
    layers: tuple[LayerReport, ...]
    left_uncompressed: dict[str, str]
    kernels: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; null for an output error that is not recorded."""
        values = asdict(self)
        for layer in values["layers"]:
            layer["output_error"] = None if math.isnan(layer["output_error"]) else layer["output_error"]
        return values


def inspect_folder(folder: Path) -> Inspection:
    """Count what `folder` stores, from the files' headers; only loading also checks the tensors' values.

    Raises:
        ModelError: the folder is not a model compressed by pbsp, or lacks files.
        FormatError: its files are damaged.
    """
    skeleton, quantization = _compressed_model(folder)
    split_experts(skeleton, holding={*quantization.layers, *quantization.left_uncompressed})
    place = {name: index for index, (name, _) in enumerate(skeleton.named_modules())}
    # config.json has them by the alphabet, which puts block 10 before block 2
    names = sorted(quantization.layers, key=lambda name: place.get(name, len(place)))
    entries = {name: quantization.layers[name] for name in names}
    left = quantization.left_uncompressed
    sizes = folder_bytes(folder)
    files = [name for name in sizes if name.endswith(".safetensors")]
    tensors = {tensor.key: tensor for tensor in read_headers(str(folder / name) for name in files)}
    recorded = recorded_report(folder)
    errors = {layer["name"]: layer["output_error"] for layer in recorded.get("layers", [])}
    for name in left:
        if f"{name}.weight" not in tensors:
            raise FormatError(
                f"tensor {name}.weight is missing from the model's files; the model is incomplete"
            )
    layers = tuple(_layer(name, entry, tensors, errors) for name, entry in entries.items())
    kinds = _bytes_by_kind(tensors, entries, left=set(left), embeddings=_embedding_keys(skeleton))
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
        kernels={layout: kernel_of(layout) for layout in sorted({layer.layout for layer in layers})},
    )


def _compressed_model(folder: Path) -> tuple[PreTrainedModel, PbspQuantizationConfig]:
    """The uncompressed model without weights, and the quantization; ModelError unless pbsp compressed it."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; name one that `pbsp compress` wrote")
    check_folder(folder)
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        quantization = values.pop("quantization_config", None)
        _check_depth(path, values)
        with quiet_libraries():
            config = AutoConfig.for_model(values.pop("model_type"), **values)
    except LOAD_ERRORS as error:
        raise ModelError(f"{path} is not a model's configuration: {one_line(error)}") from None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ModelError(f"{folder} is not compressed by pbsp; `pbsp compress {folder} -o OUT` does that")
    checked = PbspQuantizationConfig.from_dict(quantization)
    if not checked.layers:
        raise FormatError(f"{path} lists no packed layer; it is damaged")
    try:
        with quiet_libraries(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), checked
    except LOAD_ERRORS as error:
        raise ModelError(f"{path} describes no language model: {one_line(error)}") from None


def _check_depth(path: Path, values: dict[str, Any]) -> None:
    """Raise ModelError before a wrong number of layers is built, which could take all memory."""
    largest = path.stat().st_size  # every block has packed layers, and each of these an entry in the file
    for name in _DEPTHS:
        depth = values.get(name)
        if isinstance(depth, int) and depth > largest:
            raise ModelError(f"{path} is damaged: its {name} cannot be so large")


def recorded_report(folder: Path) -> dict[str, Any]:
    """What `compress` recorded beside the model; empty if the file was not kept."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read ({error}); delete it to go on without") from None
    if not isinstance(recorded, dict) or not _is_report(recorded):
        raise FormatError(f"{path} is not a report of pbsp; delete it to go on without")
    return recorded


def _is_report(recorded: dict[str, Any]) -> bool:
    """Whether what is read of a report has the types that `compress` writes."""
    layers, source_bytes = recorded.get("layers", []), recorded.get("source_bytes")
    return (
        (source_bytes is None or type(source_bytes) is int)
        and isinstance(layers, list)
        and all(
            isinstance(layer, dict)
            and isinstance(layer.get("name"), str)
            and type(layer.get("output_error")) in (int, float)
            for layer in layers
        )
    )


def _layer(
    name: str, entry: LayerEntry, tensors: dict[str, StoredTensor], errors: dict[str, float]
) -> LayerReport:
    check_layer_headers(name, entry, tensors)
    stored = sum(_bytes(tensors[f"{name}.{suffix}"]) for suffix in entry.form.specs())
    nominal = read_nominal_bits(name, entry, tensors)
    return LayerReport.counted(
        name, entry.form, nominal, bits=8 * stored, output_error=errors.get(name, math.nan)
    )


def _bytes(tensor: StoredTensor) -> int:
    if tensor.dtype not in _ITEM_BYTES:
        raise FormatError(f"tensor {tensor.key} is of type {tensor.dtype}, which is not known here")
    return math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]


def _bytes_by_kind(
    tensors: dict[str, StoredTensor], packed: dict[str, LayerEntry], *, left: set[str], embeddings: set[str]
) -> dict[str, int]:
    """Tensor bytes by kind."""
    specs = {
        f"{name}.{suffix}": spec
        for name, entry in packed.items()
        for suffix, spec in entry.form.specs().items()
    }
    kinds = dict.fromkeys((*(spec.kind for spec in specs.values()), *_KINDS), 0)
    for key, tensor in tensors.items():
        layer, _, suffix = key.rpartition(".")
        if key in specs:
            kind = specs[key].kind
        elif key in embeddings:
            kind = "embeddings and head"
        elif layer in left and suffix == "weight":
            kind = "linears left uncompressed"
        else:
            kind = "norms and biases" if len(tensor.shape) < 2 else _OTHER
        kinds[kind] = kinds.get(kind, 0) + _bytes(tensor)
    return kinds


def _embedding_keys(model: PreTrainedModel) -> set[str]:
    """Names of the input and output embeddings' weights, and of learned positions."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
    }
