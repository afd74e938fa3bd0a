"""Qwen2-MoE: a shared expert that every token passes, with a gate of its own, beside the routed ones; attention bias.

"Qwen2 Technical Report", Yang et al., arXiv 2407.10671; weights: Qwen/Qwen1.5-MoE-A2.7B. The shared expert is dense and
stays on the device. With the Hugging Face directory in DIR:

    python infer.py --config=configs/qwen2_moe.py --config.checkpoint=DIR --prompt="The capital of France is"

| Qwen1.5-MoE-A2.7B                        |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers, width D, expert width F          | 24, 2048, 1408; shared expert 5632                            |
| query and key/value heads, head width    | 16, 16, 128                                                   |
| experts per layer, active                | 60, 4, and the shared one                                     |
| vocabulary, context                      | 151936, 8192                                                  |
| parameters, active per token             | 14.3e9, 2.69e9                                                |
| one expert, bfloat16                     | 17.3 MB                                                       |
| all 1440 experts, bfloat16               | 24.9 GB, in host memory                                       |
| dense weights, bfloat16                  | 3.7 GB, on the device                                         |
| smallest legal device budget             | 4 experts = 69 MB                                             |
| key/value cache, bfloat16                | 197 kB per token                                              |
| expert bytes used per token              | 24 * 4 * 17.3 MB = 1.66 GB, less what is found on the device  |
"""

import dataclasses

from ml_collections import ConfigDict

from moe_jax.config import Config


def get_config() -> ConfigDict:
    """As `configs/mixtral.py`, for a model that does not ship with the repository."""
    c = ConfigDict(dataclasses.asdict(Config()))
    c.checkpoint = "Qwen1.5-MoE-A2.7B"  # a directory
    c.update(offload=dict(device_budget="auto"))
    # until a predictor has been trained for it: train_predictor.py
    c.update(prefetch=dict(predictor="router", horizon=4))
    c.dtype = "bfloat16"
    return c
