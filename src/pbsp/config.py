"""The settings of a compression run: frozen, checked when made, and saved with the model."""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pbsp.calibration.moments import Weighting
from pbsp.errors import ConfigError
from pbsp.methods.pbsp import CHOICES, Pbsp
from pbsp.methods.planes import PlaneFit
from pbsp.pruning.pattern import Pattern, parse_patterns

_CHOICES = {
    "layout": ("planes", "paper"),
    "weighting": ("auto", "plain", "attention"),
    "allocation": ("uniform", "paper"),
    **CHOICES,
    "inputs": ("compressed", "original"),
    "dtype": ("auto", "float16", "bfloat16"),
}
_TEXT_OPTIONS: dict[str, type] = {"calibration": str, "samples": int, "context": int, "seed": int}


@dataclass(frozen=True)
class Config:
    """How to compress a model.

    Attributes:
        pattern: the planes of every linear layer, "N:M" or up to four of them joined by "+".
        layout: "planes", our own, or "paper", which stores what the paper's scheme needs.
        scale_block: columns that share one scale (layout paper: nine scalars); a multiple of every M.
        damping: ridge added to each moment, as a fraction of its mean diagonal.
        sweeps: rounds of coordinate descent over all M-groups.
        weighting: how tokens count in the moments of value projections: "plain", all alike, or as the
            "attention" mixes them. "auto" is attention for planes and plain for the paper's layout.
        allocation: "uniform", or N by block importance as in the paper's coarse stage, one plane only.
        spread: of that stage: N ± spread, −1 for 1 where that fits.
        score, steps, updates, update, refresh, target, metric: of layout paper; see `methods.pbsp.Pbsp`.
        inputs: what a block's moments are measured on: the outputs of its compressed predecessors,
            or of the original ones.
        dtype: of what stays uncompressed. "auto": the source's own 16-bit type; for a float32 source
            float16 if all its values are in range, else bfloat16.
        strict: refuse the model if a linear layer cannot take the pattern, instead of leaving it as it is.

    Raises:
        ConfigError: a value is out of range.
        PatternError: the pattern is malformed.
    """

    pattern: str = "3:8+3:8+1:8"
    layout: str = "planes"
    scale_block: int = 128
    damping: float = 0.01
    sweeps: int = 3
    weighting: str = "auto"
    allocation: str = "uniform"
    spread: int = -1
    score: str = Pbsp.score
    steps: str = Pbsp.steps
    updates: int = Pbsp.updates
    update: str = Pbsp.update
    refresh: bool = Pbsp.refresh
    target: str = Pbsp.target
    metric: str = Pbsp.metric
    inputs: str = "compressed"
    dtype: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            assert isinstance(field.type, type)  # not a string: this module does not postpone annotations
            _as_type(field.name, getattr(self, field.name), field.type)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not 0 < self.damping <= 10:
            raise ConfigError(f"damping is {self.damping}; it must be above 0 and at most 10 (0.01 is usual)")
        if not 0 <= self.sweeps <= 1000:
            raise ConfigError(f"sweeps is {self.sweeps}; it must be between 0 and 1000")
        if self.spread < -1 or self.updates < 1:
            raise ConfigError(
                f"spread is {self.spread} and updates {self.updates}; at least −1 and 1 are needed"
            )
        if len(self.patterns) > 1 and "paper" in (self.layout, self.allocation):
            what = "layout" if self.layout == "paper" else "allocation"
            raise ConfigError(
                f"{what} paper takes one N:M, not the {len(self.patterns)} planes of {self.pattern}"
            )
        for pattern in self.patterns:
            if self.scale_block < 1 or self.scale_block % pattern.group:
                raise ConfigError(
                    f"scale_block is {self.scale_block}; it must be a positive multiple of "
                    f"{pattern.group} for pattern {pattern}"
                )

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The planes that `pattern` names."""
        return parse_patterns(self.pattern)

    @property
    def moment_weighting(self) -> Weighting:
        """`weighting`, "auto" resolved."""
        if self.weighting == "plain" or (self.weighting == "auto" and self.layout == "paper"):
            return "plain"
        return "attention"

    def method(self, patterns: tuple[Pattern, ...]) -> PlaneFit | Pbsp:
        """The method that these settings describe, for a layer that gets `patterns`."""
        if self.layout == "planes":
            return PlaneFit(patterns, self.scale_block, self.damping, self.sweeps)
        return Pbsp(
            patterns[0],
            self.scale_block,
            self.damping,
            score=self.score,
            steps=self.steps,
            updates=self.updates,
            update=self.update,
            refresh=self.refresh,
            target=self.target,
            metric=self.metric,
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings, as `from_dict` reads them."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Config":
        """A config with `values` over the defaults; ConfigError if a key is unknown or a type is wrong."""
        types: dict[str, Any] = {field.name: field.type for field in fields(Config)}
        _refuse_unknown(values, list(types))
        return Config(**{name: _as_type(name, value, types[name]) for name, value in values.items()})


def read_config_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings, and the choice of calibration text, in a TOML file of one `name = value` a line.

    Raises:
        ConfigError: the file cannot be read, an option is unknown, or one of the text's is of a wrong type.
    """
    values = _read_toml(path)
    _refuse_unknown(values, [*(field.name for field in fields(Config)), *_TEXT_OPTIONS])
    text = {
        name: _as_type(name, values.pop(name), wanted)
        for name, wanted in _TEXT_OPTIONS.items()
        if name in values
    }
    return values, text


def _as_type(name: str, value: Any, wanted: type) -> Any:
    """The value, if it is of the type; an int serves as a float, a bool not as an int."""
    if wanted is float and type(value) is int:
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {wanted.__name__}, not {value!r}")
    return value


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
