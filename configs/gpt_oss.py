"""GPT-OSS: experts released in four bits, attention that may attend to nothing, sliding windows in every other layer.

"gpt-oss-120b & gpt-oss-20b Model Card", OpenAI, arXiv 2508.10925; weights: openai/gpt-oss-20b and openai/gpt-oss-120b,
Apache-2.0. With the Hugging Face directory in DIR:

    python infer.py --config=configs/gpt_oss.py --config.checkpoint=DIR --chat --prompt="Why is the sky blue?"
    python infer.py --config=configs/gpt_oss.py --config.checkpoint=DIR --config.offload.device_budget=4GiB

The experts' matrices are MXFP4: blocks of 32 inputs, 4 bits each and a shared scale of 8 bits. So they stay, in host
memory, over the link and on the device, and are widened as an expert runs; no bit of a weight is lost.

| gpt-oss-20b                              |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers, width D, expert width F          | 24, 2880, 2880                                                |
| query and key/value heads, head width    | 64, 8, 64 (not D / 64)                                        |
| experts per layer, active                | 32, 4                                                         |
| vocabulary, context                      | 201088, 131072 (YaRN, from 4096)                              |
| parameters, active per token             | 20.9e9, 4.19e9 (3.61e9 without the embedding)                 |
| one expert, MXFP4, biases in bfloat16    | 3 * 2880 * 2880 * 17 / 32 bytes + biases = 13.2 MB            |
| all 768 experts, MXFP4                   | 10.2 GB, in host memory                                       |
| dense weights, bfloat16                  | 3.6 GB, on the device                                         |
| smallest legal device budget             | 4 experts = 53 MB                                             |
| key/value cache, bfloat16                | 49 kB per token                                               |
| expert bytes used per token              | 24 * 4 * 13.2 MB = 1.27 GB, less what is found on the device  |

| gpt-oss-120b                             |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers, width D, expert width F          | 36, 2880, 2880                                                |
| experts per layer, active                | 128, 4                                                        |
| vocabulary, context                      | 201088, 131072 (YaRN, from 4096)                              |
| parameters, active per token             | 117e9, 5.71e9 (5.13e9 without the embedding)                  |
| all 4608 experts of 13.2 MB, MXFP4       | 61.0 GB, in host memory                                       |
| dense weights, bfloat16                  | 4.3 GB, on the device                                         |
| smallest legal device budget             | 4 experts = 53 MB                                             |
| key/value cache, bfloat16                | 74 kB per token                                               |
| expert bytes used per token              | 36 * 4 * 13.2 MB = 1.91 GB, less what is found on the device  |
"""

import dataclasses

from ml_collections import ConfigDict

from moe_jax.config import Config


def get_config() -> ConfigDict:
    """As `configs/mixtral.py`, for a model that does not ship with the repository."""
    c = ConfigDict(dataclasses.asdict(Config()))
    c.checkpoint = "gpt-oss-20b"  # a directory
    c.update(offload=dict(device_budget="auto"))
    # until a predictor has been trained for it: train_predictor.py
    c.update(prefetch=dict(predictor="router", horizon=4))
    c.dtype = "bfloat16"
    c.max_seq_len = 8192
    return c
