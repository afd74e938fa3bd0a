"""Prompts of the benchmark: so many tokens of real text, different ones for every turn."""

from __future__ import annotations

from collections.abc import Sequence

from moe_jax.errors import UserError
from moe_jax.inference.session import shipped
from moe_jax.inference.text import Tokenizer


def prompt_ids(
    tokenizer: Tokenizer, texts: Sequence[str], batch: int, length: int | None, sets: int
) -> list[list[list[int]]]:
    """`sets` batches of `batch` prompts, token ids.

    Args:
      texts: the user's; none: what is held out of the shipped model's training.
      length: tokens of each prompt, cut from the texts in turn; None: each text is one prompt as it stands.

    Raises:
      UserError: the texts are too short for so many prompts of this length.
    """
    if texts and length is None:
        encoded = [tokenizer.encode(text) for text in texts]
        if not all(encoded):
            raise UserError("the prompt is empty; write some text after --prompt=")
        return [[encoded[(s * batch + row) % len(encoded)] for row in range(batch)] for s in range(sets)]
    length = length or DEFAULT_LENGTH
    sources = [
        tokenizer.encode(text)
        for text in texts or [file.read_text(encoding="utf-8") for file in sorted(shipped("held_out").glob("*.txt"))]
    ]
    fitting = [source for source in sources if len(source) >= length]
    if not fitting:
        raise UserError(f"no prompt has {length} tokens; give a longer --prompt, or a smaller --prompt_lengths")
    prompts = []
    for i in range(sets * batch):
        source, part = fitting[i % len(fitting)], i // len(fitting)
        start = part * STRIDE % (len(source) - length + 1)
        prompts.append(source[start : start + length])
    return [prompts[s * batch : (s + 1) * batch] for s in range(sets)]


DEFAULT_LENGTH = 32
STRIDE = 997
"""Tokens between the starts of prompts from one text; a prime, so that no two are alike."""
