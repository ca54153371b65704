"""What `pbsp bench` does after parsing: time a model, then the original in two float types."""

import gc
from typing import Any

import torch
from rich.table import Table

from pbsp.commands.console import print_json, print_tables
from pbsp.compiled import activations, kernel_of
from pbsp.evaluation.speed import Speed, check_sizes, measure_speed
from pbsp.kernels.bandwidth import read_bandwidth
from pbsp.models.load import load_model
from pbsp.packed_linear import PackedLinear

_ORIGINAL_DTYPES = ("float32", "bfloat16")


def run_bench(
    source: str,
    *,
    against: str | None,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    device: str,
    dtype: str,
    json: bool,
) -> None:
    """`pbsp bench`."""
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs}
    check_sizes(**sizes)
    activations()  # refuses what it does not know before anything is loaded
    bandwidth = read_bandwidth()
    wanted = [(source, source, dtype)]
    wanted += [(f"original, {name}", against, name) for name in _ORIGINAL_DTYPES] if against else []
    speeds: dict[str, Speed] = {}
    kernels: dict[str, str] = {}
    for title, name, chosen in wanted:
        model = load_model(name, device=device, dtype=chosen).model
        layouts = {module.form.layout for module in model.modules() if isinstance(module, PackedLinear)}
        kernels |= {layout: kernel_of(layout) for layout in sorted(layouts)}
        speeds[title] = measure_speed(model, bandwidth=bandwidth, **sizes)
        del model
        gc.collect()
    if json:
        print_json(_values(source, against, speeds, kernels, bandwidth))
    else:
        print_tables(_table(speeds, kernels, bandwidth))


def _values(
    source: str, against: str | None, speeds: dict[str, Speed], kernels: dict[str, str], bandwidth: float
) -> dict[str, Any]:
    first, *others = speeds.values()
    return {
        "model": source,
        "against": against,
        "kernels": kernels,
        "activations": activations(),
        "bandwidth": bandwidth,
        **first.to_json(),
        "original": {
            other.dtype: {
                **other.to_json(),
                "prompt_ratio": first.prompt_tokens_per_second / other.prompt_tokens_per_second,
                "decode_ratio": first.decode_tokens_per_second / other.decode_tokens_per_second,
            }
            for other in others
        },
    }


def _table(speeds: dict[str, Speed], kernels: dict[str, str], bandwidth: float) -> Table:
    first = next(iter(speeds.values()))
    ran = ", ".join(f"layout {layout} on {kernel}" for layout, kernel in kernels.items())
    parts = [
        f"prompt of {first.prompt_tokens} random tokens, {first.new_tokens} tokens behind it, one sequence",
        f"medians of {first.runs} runs",
        f"{first.threads} CPU threads of {torch.__version__} torch",
        f"memory reads {bandwidth / 1e9:.1f} GB/s",
        *([f"{ran}, activations {activations()}"] if ran else []),
        "ratio: speed of the model to this one's",
    ]
    table = Table(caption="; ".join(parts), caption_justify="left")
    table.add_column("model")
    titles = (
        "type",
        "first token",
        "prompt",
        "ratio",
        "decode",
        "ratio",
        "read a token",
        "of memory",
        "peak",
    )
    for title in titles:
        table.add_column(title, justify="right")
    for name, speed in speeds.items():
        table.add_row(
            name,
            speed.dtype,
            f"{speed.first_token_seconds:.2f} s",
            f"{speed.prompt_tokens_per_second:.0f} tokens/s",
            f"{first.prompt_tokens_per_second / speed.prompt_tokens_per_second:.2f}",
            f"{speed.decode_tokens_per_second:.1f} tokens/s",
            f"{first.decode_tokens_per_second / speed.decode_tokens_per_second:.2f}",
            f"{speed.bytes_per_token / 1e6:.1f} MB",
            f"{speed.bandwidth_share:.0%}",
            f"{speed.peak_bytes / 1e9:.2f} GB",
        )
    return table
