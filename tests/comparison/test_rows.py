import pytest

from pbsp.comparison.rows import parse_rows
from pbsp.config import Config
from pbsp.errors import ConfigError, PatternError


def names(text, patterns="4:8"):
    return [row.name for row in parse_rows(text, patterns)]


def test_rows_that_need_a_pattern_and_name_none_are_one_for_each():
    written = "planes 4:8+2:8, pbsp, billm, gptq bits=2, stbllm block=64, planes weighting=plain, rtn, arb"
    assert names(written, "4:8, 2:8") == [
        "planes 4:8+2:8",
        "pbsp 4:8",
        "pbsp 2:8",
        "billm",
        "gptq bits=2",
        "stbllm 4:8 block=64",
        "stbllm 2:8 block=64",
        "planes 4:8 weighting=plain",
        "planes 2:8 weighting=plain",
        "rtn",
        "arb",
    ]


@pytest.mark.parametrize(
    "line",
    ["planes 4:8+2:8", "billm 4:8 damping=0.02", "stbllm 4:8 strict=true zeros=released", "arb bitmap=false"],
)
def test_a_name_is_read_as_the_same_row(line):
    (row,) = parse_rows(line)
    assert row.name == line
    assert row.config == Config.parse(line)
    assert parse_rows(row.name) == [row]


def test_a_name_does_not_depend_on_how_the_row_is_written():
    assert names(" planes   4:8 sweeps=1  damping=1e-2,") == ["planes 4:8 damping=0.01 sweeps=1"]
    assert names("planes block=64 pattern=4:8") == ["planes 4:8 block=64"]


def test_budgets_make_rows_of_their_own():
    rows = parse_rows("planes bits=2, planes bits=2.5, planes file_size=60000000")
    assert [row.name for row in rows] == ["planes bits=2.0", "planes bits=2.5", "planes file_size=60000000"]


def test_slugs_are_file_names_and_differ():
    rows = parse_rows("planes 4:8+2:8, planes 4:8, planes 4:8 weighting=plain, gptq bits=2, rtn")
    assert rows[0].slug == "planes_4-8+2-8"
    assert len({row.slug for row in rows}) == len(rows)
    assert not any(set(row.slug) & set('/\\:*?"<>| ') for row in rows)


@pytest.mark.parametrize(
    ("written", "patterns", "message"),
    [
        ("planes, planes 4:8", "4:8", "'planes 4:8' are the same"),
        ("gptq, gptq bits=3", "4:8", "'gptq' and 'gptq bits=3' are the same"),
        ("planes 4:8, planes 4:8 weighting=attention", "4:8", "are the same"),
        ("foo", "4:8", "row 'foo': method is 'foo'"),
        ("gptq 4:8", "4:8", "takes no N:M"),
        ("planes frob=1", "4:8", "no option 'frob'"),
        ("pbsp", "4:8+2:8", "takes one N:M"),
        (" , ", "4:8", "no method"),
        ("planes", " ", "no pattern"),
    ],
)
def test_wrong_rows_are_refused(written, patterns, message):
    with pytest.raises(ConfigError, match=message):
        parse_rows(written, patterns)


def test_a_malformed_pattern_is_refused_even_where_no_row_needs_it():
    with pytest.raises(PatternError, match="is not a pattern"):
        parse_rows("rtn", "4-8")
