"""The source model: a folder, a Hub id, a .gguf file or the built-in name, all ending as a loaded folder."""

import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pbsp.errors import ConfigError, ModelError
from pbsp.models.folder import check_folder, half_dtype, has_tokenizer, weight_bytes, weight_files
from pbsp.models.gguf import BUILTIN, builtin_file, converted_folder
from pbsp.models.memory import in_blocks
from pbsp.models.quiet import quiet_libraries
from pbsp.models.shards import Shards

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_HUB_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)  # fmt: skip
"""What transformers raises for a folder or a config that is damaged or that it does not know."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be compressed or evaluated.

    Attributes:
        model: in evaluation mode, without gradients.
        tokenizer: None if the source has none.
        source: what the user named.
        source_dtype: the 16-bit type of the source's own weights; None if they are of another type.
        source_bytes: size of the weight files that the user named; of the .gguf file, not of its copy.
        seconds: wall time of `convert` (GGUF to a 16-bit folder, 0.0 otherwise) and of `load`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    source_dtype: str | None
    source_bytes: int
    seconds: dict[str, float]


def load_model(
    source: str,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory: str = "whole",
    tokens: int = 0,
) -> LoadedModel:
    """Load a causal language model, compressed or not, and its tokenizer.

    Args:
        source: a folder, a .gguf file, a Hub id, or the built-in `smollm2-135m`.
        device: "auto" is the GPU if there is one, else the CPU.
        dtype: of the weights; "auto" is float32 on the CPU, where 16-bit products are slower, and the
            source's own type elsewhere.
        memory: "whole"; or "blocks", to be compressed with one decoder block in memory at a time; or
            "auto", blocks where the model and the hidden states of `tokens` would not fit, see `memory`.
        tokens: that will be calibrated on.

    Raises:
        ModelError: the source is not found, incomplete, damaged or of an unknown architecture.
        ConfigError: the device or dtype is unknown or not there.
    """
    chosen = _device(device)
    chosen_dtype = _dtype(dtype, chosen)
    start = time.perf_counter()
    folder, source_bytes = _folder_of(source)
    converted = time.perf_counter()
    itemsize = chosen_dtype.itemsize if isinstance(chosen_dtype, torch.dtype) else 2
    by_blocks = in_blocks(memory, folder, device=chosen, itemsize=itemsize, tokens=tokens)
    load = _load_blocks if by_blocks else _load_folder
    model = load(source, folder, device=chosen, dtype=chosen_dtype)
    tokenizer = _load_tokenizer(source, folder)
    seconds = {"convert": converted - start, "load": time.perf_counter() - converted}
    return LoadedModel(model, tokenizer, source, half_dtype(folder), source_bytes, seconds)


def _folder_of(source: str) -> tuple[Path, int]:
    """The folder to load, and the bytes of the weights that the user named."""
    path = Path(source).expanduser()
    if source == BUILTIN and not path.exists():
        path = builtin_file()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ModelError(f"{source} does not exist")
        return converted_folder(path), path.stat().st_size
    if path.is_file():
        raise ModelError(f"{source} is a file; name the folder it lies in, or a .gguf file")
    folder = path if path.is_dir() else _hub_folder(source)
    check_folder(folder)
    return folder, weight_bytes(folder)


def _hub_folder(source: str) -> Path:
    """The local copy of a Hub model, downloaded if it is not there.

    The snapshot is asked for before transformers is: offline that fails at once, where
    `from_pretrained` retries for 45 seconds.
    """
    known = f"name a folder, a .gguf file, a Hub id or the built-in {BUILTIN}"
    if source.startswith((".", "/", "~")):
        raise ModelError(f"{source} does not exist; {known}")
    try:
        with quiet_libraries():
            folder = Path(snapshot_download(source, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
            if not weight_files(folder):
                snapshot_download(source, allow_patterns=["*.bin"], ignore_patterns=_HUB_IGNORED)
    except HFValidationError:
        raise ModelError(f"{source!r} is not a folder and cannot be a Hub id; {known}") from None
    except HfHubHTTPError as error:
        raise ModelError(f"the Hub does not give {source!r} ({one_line(error)}); {known}") from None
    except OSError:
        raise ModelError(
            f"{source!r} is not a folder here, and the Hub cannot be reached to look for it; {known}"
        ) from None
    return folder


def _load_blocks(source: str, folder: Path, *, device: torch.device, dtype: object) -> PreTrainedModel:
    """The model without its weights, which are read part by part when they are used."""
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        raise ModelError(
            f"{source} has .bin weights, which cannot be read block by block; convert them to safetensors "
            "(save_pretrained does), or use --memory whole"
        )
    empty = _load_folder(source, folder, device=torch.device("meta"), dtype=dtype)
    if getattr(empty, "is_quantized", False):
        raise ModelError("the model is already quantized; compress the original instead")
    return Shards(empty, files, device).model


def _load_folder(source: str, folder: Path, *, device: torch.device, dtype: object) -> PreTrainedModel:
    try:
        with quiet_libraries():
            model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                folder,
                dtype=dtype,
                device_map=None if device.type == "cpu" else {"": device},
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except LOAD_ERRORS as error:
        raise ModelError(f"{source} cannot be loaded: {one_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise ModelError(
            f"{source} lacks {len(missing)} of the tensors of a {type(model).__name__}, {missing[0]} the "
            "first; its weights are incomplete, or of another architecture"
        )
    return model.eval().requires_grad_(False)


def _load_tokenizer(source: str, folder: Path) -> PreTrainedTokenizerBase | None:
    if not has_tokenizer(folder):
        return None
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"the tokenizer of {source} cannot be loaded: {one_line(error)}") from None


def _device(requested: str | torch.device) -> torch.device:
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ConfigError(f"device {requested!r} is unknown; choose auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {requested} is not supported; choose auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {requested} is not available: this torch sees no GPU; choose cpu")
    return device


def _dtype(requested: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """What `from_pretrained` takes as dtype; its "auto" is the source's own."""
    if isinstance(requested, torch.dtype):
        return requested
    if requested == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if requested not in _DTYPES:
        raise ConfigError(f"dtype {requested!r} is unknown; choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[requested]


def one_line(error: BaseException) -> str:
    """The first sentence or so of an error of another library."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:240].rsplit(" ", 1)[0] + " …"
