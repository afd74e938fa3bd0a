"""Numbers of a run that was interrupted."""

import moe_jax


def test_with_nothing_in_the_store_the_bounds_are_null(monkeypatch):
    """As when Ctrl-C comes while all that the budget holds is on its way."""
    model = moe_jax.load(prefetch={"predictor": "none"})
    generation = model.start(["def main("], 3)
    for _ in generation:
        pass
    assert model.metrics(generation)["bound_overlap_s"] > 0
    monkeypatch.setattr(model.engine.source, "resident", list)
    assert model.metrics(generation)["bound_overlap_s"] is None
    model.close()
