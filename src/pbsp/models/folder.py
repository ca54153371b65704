"""A model folder as `save_pretrained` writes it: checked by its files before anything is loaded."""

import json
from pathlib import Path

from pbsp.errors import ModelError

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def check_folder(folder: Path) -> None:
    """Raise ModelError, naming what is missing, unless the folder has a config and all its weight files."""
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"name its .gguf file: {ggufs[0]}" if ggufs else "name a folder that save_pretrained wrote"
        raise ModelError(f"{folder} has no config.json; {hint}")
    if not weight_files(folder):
        raise ModelError(f"{folder} has a config.json but no weights (*.safetensors or *.bin)")
    for index in sorted(folder.glob("*.index.json")):
        missing = [name for name in _shards(index) if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the weight files that {index.name} lists, {missing[0]} "
                "the first; copy or download it again"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: the safetensors if there are any, else the .bin files."""
    safetensors = sorted(folder.glob("*.safetensors"))
    return safetensors or sorted(path for path in folder.glob("*.bin") if path.name not in _NOT_WEIGHTS)


def weight_bytes(folder: Path) -> int:
    """The size of the weight files in bytes."""
    return sum(path.stat().st_size for path in weight_files(folder))


def half_dtype(folder: Path) -> str | None:
    """ "float16" or "bfloat16" if that is the type that the config gives for the weights, else None."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype", config.get("torch_dtype"))
    return named if named in ("float16", "bfloat16") else None


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer of any kind."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a list of weight files: {error!r}") from None
