"""Saving a compressed model as one whole folder: packed weights, tokenizer, report and model card."""

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from pbsp.allocation.planfile import KEPT, PLAN_FILE, plan_text
from pbsp.errors import OutputError
from pbsp.models.precision import stored_tensors
from pbsp.models.quiet import quiet_libraries
from pbsp.models.shards import shards_of
from pbsp.report import CompressionReport
from pbsp.storage.bits import TensorSpec
from pbsp.storage.folder import check_output, new_folder
from pbsp.storage.safetensors_file import write_safetensors
from pbsp.unfinished import Unfinished

REPORT_FILE = "pbsp_report.json"


def check_target(folder: Path, *, source: str, overwrite: bool) -> None:
    """Raise OutputError unless the compressed form of `source` can be written to `folder`.

    Overwriting removes a folder with all it holds: that must be a model, and not the source.
    """
    check_output(folder, overwrite=overwrite)
    if folder.is_symlink():
        raise OutputError(f"{folder} is a symbolic link; name the folder that it points to")
    whole = folder.resolve()
    if Path.cwd().is_relative_to(whole):
        raise OutputError(f"{folder} is or holds the current folder; name a new folder in it")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").is_file():
        raise OutputError(
            f"{folder} holds no model (it has no config.json), so it is not replaced; choose another"
        )
    if Path(source).expanduser().resolve().is_relative_to(whole):
        raise OutputError(f"overwriting {folder} would remove the source {source}; choose another folder")


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    report: CompressionReport,
    *,
    overwrite: bool = False,
    unfinished: Unfinished | None = None,
) -> None:
    """Write a model that `compress` has packed; `folder` appears only when it is whole.

    Args:
        unfinished: where `compress` has left the blocks of a model that is read block by block.

    Raises:
        OutputError: see `check_target`; or the model is not packed, or its blocks are not at hand, or the
            folder cannot be created, or the disk is full.
    """
    if not report.packed:
        raise OutputError("the model is not packed: its method has no layout, only its bits are counted")
    check_target(Path(folder), source=report.source, overwrite=overwrite)
    with new_folder(Path(folder), overwrite=overwrite) as partial:
        with quiet_libraries():
            if shards_of(model):
                _save_from_blocks(model, partial, unfinished)
            else:
                model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        text = json.dumps(report.to_dict(), indent=1)
        (partial / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        planes = {layer.name: layer.pattern for layer in report.layers if layer.layout in ("planes", "rows")}
        if planes:
            kept = dict.fromkeys(report.left_uncompressed, KEPT)
            (partial / PLAN_FILE).write_text(plan_text({**planes, **kept}), encoding="utf-8")
        (partial / "README.md").write_text(_model_card(report), encoding="utf-8")


def _save_from_blocks(model: PreTrainedModel, folder: Path, unfinished: Unfinished | None) -> None:
    """What `save_pretrained` writes, in one weight file, with one tensor of a block in memory at a time."""
    shards = shards_of(model)
    if unfinished is None or shards is None:
        raise OutputError("the model was read block by block; pass the `unfinished` that compress was given")
    numbers = {part: number for number, part in enumerate(shards.blocks)}
    tensors = dict(stored_tensors(model))

    def value(name: str) -> Tensor:
        number = numbers.get(shards.part_of(name))
        found = tensors[name] if number is None else unfinished.tensor(number, name)
        return found.to(tensors[name].dtype)

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    specs = [(name, TensorSpec(tuple(tensor.shape), tensor.dtype, "")) for name, tensor in tensors.items()]
    write_safetensors(folder / SAFE_WEIGHTS_NAME, specs, value, metadata={"format": "pt"})


def _model_card(report: CompressionReport) -> str:
    """The README.md of the folder, for whoever finds it."""
    calibration = report.calibration
    patterns = sorted({layer.pattern for layer in report.layers})
    layouts = ", ".join(sorted({layer.layout for layer in report.layers}))
    return f"""---
library_name: transformers
tags: [pbsp, quantization, binarization, pruning]
---
# A model compressed by pbsp

The linear layers of `{report.source}`, binarized at N:M ({", ".join(patterns)}; layout {layouts}):
{report.stored_bits:.3f} bits per weight in the file, scales and padding included
({report.nominal_bits:.3f} as papers count, kept weights alone).
{len(report.layers)} linear layers are compressed, {len(report.left_uncompressed)} are left as they were.

Calibrated on {calibration["text"]} ({calibration["split"]}): {calibration["windows"]} windows of
{calibration["context"]} tokens, seed {calibration["seed"]}. The error of every layer is in `{REPORT_FILE}`.

```python
import pbsp  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
```
"""
