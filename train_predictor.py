"""Trains the network that predicts which experts the next layers will need.

    python train_predictor.py --config=configs/predictor.py [--text=FOLDER_OR_FILE ...] [--config.FIELD=VALUE ...]
    python train_predictor.py --score=shipped|FOLDER [--test_text=FILE ...]        nothing is trained: the tables only
    python train_predictor.py --calibrate=FOLDER [--validation_text=FILE ...]      its look-aheads' probabilities anew
    python train_predictor.py --ablate=kl --ablate=kl+membership [--text=...]      losses compared on validation text

Runs the model over text, logs activations to disk, fits the network, and prints recall by layer and horizon on texts it
has not seen. Killed at any moment, the same command goes on where it stopped and ends with the same weights.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from moe_jax import cli, outputs
from moe_jax.errors import UserError

CONFIG = cli.config_flag("configs/predictor.py", "Model, text budget and fit.")
TEXT = flags.DEFINE_multi_string("text", [], "File or folder to train on; repeatable. Default: Python's own library.")
VALIDATION_TEXT = flags.DEFINE_multi_string(
    "validation_text",
    [],
    "File or folder that chooses when to stop; repeatable. Default: the shipped development texts.",
)
TEST_TEXT = flags.DEFINE_multi_string(
    "test_text", [], "File or folder to test on; repeatable. Default: the shipped test texts."
)
SCORE = flags.DEFINE_string(
    "score", None, "Train nothing: score this predictor's folder, or `shipped`, on --test_text."
)
CALIBRATE = flags.DEFINE_string(
    "calibrate",
    None,
    "Train nothing: fit the probabilities of `router` and `default_vector` on --validation_text,"
    " and store them in this predictor's folder (or `shipped`).",
)
ABLATE = flags.DEFINE_multi_string(
    "ablate", [], "Only fit with this loss, as config.fit.loss, and compare on --validation_text; repeatable."
)
OUTPUT_JSON = flags.DEFINE_string("output_json", None, "Write scores and timings to this file.")

FIELDS = {
    *("checkpoint", "output", "tier", "device_budget", "horizon", "window", "max_tokens", "max_scored_tokens"),
    *("dtype", "seed", "fit"),
}
CHOSEN_ON = 96  # windows of the validation texts that the best predictor of every layer is chosen on


def main() -> None:
    if OUTPUT_JSON.value:
        outputs.check("output_json", OUTPUT_JSON.value)
    if bool(SCORE.value) + bool(CALIBRATE.value) + bool(ABLATE.value) > 1:
        raise UserError("--score, --calibrate and --ablate are different things to do; give one of them")
    started = time.time()
    c = CONFIG.value.to_dict()
    if absent := sorted(FIELDS - c.keys()):
        raise UserError(f"the config lacks {', '.join(absent)}; see configs/predictor.py")

    from moe_jax.config import Config
    from moe_jax.inference import activations
    from moe_jax.inference.session import Model, shipped
    from moe_jax.model.layers import parameter_counts
    from moe_jax.prediction import best as best_per_layer
    from moe_jax.prediction import (
        calibration,
        fit,
        lookahead,
        metrics,
        predictors,
        report,
        saved,
        scalars,
        texts,
        usage,
        usage_fit,
    )
    from moe_jax.prediction.activation_log import ActivationLog, room
    from moe_jax.prediction.interface import ModelParts, Spec, fingerprint
    from moe_jax.prediction.regression_rows import too_few

    settings = fit.FitConfig(**c["fit"], seed=c["seed"])
    variants = {loss: dataclasses.replace(settings, loss=loss) for loss in ABLATE.value}
    for name in ("max_tokens", "max_scored_tokens"):
        if c[name] < 1:
            raise UserError(f"config.{name} must be at least 1, not {c[name]}")
    compared = predictors.compared()  # one that cannot be imported fails now
    output = Path(c["output"])
    outputs.make_folder(f"--config.output={output}", output)
    offload = {"tier": c["tier"], "device_budget": c["device_budget"]}
    chunk = activations.BATCH * c["window"]  # a batch of windows is one prefill chunk
    values = {"checkpoint": c["checkpoint"], "offload": offload, "prefill_chunk": chunk, "dtype": c["dtype"]}
    with cli.status("loading the model"):
        model = Model(Config.from_dict(values | {"prefetch": {"predictor": "none"}}))
    a = model.checkpoint.architecture
    horizon = min(c["horizon"], a.num_moe_layers)  # further ahead every layer has been seen
    if horizon < 1:
        raise UserError(f"config.horizon must be at least 1, not {c['horizon']}")
    if horizon < c["horizon"]:
        print(f"horizon: {horizon}, as this model has no more layers with experts", file=sys.stderr)
    spec, parts = Spec.of(a, horizon), ModelParts.of(model.engine.dense)
    identity = fingerprint(a, model.engine.dense)
    if not 2 <= c["window"] < a.max_seq_len:
        raise UserError(f"config.window={c['window']} must be from 2 to {a.max_seq_len - 1} for this model")

    def logged(**plans):
        """The logs of some plans, in their order."""
        logs = [ActivationLog(output / "log" / name, spec, identity, plan, c["dtype"]) for name, plan in plans.items()]
        print(room(logs), file=sys.stderr)
        for log in logs:
            title = f"logging {log.directory.name} text, {log.windows.lengths.sum():,} tokens"
            with cli.progress(title, len(log.windows.tokens)) as advance:
                activations.write_log(model.engine, log, advance)
        return logs

    def score(name, log, weights, windows=None):
        own = predictors.params_of(name, spec, parts, weights, c["seed"])
        return metrics.evaluate(predictors.named(name), own, spec, log, windows)

    def calibrate(directory, log, weights):
        """Fits and stores how far the look-aheads can be trusted."""
        own = {name: predictors.params_of(name, spec, parts, weights) for name in calibration.LOOKAHEADS}
        with cli.status("calibrating the look-aheads"):
            found = {name: calibration.fit(name, params, spec, log, some(log)) for name, params in own.items()}
        calibration.store(directory, identity, found, [Path(name).name for name in chosen_on])

    def closed_form(log):
        if said := too_few(log.windows, spec):
            print(said, file=sys.stderr)
        print(f"least squares over {log.windows.lengths.sum():,} tokens ...", file=sys.stderr, flush=True)
        return fit.solve(settings, spec, parts, log)

    def fitted(settings, directory, title, log, validation, solved):
        with contextlib.ExitStack() as stack, cli.progress(title, settings.steps) as advance:
            writers = scalars.writers(directory / "scalars")
            curves = [stack.enter_context(contextlib.closing(writer)) for writer in writers]

            def measured(step, values):
                advance(step, values)
                for writer in curves:
                    writer.write(step, values)

            return fit.fit(settings, spec, parts, log, validation, directory / "fit", measured, solved)

    def ablate(log, validation):
        """One fit for every loss, all from one closed form, and what each finds of the validation texts."""
        solved = functools.cache(lambda: closed_form(log))
        closed = dataclasses.replace(settings, steps=0)
        rows = []
        for name, own in ({"closed form": closed} | variants).items():
            began = time.time()
            params, best = fitted(own, output / "ablation" / name.replace(" ", "_"), name, log, validation, solved)
            seconds = time.time() - began
            with cli.status(f"scoring {name}"):
                scores = metrics.evaluate(predictors.named("learned"), params, spec, validation)
            rows.append(report.Fitted(name, best["recall"], int(best["step"]), seconds, scores))
        report.print_ablation(rows, spec)
        if OUTPUT_JSON.value:
            tokens = {"train": int(log.windows.lengths.sum()), "validation": int(validation.windows.lengths.sum())}
            document = {"config": c, "spec": dataclasses.asdict(spec), "model": identity, "tokens": tokens}
            document["losses"] = [row.to_dict() for row in rows]
            outputs.write_json(OUTPUT_JSON.value, document, resumes=True)

    def some(log):
        """Windows of a log that choices are made on."""
        return np.arange(0, len(log.windows.tokens), -(-len(log.windows.tokens) // CHOSEN_ON))

    def tell(log, weights, summary):
        """The tables on the test texts, and the document for programs."""
        summary = summary | {"test_tokens": int(log.windows.lengths.sum())}
        scores = {}
        with cli.progress(f"scoring {len(compared)} predictors", len(compared)) as advance:
            for name in compared:
                scores[name] = score(name, log, weights)
                advance(len(scores))
        report.print_scores(scores, spec)
        if OUTPUT_JSON.value:
            by_name = {name: score.to_dict() for name, score in scores.items()}
            document = {"config": c, "spec": dataclasses.asdict(spec), **summary, "scores": by_name}
            outputs.write_json(OUTPUT_JSON.value, document, resumes=True)

    ours = {name: sorted(map(str, shipped(name).glob("*.txt"))) for name in ("development", "held_out")}
    chosen_on, tests = VALIDATION_TEXT.value or ours["development"], TEST_TEXT.value or ours["held_out"]

    def plan(name, sources, **options):
        with cli.status(f"cutting {name} text into windows"):
            return texts.plan(model.tokenizer.encode, sources, c["window"], seed=c["seed"], **options)

    scored = functools.partial(plan, max_tokens=c["max_scored_tokens"], in_order=True)
    if named := SCORE.value or CALIBRATE.value:
        directory = shipped("predictor") if named == "shipped" else Path(named)
        weights = saved.load(directory, spec, identity)
        if CALIBRATE.value:
            outputs.check_folder(f"--calibrate={named}", directory)
            [validation] = logged(validation=scored("validation", chosen_on))
            calibrate(directory, validation, weights)
            print(f"stored in {directory / calibration.FILE}")
        else:
            [test] = logged(test=scored("test", tests))
            tell(test, weights, {"model": identity, "predictor": str(directory)})
        model.close()
        return

    ours_used = {} if VALIDATION_TEXT.value else {"--validation_text": "choose"}
    if not (TEST_TEXT.value or variants):
        ours_used["--test_text"] = "test"
    if TEXT.value and ours_used:
        what = f"the shipped English and Python texts {' and '.join(ours_used.values())} the predictor"
        print(f"warning: --text without {' and '.join(ours_used)}: {what}; give your own", file=sys.stderr)
    sources = TEXT.value or [texts.standard_library()]
    # Neither what is tested on nor what is chosen on is trained on, whoever ships it.
    exclude = [*chosen_on, *tests, *ours["development"], *ours["held_out"]]
    train_plan = plan("train", sources, max_tokens=c["max_tokens"], exclude=exclude)
    if train_plan.left_out:
        print(
            f"{train_plan.left_out} documents are left out: they share text with what is chosen or tested on",
            file=sys.stderr,
        )
    plans = {"train": train_plan, "validation": scored("validation", chosen_on)}
    if variants:
        log, validation = logged(**plans)
        ablate(log, validation)
        model.close()
        return
    log, validation, test = logged(**plans, test=scored("test", tests))
    logged_s = time.time() - started

    params, best = fitted(settings, output, "fitting", log, validation, lambda: closed_form(log))
    fitted_s = time.time() - started - logged_s

    with cli.progress("fitting later use", usage_fit.STEPS) as advance:
        later = usage_fit.fit(spec, log, c["seed"], advance)
    used_s = time.time() - started - logged_s - fitted_s
    vectors, unseen = lookahead.default_vectors(*log.outputs())
    weights = {"network": params["network"], "vectors": vectors}
    with cli.status("choosing what predicts each layer best"):
        later_use = {name: usage_fit.loss(u, spec, validation) for name, u in (("network", later), ("averages", None))}
        chosen_by = {name: score(name, validation, weights, some(validation)) for name in best_per_layer.CANDIDATES}
    recall, first = ({name: getattr(s, field) for name, s in chosen_by.items()} for field in ("recall", "first"))
    weights["best"] = best_per_layer.choose(recall, first)
    own = predictors.Learned(settings.expert_hidden).multiply_adds(spec)
    cost = own / parameter_counts(a)["active"]
    summary = {
        "model": identity,
        "train_tokens": int(train_plan.lengths.sum()),
        "validation": best,
        "experts_never_seen": unseen,
        "share_of_active_multiply_adds": cost,
        "later_use_nats_per_expert": later_use,
        "seconds": {"logging": logged_s, "fitting": fitted_s, "later_use": used_s, "total": time.time() - started},
    }
    saved.save(output / "predictor", weights, spec, identity, {"config": c, **summary})
    if worth_it := (later_use["network"] or 0) < (later_use["averages"] or 0):
        usage.store(output / "predictor", identity, later)
    calibrate(output / "predictor", validation, weights)
    tell(test, saved.load(output / "predictor", spec, identity), summary)  # rounded, as they will be used
    print(
        f"{summary['train_tokens']:,} tokens; logging {logged_s:.0f} s, fitting {fitted_s:.0f} s, with choosing and"
        f" testing {time.time() - started:.0f} s; the network costs {100 * cost:.1f}% of the model's active"
        f" multiply-adds; {unseen} experts were never routed to\n"
        f"{report.later_use(**later_use, kept=worth_it)}\n"
        f"saved: --config.prefetch.checkpoint={output / 'predictor'}"
    )
    model.close()


if __name__ == "__main__":
    cli.run(main)
