"""Trains the expert predictor of a model: activations are logged, a small network is fitted, and tested.

    python train_predictor.py --config=configs/predictor.py                         the shipped model
    python train_predictor.py --config.checkpoint=DIR --text=FOLDER --text=FILE     another one, on your own text

The shipped predictor was trained on 600,000 tokens of all three kinds of text (about 4 GB of log), with the shares and
seeds below; the test texts, and documents that share lines with them, were left out:

    python train_predictor.py --text=/usr/lib/python3.11 --text=_sources --text=kjv.txt

(`moe_jax/training/corpus.py` says where these texts come from.) The closed form alone (`fit.steps=0`) already beats
router look-ahead at every horizon; a hidden layer of 24 instead of 96 gives a point less recall at half the cost.
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
    c.max_tokens = 600_000  # of text to log, an equal share of each --text
    c.seed = 0
    c.fit = ConfigDict(
        dict(
            hidden=96,
            steps=1600,
            batch_windows=8,
            learning_rate=3e-3,
            direct_rate=0.3,
            ridge=1e-5,
            evaluate_every=200,
            checkpoint_every=100,
            patience=20,
        )
    )
    return c
