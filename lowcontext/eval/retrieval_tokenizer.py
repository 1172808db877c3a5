"""The tokenizer of the retrieval checkpoint: whole words, numbers of up to three digits, letters.

Every word of the evaluation's own texts is one token, and so is every group of three digits. Any
other text is spelled with single letters, so a user's own file can serve as a haystack.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from lowcontext.eval.words import filler_words, key_words, plain_words, template_words

VOCAB_SIZE = 4096
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"


def build_vocabulary() -> dict[str, int]:
    """Returns the 4096 tokens with their ids; the unused tail is named ``<unused...>``."""
    tokens = [PAD, BOS, EOS, UNK]
    tokens += list(string.punctuation)
    letters = list(string.ascii_lowercase + string.digits)
    tokens += letters + [f"##{c}" for c in letters]
    numbers = [f"{n:03d}" for n in range(1000)]
    tokens += numbers + [f"##{n}" for n in numbers]
    tokens += template_words() + plain_words() + key_words() + filler_words()
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"<unused{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    return {token: i for i, token in enumerate(tokens)}


def topic_tokens() -> list[str]:
    """Returns the tokens a needle is made of: template words, keys, groups of three digits."""
    numbers = [f"{n:03d}" for n in range(1000)]
    return template_words() + key_words() + numbers + [f"##{n}" for n in numbers]


def write_tokenizer(
    folder: Path, vocabulary: dict[str, int], *, max_length: int, join_hyphens: bool = False
) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        folder: An existing folder.
        vocabulary: Tokens with their ids.
        max_length: The ``model_max_length`` to record.
        join_hyphens: Whether hyphens are decoded without the spaces that other punctuation gets.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.WordPiece(vocab=vocabulary, unk_token=UNK, continuing_subword_prefix="##")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    if join_hyphens:
        joined = [tokenizer.decoder, decoders.Fuse(), decoders.Replace(" - ", "-")]
        tokenizer.decoder = decoders.Sequence(joined)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNK])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
