"""Real chat templates, from the wheel of trl, each with a tokenizer that has its special tokens.

The tokenizer knows the bytes and the tokens that the template writes: ids are not those of the real
model, all else is.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOKEN = re.compile(
    r"<\|[^|<>{}'\s]+\|?>|<[a-z_:]+\|>|<\|\"\|>|<｜[^｜]+｜>|</?[a-z_]+>|\[[A-Za-z_]+\](?=<sop>)"
)
"""A special token or tag in the text of a template."""
PLAIN = re.compile(r"</?[a-z_]+>")
"""A tag that real tokenizers have as one token, though not as a special one."""


def names() -> list[str]:
    """The templates by name, `qwen3` for `qwen3.jinja`."""
    return sorted(
        file.name.removesuffix(".jinja")
        for file in files("trl.chat_templates").iterdir()
        if file.name.endswith(".jinja")
    )


@cache
def text(name: str) -> str:
    return (files("trl.chat_templates") / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer(template: str, name: str = "model") -> PreTrainedTokenizerFast:
    """A tokenizer for the text of a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
        name_or_path=name,
    )
    made.add_tokens(
        [
            AddedToken(token, special=not PLAIN.fullmatch(token), normalized=False)
            for token in sorted(set(TOKEN.findall(template)))
        ]
    )
    return made
