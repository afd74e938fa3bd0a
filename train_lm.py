"""Trains the small Mixture-of-Experts language model that ships with the repository.

    python train_lm.py --config=configs/tiny_lm.py --config.data=DIR --config.output=DIR

A killed run resumes when the same command is given again. `--export=DIR` writes the Hugging Face directory.
"""

from absl import flags

from moe_jax import cli, outputs

CONFIG = cli.config_flag("configs/tiny_lm.py", "Training configuration.")
EXPORT = flags.DEFINE_string("export", None, "Directory for the trained model in Hugging Face format (bf16).")


def main() -> None:
    import json
    import logging as std_logging
    from pathlib import Path

    from absl import logging

    from moe_jax.training import loop

    logging.set_verbosity(logging.INFO)
    std_logging.getLogger("absl").addFilter(lambda record: "moe_jax" in record.pathname)  # not JAX's, not orbax's
    values = CONFIG.value.to_dict()
    config = loop.TrainConfig.from_dict(values)
    outputs.make_folder(f"--config.output={config.output}", Path(config.output))
    if EXPORT.value:
        outputs.check_folder(f"--export={EXPORT.value}", Path(EXPORT.value))
    params = loop.train(config)
    if EXPORT.value:
        from moe_jax.checkpoint import export
        from moe_jax.training import scores

        manifest = json.loads((Path(config.data) / "manifest.json").read_text())
        with outputs.room(EXPORT.value, resumes=True):
            export.save(EXPORT.value, config.architecture, params, config.data)
            card = scores.write_card(Path(EXPORT.value), Path(config.data), values, manifest)
        for name, score in card.items():
            print(name, {key: round(value, 3) for key, value in score.items()})


if __name__ == "__main__":
    cli.run(main)
