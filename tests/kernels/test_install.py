"""Installation with and without a compiler, as pip does it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
USES = """
import sys
import warnings
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]  # no editable installs
import torch
from pbsp import compiled
from pbsp.packed_linear import PackedLinear
from random_planes import random_planes

planes = random_planes("4:8", 7, 96)
x = torch.randn(2, 96)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.testing.assert_close(PackedLinear.of(planes)(x), x @ planes.dense().T, rtol=1e-4, atol=1e-4)
said = [warning for warning in caught if "compiled kernels" in str(warning.message)]
print(compiled.__file__, compiled.kernel_name(), len(said))
"""


def installed(tmp_path, **environment):
    """The names in the wheel that pip builds, which kernel runs when it is used, and how many warnings."""
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "build", "CMake*.txt.*", "CMakeCache.txt", "CMakeFiles", "*.so"
    )
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        tmp_path,
        tmp_path / "source",
    ]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if "No matching distribution found for scikit-build-core" in built.stderr:
        pytest.skip("pip reaches no package index to build with")
    assert built.returncode == 0, built.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    paths = os.pathsep.join(map(str, (tmp_path / "site", ROOT / "tests")))
    used = subprocess.run(
        [sys.executable, "-c", USES], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert used.returncode == 0, used.stderr[-2000:]
    place, kernel, warnings = used.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    return names, kernel, int(warnings)


@pytest.mark.slow
def test_without_a_compiler_pbsp_installs_and_computes_with_torch_after_one_warning(tmp_path):
    names, kernel, warnings = installed(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert not [name for name in names if name.endswith(".so")]
    assert (kernel, warnings) == ("reference", 1)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
def test_with_a_compiler_the_wheel_holds_the_library_and_no_sources(tmp_path):
    names, kernel, warnings = installed(tmp_path)
    assert "pbsp/kernels/pbsp_cpu.so" in names
    assert not [name for name in names if name.startswith("pbsp/kernels/cpu/")]
    assert kernel != "reference"
    assert warnings == 0
