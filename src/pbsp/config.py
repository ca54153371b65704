"""The settings of a compression run: frozen, checked when made, and saved with the model."""

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pbsp.errors import ConfigError
from pbsp.pruning.pattern import Pattern, parse_patterns

_CHOICES = {
    "inputs": ("compressed", "original"),
    "dtype": ("auto", "float16", "bfloat16"),
}
_TEXT_OPTIONS: dict[str, type] = {"calibration": str, "samples": int, "context": int, "seed": int}


@dataclass(frozen=True)
class Config:
    """How to compress a model.

    Attributes:
        pattern: the planes of every linear layer, "N:M" or up to four of them joined by "+".
        scale_block: columns that share one 8-bit scale; a multiple of every M.
        damping: ridge added to each moment, as a fraction of its mean diagonal.
        sweeps: rounds of coordinate descent over all M-groups.
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
    scale_block: int = 128
    damping: float = 0.01
    sweeps: int = 3
    inputs: str = "compressed"
    dtype: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            assert isinstance(field.type, type)  # not a string: this module does not postpone annotations
            _check_type(field.name, getattr(self, field.name), field.type)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not 0 < self.damping <= 10:
            raise ConfigError(f"damping is {self.damping}; it must be above 0 and at most 10 (0.01 is usual)")
        if not 0 <= self.sweeps <= 1000:
            raise ConfigError(f"sweeps is {self.sweeps}; it must be between 0 and 1000")
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

    def to_dict(self) -> dict[str, Any]:
        """All settings, as `from_dict` reads them."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Config":
        """A config with `values` over the defaults; ConfigError if a key is unknown."""
        _refuse_unknown(values, [field.name for field in fields(Config)])
        return Config(**values)


def read_config_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings, and the choice of calibration text, in a TOML file of one `name = value` a line.

    Raises:
        ConfigError: the file cannot be read, an option is unknown, or one of the text's is of a wrong type.
    """
    values = _read_toml(path)
    _refuse_unknown(values, [*(field.name for field in fields(Config)), *_TEXT_OPTIONS])
    text = {name: values.pop(name) for name in _TEXT_OPTIONS if name in values}
    for name, value in text.items():
        _check_type(name, value, _TEXT_OPTIONS[name])
    return values, text


def _check_type(name: str, value: object, wanted: type) -> None:
    """Raise ConfigError unless `value` is of the type; an int serves as a float, a bool not as an int."""
    serves = {float: (int, float)}.get(wanted, wanted)
    if not isinstance(value, serves) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{name} must be of type {wanted.__name__}, not {value!r}")


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
