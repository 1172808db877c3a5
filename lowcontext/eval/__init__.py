"""Long-context evaluation: the retrieval checkpoint, the needle task, its runner, scores, plots.

Nothing here knows how a model was patched: everything takes a model object.
"""

from lowcontext.eval.needle import NeedleSample, NeedleTask, make_sample
from lowcontext.eval.plots import plot_needle
from lowcontext.eval.records import NeedleRow, read_rows
from lowcontext.eval.retrieval import write_retrieval_checkpoint
from lowcontext.eval.run import NeedleGrid, run_needle
from lowcontext.eval.scoring import contains_all, exact_match, wilson_interval
from lowcontext.eval.summary import SummaryRow, summarize

__all__ = [
    "NeedleGrid",
    "NeedleRow",
    "NeedleSample",
    "NeedleTask",
    "SummaryRow",
    "contains_all",
    "exact_match",
    "make_sample",
    "plot_needle",
    "read_rows",
    "run_needle",
    "summarize",
    "wilson_interval",
    "write_retrieval_checkpoint",
]
