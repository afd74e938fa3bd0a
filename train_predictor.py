"""Trains the network that predicts which experts the next layers will need.

    python train_predictor.py --config=configs/predictor.py [--text=FOLDER_OR_FILE ...] [--config.FIELD=VALUE ...]

Runs the model over text, logs activations to disk, fits the network, and prints recall by layer and horizon on texts it
has not seen. Killed at any moment, the same command goes on where it stopped and ends with the same weights.
"""

import dataclasses
import json
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from moe_jax import cli
from moe_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", "configs/predictor.py", "Model, text budget and fit.")
TEXT = flags.DEFINE_multi_string("text", [], "File or folder to train on; repeatable. Default: Python's own library.")
VALIDATION_TEXT = flags.DEFINE_multi_string(
    "validation_text", [], "File that chooses when to stop; repeatable. Default: the shipped development texts."
)
TEST_TEXT = flags.DEFINE_multi_string("test_text", [], "File to test on; repeatable. Default: the shipped test texts.")
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write scores and timings to this file.")

COMPARED = ("best_per_layer", "learned", "default_vector", "router", "repeat", "frequency")  # in the table


def main() -> None:
    if OUTPUT_JSON.value and not Path(OUTPUT_JSON.value).absolute().parent.is_dir():
        raise UserError(f"--output_json={OUTPUT_JSON.value}: its folder does not exist")
    started = time.time()
    c = CONFIG.value.to_dict()

    from moe_jax.config import Config
    from moe_jax.inference import activations
    from moe_jax.inference.session import Model, shipped
    from moe_jax.model.layers import parameter_counts
    from moe_jax.prediction import best as best_per_layer
    from moe_jax.prediction import fit, lookahead, metrics, predictors, report, saved, texts
    from moe_jax.prediction.activation_log import ActivationLog
    from moe_jax.prediction.interface import ModelParts, Spec, fingerprint

    settings = fit.FitConfig(**c["fit"], seed=c["seed"])
    if c["max_tokens"] < 1:
        raise UserError(f"config.max_tokens must be at least 1, not {c['max_tokens']}")
    offload = {"tier": c["tier"], "device_budget": c["device_budget"]}
    chunk = activations.BATCH * c["window"]  # a batch of windows is one prefill chunk
    values = {"checkpoint": c["checkpoint"], "offload": offload, "prefill_chunk": chunk}
    model = Model(Config.from_dict(values | {"prefetch": {"predictor": "none"}}))
    a = model.checkpoint.architecture
    spec, parts = Spec.of(a, c["horizon"]), ModelParts.of(model.engine.dense)
    identity, output = fingerprint(a, model.engine.dense), Path(c["output"])
    if not 2 <= c["window"] < a.max_seq_len:
        raise UserError(f"config.window={c['window']} must be from 2 to {a.max_seq_len - 1} for this model")

    ours = {name: sorted(map(str, shipped(name).glob("*.txt"))) for name in ("development", "held_out")}
    chosen_on, tests = VALIDATION_TEXT.value or ours["development"], TEST_TEXT.value or ours["held_out"]
    sources = TEXT.value or [texts.standard_library()]
    encode = model.tokenizer.encode
    # Neither what is tested on nor what is chosen on is trained on, whoever ships it.
    exclude = [*chosen_on, *tests, *ours["development"], *ours["held_out"]]
    train_plan = texts.plan(encode, sources, c["window"], c["max_tokens"], c["seed"], exclude=exclude)
    validation_plan, test_plan = (texts.plan(encode, files, c["window"]) for files in (chosen_on, tests))
    logs = {}
    for name, plan in (("train", train_plan), ("validation", validation_plan), ("test", test_plan)):
        logs[name] = ActivationLog(output / "log" / name, spec, identity, plan)
        title = f"logging {name} text, {plan.lengths.sum():,} tokens"
        with report.progress(title, len(plan.tokens)) as advance:
            activations.write_log(model.engine, logs[name], lambda done, advance=advance: advance(done, {}))
    logged_s = time.time() - started

    with report.progress("fitting", settings.steps) as advance:
        params, best = fit.fit(settings, spec, parts, logs["train"], logs["validation"], output / "fit", advance)
    fitted_s = time.time() - started - logged_s

    vectors, unseen = lookahead.default_vectors(*logs["train"].outputs())
    weights = {"network": params["network"], "vectors": vectors}

    def score(name, log):
        own = predictors.params_of(name, spec, parts, weights, c["seed"])
        return metrics.evaluate(predictors.named(name), own, spec, log)

    chosen_by = {name: score(name, logs["validation"]) for name in best_per_layer.CANDIDATES}
    recall, first = ({name: getattr(s, field) for name, s in chosen_by.items()} for field in ("recall", "first"))
    weights["best"] = best_per_layer.choose(recall, first)
    scores = {name: score(name, logs["test"]) for name in COMPARED}
    cost = predictors.Learned.multiply_adds(params) * spec.num_layers / parameter_counts(a)["active"]
    summary = {
        "model": identity,
        "train_tokens": int(train_plan.lengths.sum()),
        "test_tokens": int(test_plan.lengths.sum()),
        "validation": best,
        "experts_never_seen": unseen,
        "share_of_active_multiply_adds": cost,
        "seconds": {"logging": logged_s, "fitting": fitted_s, "total": time.time() - started},
    }
    saved.save(output / "predictor", weights, spec, identity, {"config": c, **summary})
    report.print_scores(scores, spec)
    print(
        f"{summary['train_tokens']:,} tokens; logging {logged_s:.0f} s, fitting {fitted_s:.0f} s; the network costs"
        f" {100 * cost:.1f}% of the model's active multiply-adds; {unseen} experts were never routed to\n"
        f"saved: --config.prefetch.checkpoint={output / 'predictor'}"
    )
    if OUTPUT_JSON.value:
        by_name = {name: score.to_dict() for name, score in scores.items()}
        document = {"config": c, "spec": dataclasses.asdict(spec), **summary, "scores": by_name}
        Path(OUTPUT_JSON.value).write_text(json.dumps(document, indent=1) + "\n")
    model.close()


if __name__ == "__main__":
    cli.run(main)
