"""Small numbers of one width as bit streams: the way every packed tensor of bytes is written.

The numbers of a row follow each other LSB-first, and the row is padded with zero bits to a whole byte,
so that eight numbers take exactly `width` bytes and any range of rows can be decoded on its own.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int32, Integer, UInt8
from torch import Tensor

from pbsp.errors import FormatError


def stream_bytes(count: int, width: int) -> int:
    """Bytes of a row of `count` numbers, padding included."""
    return -(-count * width // 8)


def join_bits(numbers: Integer[Tensor, "rows count"], width: int) -> UInt8[Tensor, "rows bytes"]:
    """The numbers, each below 2^width, as a row's bit stream."""
    rows, count = numbers.shape
    runs = -(-count // 8)
    padded = torch.nn.functional.pad(numbers, (0, runs * 8 - count)).view(rows, runs, 8)
    stream = torch.zeros(rows, runs, width, dtype=torch.uint8, device=numbers.device)
    for number in range(8):
        first, shift = divmod(number * width, 8)
        shifted = padded[..., number].long() << shift
        for byte in range(first, (number * width + width - 1) // 8 + 1):
            stream[..., byte] |= ((shifted >> 8 * (byte - first)) & 255).to(torch.uint8)
    return stream.view(rows, -1)[:, : stream_bytes(count, width)].contiguous()


def split_bits(stream: UInt8[Tensor, "rows bytes"], width: int, count: int) -> Int32[Tensor, "rows count"]:
    """The inverse of `join_bits`. Bytes are transposed first, so that all arithmetic is contiguous."""
    runs = -(-count // 8)
    padding = runs * width - stream.shape[1]
    whole = torch.nn.functional.pad(stream, (0, padding)) if padding else stream
    columns = whole.reshape(-1, width).T.to(torch.int32).contiguous()
    result = torch.empty(columns.shape[1], 8, dtype=torch.int32, device=stream.device)
    for number in range(8):
        first, shift = divmod(number * width, 8)
        code = columns[first] >> shift
        for byte in range(first + 1, (number * width + width - 1) // 8 + 1):
            # A fifth byte reaches beyond bit 31 only with bits above the number's width, masked below.
            code |= columns[byte] << (8 * (byte - first) - shift)
        result[:, number] = code
    result &= (1 << width) - 1
    return result.view(len(stream), -1)[:, :count]


def check_padding(stream: UInt8[Tensor, "rows bytes"], bits: int, name: str) -> None:
    """Raise FormatError unless whatever follows the first `bits` of every row is zero."""
    if bits % 8 and bool((stream[:, -1] >> bits % 8).any()):
        raise FormatError(f"{name} has set bits in the padding of a row, which must be zero")


def row_tiles(rows: int, row_items: int, tile_items: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that hold about `tile_items` items each."""
    step = max(1, tile_items // row_items)
    return ((low, min(low + step, rows)) for low in range(0, rows, step))
