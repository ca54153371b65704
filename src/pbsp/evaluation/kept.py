"""The original's predictions kept on disk, so that measuring many models against it runs it once.

What is kept is the input of the output embedding, which is small: the logits come back from it by one
product, where the model itself is some twenty times as much work.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pbsp.calibration.windows import Windows
from pbsp.errors import OutputError
from pbsp.evaluation.perplexity import Predictions, Progress, evaluate
from pbsp.evaluation.result import Evaluation

_INDEX = "original.json"  # written last: where it is, the folder is whole
_TOLERANCE = 1e-5


class KeptPredictions:
    """`Predictions` out of a folder that `keep_predictions` has filled."""

    def __init__(self, model: PreTrainedModel, folder: Path, losses: Sequence[float]) -> None:
        self._head = _head(model)
        self._device = model.device
        self._folder = folder
        self.losses = losses
        self.vocabulary: int = model.config.get_text_config().vocab_size

    @torch.no_grad()
    def logits(self, windows: slice) -> Float[Tensor, "windows context vocabulary"]:
        """The logits at all positions of these windows."""
        files = [_file(self._folder, index) for index in range(len(self.losses))[windows]]
        hidden = torch.cat([load_file(file)["hidden"] for file in files])
        return self._head(hidden.to(self._device))


def keep_predictions(
    model: PreTrainedModel, windows: Windows, folder: Path, *, progress: Progress | None = None
) -> tuple[Evaluation, Predictions | None]:
    """The original's own evaluation and its predictions; both are read from `folder` if they are there.

    Args:
        model: the original; its output embedding is used again for as long as the predictions are.
        windows: what it predicts.
        folder: of this model and these windows alone; made if need be.
        progress: told the forward passes done.

    Returns:
        None for predictions that cannot be had this way: the model does more to its logits than its output
        embedding does, as with soft capping.

    Raises:
        OutputError: the folder cannot be written.
    """
    if not _is_whole(folder, len(windows)):
        hidden = _head_gives_the_logits(model, windows.tokens[:1])
        _fill(model, windows, folder, hidden=hidden, progress=progress)
    known = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    evaluation = Evaluation.from_json(known["evaluation"])
    kept = KeptPredictions(model, folder, known["window_losses"]) if known["hidden"] else None
    return evaluation, kept


def _is_whole(folder: Path, windows: int) -> bool:
    """Whether nothing is missing in the folder."""
    index = folder / _INDEX
    if not index.is_file():
        return False
    hidden = json.loads(index.read_text(encoding="utf-8"))["hidden"]
    return not hidden or all(_file(folder, window).is_file() for window in range(windows))


def _fill(
    model: PreTrainedModel, windows: Windows, folder: Path, *, hidden: bool, progress: Progress | None
) -> None:
    """Evaluate the model, window by window, and keep what its output embedding is given for each."""
    seen = iter(range(len(windows)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _INDEX).unlink(missing_ok=True)
        if hidden:
            with _inputs_of_head(
                model, lambda given: save_file({"hidden": given.contiguous()}, _file(folder, next(seen)))
            ):
                evaluation = evaluate(model, windows, progress=progress)
        else:
            evaluation = evaluate(model, windows, progress=progress)
        known = {
            "evaluation": evaluation.to_json(),
            "window_losses": evaluation.window_losses,
            "hidden": hidden,
        }
        partial = folder / f".{_INDEX}"
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(folder / _INDEX)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the original's predictions cannot be kept in {folder}: {error}") from None


@torch.no_grad()
def _head_gives_the_logits(model: PreTrainedModel, tokens: Int64[Tensor, "windows context"]) -> bool:
    """Whether the output embedding alone, given its input again, gives the model's own logits."""
    if not isinstance(model.get_output_embeddings(), nn.Module):
        return False
    inputs: list[Tensor] = []
    with _inputs_of_head(model, inputs.append):
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    if len(inputs) != 1:
        return False
    again = _head(model)(inputs[0])
    return again.shape == logits.shape and torch.allclose(again, logits, rtol=0, atol=_TOLERANCE)


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module), "checked before anything is kept"
    return head


@contextmanager
def _inputs_of_head(model: PreTrainedModel, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `take` is called with what the output embedding is given."""
    handle = _head(model).register_forward_pre_hook(lambda _, inputs: take(inputs[0].detach()))
    try:
        yield
    finally:
        handle.remove()


def _file(folder: Path, window: int) -> Path:
    return folder / f"hidden-{window:05}.safetensors"
