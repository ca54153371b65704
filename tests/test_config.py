import pytest

from pbsp.config import Config, read_config_file
from pbsp.errors import ConfigError, PatternError
from pbsp.pruning.pattern import Pattern


def test_defaults_are_valid_and_a_config_survives_its_dict():
    config = Config(pattern="4:8+2:8", damping=1.0, strict=True)
    assert Config.from_dict(config.to_dict()) == config
    assert config.patterns == (Pattern(4, 8), Pattern(2, 8))
    assert Config.from_dict({}) == Config()
    assert Config.from_dict({"damping": 1}).damping == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patern": "4:8"}, "unknown option 'patern'; did you mean 'pattern'"),
        ({"xyzzy": 1}, "known options: pattern, layout, scale_block"),
        ({"pattern": 4}, "pattern must be of type str, not 4"),
        ({"sweeps": 2.0}, "sweeps must be of type int, not 2.0"),
        ({"sweeps": True}, "sweeps must be of type int, not True"),
        ({"damping": True}, "damping must be of type float, not True"),
        ({"damping": "0.01"}, "damping must be of type float"),
        ({"strict": 1}, "strict must be of type bool, not 1"),
        ({"damping": 0.0}, "above 0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"sweeps": 1001}, "between 0 and 1000"),
        ({"inputs": "none"}, "compressed, original"),
        ({"dtype": "float32"}, "auto, float16, bfloat16"),
        ({"scale_block": 0}, "positive multiple of 8"),
        ({"scale_block": 12}, "positive multiple of 8"),
        ({"pattern": "4:8+4:16", "scale_block": 8}, "16 for pattern 4:16"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values)


@pytest.mark.parametrize("pattern", ["", "4", "4:8+", "9:8", "0:8", "-1:8", "+".join(["1:8"] * 5), "30:60"])
def test_malformed_patterns_are_refused(pattern):
    with pytest.raises(PatternError):
        Config(pattern=pattern)


def test_config_files_give_settings_and_the_choice_of_text(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('# a run\npattern = "2:8"\nstrict = true\nsamples = 4\ncalibration = "c4"\n')
    assert read_config_file(path) == (
        {"pattern": "2:8", "strict": True},
        {"samples": 4, "calibration": "c4"},
    )


def test_config_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_config_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_config_file(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        read_config_file(tmp_path / "binary.toml")
    (tmp_path / "table.toml").write_text("[calibration]\nsamples = 1\n")
    with pytest.raises(ConfigError, match="calibration must be of type str"):
        read_config_file(tmp_path / "table.toml")
