"""The model of `lm-eval` (pip install "moe_jax[eval]"): its tasks, with any execution mode and predictor.

    lm_eval --model moe_jax --tasks hellaswag \\
        --model_args checkpoint=DIR,execution=speculative_gated,predictor=router,offload.device_budget=25%

Every other flag is lm-eval's own. Arguments of the model are `config` (a document such as configs/mixtral.py, whose
values the others replace), `execution`, `predictor`, and any field of the configuration; `--batch_size` is the
configuration's too. `seed` is that of the first text that is sampled (`do_sample`); each one after has the next.

A context is prefilled, exactly in every mode, but for its last token: what is scored or generated comes out of decode
steps, where modes act. (A context of one token, as every text of `loglikelihood_rolling` has, leaves the first
prediction to the prefill.)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from rich.progress import track

from moe_jax.config import Config
from moe_jax.errors import UserError
from moe_jax.inference.generate import Generation
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.session import Model

_SHORT = {"predictor": "prefetch.predictor"}
_LM_EVAL = ("max_batch_size", "device", "metadata")  # what lm_eval gives every model and this one has no use for
_END = "(the answer goes on here) "  # its last space tells whether the template trims


class MoeJax(TemplateLM):
    """See the module. Requests are sorted by length, so that batches hold rows of about the same."""

    def __init__(self, config: str = "", seed: int = 0, **fields: Any):
        """
        Args:
          config: path of a configuration document; empty: the defaults, that is the shipped model.
          seed: of sampled texts.
          fields: of the configuration, nested ones as `offload.device_budget`.

        Raises:
          UserError: a field or value that `Config` refuses.
        """
        super().__init__()
        if not isinstance(seed, int):
            raise UserError(f"seed={seed} is no whole number")
        self._seed = seed
        values = _document(config) if config else {}
        for name, value in fields.items():
            if name in _LM_EVAL or (name == "batch_size" and not str(value).isdigit()):  # "auto"
                continue
            value = (
                int(value) if name == "batch_size" else "none" if value is None else value
            )  # lm_eval reads "none" so
            *groups, last = _SHORT.get(name, name).split(".")
            place = values
            for group in groups:
                place = place.setdefault(group, {})
            place[last] = value
        self.model = Model(Config.from_dict(values))
        self.tokenizer = self.model.tokenizer  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.tokenizer.directory)

    @property
    def eot_token_id(self) -> int:
        return self.model.checkpoint.architecture.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.checkpoint.architecture.bos_id
        return self.eot_token_id if bos is None else bos

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the template, for lm_eval's records.

        Raises:
          UserError: the checkpoint has none; or one is asked for by name.
        """
        if isinstance(chat_template, str):
            raise UserError(f"--apply_chat_template={chat_template}: only the default template is used; give no name")
        return self.model.tokenizer.chat_template()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; `tok_encode` adds no second bos to it.

        Without a generation prompt the last message is an answer that a task has begun (`gen_prefix`), and the text
        ends where it goes on, as in `transformers`.

        Raises:
          UserError: the checkpoint has no chat template, or it refuses these messages or leaves out the last one.
        """
        render = self.model.tokenizer.render_chat
        if add_generation_prompt:
            return render(chat_history)
        *before, last = chat_history
        text = render([*before, {**last, "content": last["content"] + _END}], add_generation_prompt=False)
        head, end, tail = text.rpartition(_END.rstrip())
        if not end:
            raise UserError("the chat template leaves out the answer that the task begins (gen_prefix)")
        return head if tail.startswith(" ") else head.rstrip()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        tokenizer = self.model.tokenizer
        if add_special_tokens is False:
            return tokenizer.backend.encode(string, add_special_tokens=False).ids
        return tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        longest = self.model.engine.max_seq_len
        # The last token is predicted and does not enter; a context that is too long loses its beginning.
        rows = [((context + scored)[-longest - 1 :], len(scored)) for _, context, scored in requests]
        if any(count > longest for _, count in rows):
            raise UserError(f"a continuation is longer than the context of {longest} tokens")
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        size, found = self.model.config.batch_size, {}
        starts = range(0, len(order), size)
        for start in track(starts, "scoring", disable=disable_tqdm or len(starts) < 2):
            part = order[start : start + size]
            found |= dict(zip(part, self._score([rows[i] for i in part]), strict=True))
        return [found[i] for i in range(len(rows))]

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of the last tokens of each row (tokens, how many), and whether greedy decoding gives them."""
        engine = self.model.engine
        heads = [max(1, len(tokens) - count - 1) for tokens, count in rows]  # tokens of each that are prefilled
        steps = max(len(tokens) - head for (tokens, _), head in zip(rows, heads, strict=True))
        logits, state = engine.prefill([tokens[:head] for (tokens, _), head in zip(rows, heads, strict=True)], steps)
        sums, greedy = np.zeros(len(rows)), np.ones(len(rows), bool)
        for step in range(steps):
            targets = np.zeros(len(state.lengths), np.int32)
            scored = np.zeros(len(rows), bool)
            for i, ((tokens, count), head) in enumerate(zip(rows, heads, strict=True)):
                position = head + step  # of the token that these logits predict
                if position < len(tokens):
                    targets[i], scored[i] = tokens[position], position >= len(tokens) - count
            if scored.any():
                likelihood, best = (np.asarray(x)[: len(rows)] for x in _predicted(logits, targets))
                sums += np.where(scored, likelihood, 0.0)
                greedy &= best | ~scored
            state.active = np.pad(
                [head + step + 1 < len(tokens) for (tokens, _), head in zip(rows, heads, strict=True)],
                (0, len(state.lengths) - len(rows)),
            )
            if state.active.any():
                logits = engine.decode(targets, state)
        return [(float(total), bool(same)) for total, same in zip(sums, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        longest, windows, owners = self.model.engine.max_seq_len, [], []
        for index, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            for pair in utils.get_rolling_token_windows(ids, self.prefix_token_id, longest, 1):
                context, scored = utils.make_disjoint_window(pair)
                windows.append((None, context, scored))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        # A seed each: the repeats of a request are texts of their own.
        tracked = track(enumerate(requests, self._seed), "generating", len(requests), disable=disable_tqdm)
        return [self._generate(*request.args, seed=seed) for seed, request in tracked]

    def _generate(self, context: str, options: dict[str, Any], seed: int) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        count = int(options.get("max_gen_toks", 256))
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0
        room = self.model.engine.max_seq_len - count
        if room < 1:
            raise UserError(f"max_gen_toks={count} leaves no room for a context")
        ids = self.tok_encode(context)[-room:]
        sampling = Sampling(temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)), seed)
        generation = Generation(self.model.engine, self.model.tokenizer, [context], [ids], count, sampling, 1)
        text = ""
        for piece in _pieces(generation):
            text += piece
            if ends := [text.index(stop) for stop in stops if stop and stop in text]:
                return text[: min(ends)]
        return text


if "moe_jax" not in model_registry:  # otherwise lm-eval knows it by its entry point, see lm_eval_plugin.py
    model_registry.register("moe_jax", target=MoeJax)


def _pieces(generation: Generation) -> Iterator[str]:
    for _, piece in generation:
        yield piece


@jax.jit
def _predicted(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood [B] of the targets, and whether they are the most probable."""
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return likelihood, logits.argmax(1) == targets


def _document(path: str) -> dict[str, Any]:
    """The values of a configuration document."""
    spec = importlib.util.spec_from_file_location("document", path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"config={path}: no such configuration document; see configs/")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()
