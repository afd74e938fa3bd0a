"""Trains the expert predictor of a model: activations are logged, a small network is fitted, and tested.

    python train_predictor.py --config=configs/predictor.py                         the shipped model
    python train_predictor.py --config.checkpoint=DIR --text=FOLDER --text=FILE     another one, on your own text

The shipped predictor was trained on 600,000 tokens of all three kinds of text (about 4 GB of log), with the shares and
seeds below; the development and test texts, and documents that share lines with them, were left out:

    python train_predictor.py --text=/usr/lib/python3.11 --text=_sources --text=kjv.txt

(`moe_jax/training/corpus.py` says where these texts come from.) It is not the end of that run: the machine was shared,
and it was stopped after 500 of the steps; what is shipped is the best network by then, that of step 400.

What was tried on the development texts, in the closed form alone (linear regression of the target's router logits on
160,000 tokens; recall@2 of the target, from layer to layer):

    what the network reads                           0 to 1   2 to 3   6 to 7   9 to 10   2 to 6   6 to 10
    residual, gates, last token's experts            85.7     86.6     89.6     89.3      77.5     78.6
    ... and the last token's residual in this layer  85.9     92.9     89.7     89.5      81.1     79.0
    ... or in the target layer (the echo: shipped)   86.4     93.2     89.9     89.5      82.5     79.2
    ... or its moving average over tokens            86.6     91.0     90.1     89.6      80.9     79.4
    ... or the last token's and the moving average   86.7     93.6     90.2     89.6      82.7     79.5
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
            steps=1200,
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
