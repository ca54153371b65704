import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsp.errors import PatternError
from pbsp.pruning.pattern import Pattern, format_patterns, parse_patterns


@pytest.mark.parametrize(
    ("text", "width", "bits"),
    [
        ("1:8", 4, 0.5),
        ("2:16", 9, 0.5625),
        ("1:4", 3, 0.75),
        ("2:8", 7, 0.875),
        ("4:16", 15, 0.9375),
        ("8:8", 8, 1.0),
        ("3:8", 9, 1.125),
        ("2:4", 5, 1.25),
        ("4:8", 11, 1.375),
        ("8:16", 22, 1.375),
        ("5:8", 11, 1.375),
        ("6:8", 11, 1.375),
        ("1:1", 1, 1.0),
        ("31:31", 31, 1.0),
    ],
)
def test_code_widths(text, width, bits):
    pattern = Pattern.parse(text)
    assert (pattern.code_bits, pattern.bits_per_weight) == (width, bits)
    assert pattern.nominal_bits == pattern.kept / pattern.group


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_code_has_room_for_every_support_and_sign_and_no_bit_more(kept, group):
    if kept > group:
        with pytest.raises(PatternError, match=f"keeps {kept} of {group}"):
            Pattern(kept, group)
        return
    needed = math.ceil(math.log2(math.comb(group, kept))) + kept
    if needed > 31:
        with pytest.raises(PatternError, match="bits for one group"):
            Pattern(kept, group)
    else:
        assert Pattern(kept, group).code_bits == needed
        assert Pattern.parse(str(Pattern(kept, group))) == Pattern(kept, group)


@pytest.mark.parametrize(
    "text", ["", "4", "4:", ":8", "4:8:2", "-1:8", "4.0:8", "a:b", "4:8+", "4:8++2:8", "0:8"]
)
def test_what_is_not_a_pattern_is_refused(text):
    with pytest.raises(PatternError):
        parse_patterns(text)


def test_planes_parse_and_print():
    patterns = parse_patterns(" 4:8 + 2:16")
    assert patterns == (Pattern(4, 8), Pattern(2, 16))
    assert format_patterns(patterns) == "4:8+2:16"
    with pytest.raises(PatternError, match="5 planes"):
        parse_patterns("+".join(["4:8"] * 5))


def test_pattern_reports_the_remainder_when_groups_do_not_tile():
    Pattern(4, 8).check(96)
    with pytest.raises(PatternError, match="row of 100 weights: 4 left over"):
        Pattern(4, 8).check(100)
