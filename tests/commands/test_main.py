import subprocess
import sys
from importlib.metadata import version

from command_line import SELF, succeeds
from fresh import PBSP


def test_no_arguments_show_the_help(capsys):
    assert "compress" in succeeds(capsys)


def test_version_is_that_of_the_installed_package(capsys):
    assert succeeds(capsys, "--version") == f"pbsp {version('pbsp')}\n"


def test_module_runs_quietly_in_a_process_of_its_own(tmp_path, source, compressed, fresh):
    command = [sys.executable, "-m", "pbsp", "compress", source, "-o", str(tmp_path / "out"), *SELF]
    for done in (
        subprocess.run(command, capture_output=True, text=True, timeout=120),
        fresh(PBSP, "generate", compressed, "hello", "--max-tokens", "200"),
    ):
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_module_reports_a_fault_in_one_line_and_code_2(tmp_path, fresh):
    done = fresh(PBSP, "compress", tmp_path / "none", "-o", tmp_path / "out", *SELF)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pbsp: ")
    assert done.stderr.count("\n") == 1
