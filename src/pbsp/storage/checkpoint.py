"""What a compressed model's files must hold: the entry of each packed linear, and the checks before use."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from pbsp.errors import FormatError, PatternError
from pbsp.pruning.pattern import format_patterns, parse_patterns
from pbsp.storage.layouts import FORMS, Form, Packed

FORMAT_VERSION = 1
_DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16"}
_LARGEST_SIZE = 2**31 - 1
_FLOAT_NAMES = ("F16", "BF16", "F32", "F64")
_WRITTEN = {"patterns": str, "shared_scales": bool}  # how a form's fields are in JSON; the others are sizes


@dataclass(frozen=True)
class LayerEntry:
    """What config.json says about one packed linear; `sha256` is `packed_digest` of its tensors."""

    form: Form
    bias: bool
    sha256: str

    @property
    def layout(self) -> str:
        """The layout's name."""
        return self.form.layout

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON."""
        values = {field.name: getattr(self.form, field.name) for field in fields(self.form)}
        if "patterns" in values:
            values["patterns"] = format_patterns(values["patterns"])
        for name, default in _defaults(type(self.form)).items():
            if values[name] == default:
                del values[name]
        return {"layout": self.layout, **values, "bias": self.bias, "sha256": self.sha256}

    @staticmethod
    def from_dict(name: str, entry: Any) -> "LayerEntry":
        """The entry of layer `name` as JSON has it; FormatError unless it is whole and consistent."""
        if not isinstance(entry, Mapping):
            raise FormatError(f"layer {name}: its entry is {entry!r}, not an object")
        layout = entry.get("layout")
        if not isinstance(layout, str) or layout not in FORMS:
            raise FormatError(f"layer {name}: layout is {layout!r}; this pbsp knows {', '.join(FORMS)}")
        form = FORMS[layout]
        absent = [name for name in _defaults(form) if name not in entry]
        names = [field.name for field in fields(form) if field.name not in absent]
        written = {name: _WRITTEN.get(name, int) for name in names}
        sizes = [name for name in names if written[name] is int]
        types = {"layout": str, **written, "bias": bool, "sha256": str}
        if set(entry) != set(types):
            raise FormatError(f"layer {name}: its entry must have exactly the keys {', '.join(types)}")
        for key, expected in types.items():
            if type(entry[key]) is not expected:
                raise FormatError(f"layer {name}: {key} is {entry[key]!r}, not {expected.__name__}")
        for key in sizes:
            if not 1 <= entry[key] <= _LARGEST_SIZE:
                shown = entry[key] if abs(entry[key]) < 1 << 64 else "far too large"
                raise FormatError(f"layer {name}: {key} is {shown}; it must be from 1 to {_LARGEST_SIZE}")
        if re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is None:
            raise FormatError(f"layer {name}: sha256 is {entry['sha256']!r}, not 64 hexadecimal digits")
        try:
            values = {name: entry[name] for name in names}
            if "patterns" in values:
                values["patterns"] = parse_patterns(values["patterns"])
            checked = form(**values)
        except (PatternError, FormatError) as error:
            raise FormatError(f"layer {name}: {error}") from error
        return LayerEntry(checked, entry["bias"], entry["sha256"])


class StoredTensor(NamedTuple):
    """Where a tensor lies and what the file's header says of it; dtype as safetensors writes it."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: str


def _defaults(form: type[Form]) -> dict[str, Any]:
    """Fields that an entry leaves out where they have these values."""
    return {field.name: field.default for field in fields(form) if field.default is not MISSING}


def packed_digest(packed: Packed) -> str:
    """SHA-256 over a line of the layer's layout, patterns and sizes, then the bytes of its packed tensors.

    The line is part of it because patterns share code widths: 4:8 read as 5:8 would decode to noise.
    """
    digest = hashlib.sha256(f"{packed.form}\n".encode())
    for tensor in packed.tensors().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def read_headers(files: Iterable[str]) -> list[StoredTensor]:
    """Every tensor of safetensors files, from their headers alone.

    Raises:
        FormatError: a file is missing, truncated or not safetensors.
    """
    tensors = []
    for file in files:
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                header = opened.get_slice(key)
                tensors.append(StoredTensor(file, key, tuple(header.get_shape()), header.get_dtype()))
    return tensors


def check_layer(name: str, entry: LayerEntry, stored: Mapping[str, StoredTensor]) -> None:
    """Compare a layer's headers with its entry, then its bytes with their digest and the format.

    Args:
        name: the layer's name in the model.
        entry: what the config says of it.
        stored: the file's tensors by their name in the model.

    Raises:
        FormatError: anything of the layer is missing, differs or has no meaning; it names the layer.
    """
    check_layer_headers(name, entry, stored)
    tensors = {suffix: read_tensor(stored[f"{name}.{suffix}"]) for suffix in entry.form.specs()}
    packed = entry.form.packed(tensors)
    digest = packed_digest(packed)
    if digest != entry.sha256:
        raise FormatError(
            f"layer {name}: the SHA-256 of its packed tensors is {digest}, config.json says {entry.sha256}: "
            "the file was damaged or changed; download or compress the model again"
        )
    try:
        packed.check()
    except FormatError as error:
        raise FormatError(f"layer {name}: {error}") from error


def check_layer_headers(name: str, entry: LayerEntry, stored: Mapping[str, StoredTensor]) -> None:
    """The first part of `check_layer`, which reads no tensor: names, shapes and dtypes."""
    for suffix, spec in entry.form.specs().items():
        check_header(f"{name}.{suffix}", stored, spec.shape, (_DTYPE_NAMES[spec.dtype],))
    if entry.bias:
        check_header(f"{name}.bias", stored, (entry.form.out_features,), _FLOAT_NAMES)


def read_nominal_bits(name: str, entry: LayerEntry, stored: Mapping[str, StoredTensor]) -> float:
    """Bits per weight of a layer as the papers count them; reads a tensor only where they depend on it."""
    return entry.form.nominal_bits(lambda suffix: read_tensor(stored[f"{name}.{suffix}"]))


def check_header(
    name: str, stored: Mapping[str, StoredTensor], shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    """Raise FormatError unless tensor `name` is stored with that shape and one of the dtypes."""
    if name not in stored:
        raise FormatError(f"tensor {name} is missing from the model's files; the model is incomplete")
    tensor = stored[name]
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise FormatError(
            f"tensor {name} is {tensor.dtype} {list(tensor.shape)} in {os.path.basename(tensor.file)}; "
            f"config.json calls for {' or '.join(dtypes)} {list(shape)}"
        )


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """The tensor's values."""
    with _opened(tensor.file) as opened:
        return opened.get_tensor(tensor.key)


def _opened(file: str) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise FormatError(f"file {file} is missing; the model is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"file {file} cannot be read as safetensors ({error}); it is damaged") from error
