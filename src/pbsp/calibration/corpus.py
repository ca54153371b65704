"""From the name of a text to token windows: random ones to calibrate on, the first ones to evaluate on."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pbsp.calibration.sampling import Progress, sample_windows, start_token
from pbsp.calibration.texts import Part, Text, read_text
from pbsp.calibration.windows import Windows, check_fit, draw_windows, tokens_digest, whole_windows
from pbsp.errors import ConfigError, CorpusError
from pbsp.models.shards import shards_of

SELF = "self"
_STREAMS: dict[Part, int] = {"calibration": 0, "evaluation": 1}
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer of English needs; C4 is streamed up to this many


@dataclass(frozen=True)
class Corpus:
    """The text to calibrate on, and how much of it.

    Attributes:
        name: `self` (sampled from the model), c4, wikitext2, or the path of a text file.
        samples: windows to use; fewer if the text is shorter, and then the windows' note says so.
        context: tokens of a window.
        seed: of the sampling, or of the choice of windows.

    Raises:
        ConfigError: a number is out of range.
    """

    name: str
    samples: int = 128
    context: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self.samples, self.context, self.seed)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise CorpusError, before any work, if `windows` cannot be had from this model."""
        check_fit(model, self.context)
        if self.name == SELF and shards_of(model):
            raise CorpusError(
                "calibration text `self` cannot be sampled from a model that is read block by block: every "
                "token would read all of it; choose c4 or a text file with --calibration, or --memory whole"
            )

    def windows(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        model: PreTrainedModel,
        *,
        progress: Progress | None = None,
    ) -> Windows:
        """The calibration windows: drawn from all whole windows of the text, in the order of the text.

        Documents (rows of JSON lines) are tokenized one by one and joined to one stream, with an EOS
        after each if the tokenizer has one; a plain text is one document, without the EOS. Special
        tokens are the tokenizer's own doing, here as in `evaluation_windows`.

        Args:
            tokenizer: the model's; `self` takes only the start token from it and does without.
            model: the original; sampled from for `self`, and asked for its longest context.
            progress: told the tokens sampled so far.

        Raises:
            CorpusError: the text is missing, empty, too short, or not this model's.
        """
        self.check_model(model)
        if self.name == SELF:
            return _sampled(self, tokenizer, model, part="calibration", progress=progress)
        characters = self.samples * self.context * _CHARACTERS_PER_TOKEN
        text = read_text(self.name, part="calibration", characters=characters, seed=self.seed)
        every = whole_windows(_tokens(text, tokenizer), self.context, name=text.name)
        check_fit(model, self.context, int(every.max()))
        chosen = draw_windows(every, self.samples, seed=self.seed)
        return Windows(
            chosen,
            text=text.name,
            split=text.split,
            text_digest=text.digest,
            requested=self.samples,
            seed=self.seed,
            note=f"{len(chosen)} of {self.samples} samples" if len(chosen) < self.samples else "",
        )


def corpus(name: str, samples: int = 128, context: int = 2048, seed: int = 0) -> Corpus:
    """The text to calibrate on; see `Corpus`."""
    return Corpus(name, samples, context, seed)


def evaluation_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    context: int = 2048,
    windows: int | None = 40,
    seed: int = 0,
    progress: Progress | None = None,
) -> Windows:
    """The first windows of a text, in order; of named corpora the split that calibration does not use.

    Args:
        name: as in `Corpus`.
        tokenizer: the model's.
        model: the original; `self` samples from it, independently of calibration under the same seed.
        context: tokens of a window; a last partial one is dropped.
        windows: how many; None for all of them, fewer if the text is shorter.
        seed: of `self`; other texts do not depend on it.
        progress: told the tokens sampled so far.

    Raises:
        CorpusError: the text is missing, empty, too short, or not this model's.
    """
    _check_numbers(1 if windows is None else windows, context, seed)
    check_fit(model, context)
    if name == SELF:
        if windows is None:
            raise CorpusError("text sampled from a model (`self`) has no end: give a number of windows")
        spec = Corpus(name, windows, context, seed)
        return _sampled(spec, tokenizer, model, part="evaluation", progress=progress)
    characters = None if windows is None else windows * context * _CHARACTERS_PER_TOKEN
    text = read_text(name, part="evaluation", characters=characters, seed=seed)
    every = whole_windows(_tokens(text, tokenizer), context, name=text.name)
    check_fit(model, context, int(every.max()))
    chosen = every[:windows]
    return Windows(
        chosen,
        text=text.name,
        split=text.split,
        text_digest=text.digest,
        requested=windows,
        note=_extent(len(chosen), len(every), windows, whole=text.whole),
    )


def check_text(name: str) -> None:
    """Read a file once before the model is loaded, to refuse a bad one; other texts are too far away."""
    if name not in (SELF, "c4", "wikitext2"):
        read_text(name, part="calibration", characters=None, seed=0)


def _sampled(
    spec: Corpus,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    part: Part,
    progress: Progress | None,
) -> Windows:
    tokens = sample_windows(
        model,
        start=start_token(tokenizer, model),
        windows=spec.samples,
        context=spec.context,
        seed=spec.seed,
        stream=_STREAMS[part],
        progress=progress,
    )
    return Windows(
        tokens,
        text=SELF,
        split=f"sampled for {part}",
        text_digest=tokens_digest(tokens),
        requested=spec.samples,
        seed=spec.seed,
    )


def _tokens(text: Text, tokenizer: PreTrainedTokenizerBase | None) -> Int64[Tensor, "tokens"]:
    """The documents' tokens in one stream; see `Corpus.windows`."""
    if tokenizer is None:
        raise CorpusError(f"the model has no tokenizer to read {text.name} with; use `self`")
    if len(text.documents) == 1:
        ids: list[int] = tokenizer(text.documents[0], verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for document in tokenizer([text for text in text.documents if text], verbose=False).input_ids:
        stream += document
        if isinstance(end, int) and document[-1:] != [end]:
            stream.append(end)
    return torch.tensor(stream, dtype=torch.int64)


def _extent(chosen: int, every: int, requested: int | None, *, whole: bool) -> str:
    """What part of a text was evaluated, where that is not just what was asked for."""
    if requested is not None and chosen < requested:
        return f"all {every} windows; {requested} were asked for"
    if not whole:
        return f"first {chosen} windows"
    return "" if chosen == every else f"first {chosen} of {every} windows"


def _check_numbers(samples: int, context: int, seed: int) -> None:
    if samples < 1:
        raise ConfigError(f"{samples} windows asked for; at least 1 is needed")
    if context < 2:
        raise ConfigError(f"a context of {context} tokens has nothing to predict; at least 2 are needed")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed is {seed}; it must be between 0 and 2^63 − 1")
