"""Silence the libraries while they load, save and generate: whoever calls us shows the progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from tqdm.auto import tqdm
from transformers import modeling_gguf_pytorch_utils as gguf_loading
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars or warnings of transformers and huggingface_hub inside; their state is put back."""
    level, hub_level = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if hub_bars:
        disable_progress_bars()
    try:
        with no_bars(gguf_loading):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


@contextmanager
def no_bars(*modules: ModuleType) -> Iterator[None]:
    """No bars of modules that draw them with a plain `tqdm`, which no setting turns off."""
    bars = [(module, module.tqdm) for module in modules if hasattr(module, "tqdm")]
    for module, _ in bars:
        setattr(module, "tqdm", _no_bar)  # noqa: B010 - the name is not exported
    try:
        yield
    finally:
        for module, bar in bars:
            setattr(module, "tqdm", bar)  # noqa: B010


def _no_bar(items: object = None, **settings: object) -> tqdm:
    return tqdm(items, **{**settings, "disable": True})  # pyright: ignore[reportArgumentType, reportCallIssue]
