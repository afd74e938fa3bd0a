"""DeepSeek-V2 and -V3: latent attention with a narrow cache, shared experts, routing limited to groups of experts.

"DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", arXiv 2405.04434; "DeepSeek-V3
Technical Report", arXiv 2412.19437; weights: deepseek-ai/DeepSeek-V2-Lite and deepseek-ai/DeepSeek-V3, DeepSeek Model
License. With the Hugging Face directory in DIR:

    python infer.py --config=configs/deepseek.py --config.checkpoint=DIR --chat --prompt="Why is the sky blue?"
    python infer.py --config=configs/deepseek.py --config.checkpoint=DIR --config.offload.device_budget=4GiB

| DeepSeek-V2-Lite                         |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers (dense), width D, expert width F  | 27 (1), 2048, 1408                                            |
| heads, not rotated, rotated, value width | 16, 128, 64, 128                                              |
| latent of queries, of keys and values    | none, 512                                                     |
| experts per layer, active, shared        | 64, 6, 2                                                      |
| groups, kept                             | none                                                          |
| vocabulary, context                      | 102400, 163840                                                |
| parameters, active per token             | 15.7e9, 2.66e9 (published: 2.4e9, without the embedding)      |
| one expert, bfloat16                     | 17.3 MB                                                       |
| all 1664 experts, bfloat16               | 28.8 GB, in host memory                                       |
| dense weights, bfloat16                  | 2.6 GB, on the device                                         |
| smallest legal device budget             | 6 experts = 104 MB                                            |
| latent cache, bfloat16                   | 31 kB per token                                               |
| expert bytes used per token              | 26 * 6 * 17.3 MB = 2.7 GB, less what is found on the device   |

| DeepSeek-V3                              |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers (dense), width D, expert width F  | 61 (3), 7168, 2048                                            |
| heads, not rotated, rotated, value width | 128, 128, 64, 128                                             |
| latent of queries, of keys and values    | 1536, 512                                                     |
| experts per layer, active, shared        | 256, 8, 1                                                     |
| groups, kept                             | 8, 4                                                          |
| vocabulary, context                      | 129280, 163840                                                |
| parameters, active per token             | 671e9, 37.6e9 (published: 36.6e9, without the embedding)      |
| one expert, bfloat16                     | 88.1 MB                                                       |
| all 14848 experts, bfloat16              | 1307.8 GB, in host memory                                     |
| dense weights, bfloat16                  | 34.2 GB, on the device                                        |
| smallest legal device budget             | 8 experts = 705 MB                                            |
| latent cache, bfloat16                   | 70 kB per token                                               |
| expert bytes used per token              | 58 * 8 * 88.1 MB = 40.9 GB, less what is found on the device  |

V3 is released in FP8 with a scale for every block of 128 x 128: read as bfloat16, tensor by tensor (and quantised
again, should `convert.py --quantization=int8` or `int4` be asked for). Its layer for multi-token prediction is not
read.

The shared experts are dense weights; the caches are so small that nearly all device memory can go to experts.
"""

import dataclasses

from ml_collections import ConfigDict

from moe_jax.config import Config


def get_config() -> ConfigDict:
    """As `configs/mixtral.py`, for models that do not ship with the repository."""
    c = ConfigDict(dataclasses.asdict(Config()))
    c.checkpoint = "DeepSeek-V2-Lite"  # a directory
    c.update(offload=dict(device_budget="auto"))
    # until a predictor has been trained for it: train_predictor.py
    c.update(prefetch=dict(predictor="router", horizon=4))
    c.dtype = "bfloat16"
    c.max_seq_len = 8192
    return c
