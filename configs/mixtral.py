"""Mixtral: sparse Mixture-of-Experts decoders with grouped-query attention and a softmax top-k router.

"Mixtral of Experts", Jiang et al., arXiv 2401.04088. The default is the small Mixtral that ships with the repository:

    python infer.py --config=configs/mixtral.py
    python infer.py --config=configs/mixtral.py --prompt="In the beginning" --temperature=0.8 --top_p=0.95
    python infer.py --config=configs/mixtral.py --config.prefetch.predictor=none --config.offload.device_budget=50%

Mixtral-8x7B, a Hugging Face directory with config.json, safetensors shards and tokenizer.json:

    python infer.py --config=configs/mixtral.py --config.checkpoint=DIR --config.dtype=bfloat16 \\
        --config.offload.device_budget=auto --config.max_seq_len=8192 --config.prefetch.predictor=router

| Mixtral-8x7B                             |                                                               |
|------------------------------------------|---------------------------------------------------------------|
| layers, width D, expert width F          | 32, 4096, 14336                                               |
| query and key/value heads, head width    | 32, 8, 128                                                    |
| experts per layer, active                | 8, 2                                                          |
| vocabulary, context                      | 32000, 32768                                                  |
| parameters, active per token             | 46.7e9, 12.9e9                                                |
| one expert, bfloat16                     | 3 * 4096 * 14336 * 2 bytes = 352 MB                           |
| all 256 experts, bfloat16                | 90.2 GB, in host memory                                       |
| dense weights, bfloat16                  | 3.2 GB, on the device                                         |
| smallest legal device budget             | 2 experts = 705 MB                                            |
| key/value cache, bfloat16                | 131 kB per token                                              |
| expert bytes used per token              | 32 * 2 * 352 MB = 22.5 GB, less what is found on the device   |
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Inference configuration; the fields, and what they mean, are those of `moe_jax.config.Config`."""
    c = ConfigDict()
    c.checkpoint = ""  # the shipped model
    c.offload = ConfigDict()
    c.offload.tier = "host"  # none | host | disk (a converted checkpoint)
    c.offload.device_budget = "25%"  # of all experts' bytes; or 512MiB, 6GiB, auto
    c.offload.host_budget = "0%"  # with tier disk: experts kept in host memory besides
    c.offload.upcast = "stage"  # stage | arrival: when experts take the compute dtype
    c.offload.budget_scope = "global"  # global | layer
    c.offload.policy = "predicted"  # lru | lfu | least_stale | predicted | belady
    c.offload.trace = ""  # of an equal run, for belady
    c.offload.link_gbps = 0.0  # > 0: a simulated link of so many GB/s
    c.prefetch = ConfigDict()
    # none | random | frequency | repeat | router | default_vector | learned | best_per_layer | oracle
    c.prefetch.predictor = "learned"
    c.prefetch.horizon = 8  # layers ahead
    c.prefetch.checkpoint = ""  # the shipped predictor
    c.execution = "exact"  # exact | speculative | speculative_gated | hybrid | cache_aware
    c.speculation = ConfigDict()
    c.speculation.threshold = 0.5  # hybrid: layers whose recall on validation text is below run exactly
    c.speculation.bonus = 0.5  # cache_aware: added to the router logits of experts on the device
    c.dtype = "float32"  # float32 | bfloat16
    c.max_seq_len = 0  # as many positions as the model allows
    c.prefill_chunk = 256
    c.batch_size = 8
    return c
