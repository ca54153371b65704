"""All methods by name, and how one is made from what a user writes."""

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from pbsp.binarization.grouped import GroupedBinarization
from pbsp.binarization.low_rank import LowRankBinary
from pbsp.binarization.planes import Planes
from pbsp.errors import ConfigError
from pbsp.methods.arb import Arb
from pbsp.methods.billm import Billm
from pbsp.methods.gptq import Gptq
from pbsp.methods.integers import IntegerFit
from pbsp.methods.nanoquant import Nanoquant
from pbsp.methods.pbsp import N_OF_M, Pbsp
from pbsp.methods.planes import PlaneFit
from pbsp.methods.prune_then_binarize import PruneThenBinarize
from pbsp.methods.rtn import Rtn
from pbsp.methods.stbllm import Stbllm
from pbsp.pruning.lattice import Lattice
from pbsp.pruning.pattern import PlanePattern
from pbsp.quantization.integers import IntegerGroups
from pbsp.quantization.rows import QuantizedRows


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass whose fields are its hyperparameters.

    Attributes:
        rows_interact: whether the result for a row depends on the others; linears with the same inputs
            are only solved as one matrix where it does not.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    rows_interact: ClassVar[bool]

    def compress(
        self, weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
    ) -> Planes | GroupedBinarization | QuantizedRows | IntegerGroups | LowRankBinary:
        """A representation of `weight` fitted under the moment of its inputs."""
        ...


METHODS: dict[str, type[Method]] = {
    "planes": PlaneFit,
    "pbsp": Pbsp,
    "rtn": Rtn,
    "gptq": Gptq,
    "integers": IntegerFit,
    "billm": Billm,
    "arb": Arb,
    "stbllm": Stbllm,
    "nanoquant": Nanoquant,
    "prune-then-binarize": PruneThenBinarize,
}
_PATTERN_FIELDS = ("patterns", "pattern")


def build_method(
    name: str, patterns: tuple[PlanePattern, ...] | None = None, options: Mapping[str, Any] | None = None
) -> Method:
    """The method of that name.

    Args:
        patterns: None for the method's own default.
        options: its other fields by name.

    Raises:
        ConfigError: no such method or option, a value out of range, or patterns that it does not take.
    """
    if name not in METHODS:
        raise ConfigError(f"method is {name!r}; choose one of {', '.join(METHODS)}")
    kind = METHODS[name]
    types = option_types(name)
    chosen = dict(options or {})
    for option, value in chosen.items():
        if option not in types:
            raise ConfigError(f"method {name} has no option {option!r}; it has {', '.join(types)}")
        wanted = types[option]
        if wanted is float and type(value) is int and abs(value) < 2**53:
            chosen[option] = float(value)
        elif type(value) is not wanted:
            raise ConfigError(f"{option} must be of type {wanted.__name__}, not {value!r}")
    if patterns:
        takes = next((field.name for field in fields(kind) if field.name in _PATTERN_FIELDS), None)
        if takes is None:
            raise ConfigError(f"method {name} takes no N:M pattern")
        if takes == "pattern" and len(patterns) > 1:
            raise ConfigError(f"method {name} takes one N:M, not {len(patterns)} planes")
        if takes == "pattern" and any(isinstance(pattern, Lattice) for pattern in patterns):
            raise ConfigError(f"method {name} takes N:M; codes of E8 are for method planes")
        chosen[takes] = next(iter(patterns)) if takes == "pattern" else patterns
    return kind(**chosen)


def option_types(name: str) -> dict[str, type]:
    """The fields of a method that are not patterns, and their types."""
    return {
        field.name: type(field.default)
        for field in fields(METHODS[name])
        if field.name not in _PATTERN_FIELDS
    }


def patterns_of(method: Method) -> tuple[PlanePattern, ...]:
    """The N:M patterns that a method keeps; none for dense ones."""
    patterns = getattr(method, "patterns", None)
    if patterns is not None:
        return patterns
    pattern = getattr(method, "pattern", None)
    return () if pattern is None else (pattern,)


def packs(method: Method) -> bool:
    """Whether a layout holds the method's results, so that a compressed model can be saved."""
    if isinstance(method, Stbllm):
        return method.zeros == "kept"
    if isinstance(method, Pbsp):
        return method.pruning == N_OF_M
    return isinstance(method, PlaneFit | IntegerFit | Nanoquant)
