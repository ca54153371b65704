import pytest

from command_line import SELF, save_model
from pbsp.cli import main


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with `model`, and `out`, its compressed form, which no test changes."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    with pytest.raises(SystemExit):
        main(["compress", str(folder / "model"), "-o", str(folder / "out"), *SELF])
    return folder


@pytest.fixture
def source(work):
    return str(work / "model")


@pytest.fixture
def compressed(work):
    return work / "out"


@pytest.fixture
def text(work):
    return str(work / "text.txt")
