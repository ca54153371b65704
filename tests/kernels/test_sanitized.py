"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven by check.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pbsp import kernels

SOURCE = Path(next(iter(kernels.__path__))) / "cpu"
CHECK = Path(__file__).with_name("check.cpp")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++") and SOURCE.is_dir()),
    reason="needs cmake and a compiler",
)
def test_kernels_are_right_and_stay_in_their_buffers(tmp_path):
    configure = ["cmake", "-S", SOURCE, "-B", tmp_path, f"-DPBSP_CHECK={CHECK}", "-DCMAKE_BUILD_TYPE=None"]
    for command in (
        [*configure, f"-DCMAKE_CXX_FLAGS={SANITIZE}"],
        ["cmake", "--build", tmp_path, "--target", "check", "--parallel", "2"],
        [tmp_path / "check"],
    ):
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
