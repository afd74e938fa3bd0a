r"""Trains the expert predictor of a model: activations are logged, a small network is fitted, and tested.

    python train_predictor.py --config=configs/predictor.py                         the shipped model
    python train_predictor.py --config.checkpoint=DIR --text=FOLDER --text=FILE     another one, on your own text

The shipped predictor was trained with these values (those of its last training are in its predictor.json) on 600,000
tokens of all three kinds of text (about 4 GB of log); the development and test texts, and documents that share lines
with them, were left out:

    python train_predictor.py --text=/usr/lib/python3.11 --text=_sources --text=kjv.txt

(`moe_jax/training/corpus.py` says where these texts come from.) From nothing to the saved predictor that took 401 s on
two cores, of which logging 141 s and fitting 196 s; two such runs on different days gave the same weights, bit for bit.
Patience was 20 then; every look was better than the one before, and with 3 the same log gives the same bits. Gradient
steps in bfloat16 (`--config.fit.dtype=bfloat16`) reach the recall of float32 on the development texts, 64.94%, but no
sooner on a CPU: 419 s after 363 s, on a machine that others were using. The network of later use came after that, and
takes 10 to 30 s more; a third such run, with a test suite beside it, gave the same weights again.
The tables on the test texts alone take one minute (`train_predictor.py --score=shipped`).

Losses (`moe_jax/prediction/losses.py`), compared on the development texts after 300 steps on 150,000 tokens (13 minutes
for all of them):

    python train_predictor.py --text=/usr/lib/python3.11 --text=_sources --text=kjv.txt --config.max_tokens=150000 \
        --config.fit.steps=300 --config.fit.evaluate_every=100 --ablate=squared --ablate=kl --ablate=membership ...

Recall@2 by layers ahead, of targets in the same token (mean over layers) and in the next one; of layer 0's experts from
the embedding; over all layers and horizons; and the Brier score of the next token's:

    loss                  1     2     4     8   next 1     8  layer 0    all   Brier
    closed form        89.4  81.0  72.8  66.1     37.0  35.2     91.6  62.25     9.8
    squared            89.9  81.2  73.0  66.3     37.3  35.3     91.2  62.41     9.8
    kl                 89.9  81.4  73.1  66.4     39.6  35.8     90.7  62.77     9.7
    membership         89.3  81.8  73.8  67.1     42.5  36.8     88.8  63.45     9.6
    ranking            89.9  82.0  73.6  67.0     42.9  36.8     91.1  63.53     9.6
    squared+membership 89.9  81.8  73.6  66.8     40.5  36.1     92.3  63.12     9.7
    kl+membership      89.9  81.8  73.6  66.8     41.3  36.2     91.8  63.23     9.7
    squared+ranking    90.2  81.8  73.5  66.8     41.8  36.5     92.2  63.35     9.6
    kl+ranking         90.2  81.9  73.5  66.8     41.8  36.4     91.9  63.34     9.6

Ranking beats cross-entropy of membership beside either of the others. Alone it finds most of all, but less of the next
layer and of layer 0, which matter most, and logits that only have to be in order make no gates (mode `speculative`):
hence squared+ranking. The calibration error is at most 1.8% for every one of them.

What a network costs and what it finds: recall@2 on the development texts by layers ahead in the same token, the mean
over targets in the next token, and layer 0 before it has run. The cost is that of all places, in the model's active
multiply-adds; look-ups in tables cost none.

                                                       cost     1     2     3     4     8   next  layer 0
    this one                                           2.9%  90.6  82.8  82.6  75.5  69.0  38.9     93.4
    its closed form alone (--config.fit.steps=0)       2.9%  89.6  81.9  81.6  74.5  67.9  36.0     92.8
    an earlier one: everything read afresh (e25493a)    22%  91.3  88.0  85.1  82.5  73.8  43.2     91.4
    a running estimate, no tables of tokens (45fc0a7)  4.3%  90.8  81.9  74.8  74.8  68.8  37.3     90.0
    the model's own routers (`router`)                  10%  84.7  77.7  72.5  68.2  54.0  19.2     38.3

What a token is says most of which experts it takes: rows of tables for it and for the last one, 4096 x 3 x 192 numbers,
find 81% of the experts of layers 0 to 7 before any of them has run, without a multiplication. What the residual adds
is read for two distances only, each at full rank: for the next layer nothing less tells its experts apart, and what is
read three layers ahead serves those between as well.
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
    c.max_tokens = 600_000  # of text to train on, an equal share of each --text
    c.max_scored_tokens = 300_000  # of validation text, and of test text, an equal share of each; ours have 60,000 each
    c.dtype = "float32"  # of the model that logs: "float32" or "bfloat16"
    c.seed = 0
    c.fit = ConfigDict(
        dict(
            expert_hidden=1,
            tokens=4096,
            loss="squared+ranking",  # terms of moe_jax/prediction/losses.py
            steps=600,
            batch_windows=8,
            learning_rate=3e-3,
            direct_rate=0.5,
            ridge=1e-5,
            evaluate_every=100,
            checkpoint_every=50,
            patience=3,  # looks: half of the steps without a better recall
            dtype="float32",  # of the gradient steps; "bfloat16" keeps float32 weights
        )
    )
    return c
