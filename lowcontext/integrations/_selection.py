"""What methods report of their selections while someone measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lowcontext.integrations._families import reporting


class Selection:
    """Means of the named figures that methods report, over layers, steps and rows of the batch."""

    def __init__(self) -> None:
        # Kept on the device, and read when someone asks: adding must not stall a GPU.
        self._figures: dict[str, list[Tensor]] = {}

    def add(self, figures: dict[str, Tensor]) -> None:
        """Takes one value per row of the batch for each name."""
        for name, values in figures.items():
            self._figures.setdefault(name, []).append(values.detach())

    @property
    def names(self) -> list[str]:
        """Figures that were reported."""
        return sorted(self._figures)

    def count(self, name: str) -> int:
        """Values reported under `name`."""
        return sum(values.numel() for values in self._figures.get(name, []))

    def mean(self, name: str) -> float:
        """Mean of the values reported under `name`, NaN where there are none."""
        count = self.count(name)
        total = sum(float(values.sum()) for values in self._figures.get(name, []))
        return total / count if count else float("nan")


@contextmanager
def measure_selection(model: nn.Module) -> Iterator[Selection]:
    """Measures what the method of a patched model selects inside the `with` block.

    `tokenselect` reports `cache_hits` (share of decode steps that reused a selection) and
    `selected_mass` (share of the votes of all candidates that the selected tokens hold, when they
    are selected); other methods report nothing.

    Args:
        model: a model that `patch_model` has patched.

    Returns:
        A context manager whose value has `.names`, `.mean(name)` and `.count(name)`.

    Raises:
        ValueError: the model is not patched.

    Example:
        >>> import lowcontext, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
        >>> config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        >>> model = LlamaForCausalLM(config).eval()
        >>> model = lowcontext.patch_model(model, "tokenselect", k=4, sink=2, local=4)
        >>> ids = torch.ones(1, 40, dtype=torch.long)
        >>> with lowcontext.measure_selection(model) as selection:
        ...     out = model.generate(ids, max_new_tokens=4, min_new_tokens=4)
        >>> selection.count("cache_hits")
        3
    """
    selection = Selection()
    with reporting(model, "observe", selection.add):
        yield selection
