r"""Trains the expert predictor of a model: activations are logged, a small network is fitted, and tested.

    python train_predictor.py --config=configs/predictor.py                         the shipped model
    python train_predictor.py --config.checkpoint=DIR --text=FOLDER --text=FILE     another one, on your own text

The shipped predictor was trained with these values (those of its last training are in its predictor.json) on 600,000
tokens of all three kinds of text (about 4 GB of log); the development and test texts, and documents that share lines
with them, were left out:

    python train_predictor.py --text=/usr/lib/python3.11 --text=_sources --text=kjv.txt

(`moe_jax/training/corpus.py` says where these texts come from.) That took 12 minutes of user and 4 of system time, the
tables on the test texts included: 28 minutes by the clock on two cores that others used too, and stopped for minutes.
The tables alone take one minute (`train_predictor.py --score=shipped`).

Losses (`moe_jax/prediction/losses.py`), compared on the development texts after 300 steps on 150,000 tokens (a quarter
of the text, and 300 of 800 steps; 26 minutes of CPU):

    python train_predictor.py --text=/usr/lib/python3.11 --text=_sources --text=kjv.txt --config.max_tokens=150000 \
        --config.fit.steps=300 --config.fit.evaluate_every=100 --ablate=squared --ablate=kl --ablate=membership ...

Recall@2 by layers ahead, of targets in the same token (mean over layers) and in the next one; of layer 0's experts from
the embedding; over all layers and horizons; and the Brier score of the next token's:

    loss                  1     2     4     8   next 1     8  layer 0    all   Brier
    closed form        89.9  86.0  78.7  68.9     37.4  39.5     88.7  65.85     9.4
    squared            90.8  87.0  80.7  71.5     38.4  41.2     89.1  67.44     9.3
    kl                 90.8  87.1  80.7  71.7     40.3  41.7     89.6  67.76     9.2
    membership         90.0  86.9  81.3  72.5     44.0  43.1     90.9  68.68     8.9
    ranking            90.8  87.3  81.2  72.5     44.0  43.3     92.1  68.83     8.9
    squared+membership 90.8  87.5  81.5  72.4     41.8  42.4     91.2  68.47     9.1
    kl+membership      90.9  87.5  81.4  72.5     42.1  42.4     91.6  68.52     9.1
    squared+ranking    91.1  87.5  81.3  72.4     42.9  43.0     91.5  68.73     9.0
    kl+ranking         91.1  87.5  81.3  72.4     42.8  42.9     92.0  68.66     9.0

Ranking beats cross-entropy of membership alone and beside either of the others. Alone it finds most of all, but less of
the next layer, which matters most, and logits that only have to be in order make no gates (mode `speculative`): hence
squared+ranking. The calibration error is at most 1.4% for every one of them.

Forms of the network, with squared+membership on 164,000 tokens: recall@2 from layers 2, 5 and 9 to the next, from
layers 2 and 5 to the second and fourth, and of targets in the next token. The cost is that of all places, in the
model's active multiply-adds.

    hidden 64, 16 of every expert, full rank                      36%     91.6    88.3    82.3     41.5
    hidden 32, experts 16, echo of rank 32                        25%     91.5    88.2    82.3     41.5
    experts 16, direct part of rank 48, full for two horizons     18%     91.4    88.0    81.5     41.0
    hidden 16, experts 16, rank 32, full for one                  15%     91.0    84.4    80.0     40.5
    experts 8, rank 24, full for one                              10%     90.8    80.8    77.2     39.3

A much smaller network was tried (commit 45fc0a7: the state is a running estimate of every layer's logits, which each
layer corrects through 2 E directions; 4.3%). On the development texts it finds 90.8, 81.9, 74.8 and 68.8 of the same
token's experts 1, 2, 4 and 8 layers ahead, this one 91.3, 88.0, 82.5 and 73.8; in mode `hybrid` it cost 2% of
perplexity, where this one costs 0.25%. Hence it is not used. A call of it takes 39 us on a CPU, one of this network 56.

With the chosen experts' exact outputs among what it reads, the linear fit finds 94.9, 93.9 and 94.9 (92.9, 90.5 and
89.2 without) of the next layer's experts after layers 2, 5 and 9: that is what the experts' hidden layers are after.
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
            hidden=16,
            expert_hidden=16,
            loss="squared+ranking",  # terms of moe_jax/prediction/losses.py
            steps=800,
            batch_windows=8,
            learning_rate=1e-3,
            direct_rate=0.5,
            ridge=1e-5,
            evaluate_every=200,
            checkpoint_every=100,
            patience=20,
        )
    )
    return c
