"""OLMoE: 64 small experts, 8 active, gates as the softmax gives them; the norm of queries and keys spans all heads.

"OLMoE: Open Mixture-of-Experts Language Models", Muennighoff et al., arXiv 2409.02060; weights:
allenai/OLMoE-1B-7B-0924, Apache-2.0. With the Hugging Face directory in DIR:

    python infer.py --config=configs/olmoe.py --config.checkpoint=DIR --prompt="Bitcoin is"
    python infer.py --config=configs/olmoe.py --config.checkpoint=DIR --config.offload.device_budget=25%

| OLMoE-1B-7B                              |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers, width D, expert width F          | 16, 2048, 1024                                                |
| query and key/value heads, head width    | 16, 16, 128                                                   |
| experts per layer, active                | 64, 8                                                         |
| vocabulary, context                      | 50304, 4096                                                   |
| parameters, active per token             | 6.92e9, 1.28e9                                                |
| one expert, bfloat16                     | 12.6 MB                                                       |
| all 1024 experts, bfloat16               | 12.9 GB, in host memory                                       |
| dense weights, bfloat16                  | 1.0 GB, on the device                                         |
| smallest legal device budget             | 8 experts = 101 MB                                            |
| key/value cache, bfloat16                | 131 kB per token                                              |
| expert bytes used per token              | 16 * 8 * 12.6 MB = 1.61 GB, less what is found on the device  |
"""

import dataclasses

from ml_collections import ConfigDict

from moe_jax.config import Config


def get_config() -> ConfigDict:
    """As `configs/mixtral.py`, for a model that does not ship with the repository."""
    c = ConfigDict(dataclasses.asdict(Config()))
    c.checkpoint = "OLMoE-1B-7B-0924"  # a directory
    c.update(offload=dict(device_budget="auto"))
    # until a predictor has been trained for it: train_predictor.py
    c.update(prefetch=dict(predictor="router", horizon=4))
    c.dtype = "bfloat16"
    return c
