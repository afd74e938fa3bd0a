"""The shipped model: a 10M-parameter Mixtral trained on Python code, Python documentation and the King James text.

    python train_lm.py --config=configs/tiny_lm.py --config.data=DIR --config.output=DIR

12 layers (deep enough to study look-ahead over 8 of them), 16 experts, 2 active; 2.2M of 10.1M parameters active.
Sizes come from a pilot on 2 cores: 4,200 tokens/s at any depth from 10 to 12 with the same expert parameters; halving
the model hardly helped. `DIR` is what `python -m moe_jax.training.corpus` writes. Cost: about 80 minutes on 2 cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Training configuration; the fields are those of `moe_jax.training.loop.TrainConfig`."""
    c = ConfigDict()
    c.data = "data/tiny"
    c.output = "runs/tiny_lm"
    c.seed = 0
    c.architecture = ConfigDict(
        dict(
            vocab_size=4096,
            d_model=192,
            num_layers=12,
            num_heads=4,
            num_kv_heads=2,
            head_dim=48,
            num_experts=16,
            top_k=2,
            expert_ff=72,
            max_seq_len=512,
            rope_theta=10000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
        )
    )
    c.domain_weights = ConfigDict(dict(code=0.55, docs=0.27, prose=0.18))
    c.steps = 2400
    c.batch_tokens = 4096
    c.context = 256
    c.final_context = 512  # the last `final_context_steps` steps see longer windows, so that 512 tokens work
    c.final_context_steps = 300
    c.learning_rate = 8e-3
    c.warmup_steps = 100
    c.decay_steps = 800  # constant rate until steps - decay_steps, then linear to zero
    c.weight_decay = 0.02
    c.capacity_factor = 1.25
    c.balance_loss = 0.02
    c.final_balance_loss = 0.15  # while the rate goes to zero, every expert gets its share in every domain
    c.final_balance_steps = 200
    c.router_z_loss = 1e-3
    c.z_loss = 1e-4
    c.checkpoint_every = 200
    c.evaluate_every = 200
    return c
