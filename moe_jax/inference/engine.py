"""Prefill and decode over any `ExpertSource`. See the diagram of one decode step in the README.

Shapes depend on the model and the request alone (batch, prompt length, routing), never on where experts happen to be:
that, and an output slot of its own for every (token, expert) pair, is what makes offloaded logits bitwise equal to
resident ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.inference.block import Block
from moe_jax.inference.calls import ExpertCalls
from moe_jax.inference.execution import Execution
from moe_jax.inference.forecast import Announced, Forecast
from moe_jax.inference.grouping import groups, request_shapes, unique_in_order, used_by_token
from moe_jax.inference.state import Batch, DecodeState, Entered, Record
from moe_jax.model.architecture import Architecture
from moe_jax.model.decoder import CHUNKS, Routed, Stages, Stream, committed, still
from moe_jax.model.experts import ExpertSource
from moe_jax.prediction.oracle import Oracle

Sink = Callable[[int, int, Routed], None]
"""Receives (layer among those with experts, chunk, Routed with what the experts gave in `outputs`) during prefill, when
the layer's experts have run; rows are [B, Tc] flattened."""


class Ahead(NamedTuple):
    """Experts of a layer that were dispatched before the host knew which they are."""

    experts: list[int]  # they have run if the layer needs them
    outputs: jax.Array  # the layer's output slots after them
    after: jax.Array  # ready when they have run


class Engine:
    """Runs a model whose dense weights are on the device and whose experts come from `source`.

    Args:
      stages: the jitted stages of the architecture.
      dense: device pytree of `layers.Decoder` in the compute dtype.
      source: where experts come from.
      predictor: a predictor with its parameters, or None.
      prefill_chunk: token rows of one prefill chunk (over all prompts of the batch).
      max_seq_len: most positions of a row, prompt and new tokens together.
      execution: what decode steps run instead of the router's own choice; None: exactly that.
    """

    def __init__(
        self,
        stages: Stages,
        dense: Any,
        source: ExpertSource,
        predictor: tuple[Any, Any, Any] | None = None,
        prefill_chunk: int = 256,
        max_seq_len: int | None = None,
        execution: Execution | None = None,
    ):
        self.stages, self.dense, self.source = stages, dense, source
        self.architecture: Architecture = stages.architecture
        self.prefill_chunk = prefill_chunk
        self.max_seq_len = max_seq_len or self.architecture.max_seq_len
        self.calls = ExpertCalls(stages)
        self.execution = execution
        self.use_predictor(predictor)
        self.record: Record | None = None
        ordinal = {layer: i for i, layer in enumerate(self.architecture.moe_layers)}
        self.first = self.architecture.moe_layers[0]
        # Every layer, and its number among those that have experts: what sources, predictors and records count by.
        self.numbered = [(layer, ordinal.get(layer)) for layer in range(self.architecture.num_layers)]

    def use_predictor(self, predictor: tuple[Any, Any, Any] | None) -> None:
        """Replaces the predictor, with its spec and parameters; compile again before the next request."""
        self.forecast = predictor and Forecast(*predictor, self.execution, self.stages.dtype)

    # ---- prefill -----------------------------------------------------------------------------------------------

    def shapes(self, prompt_lengths: Sequence[int], new_tokens: int) -> tuple[int, int, int]:
        """Of a request, see `request_shapes`."""
        return request_shapes(prompt_lengths, new_tokens, self.prefill_chunk, self.max_seq_len)

    def prefill(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sink: Sink | None = None
    ) -> tuple[jax.Array, DecodeState]:
        """Runs the prompts, layer by layer over chunks, so that each layer's experts are fetched once.

        Args:
          prompts: token ids of each row, at most `max_seq_len - 1` of them.
          new_tokens: decode steps to make room for.
          sink: receives every layer's `Routed` (activation logging).

        Returns:
          Float32 logits [B, V] after each prompt's last token (rows past the prompts are padding, see `padded`),
          and the state to decode from.

        Raises:
          UserError: a token that the model does not know, or too many.
        """
        B, Tc, S = self.shapes([len(p) for p in prompts], new_tokens)
        a, stages = self.architecture, self.stages
        lengths = np.zeros(B, np.int32)
        lengths[: len(prompts)] = [len(p) for p in prompts]
        chunks = -(-int(lengths.max()) // Tc)
        tokens = np.zeros((B, chunks * Tc), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        if tokens.max() >= a.vocab_size or tokens.min() < 0:  # an embedding that is not there would be another's
            wrong = next(int(token) for token in tokens.flat if not 0 <= token < a.vocab_size)
            raise UserError(
                f"the tokenizer gives token {wrong}, and the model has {a.vocab_size}: give both from one checkpoint"
            )
        positions = np.broadcast_to(np.arange(chunks * Tc, dtype=np.int32), tokens.shape)
        real = positions < lengths[:, None]
        split = lambda x: [np.ascontiguousarray(x[:, c * Tc : (c + 1) * Tc]) for c in range(chunks)]
        active = [mask.reshape(-1) for mask in split(real)]
        device_positions = [jax.device_put(p) for p in split(positions)]

        state = DecodeState(stages.kv_cache(B, S), stages.rope(S), lengths, lengths > 0)
        if self.record:
            self.record.batches.append(Batch(len(self.record.active), S))
        x = [stages.embed(self.dense, chunk) for chunk in split(tokens)]
        ids_by_layer = []
        self.source.begin_token(-1)
        for index, layer in self.numbered:
            call = lambda stage, c: stage(index, self.dense, state.rope, x[c], device_positions[c], state.kv)  # noqa: B023
            if layer is None:
                for c in range(chunks):
                    x[c] = call(stages.dense_layer, c)
                continue
            blocks = []
            for first in range(0, chunks, CHUNKS):
                own = range(first, min(first + CHUNKS, chunks))
                routed = (call(stages.route, c) for c in own)
                blocks.append(Block(stages, [*routed], [active[c] for c in own], alone=chunks == 1))
            self.source.settle()
            ids = np.concatenate([block.ids() for block in blocks])
            ids_by_layer.append(ids.reshape(chunks, B, Tc, -1).swapaxes(0, 1).reshape(B, chunks * Tc, -1))
            needed = unique_in_order(ids, np.concatenate(active))
            order = self.source.request(layer, needed, used_by_token(ids_by_layer[-1], lengths, a.num_experts))
            if self.record:
                self.record.prefill_needed.append(needed)
            # Every prompt of some length needs nearly all experts: the next layer's follow behind this one's.
            if layer + 1 < a.num_moe_layers:
                self.source.offer(layer, np.full((1, a.num_experts), min(1.0, len(needed) / a.num_experts), np.float32))
            for expert in order:
                [weights] = self.source.take(layer, [expert])
                after = [done for block in blocks if (done := block.run(expert, weights)) is not None]
                self.source.release(layer, [expert], after[-1])
            finished = (r for _ in range(len(blocks)) for r in blocks.pop(0).finish())  # freed one by one
            for c, r in enumerate(finished):
                if sink:
                    sink(layer, c, r)
                x[c] = stages.combine(r.residual, r.outputs, r.gates, x[c])

        # The last token's residual of every row, through the host: the head then is decoding's executable.
        last = np.maximum(lengths - 1, 0)
        self.source.settle()
        ends = np.stack([np.asarray(x[p // Tc])[row, p % Tc] for row, p in enumerate(last.tolist())])
        logits = stages.head(self.dense, committed(still(ends, a.top_k)))
        seen = np.where(real[None, :, :, None], ids_by_layer, -1)
        if self.forecast is not None:
            state.predictor = self.forecast.state(seen)
        if self.execution is not None:
            state.memory = self.execution.start(seen)
        return logits, state

    # ---- decode ------------------------------------------------------------------------------------------------

    def enter(self, tokens: jax.Array | np.ndarray, state: DecodeState) -> Entered:
        """Dispatches a step as far as it needs nothing from the host: up to the first choice of experts.

        To be called before the host waits for `tokens`, int32 [B], so that the device goes on meanwhile. `decode` of
        the same array does the rest; if it never comes, as the text has ended, nothing has happened.
        """
        given = tokens if isinstance(tokens, jax.Array) else committed(np.asarray(tokens, np.int32))
        # A row that has ended writes past its cache, that is nowhere.
        positions = np.where(state.active, state.lengths, state.capacity).astype(np.int32)
        x, positions = self.stages.begin(self.dense, given, positions)
        # One decision a step, whoever enters it again.
        forecast = self._predicting(state) if state.entered is None else state.entered.forecast
        said, predictor = None, state.predictor
        if forecast is not None:
            said, predictor = forecast.begin(predictor, x.residual, given, state.device_active())
        for index in range(self.first):
            x = self.stages.dense_layer(index, self.dense, state.rope, x, positions, state.kv)
        routed = self.stages.route(self.first, self.dense, state.rope, x, positions, state.kv)
        state.entered = Entered(given, state.active.copy(), positions, forecast, routed, predictor, said)
        return state.entered

    def decode(self, tokens: jax.Array | np.ndarray, state: DecodeState) -> jax.Array:
        """One step: tokens int32 [B] enter at each row's position; returns float32 logits [B, V]. Updates `state`."""
        stages, entered = self.stages, state.entered
        # Rows that have ended since are not to be predicted for. To enter again changes nothing else.
        if entered is None or entered.tokens is not tokens or (entered.active != state.active).any():
            entered = self.enter(tokens, state)
        state.entered = None
        self.source.begin_token(state.step)
        positions, forecast, routed, state.predictor = entered[2:6]
        lends = self.source.lends and self.calls.can_be_ahead(len(state.active))
        active = state.device_active()
        x, said, plan, true = None, None, None, []
        # `plan`: of the next layer. `said`: what was last predicted.
        if entered.said is not None:
            said, plan = Announced(-1, entered.said[0]), entered.said[1]
        for index, layer in self.numbered[self.first :]:
            if layer is None:
                x = stages.dense_layer(index, self.dense, state.rope, x, positions, state.kv)
                continue
            if layer:
                routed = stages.route(index, self.dense, state.rope, x, positions, state.kv)
            predicted = None
            if forecast is not None:
                predicted, state.predictor = forecast.after(layer, state.predictor, routed, active)
            if self.execution is None:
                ids, gates, told = routed.ids, routed.gates, routed.told
            else:
                self._offer(said)
                ids, gates = self.execution.decide(layer, routed, plan, state.memory, state.active)
                told = ids
            ahead = self._run_held(layer, routed, ids, said) if lends else None
            self._offer(said)  # read only now: the device has work meanwhile
            said = None
            if predicted is not None:
                said, plan = Announced(layer, predicted[0]), predicted[1]
            elif self.record:
                self.record.said.append(None)
            outputs = self._run_layer(layer, routed, ids, told, state.active, said, ahead)
            x = Stream(routed.residual, outputs, gates)
            true.append(routed.told)
        logits = stages.head(self.dense, x)
        self._offer(said)
        if self.record:  # only now: an interrupted step is not one
            self.record.end_step(state, true if self.execution is not None else ())
        if forecast is None and self.forecast is not None:
            state.unseen.append(np.where(state.active[:, None], [*map(np.asarray, true)], -1))
        state.lengths = state.lengths + state.active
        state.step += 1
        return logits

    def _offer(self, said: Announced | None) -> None:
        """Passes a prediction on, if there is one that has not been."""
        if said is None or said.offered:
            return
        probabilities: np.ndarray | None = said.probabilities
        if math.isnan(probabilities.item(0)):
            assert self.forecast is not None
            if self.forecast.predictor.name == Oracle.name:
                raise UserError("predictor oracle: the run is not the one it was made for")
            probabilities = None  # as the activations are; without it the text would be the same
        else:
            self.source.offer(said.layer, probabilities)
        said.offered = True
        if self.record and said.layer >= 0:
            self.record.said.append(None if probabilities is None else probabilities[0])

    def _predicting(self, state: DecodeState) -> Forecast | None:
        """Who predicts in this step, if anyone; it has been told of the steps that it has missed."""
        forecast = self.forecast
        if forecast is None:
            return None
        planning = self.execution is not None and self.execution.plans  # what runs must not depend on what pays
        if not planning and not self.source.wants_prediction(forecast.cost_s):
            return None
        if state.unseen:
            state.predictor = forecast.state(np.stack(state.unseen, axis=2), state.step)
            state.unseen.clear()
        return forecast

    def _run_held(self, layer: int, routed: Routed, chosen: jax.Array, said: Announced | None) -> Ahead | None:
        """Dispatches what is there of the experts int32 [B, K] that the layer is to run; None: nothing is.

        `said`: what was predicted for it.
        """
        lent = self.source.borrow(layer, None if said is None else self.calls.likeliest(said.probabilities[0]))
        if lent is None:
            return None
        outputs, after = self.calls.ahead(chosen, lent.experts)(routed.outputs, routed.h, lent.weights)
        return Ahead(lent.experts.tolist(), outputs, after)

    def _run_layer(
        self,
        layer: int,
        routed: Routed,
        chosen: jax.Array,
        told: jax.Array,
        active: np.ndarray,
        said: Announced | None,
        ahead: Ahead | None,
    ) -> jax.Array:
        """What the experts give.

        Args:
          chosen: which are to run, int32 [B, K]; told: the same, for the host.
          said: a prediction, offered before waiting for one of them.
          ahead: what has been dispatched.
        """
        self.source.settle()
        ids = np.asarray(told)
        needed = ids[0].tolist() if len(ids) == 1 else unique_in_order(ids, active)
        if self.record:
            self.record.needed.append(needed)
            self.record.ids.append(ids)
        order = self.source.request(layer, needed)
        outputs = routed.outputs
        if ahead is not None:
            outputs = ahead.outputs
            self.source.give_back(layer, [expert for expert in needed if expert in ahead.experts], ahead.after)
            needed = [expert for expert in needed if expert not in ahead.experts]
            if not needed:
                return outputs
        left = groups(needed, self.calls.together)
        for group in sorted(left, key=lambda group: max(map(order.index, group))):  # resident ones first
            if not self.source.ready(layer, group):
                self._offer(said)
            weights = self.source.take(layer, group)
            outputs, after = self.calls.group(chosen, active, group)(outputs, routed.h, weights)
            self.source.release(layer, group, after)
        return outputs
