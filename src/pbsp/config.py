"""The settings of a compression run: frozen, checked when made, and saved with the model."""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from pbsp.allocation.entry import Entry
from pbsp.allocation.planfile import check_written
from pbsp.calibration.moments import VALUES_MIXED, Weighting
from pbsp.errors import ConfigError
from pbsp.methods.integers import IntegerFit
from pbsp.methods.table import METHODS, Method, build_method, option_types, patterns_of
from pbsp.pruning.pattern import Pattern, PlanePattern, parse_patterns

AUTO = "auto"
_TUNED = ("planes", "nanoquant", "integers")
_SHARED = ("block", "damping", "sweeps", "rotation")  # options of planes that integers in a plan have, too
_CHOICES = {
    "method": tuple(METHODS),
    "weighting": (AUTO, *get_args(Weighting)),
    "allocation": (AUTO, "uniform", "paper", "outliers"),
    "inputs": ("compressed", "original"),
    "dtype": (AUTO, "float16", "bfloat16"),
    "embeddings": (AUTO, "16", "8", "4"),
    "recover": ("none", "block", "model", "both"),
}
_TEXT_OPTIONS: dict[str, type] = {"calibration": str, "samples": int, "context": int, "seed": int}


@dataclass(frozen=True)
class Config:
    """How to compress a model.

    Attributes:
        method: "planes", our own, "pbsp", the paper's, or one that they are compared with; see `METHODS`.
        pattern: "N:M", for planes up to four of them joined by "+"; None for the method's default.
        options: the method's hyperparameters by name, such as `sweeps` and `block` of planes.
        weighting: how tokens count in the moments: "plain", all alike; in those of value projections as the
            "attention" mixes them; or likewise there, and in the others by the length of the "gradient" of
            the loss at the layer's output, for which every window takes a backward pass; or in all by its
            "squares", as a second-order loss has them. "auto" is gradient with `bits`, `file_size` or `plan`,
            else attention for planes and plain for the others.
        allocation: "uniform"; "paper", N by block importance as in the paper's coarse stage; "outliers", N
            by the share of outlying scores as in STBLLM. The last two take one N:M. "auto" is outliers
            for stbllm and uniform for the others; with `bits`, `file_size` or `plan` it does not apply.
        spread: of these two: N ± spread; None for 1 where that fits.
        inputs: what a block's moments are measured on: the outputs of its compressed predecessors,
            or of the original ones.
        dtype: of what stays uncompressed. "auto": the source's own 16-bit type; for a float32 source
            float16 if all its values are in range, else bfloat16.
        embeddings: bits of the input embedding and of the head, "16", "8" or "4". "auto" is 8 with `bits`,
            `file_size` or `plan`, else 16.
        recover: what is tuned, codes, scales, norms and biases: "block", every block once it is compressed,
            until its output is near the original block's; "model", the whole model at the end, until its
            predictions are near the original's, for which the original stays in memory; "both"; or
            "none". Only planes and `nanoquant`, and inputs "compressed".
        bits: stored bits per weight of all linear layers, at most; each gets the planes that are expected to
            cost the model least in sum. Only planes.
        file_size: the same for the bytes of the weight files.
        plan: linear layer → its planes, as `allocation.planfile` writes them. Only planes.
        trial: with `bits` or `file_size`, compress a copy by the first plan and correct the plan by what it
            costs (see `trial`); not of a model that is read block by block.
        strict: refuse the model if a linear layer cannot take the pattern, instead of leaving it as it is.

    Raises:
        ConfigError: a value is out of range.
        PatternError: the pattern is malformed.
    """

    method: str = "planes"
    pattern: str | None = None
    options: dict = field(default_factory=dict)
    weighting: str = AUTO
    allocation: str = AUTO
    spread: int | None = None
    inputs: str = "compressed"
    dtype: str = AUTO
    embeddings: str = AUTO
    recover: str = "none"
    bits: float | None = None
    file_size: int | None = None
    plan: dict = field(default_factory=dict)
    trial: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        for name, wanted in _types().items():
            _check_type(name, getattr(self, name), wanted)  # here too: Config() is not only made from TOML
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.spread is not None and self.spread < 0:
            raise ConfigError(f"spread is {self.spread}; at least 0 is needed")
        patterns = self.patterns  # builds the method, which checks its options
        self._check_budget()
        if self.recover != "none" and (self.method not in _TUNED or self.inputs != "compressed"):
            raise ConfigError(f"recover takes method {' or '.join(_TUNED)}, and inputs compressed")
        if self.moment_weighting in VALUES_MIXED and getattr(METHODS[self.method], "one_moment", False):
            raise ConfigError(
                f"method {self.method} fits all rows of a layer together; weighting {self.moment_weighting} "
                "gives the values of each head a moment of their own; use weighting plain"
            )
        if self.coarse and (len(patterns) != 1 or not isinstance(patterns[0], Pattern)):
            raise ConfigError(
                f"allocation {self.coarse} takes one N:M, not the {len(patterns)} planes of "
                f"{self.pattern or self.method}"
            )

    @property
    def recovers_blocks(self) -> bool:
        """Whether every block is tuned once it is compressed."""
        return self.recover in ("block", "both")

    @property
    def recovers_model(self) -> bool:
        """Whether the whole model is tuned at the end."""
        return self.recover in ("model", "both")

    @property
    def budgeted(self) -> bool:
        """Whether planes follow from a budget."""
        return self.bits is not None or self.file_size is not None

    def _check_budget(self) -> None:
        """Raise ConfigError unless at most one thing says what planes the layers get."""
        for name in ("bits", "file_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be positive")
        check_written(self.plan)
        given = [name for name in ("bits", "file_size", "plan") if getattr(self, name)]
        if not given:
            return
        others = {"pattern": self.pattern is not None, "allocation": self.allocation != AUTO}
        given += [name for name, there in others.items() if there]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} each say which planes the layers get; give one of them")
        if self.method != "planes":
            raise ConfigError(f"{given[0]} chooses among planes; it does not go with method {self.method}")

    @property
    def patterns(self) -> tuple[PlanePattern, ...]:
        """The N:M patterns of every linear layer, on average; none for a dense method."""
        return patterns_of(self.build())

    @property
    def moment_weighting(self) -> Weighting:
        """`weighting`, "auto" resolved."""
        chosen = self._resolved("weighting", "plain")
        if self.weighting == AUTO and (self.budgeted or self.plan):
            chosen = "gradient"
        return next(weighting for weighting in get_args(Weighting) if weighting == chosen)

    @property
    def embedding_bits(self) -> int:
        """`embeddings`, "auto" resolved."""
        if self.embeddings != AUTO:
            return int(self.embeddings)
        return 8 if self.budgeted or self.plan else 16

    @property
    def coarse(self) -> str | None:
        """How blocks come to differ in N; None where they do not."""
        chosen = self._resolved("allocation", "uniform")
        return None if chosen == "uniform" else chosen

    def _resolved(self, name: str, usual: str) -> str:
        chosen = getattr(self, name)
        return getattr(METHODS[self.method], name, usual) if chosen == AUTO else chosen

    @property
    def entry(self) -> Entry:
        """What every linear layer is stored as, on average."""
        return self.options.get("bits", IntegerFit.bits) if self.method == "integers" else self.patterns

    def build(self, entry: Entry | None = None) -> Method:
        """The method that these settings describe, for a layer that is stored as `entry`."""
        if isinstance(entry, int):
            shared = {name: self.options[name] for name in _SHARED if name in self.options}
            return build_method("integers", None, {"bits": entry, **shared})
        if entry is None and self.pattern is not None:
            entry = parse_patterns(self.pattern)
        return build_method(self.method, entry, self.options)

    def for_source(self, dtype: str | None) -> "Config":
        """The same for a source whose files have this 16-bit type, or none: it is what "auto" keeps."""
        return replace(self, dtype=dtype) if self.dtype == AUTO and dtype is not None else self

    def to_dict(self) -> dict[str, Any]:
        """All settings, as `from_dict` reads them; what is None is left out, as TOML cannot hold it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Config":
        """A config with `values` over the defaults; ConfigError if a key is unknown or a type is wrong."""
        types = _types()
        _refuse_unknown(values, list(types))
        if type(values.get("bits")) is int:
            values = {**values, "bits": float(values["bits"])}
        for name, value in values.items():
            _check_type(name, value, types[name])
        return Config(**values)

    @staticmethod
    def parse(text: str) -> "Config":
        """A config written in one line: METHOD [N:M[+N:M…]] [NAME=VALUE …], as "gptq bits=2".

        See `with_settings`.
        """
        method, *words = text.split() or [""]
        values: dict[str, Any] = {"method": method}
        if words and "=" not in words[0]:
            values["pattern"] = words.pop(0)
        return Config.from_dict(with_settings(values, words))


def with_settings(values: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """The values of a config with NAME=VALUE words over them.

    Names are options of the method or fields of the config; values are written as in TOML, but strings
    need no quotes.
    """
    method = values.get("method", Config.method)
    own = option_types(method) if method in METHODS else {}
    for word in words:
        name, equals, written = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not a setting; write NAME=VALUE, as block=64")
        if name in own or name not in _types():
            values = {**values, "options": {**values.get("options", {}), name: _value(written)}}
        else:
            values = {**values, name: written if _types()[name] is str else _value(written)}
    return values


def read_config_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings, and the choice of calibration text, in a TOML file of one `name = value` a line.

    Raises:
        ConfigError: the file cannot be read, an option is unknown, or one of the text's is of a wrong type.
    """
    values = _read_toml(path)
    _refuse_unknown(values, [*_types(), *_TEXT_OPTIONS])
    text = {name: values.pop(name) for name in _TEXT_OPTIONS if name in values}
    for name, value in text.items():
        _check_type(name, value, _TEXT_OPTIONS[name])
    return values, text


def _types() -> dict[str, Any]:
    return {field.name: field.type for field in fields(Config)}  # this module does not postpone annotations


def _value(written: str) -> Any:
    try:
        return tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return written


def _check_type(name: str, value: Any, wanted: Any) -> None:
    """Raise unless the value is of the type; a bool does not pass as an int."""
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        kind = wanted.__name__ if isinstance(wanted, type) else str(wanted).removesuffix(" | None")
        raise ConfigError(f"{name} must be of type {kind}, not {value!r}")


def _refuse_unknown(values: Iterable[str], known: list[str]) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(known)}"
            raise ConfigError(f"unknown option {key!r}; {hint}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; --config takes a TOML file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None
