"""Trains the expert predictor of a model: activations are logged, a small network is fitted, and tested.

    python train_predictor.py --config=configs/predictor.py                         the shipped model
    python train_predictor.py --config.checkpoint=DIR --text=FOLDER --text=FILE     another one, on your own text

The shipped predictor was trained with these values on 600,000 tokens of all three kinds of text (about 4 GB of log);
the development and test texts, and documents that share lines with them, were left out:

    python train_predictor.py --text=/usr/lib/python3.11 --text=_sources --text=kjv.txt

(`moe_jax/training/corpus.py` says where these texts come from.) Without the log the fit took 381 s and choosing and
testing 81 s on two cores that others used too. The tables alone take one minute (`--score=shipped`).

What a network costs and what it finds: recall@2 on the development texts by layers ahead in the same token, the mean
over targets in the next token, and layer 0 from the embedding; each trained on the same 600,000 tokens. The cost is
that of all places, in the model's active multiply-adds.

    --config.fit                        cost     1     2     3     4     5     6     7     8   next  layer 0
    an earlier, larger network           22%  91.3  88.0  85.1  82.5  80.1  77.7  75.5  73.8  43.0     91.4
    rank=2 expert_hidden=2 (shipped)    4.3%  90.8  81.9  74.8  74.8  69.8  69.4  68.9  68.8  37.3     90.0
    rank=1.32 expert_hidden=1           3.0%  89.7  76.2  73.0  72.9  68.0  67.5  66.7  66.2  35.4     89.2
    the model's own routers (`router`)   10%  84.7  77.7  72.5  68.2  64.5  60.6  57.4  54.0  19.3     38.3

(`train_predictor.py --config.fit.rank=R --config.fit.expert_hidden=M --text=...`, then `train_predictor.py --score=DIR
--test_text=FILE ...` with the files of `moe_jax/shipped/development`.) To stay 5 points above the look-ahead for the
next layer, a place has to read about twice as many directions as there are experts: those that tell the next layer's
experts apart, and those that the next token's attention will use. The earlier network read full matrices for two
horizons, an echo of its own for every horizon and a hidden layer of 16 for every expert.
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
            rank=2.0,
            begin_rank=2.0,
            expert_hidden=2,
            steps=900,
            batch_windows=8,
            learning_rate=3e-3,
            ridge=1e-5,
            evaluate_every=200,
            checkpoint_every=100,
            patience=20,
        )
    )
    return c
