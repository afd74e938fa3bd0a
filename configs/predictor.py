"""Trains the expert predictor of a model: activations are logged, a small network is fitted, and tested.

    python train_predictor.py --config=configs/predictor.py                         the shipped model
    python train_predictor.py --config.checkpoint=DIR --text=FOLDER --text=FILE     another one, on your own text

The shipped model's predictor: 300,000 tokens of text, about 2 GB of log, 5 minutes on 2 cores. Twice the tokens gain
less than a point of recall; the closed form alone (`steps=0`) already beats router look-ahead at every horizon.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Configuration of `train_predictor.py`; the fields of `fit` are those of `moe_jax.prediction.fit.FitConfig`."""
    c = ConfigDict()
    c.checkpoint = ""  # empty: the shipped model
    c.output = "runs/predictor"  # log, checkpoints and, in its folder `predictor`, the result
    c.tier = "none"  # "host" logs a model whose experts do not fit on the device
    c.device_budget = "25%"  # of experts on the device, with tier "host"
    c.horizon = 8  # layers ahead
    c.window = 256  # tokens of a window
    c.max_tokens = 300_000  # of text to log, an equal share of each --text
    c.validation_share = 0.05  # of the documents
    c.seed = 0
    c.fit = ConfigDict(
        dict(
            hidden=24,
            steps=600,
            batch_windows=8,
            learning_rate=1e-2,
            direct_rate=0.3,
            ridge=1e-5,
            evaluate_every=50,
            checkpoint_every=100,
            patience=6,
        )
    )
    return c
