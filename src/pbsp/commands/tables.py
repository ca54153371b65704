"""Sizes as tables for people; evaluations have theirs in `evaluation.report`."""

import math
from collections.abc import Iterable

from rich.table import Table

from pbsp.inspection import Inspection
from pbsp.preview import Preview
from pbsp.report import LayerReport


def summary_table(found: Inspection) -> Table:
    """Nominal, stored and file sizes, one below the other, with the source's and the embeddings' share."""
    table = Table(show_header=False)
    table.add_row("nominal bits per weight (kept weights alone)", f"{found.nominal_bits:.4f}")
    table.add_row("stored bits per weight (all linear layers)", f"{found.stored_bits:.4f}")
    table.add_row("files", _megabytes(found.file_bytes))
    embeddings = found.bytes_by_kind["embeddings and head"]
    share = embeddings / found.file_bytes
    table.add_row("  of them embeddings and head", f"{_megabytes(embeddings)} ({share:.0%})")
    if found.source_bytes:
        ratio = found.file_bytes / found.source_bytes
        table.add_row("source's weight files", f"{_megabytes(found.source_bytes)} (now {ratio:.0%} of it)")
    table.add_row("compressed linear layers", str(len(found.layers)))
    table.add_row("linear layers left uncompressed", str(len(found.left_uncompressed)))
    weights = sum(layer.weights for layer in found.layers)
    error = sum(layer.output_error * layer.weights for layer in found.layers) / weights
    table.add_row("mean relative output error, by weights", _error(error))
    kernels = ", ".join(f"{layout}: {kernel}" for layout, kernel in found.kernels.items())
    table.add_row("kernels on this machine's CPU", kernels)
    return table


def preview_table(found: Preview, source_bytes: int) -> Table:
    """What a compression would write and take."""
    table = Table(show_header=False)
    table.add_row("stored bits per weight (all linear layers)", f"{found.stored_bits:.4f}")
    table.add_row("embeddings and head", f"{found.embedding_bits} bit")
    table.add_row("weight file", f"{found.weight_bytes:,} bytes")
    if source_bytes:
        table.add_row("source's weight files", f"{source_bytes:,} bytes")
    if found.expected_loss is not None:
        untried = "" if found.tried else "; the plan was not tried on a copy"
        table.add_row("expected to add", f"{found.expected_loss:.2f} nats per token{untried}")
    table.add_row("calibrating and solving, about", f"{found.seconds / 60:.1f} min")
    table.add_row("peak memory, about", f"{found.memory_bytes / 1e9:.2f} GB")
    return table


def bytes_table(found: Inspection) -> Table:
    """The folder's bytes by what they hold."""
    table = Table("what the files hold", "bytes", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, size in found.bytes_by_kind.items():
        table.add_row(kind, f"{size:,}", f"{size / found.file_bytes:.1%}")
    table.add_row("all", f"{found.file_bytes:,}", "")
    return table


def layer_table(layers: Iterable[LayerReport]) -> Table:
    """One row per compressed linear layer."""
    table = Table("layer", "pattern", "shape", "stored bits", "output error")
    for column in table.columns[:2]:
        column.overflow = "fold"  # names differ at their ends
    for column in table.columns[2:]:
        column.justify = "right"
    for layer in layers:
        table.add_row(
            layer.name,
            f"{layer.pattern} {layer.layout}" if layer.layout == "paper" else layer.pattern,
            f"{layer.out_features}×{layer.in_features}",
            f"{layer.stored_bits:.4f}",
            _error(layer.output_error),
        )
    return table


def _error(value: float) -> str:
    return "not recorded" if math.isnan(value) else f"{value:.4f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
