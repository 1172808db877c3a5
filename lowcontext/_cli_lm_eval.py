"""The command `lm-eval`: the lm-evaluation-harness on a patched model."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import typer

from lowcontext._cli_console import console, errors

OPTION = "method_"
HELP = """\
lowcontext lm-eval [OPTIONS OF lm-eval run]: lm-evaluation-harness on a patched model.

Beside the model arguments of the harness's hf, --model_args takes:
  method=NAME        what `lowcontext methods` lists; default: dense
  method_KEY=VALUE   a hyper-parameter of the method
--model is lowcontext where none is given.

  lowcontext lm-eval --model_args pretrained=DIR,method=quest,method_budget=1024 --tasks ruler_fwe
  lowcontext lm-eval --tasks ruler_fwe --model_args \\
    '{"pretrained": "DIR", "method": "tidaldecode", "method_select_layers": [2, 13]}'

All else is the harness's own:
"""


class MethodRefused(ValueError):
    """The model arguments name no method, or one that refuses its hyper-parameters."""


def lm_eval(context: typer.Context) -> None:
    """Runs lm-evaluation-harness with the model `lowcontext`; arguments go to its command line.

    Model arguments beside those of the model `hf`: method=NAME, and method_KEY=VALUE for the
    hyper-parameters of the method.

    Example: `lowcontext lm-eval --model_args pretrained=DIR,method=quest,method_budget=1024
    --tasks ruler_fwe --metadata '{"max_seq_lengths":[4096]}'`
    """
    if {"-h", "--help"} & set(context.args):
        console.print(HELP, markup=False, highlight=False, soft_wrap=True)
    with errors():
        if find_spec("lm_eval") is None:
            raise RuntimeError("lm-eval: expected lm_eval to be installed; pip install lm-eval")
        register()
    from lm_eval.__main__ import cli_evaluate

    chosen = any(argument.split("=")[0] in ("--model", "-M") for argument in context.args)
    model = [] if chosen else ["--model", "lowcontext"]
    sys.argv = ["lm-eval", "run", *model, *context.args]
    try:
        cli_evaluate()
    except MethodRefused:  # what else the harness raises keeps its traceback
        with errors():
            raise


@cache
def register() -> type:
    """Makes the model `lowcontext` known to the harness, which has no entry points for models.

    Once in a process: the harness refuses a second time.
    """
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    from lowcontext.integrations import patch_model
    from lowcontext.methods import get_method

    class LowContextLM(HFLM):
        """The harness's own `hf` model, patched once it is loaded."""

        def __init__(self, method: str = "dense", **arguments: Any) -> None:
            names = [name for name in arguments if name.startswith(OPTION)]
            options = {name.removeprefix(OPTION): arguments.pop(name) for name in names}
            try:
                self.method = get_method(method, **options)
            except (ValueError, TypeError) as error:
                raise MethodRefused(f"--model_args: {error}") from error
            super().__init__(**arguments)

        def _create_model(self, *arguments: Any, **options: Any) -> None:
            super()._create_model(*arguments, **options)
            patch_model(self._model, self.method)

    register_model("lowcontext")(LowContextLM)
    return LowContextLM
