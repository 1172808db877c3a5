"""RULER's 13 tasks without a download: own wording, made-up words, local files.

Scores are not comparable with published ones: texts, words and numbers differ.
Source: Hsieh et al., RULER, 2024 (arXiv 2404.06654).

Example:
    >>> import tempfile
    >>> from transformers import AutoTokenizer
    >>> from lowcontext.eval import write_retrieval_checkpoint
    >>> tokenizer = AutoTokenizer.from_pretrained(write_retrieval_checkpoint(tempfile.mkdtemp()))
    >>> sample = make_ruler_sample(tokenizer, "niah_multivalue", length=1024, seed=0)
    >>> len(sample.input_ids), len(sample.answers)
    (896, 4)
"""

from lowcontext.eval.ruler.plots import plot_ruler
from lowcontext.eval.ruler.run import RulerRun, run_ruler
from lowcontext.eval.ruler.summary import RulerSummary, summarize_ruler
from lowcontext.eval.ruler.tasks import (
    TASKS,
    RulerSample,
    RulerTask,
    Sources,
    available_tasks,
    make_ruler_sample,
)

__all__ = [
    "TASKS",
    "RulerRun",
    "RulerSample",
    "RulerSummary",
    "RulerTask",
    "Sources",
    "available_tasks",
    "make_ruler_sample",
    "plot_ruler",
    "run_ruler",
    "summarize_ruler",
]
