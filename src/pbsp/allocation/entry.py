"""What one linear layer can be stored as, and how that is written: "4:8+2:8" or "3 bit"."""

from pbsp.errors import PatternError
from pbsp.methods.integers import DENSE, PLANE_BITS
from pbsp.pruning.pattern import PlanePattern, format_patterns, parse_patterns
from pbsp.storage.layouts import Form
from pbsp.storage.planes import PlanesForm
from pbsp.storage.rows import RowsForm

Entry = tuple[PlanePattern, ...] | int
"""The patterns of planes, or the bits of integers (see `methods.integers`)."""

_INTEGERS = {f"{bits} bit": bits for bits in (*PLANE_BITS, 8)}


def format_entry(entry: Entry) -> str:
    """As plans and reports write it; empty for a method without patterns."""
    return f"{entry} bit" if isinstance(entry, int) else format_patterns(entry)


def parse_entry(text: str) -> Entry:
    """The inverse of `format_entry`; PatternError if the text is anything else."""
    if text in _INTEGERS:
        return _INTEGERS[text]
    return parse_patterns(text) if text else ()


def check_entry(entry: Entry, in_features: int) -> None:
    """Raise PatternError unless rows of so many weights can be stored so."""
    for pattern in () if isinstance(entry, int) else entry:
        pattern.check(in_features)


def fits(entry: Entry, in_features: int) -> bool:
    """Whether rows of so many weights can be stored so."""
    try:
        check_entry(entry, in_features)
    except PatternError:
        return False
    return True


def entry_form(entry: Entry, out_features: int, in_features: int, block: int) -> Form:
    """How a linear is stored; `block` is the most columns that share a scale of planes.

    Raises:
        PatternError, FormatError: its rows cannot be.
    """
    if isinstance(entry, tuple):
        return PlanesForm.even(entry, in_features, out_features, block)
    if entry in PLANE_BITS:
        return PlanesForm.even((DENSE,) * entry, in_features, out_features, block, shared_scales=True)
    return RowsForm(entry, in_features, out_features)


def entry_bits(entry: Entry, out_features: int, in_features: int, block: int) -> int:
    """Bits of the stored tensors of a linear, exactly."""
    form = entry_form(entry, out_features, in_features, block)
    return sum(spec.bits for spec in form.specs().values())
