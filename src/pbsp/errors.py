"""Errors a user can fix; the command line prints each as one line and exits with code 2."""


class PbspError(Exception):
    """Base of every error that the user's input, files or machine can cause."""


class ModelError(PbspError):
    """The source model cannot be found, read, walked or trusted."""


class CorpusError(PbspError):
    """The calibration or evaluation text is missing, empty or too short."""


class PatternError(PbspError):
    """An N:M pattern is malformed, or does not fit the rows that it is asked to prune."""


class CalibrationError(PbspError):
    """The statistics of a layer's inputs do not allow it to be solved."""


class FormatError(PbspError):
    """A compressed model's files are damaged, incomplete or of another format."""


class ConfigError(PbspError):
    """A setting is unknown, or its value is out of range."""


class OutputError(PbspError):
    """The result cannot be written where it was asked for."""


class RankError(PbspError):
    """Another process of the same run has ended, or was started differently."""
