"""A model in memory as lm-evaluation-harness asks one."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.calibration.windows import check_fit
from pbsp.errors import ModelError

_Harness: Any = HFLM  # whose decorator hides its type


class HarnessModel(_Harness):
    """lm-eval's own way with transformers models, with nothing cut, unknown or undefined going unnoticed.

    Attributes:
        cut: requests of each task whose prompt lost its beginning, to fit the model's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        # lm-eval gives the tokenizer a padding token, so it gets a copy.
        super().__init__(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
        self.cut: Counter[str] = Counter()
        self._progress = progress
        self._names: list[str] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether it is the greedy one."""
        self._names = [request.task_name for request in requests]
        self.cache_hook = _Counter(self._progress, len(requests))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """A continuation of each request."""
        self.cache_hook = _Counter(self._progress, len(requests))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        names = self._names if len(self._names) == len(requests) else [""] * len(requests)
        for name, (_, prompt, continuation) in zip(names, requests, strict=True):
            check_fit(self.model, len(continuation), max(prompt + continuation))
            if len(prompt) + len(continuation) > self.max_length + 1:
                self.cut[name] += 1
        answers = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        broken = sum(not math.isfinite(answer[0]) for answer in answers)
        if broken:
            raise ModelError(
                f"{broken} of {len(answers)} log-likelihoods are not finite: the model's outputs are not; "
                "try dtype float32 or bfloat16"
            )
        return answers


class _Counter(CacheHook):
    """Told of each answer, as lm-eval tells its cache; passes the number on."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        super().__init__(None)
        self._progress = progress
        self._done, self._total = 0, total

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One more request is answered."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
