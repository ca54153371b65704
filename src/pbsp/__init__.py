"""Compress large language models after training to N:M binary planes, in files that are really that small.

Importing this package registers its format with transformers: `AutoModelForCausalLM.from_pretrained`
then loads compressed models.
"""

from pbsp.allocation.planfile import read_plan
from pbsp.calibration.corpus import Corpus, corpus, evaluation_windows
from pbsp.compress import compress
from pbsp.config import Config
from pbsp.errors import PbspError
from pbsp.evaluation.perplexity import evaluate, evaluate_all
from pbsp.evaluation.tasks import evaluate_tasks
from pbsp.inspection import inspect_folder
from pbsp.models.load import load_model
from pbsp.planning import Measured
from pbsp.recover import recover
from pbsp.save import save_compressed
from pbsp.unfinished import Unfinished

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Corpus",
    "Measured",
    "PbspError",
    "Unfinished",
    "compress",
    "corpus",
    "evaluate",
    "evaluate_all",
    "evaluate_tasks",
    "evaluation_windows",
    "inspect_folder",
    "load_model",
    "read_plan",
    "recover",
    "save_compressed",
]
