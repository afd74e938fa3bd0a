"""llama.cpp, through the package `xllamacpp` (prebuilt for CPUs; pip install 'moe_jax[peers]')."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe_jax.evaluation.gguf_file import token_ids
from moe_jax.evaluation.peers.run import Run

_MADV_RANDOM = 1
Loading = Literal["mmap", "mmap_random", "read"]
"""How the weights get into memory: mapped, with the read-ahead and population llama.cpp asks for; mapped, and then
declared to be accessed at random, so that a page fault reads little more than its page; or read into buffers."""


class LlamaCpp:
    """A GGUF file, loaded.

    Args:
      file: see `gguf_file.write_gguf`.
      context: positions of the cache.
      loading: how; see `Loading`.
      threads: that compute.
    """

    def __init__(self, file: Path, context: int, loading: Loading = "mmap", threads: int = os.cpu_count() or 1):
        xllamacpp: Any = importlib.import_module("xllamacpp")  # compiled, without types
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.fit_params, params.verbosity = (
            context,
            1,
            False,
            False,
            0,
        )
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # its default is float16
        modes = xllamacpp.llama_load_mode
        params.load_mode = modes.LLAMA_LOAD_MODE_NONE if loading == "read" else modes.LLAMA_LOAD_MODE_MMAP
        self._server = xllamacpp.Server(params)
        if loading == "mmap_random":
            _advise_random(file)

    def generate(self, prompt_ids: Sequence[int], new_tokens: int) -> Run:
        """Greedy, up to the end of the text, whose token is not in the answer; times are llama.cpp's own."""
        request = {
            "prompt": list(prompt_ids),
            "n_predict": new_tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
        }
        answer = self._server.handle_completions(request)
        if isinstance(answer, str | bytes):
            answer = json.loads(answer)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp: {answer}")
        tokens = token_ids(answer["choices"][0]["text"])
        timings = answer["timings"]
        # Its clock of generation starts when the first token is there.
        return Run(
            tokens, 1e-3 * timings["predicted_ms"] / max(timings["predicted_n"] - 1, 1), 1e-3 * timings["prompt_ms"]
        )


def _advise_random(file: Path) -> None:
    """madvise(MADV_RANDOM) on every mapping of `file` in this process."""
    libc, name = ctypes.CDLL(None, use_errno=True), str(file.resolve())
    found = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name)]
    if not found:
        raise RuntimeError(f"llama.cpp has not mapped {file}")
    for start, end in (map(lambda x: int(x, 16), span.split("-")) for span in found):
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_RANDOM):
            raise OSError(ctypes.get_errno(), "madvise")
