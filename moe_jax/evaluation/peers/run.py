"""What one run of any engine gives."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Run:
    """A greedy continuation of one prompt.

    Attributes:
      token_ids: generated, the first one included.
      tpot_s: mean seconds per token after the first: every engine can tell that, not every one its median.
      ttft_s: seconds from the prompt to the first token.
    """

    token_ids: list[int]
    tpot_s: float
    ttft_s: float
