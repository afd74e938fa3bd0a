"""Qwen3-MoE: many small experts, grouped-query attention with a norm on every head's queries and keys.

"Qwen3 Technical Report", Yang et al., arXiv 2505.09388; weights: Qwen/Qwen3-30B-A3B, Apache-2.0. With the Hugging Face
directory in DIR:

    python infer.py --config=configs/qwen3_moe.py --config.checkpoint=DIR --chat --prompt="Why is the sky blue?"
    python infer.py --config=configs/qwen3_moe.py --config.checkpoint=DIR --config.offload.device_budget=6GiB

| Qwen3-30B-A3B                            |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers, width D, expert width F          | 48, 2048, 768                                                 |
| query and key/value heads, head width    | 32, 4, 128 (not D / 32)                                       |
| experts per layer, active                | 128, 8                                                        |
| vocabulary, context                      | 151936, 40960                                                 |
| parameters, active per token             | 30.5e9, 3.35e9                                                |
| one expert, bfloat16                     | 9.44 MB                                                       |
| all 6144 experts, bfloat16               | 58.0 GB, in host memory                                       |
| dense weights, bfloat16                  | 3.1 GB, on the device                                         |
| smallest legal device budget             | 8 experts = 75 MB                                             |
| key/value cache, bfloat16                | 98 kB per token                                               |
| expert bytes used per token              | 48 * 8 * 9.44 MB = 3.62 GB, less what is found on the device  |

Small experts: one copy takes about as long as one layer's compute on a fast link, so a short horizon is enough.
Qwen3-30B-A3B-FP8 (a scale for every block of 128 x 128) is read as bfloat16.
"""

import dataclasses

from ml_collections import ConfigDict

from moe_jax.config import Config


def get_config() -> ConfigDict:
    """As `configs/mixtral.py`, for a model that does not ship with the repository."""
    c = ConfigDict(dataclasses.asdict(Config()))
    c.checkpoint = "Qwen3-30B-A3B"  # a directory
    c.update(offload=dict(device_budget="auto"))
    # until a predictor has been trained for it: train_predictor.py
    c.update(prefetch=dict(predictor="router", horizon=4))
    c.dtype = "bfloat16"
    c.max_seq_len = 8192
    return c
