"""Checks of hyperparameters that several methods share; each raises ConfigError with what to do."""

from collections.abc import Mapping

from pbsp.errors import ConfigError
from pbsp.pruning.pattern import PlanePattern


def check_choices(method: object, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raise unless each field named in `choices` has one of its values."""
    for name, allowed in choices.items():
        if getattr(method, name) not in allowed:
            raise ConfigError(f"{name} is {getattr(method, name)!r}; choose one of {', '.join(allowed)}")


def check_damping(damping: float) -> None:
    """Raise unless the damping is a ridge."""
    if not 0 < damping <= 10:
        raise ConfigError(f"damping is {damping}; it must be above 0 and at most 10 (0.01 is usual)")


def check_sweeps(sweeps: int) -> None:
    """Raise unless it is a number of rounds of descent."""
    if not 0 <= sweeps <= 1000:
        raise ConfigError(f"sweeps is {sweeps}; it must be between 0 and 1000")


def check_blocks(block: int, damping: float, *patterns: PlanePattern | None) -> None:
    """Raise unless blocks hold whole groups and the damping is a ridge."""
    check_damping(damping)
    if block < 1:
        raise ConfigError(f"block is {block}; at least 1 column is needed")
    for pattern in patterns:
        if pattern is not None and block % pattern.group:
            raise ConfigError(
                f"block is {block}; it must be a positive multiple of {pattern.group} for pattern {pattern}"
            )
