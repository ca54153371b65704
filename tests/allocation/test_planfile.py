import pytest

from pbsp.allocation.plan import uniform_plan
from pbsp.allocation.planfile import KEPT, plan_of, plan_text, read_plan, written_plan
from pbsp.errors import ConfigError, PatternError
from pbsp.models.blocks import decoder_blocks
from pbsp.pruning.pattern import parse_patterns
from tiny import tiny_model


@pytest.fixture
def blocks():
    return decoder_blocks(tiny_model())


@pytest.fixture
def written(blocks):
    return written_plan(uniform_plan(blocks, parse_patterns("4:8+2:8"), strict=True))


def test_a_plan_survives_the_file(blocks, written, tmp_path):
    file = tmp_path / "plan.toml"
    first, second, third, *_ = written
    changed = {**written, first: KEPT, second: "1:8", third: "4 bit"}
    file.write_text(plan_text(changed))
    assert read_plan(file) == changed
    plan = plan_of(blocks, read_plan(file))
    assert plan.left_uncompressed == {first: "kept by the plan"}
    assert plan.entries[second] == parse_patterns("1:8")
    assert plan.entries[third] == 4
    assert {**written_plan(plan)} == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must have one table, \[layers\]"),
        ("[layers]\n", r"must have one table, \[layers\]"),
        ("other = 1\n[layers]\na = '1:8'", r"must have one table"),
        ("[layers]\na = 3", "plan: a: '3' is not a pattern"),
        ("[layers]\na = '9:8'", "plan: a: pattern 9:8 keeps 9 of 8"),
        ("[layers]\na = '5 bit'", 'plan: a: .* or integers, as "3 bit", or "16 bit"'),
        ("[planes\n", "cannot be read as a plan"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, message, tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_plan(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_plan(tmp_path / "none.toml")


def test_plans_that_do_not_fit_the_model_are_refused(blocks, written):
    first = next(iter(written))
    with pytest.raises(ConfigError, match="has no linear layer other"):
        plan_of(blocks, {**written, "other": "4:8"})
    with pytest.raises(ConfigError, match=f"{first} is not in it"):
        plan_of(blocks, {name: planes for name, planes in written.items() if name != first})
    with pytest.raises(PatternError, match=f"{first}: pattern 1:7 does not tile"):
        plan_of(blocks, {**written, first: "1:7"})
    with pytest.raises(PatternError, match="nothing would be compressed"):
        plan_of(blocks, dict.fromkeys(written, KEPT))
