"""What the command line does below its options: parsing, loading, running, tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Column, Table

from lowcontext._cli_sweep import read_sweep
from lowcontext.methods import Method, get_method


def installed_version(package: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def method(spec: str) -> Method:
    """A method from `NAME` or `NAME:key=value,key=value`; values are YAML scalars or [lists].

    Raises:
        ValueError, TypeError: the text does not parse, or the method refuses it.
    """
    import yaml

    name, _, rest = spec.partition(":")
    options = {}
    for pair in filter(None, re.split(r",(?![^\[]*\])", rest)):  # commas outside of [...]
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"method: expected NAME:key=value,key=value, got {spec!r}")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"method: expected a YAML value of {key}, got {value!r}") from error
    return get_method(name.strip(), **options)


def op_table(devices: Sequence[str]) -> Table:
    """Which backend "auto" takes for each op, on tensors with a head_dim of 64."""
    import torch

    from lowcontext.ops import _dispatch, block_scores, hierarchy, vertical_slash, votes

    ops = [
        (votes, ("token_scores", "page_scores", "quantize_keys")),
        (votes, ("soft_vote", "topk", "mass_mask")),
        (vertical_slash, ("last_window_scores", "line_index")),
        (block_scores, ("antidiagonal_scores", "block_means")),
        (hierarchy, ("hip_tree", "hip_stage")),
    ]
    table = Table("op", *(f"backend on {device}" for device in devices))
    likes = [torch.empty(1, 1, 1, 64, device=device) for device in devices]

    def attend(x: torch.Tensor) -> str:
        return _dispatch.select("attention", "auto", x, x, x).name

    def score(family: Any, name: str) -> Callable[[torch.Tensor], str]:
        return lambda x: _dispatch.choose(family.BACKENDS, name, "auto", x)

    choices: dict[str, Callable[[torch.Tensor], str]] = {"attention, sparse_attention": attend}
    choices |= {name: score(family, name) for family, names in ops for name in names}
    for title, choice in choices.items():
        table.add_row(title, *(_taken(choice, x) for x in likes))
    return table


def _taken(choice: Callable[[Any], str], like: Any) -> str:
    try:
        return choice(like)
    except RuntimeError:
        return "none"


def methods(names: str, given: Sequence[str] | None, sweep: Path | None) -> list[Method]:
    """The methods of `--methods a,b`, of every `-m` and of a sweep file; dense if there is none.

    One that is named twice is there once: its rows would count twice.

    Raises:
        ValueError, TypeError: as `method` and `read_sweep`.
    """
    specs = [*filter(None, names.split(",")), *(given or [])]
    found = [method(spec) for spec in specs] + (read_sweep(sweep) if sweep else [])
    return list({str(one): one for one in found or [method("dense")]}.values())


def lengths(text: str) -> tuple[int, ...]:
    """Token counts from text such as "1k,4096,128k"; k is 1024."""
    values = []
    for part in filter(None, (p.strip().lower() for p in text.split(","))):
        number, factor = (part[:-1], 1024) if part.endswith("k") else (part, 1)
        if not number.isdigit():
            raise ValueError(f"lengths: expected numbers such as 4096 or 4k, got {part!r}")
        values.append(int(number) * factor)
    return tuple(values)


def layer_groups(text: str, count: int) -> dict[str, range]:
    """Groups of layers from text such as "0-10,11-29", each by its own text.

    Raises:
        ValueError: not such text, or layers that a model of `count` layers does not have.
    """
    groups = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < count:
            raise ValueError(
                f"--layers: expected N or N-M of the layers 0-{count - 1}, got {part!r}"
            )
        groups[part] = range(first, last + 1)
    return groups


def depth_grid(count: int) -> tuple[float, ...]:
    """`count` depths from 0 to 100 percent; one depth is the middle."""
    return (50.0,) if count == 1 else tuple(100.0 * i / (count - 1) for i in range(count))


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt from one of the two options."""
    if (prompt is None) == (file is None):
        raise ValueError("prompt: expected one of --prompt and --prompt-file")
    if file is not None:
        return file_text(file)
    if not prompt:
        raise ValueError("prompt: expected some text, got none")
    return prompt


def file_text(file: Path) -> str:
    """The contents of a UTF-8 text file.

    Raises:
        ValueError: it is empty, or not UTF-8. OSError: it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt: expected UTF-8 text in {str(file)!r}, got {error}") from error
    if not text:
        raise ValueError(f"prompt: expected some text in {str(file)!r}, got none")
    return text


def load_model(
    folder: str, dtype: str, device: str, device_map: str | None = None
) -> tuple[Any, Any]:
    """A causal LM and its tokenizer from a local folder, in eval mode.

    Raises:
        ValueError: the folder lacks a checkpoint or a tokenizer, dtype or device map is unknown, or
            torch has no such device.
        RuntimeError: a device map is asked for without accelerate.
    """
    if not (Path(folder) / "config.json").exists():
        raise ValueError(
            f"model: expected a folder with a config.json, got {folder!r}; fetch one with "
            "`hf download OWNER/NAME --local-dir FOLDER`, or build one with "
            "`lowcontext checkpoint FOLDER`"
        )
    folder = str(Path(folder))  # rows name it: FOLDER/ is not another one
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)}, got {dtype!r}")
    maps = (None, "auto", "balanced", "balanced_low_0", "sequential")
    if device_map not in maps:
        names = ", ".join(maps[1:])
        raise ValueError(f"--device-map: expected one of {names}, got {device_map!r}")
    if device_map and device != "auto":
        raise ValueError(f"--device-map: expected it without --device, got --device {device!r}")
    if device_map and find_spec("accelerate") is None:
        raise RuntimeError("--device-map: expected accelerate; pip install accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a tokenizer in {folder!r}, got {error}") from error
    value = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=value, device_map=device_map)
    if device_map is None:
        try:
            model.to(torch.device(device))  # type: ignore[arg-type]
        # Builds of torch without CUDA raise the first, those with it the second.
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"--device: expected one that torch can use, got {device!r}: {error}"
            ) from error
    return model.eval(), tokenizer


@dataclass(frozen=True)
class Generated:
    """The new text and one line about how it was made."""

    text: str
    summary: str


def generate(
    model: Any,
    tokenizer: Any,
    text: str,
    chosen: Method,
    max_new_tokens: int,
    chat: bool,
    chunk: int | None,
) -> Generated:
    """Greedy generation with a patched model.

    Raises:
        ValueError: there is no chat template, or prompt and new tokens exceed the model's
            positions.
    """
    from transformers import LogitsProcessorList

    from lowcontext.eval import TokenClock
    from lowcontext.eval.generation import max_positions
    from lowcontext.integrations import measure_density, patched

    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat: expected a tokenizer with a chat template, got one without")
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    length = batch["input_ids"].shape[1]
    limit = max_positions(model)
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"--max-new-tokens: expected at most {limit} tokens (the model's "
            f"max_position_embeddings) with the prompt's {length}, got {max_new_tokens}"
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if chunk:
        options["prefill_chunk_size"] = chunk
    clock = TokenClock()
    with patched(model, chosen), measure_density(model) as density:
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_processor=LogitsProcessorList([clock]),
            **options,
        )
    times = clock.times
    steps = len(times) - 2
    tpot = f", {(times[-1] - times[1]) / steps * 1e3:.1f} ms per token after it" if steps else ""
    summary = (
        f"{chosen}: {length} prompt tokens, first token after {times[1] - times[0]:.2f} s{tpot}; "
        f"density {share(density.prefill)} in prefill"
    )
    if steps:
        summary += f", {share(density.decode)} in decode"
    return Generated(tokenizer.decode(out[0, length:], skip_special_tokens=True), summary)


@contextmanager
def counted(model: Any, chosen: Method) -> Iterator[Callable[[], dict[str, float]]]:
    """The model patched, and a function that gives the densities since it was last called."""
    from lowcontext.integrations import measure_density, patched

    with patched(model, chosen), measure_density(model) as density:

        def stats() -> dict[str, float]:
            values = {"density": density.prefill, "density_decode": density.decode}
            density.reset()
            return {name: value for name, value in values.items() if value == value}

        yield stats


def check_file(path: Path, kind: Any, chosen: Sequence[Method]) -> list[Any]:
    """The rows of an output file, none if it is missing, before a model is loaded or run.

    Raises:
        ValueError: as `RowFile`: one of the methods could not go on in it.
    """
    from lowcontext.eval.records import RowFile

    return list(RowFile(path, kind, *chosen).rows.values()) if path.exists() else []


def short_names(labels: list[str]) -> dict[str, str]:
    """Labels without their settings, where that still tells them apart."""
    names = [label.partition("(")[0] for label in labels]
    unique = {name for name in names if names.count(name) == 1}
    pairs = zip(labels, names, strict=True)
    return {label: name if name in unique else label for label, name in pairs}


def share(value: float | None) -> str:
    """A share in percent, nothing where there is none."""
    return "" if value is None or value != value else f"{value:.1%}"


def prompt_ids(tokenizer: Any, file: Path, max_length: int) -> Any:
    """Tokens [1, N] of a text file; what is too long loses its middle.

    Raises:
        ValueError: as `file_text`, or `max_length` is below 1.
    """
    import torch

    if max_length < 1:
        raise ValueError(f"--max-length: expected at least 1, got {max_length}")
    ids = tokenizer(file_text(file), return_tensors="pt")["input_ids"]
    if ids.shape[1] > max_length:
        half = max_length // 2
        ids = torch.cat([ids[:, :half], ids[:, half - max_length :]], dim=1)
    return ids


def calibration(out: Path, published: bool, blocks: int) -> Any:
    """A calibration whose measurements lie beside `out`."""
    from lowcontext.integrations import calibrate

    if out.suffix != ".json":
        raise ValueError(f"--out: expected a .json file, got {str(out)!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return calibrate.Calibration(
        blocks=blocks, published=published, state=out.with_suffix(".measured.jsonl")
    )


def choice_table(choice: Any) -> Table:
    """By layer: how many heads have which pattern, and what they cost and miss."""
    table = Table(
        Column("layer", justify="right"),
        Column("patterns", overflow="fold"),
        *(Column(name, justify="right") for name in ("density", "error", "recall")),
        box=SIMPLE,
    )
    for i, layer in enumerate(choice.patterns):
        counts = Counter(str(p) for p in layer)
        means = [sum(x[i]) / len(x[i]) for x in (choice.cost, choice.error, choice.recall)]
        table.add_row(
            str(i),
            ", ".join(f"{n} x {name}" for name, n in counts.most_common()),
            f"{means[0]:.1%}",
            f"{means[1]:.4f}",
            f"{means[2]:.2%}",
        )
    return table
