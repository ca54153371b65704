"""Saving a compressed model as one whole folder: packed weights, tokenizer, report and model card."""

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.report import CompressionReport
from pbsp.storage.folder import new_folder

REPORT_FILE = "pbsp_report.json"


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    report: CompressionReport,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model that `compress` has packed; `folder` appears only when it is whole.

    Raises:
        OutputError: the folder is in use, cannot be created, or the disk is full.
    """
    with new_folder(Path(folder), overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        text = json.dumps(report.to_dict(), indent=1)
        (partial / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_model_card(report), encoding="utf-8")


def _model_card(report: CompressionReport) -> str:
    """The README.md of the folder, for whoever finds it."""
    calibration = report.calibration
    patterns = sorted({layer.pattern for layer in report.layers})
    return f"""---
library_name: transformers
tags: [pbsp, quantization, binarization, pruning]
---
# A model compressed by pbsp

The linear layers of `{report.source}` stored as N:M binary planes ({", ".join(patterns)}):
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
