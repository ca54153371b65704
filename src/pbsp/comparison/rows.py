"""The rows of a comparison as they are written: `planes 4:8+2:8, gptq bits=2, billm`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote

from pbsp.config import Config
from pbsp.errors import ConfigError, PbspError
from pbsp.methods.table import METHODS, build_method, patterns_of
from pbsp.pruning.pattern import format_patterns, parse_patterns

_SAYS_PLANES = ("pattern=", "bits=", "file_size=")


@dataclass(frozen=True)
class Row:
    """One method with its settings.

    Attributes:
        config: how the model is compressed.
    """

    config: Config

    @property
    def name(self) -> str:
        """The row as `parse_rows` reads it, written in one way: settings by the alphabet, no defaults."""
        config = self.config
        words = [config.method]
        if config.pattern is not None:
            words.append(format_patterns(parse_patterns(config.pattern)))
        settings = dict(config.options)
        usual = Config()
        for field in fields(Config):
            value = getattr(config, field.name)
            if field.name not in ("method", "pattern", "options") and value != getattr(usual, field.name):
                settings[field.name] = value
        words += [f"{name}={_written(settings[name])}" for name in sorted(settings)]
        return " ".join(words)

    @property
    def slug(self) -> str:
        """The name as a file may be called."""
        return quote(self.name.replace(" ", "_").replace(":", "-"), safe="+=")


def parse_rows(text: str, patterns: str = "4:8") -> list[Row]:
    """The rows of a comparison.

    Args:
        text: rows separated by commas, each as `Config.parse` reads it: METHOD [N:M[+N:M…]] [NAME=VALUE …].
        patterns: N:M[+N:M…] separated by commas. A row whose method needs a pattern and that names
            none is one row for each of them.

    Raises:
        PbspError: a row or pattern is malformed, or two rows describe the same.
    """
    chosen = [part.strip() for part in patterns.split(",") if part.strip()]
    if not chosen:
        raise ConfigError("no pattern is given to compare; write N:M separated by commas, as 4:8,2:8")
    for pattern in chosen:
        parse_patterns(pattern)
    rows = [row for part in text.split(",") if part.strip() for row in _expanded(part, chosen)]
    if not rows:
        raise ConfigError("no method is given to compare; write some as planes 4:8, gptq bits=3")
    _refuse_equal(rows)
    return rows


def _expanded(text: str, patterns: Sequence[str]) -> list[Row]:
    method, *words = text.split()
    named = bool(words) and ("=" not in words[0] or any(word.startswith(_SAYS_PLANES) for word in words))
    lines = [text]
    if method in METHODS and not named and patterns_of(build_method(method)):
        lines = [" ".join([method, pattern, *words]) for pattern in patterns]
    rows = []
    for line in lines:
        try:
            rows.append(Row(Config.parse(line)))
        except PbspError as error:
            raise type(error)(f"row {line.strip()!r}: {error}") from None
    return rows


def _refuse_equal(rows: Sequence[Row]) -> None:
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        config = row.config
        budget = (config.bits, config.file_size, str(config.plan))
        settings = (config.build(), config.moment_weighting, config.coarse, config.spread, *budget)
        same = seen.setdefault((*settings, config.inputs, config.dtype, config.strict), row)
        if same is not row:
            raise ConfigError(f"rows {same.name!r} and {row.name!r} are the same; name it once")


def _written(value: Any) -> str:
    """A setting's value as TOML, strings without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
