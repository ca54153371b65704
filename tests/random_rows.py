"""Random valid representations of layout `rows`."""

import torch

from pbsp.binarization.rotation import rotation_for
from pbsp.quantization.rows import QuantizedRows, quantize_rows


def random_rows(text: str, rows: int, columns: int, *, seed: int = 0) -> QuantizedRows:
    """4 bit where the rows are whole groups, and 8 bit in every third layer; `text` is for planes."""
    weight = 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    bits = 8 if columns % 32 or seed % 3 == 0 else 4
    return QuantizedRows(quantize_rows(weight, bits), bits, rotation_for(columns, 16) if seed % 2 else 1)
