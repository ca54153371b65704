"""Processes of their own for tests, forked from one that has imported torch and transformers, but not pbsp.

A process that imports them anew takes ten seconds of a slow machine, and tests ask for many. What pbsp does
when it is imported, and what it leaves in a process, is as in one that was started by hand.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

LIBRARIES = ("torch", "transformers.modeling_utils", "transformers.integrations.finegrained_fp8")
PBSP = "import runpy; runpy.run_module('pbsp', run_name='__main__', alter_sys=True)"
"""What `python -m pbsp` does."""
TWO = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def work(script):
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        print("exitcode :", ended.code, file=sys.stderr)
        raise

one_node = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
config = LaunchConfig(**one_node, nproc_per_node=2, max_restarts=0, start_method="fork")
elastic_launch(config, work)(sys.argv.pop(1))
"""
"""Runs its first argument as `torchrun --standalone --nproc-per-node 2` runs a file.

That reports the code of the first process that fails alone, so each that ends by itself says its own, too.
"""


class Forks:
    """Starts processes; the one that they are forked from is started with the first."""

    def __init__(self):
        self.server = None

    def run(self, script, *arguments, **environment):
        """Run Python code with these arguments and one thread, and give what it ended with."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        with tempfile.TemporaryDirectory() as folder:
            asked = {"script": script, "arguments": list(map(str, arguments)), "environment": environment}
            print(
                json.dumps({**asked, "folder": folder, "cwd": os.getcwd()}),
                file=self.server.stdin,
                flush=True,
            )
            code = int(self.server.stdout.readline())
            output, errors = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(arguments, code, output, errors)

    def close(self):
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()


def serve():
    for library in LIBRARIES:
        importlib.import_module(library)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(work(**json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    os._exit(0)  # without clearing up what was imported, which takes seconds


def work(script, arguments, environment, folder, cwd):
    """Run the script in this process, its output in files, and give the exit code."""
    for number, name in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv[:] = ["-c", *arguments]
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve()
