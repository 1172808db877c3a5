"""Long-context evaluation: the retrieval checkpoint, the needle task, its runner, scores, plots.

Nothing here knows how a model was patched: everything takes a model object.

Example:
    >>> import tempfile
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> folder = write_retrieval_checkpoint(tempfile.mkdtemp())
    >>> model = AutoModelForCausalLM.from_pretrained(folder)
    >>> tokenizer = AutoTokenizer.from_pretrained(folder)
    >>> sample = make_sample(tokenizer, NeedleTask("multikey"), length=512, depth=50, seed=0)
    >>> len(sample.input_ids), sample.expected in sample.prompt
    (496, True)
    >>> grid = NeedleGrid(lengths=(256, 512), depths=(0, 100))
    >>> rows = list(run_needle(model, tokenizer, grid, out=folder / "needle.jsonl"))
    >>> read_rows(folder / "needle.jsonl") == rows
    True
    >>> [(line.method, line.length, line.accuracy) for line in summarize(rows)]
    [('dense', 256, 1.0), ('dense', 512, 1.0)]
    >>> plot_needle(rows, folder / "needle.png").name
    'needle.png'
"""

from lowcontext.eval.generation import TokenClock
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
    "TokenClock",
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
