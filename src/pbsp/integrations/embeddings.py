"""Embeddings and heads in 8 or 4 bit: put in a model, described in config.json, checked, taken out again."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.errors import FormatError
from pbsp.integrations.modules import replace_module
from pbsp.packed_embedding import PackedEmbedding, PackedHead
from pbsp.quantization.rows import WIDTHS, quantize_rows, row_bytes, width_for
from pbsp.storage.bits import CODES
from pbsp.storage.checkpoint import StoredTensor, check_header, read_tensor


@dataclass(frozen=True)
class RowsEntry:
    """What config.json says about one matrix of quantized rows; `sha256` is of its bytes."""

    rows: int
    columns: int
    bits: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(name: str, entry: Any) -> "RowsEntry":
        """The entry of embedding `name` as JSON has it; FormatError unless it is whole."""
        types = {"rows": int, "columns": int, "bits": int, "sha256": str}
        if not isinstance(entry, Mapping) or set(entry) != set(types):
            raise FormatError(f"embedding {name}: its entry must have exactly the keys {', '.join(types)}")
        for key, expected in types.items():
            if type(entry[key]) is not expected or (expected is int and not 0 < entry[key] < 2**31):
                raise FormatError(f"embedding {name}: {key} is of a wrong type or out of range")
        found = RowsEntry(**entry)
        if found.bits not in WIDTHS or width_for(found.columns, found.bits) != found.bits:
            raise FormatError(
                f"embedding {name}: rows of {found.columns} columns have no {found.bits}-bit form"
            )
        return found


def pack_embeddings(
    model: PreTrainedModel,
    dtype: torch.dtype,
    bits: int,
    *,
    round_head: Callable[[Tensor, int], Tensor] = quantize_rows,
) -> str:
    """Replace the input embedding and the head by quantized rows; tied, they stay one matrix.

    Args:
        dtype: of what is computed with them.
        bits: 8, or 4 where the rows are whole groups.
        round_head: makes bytes of what the head multiplies with (tied, the embedding's rows too) and bits.

    Returns:
        What was done, or why not: a matrix is only taken from a plain embedding or a linear without bias.
    """
    name, module = _input_embedding(model)
    if type(module) is not nn.Embedding:
        return f"16 bit: {type(module).__name__} is more than a table"
    head_name, head = _head(model)
    tied = head is not None and getattr(head, CODES, None) is module.weight
    plain = type(head) is nn.Linear and head.bias is None
    if tied and not plain:
        return f"16 bit: tied to a {type(head).__name__} that is more than a product"
    rows, columns = module.weight.shape
    bits = width_for(columns, bits)
    embedding = PackedEmbedding(rows, columns, dtype, device="meta", bits=bits)
    embedding.set_rows((round_head if tied else quantize_rows)(module.weight, bits))
    replace_module(model, name, embedding)
    if not isinstance(head, nn.Linear) or not plain:
        return f"{bits} bit" if head is None else f"{bits} bit; the head, {type(head).__name__}, 16 bit"
    rows, columns = head.weight.shape
    packed = PackedHead(rows, columns, dtype, device="meta", bits=width_for(columns, bits))
    if tied:
        packed.weight = embedding.weight
    else:
        packed.set_rows(round_head(head.weight, packed.bits))
    replace_module(model, head_name, packed)
    return f"{bits} bit"


def packable_embeddings(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices that `pack_embeddings` would store, by their modules' names."""
    name, module = _input_embedding(model)
    head_name, head = _head(model)
    plain = type(head) is nn.Linear and head.bias is None
    tied = head is not None and getattr(head, CODES, None) is getattr(module, CODES)
    if type(module) is not nn.Embedding or (tied and not plain):
        return {}
    found = {name: module.weight}
    if plain and not tied:
        assert isinstance(head, nn.Linear)
        found[head_name] = head.weight
    return found


def embedding_entries(model: PreTrainedModel) -> dict[str, RowsEntry]:
    """The entries of a model's quantized rows; of tied ones, that of the embedding."""
    found: dict[int, tuple[str, PackedEmbedding | PackedHead]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedEmbedding | PackedHead):
            found.setdefault(id(module.weight), (name, module))
    return {
        name: RowsEntry(module.rows, module.columns, module.bits, _digest(module.weight))
        for name, module in found.values()
    }


def place_embeddings(model: PreTrainedModel, entries: Mapping[str, RowsEntry]) -> None:
    """Put empty quantized rows where the entries say, and in a tied head's place.

    Args:
        entries: by the model's own names.

    Raises:
        FormatError: the model has no plain embedding or head of that name and shape.
    """
    modules = dict(model.named_modules())
    for name, entry in entries.items():
        module = modules.get(name)
        if type(module) not in (nn.Embedding, nn.Linear):
            raise FormatError(f"embedding {name}: {type(model).__name__} has no embedding of that name")
        assert isinstance(module, nn.Embedding | nn.Linear)
        if tuple(module.weight.shape) != (entry.rows, entry.columns):
            raise FormatError(
                f"embedding {name} is {entry.rows}x{entry.columns} in quantization_config and "
                f"{'x'.join(map(str, module.weight.shape))} in {type(model).__name__}"
            )
        kind = PackedEmbedding if isinstance(module, nn.Embedding) else PackedHead
        replace_module(model, name, _empty(kind, entry, module.weight.dtype))
    head_name, head = _head(model)
    entry = entries.get(_tied_source(model, head_name) or "")
    if isinstance(head, nn.Linear) and entry is not None:
        replace_module(model, head_name, _empty(PackedHead, entry, head.weight.dtype))


def check_embedding(name: str, entry: RowsEntry, stored: Mapping[str, StoredTensor]) -> None:
    """Compare a stored matrix with its entry; FormatError, naming it, if it is missing or differs."""
    key = f"{name}.{CODES}"
    check_header(key, stored, (entry.rows, row_bytes(entry.columns, entry.bits)), ("U8",))
    found = _digest(read_tensor(stored[key]))
    if found != entry.sha256:
        raise FormatError(
            f"embedding {name}: the SHA-256 of its bytes is {found}, config.json says {entry.sha256}: "
            "the file was damaged or changed; download or compress the model again"
        )


def unpack_embeddings(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put plain embeddings and heads in `dtype` back; what shared its rows shares its values."""
    dense: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedEmbedding | PackedHead):
            continue
        weight = dense.setdefault(id(module.weight), nn.Parameter(module.dense(dtype)))
        with torch.device("meta"):
            rows, columns = weight.shape
            embeds = isinstance(module, PackedEmbedding)
            plain = nn.Embedding(rows, columns) if embeds else nn.Linear(columns, rows, bias=False)
        plain.weight = weight
        replace_module(model, name, plain)


def _empty(
    kind: type[PackedEmbedding | PackedHead], entry: RowsEntry, dtype: torch.dtype
) -> PackedEmbedding | PackedHead:
    return kind(entry.rows, entry.columns, dtype, device="meta", bits=entry.bits)


def _digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().cpu().contiguous().numpy().data).hexdigest()


def _tied_source(model: PreTrainedModel, head_name: str) -> str | None:
    """The name of the module whose weight the head takes; None if it has its own."""
    source = model.all_tied_weights_keys.get(f"{head_name}.{CODES}")
    return None if source is None else source.removesuffix(f".{CODES}")


def _input_embedding(model: PreTrainedModel) -> tuple[str, nn.Module]:
    module = model.get_input_embeddings()
    return _name_of(model, module), module


def _head(model: PreTrainedModel) -> tuple[str, nn.Module | None]:
    module = model.get_output_embeddings()
    return ("", None) if module is None else (_name_of(model, module), module)


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
