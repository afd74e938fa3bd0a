"""Trains the small Mixture-of-Experts language model that ships with the repository.

    python train_lm.py --config=configs/tiny_lm.py --config.data=DIR --config.output=DIR

A killed run resumes when the same command is given again. `--export=DIR` writes the Hugging Face directory.
"""

from absl import flags
from ml_collections import config_flags

from moe_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny_lm.py", "Training configuration.")
EXPORT = flags.DEFINE_string("export", None, "Directory for the trained model in Hugging Face format (bf16).")


def main() -> None:
    from moe_jax.training import loop

    config = loop.TrainConfig.from_dict(CONFIG.value.to_dict())
    params = loop.train(config)
    if EXPORT.value:
        from moe_jax.checkpoint import export

        export.save(EXPORT.value, config.architecture, params, config.data)


if __name__ == "__main__":
    cli.run(main)
