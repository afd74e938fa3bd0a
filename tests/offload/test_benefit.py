"""When predicting pays."""

from moe_jax.offload.benefit import TRIAL, WINDOW, Benefit


def tokens(benefit, count, *, hidden=0.0, stall=0.0, spent=0.0, cost=1.0):
    """The decisions of so many tokens, in each of which one expert was found early and one waited for."""
    decisions = []
    for _ in range(count):
        benefit.hid(hidden)
        benefit.stalled(stall)
        benefit.spent(spent)
        decisions.append(benefit.pays(cost))
    return decisions


def test_predictions_that_hide_less_than_they_cost_end_after_a_trial():
    assert tokens(Benefit(), TRIAL + 20, hidden=0.9, stall=0.5) == [True] * TRIAL + [False] * 20


def test_predictions_that_pay_go_on():
    assert all(tokens(Benefit(), 100, hidden=1.1))


def test_what_the_host_spends_on_them_is_a_cost_that_is_remembered():
    benefit = Benefit()
    assert all(tokens(benefit, 40, hidden=1.6, spent=0.5))
    assert not tokens(benefit, 60, hidden=1.6, spent=0.7)[-1]
    benefit = Benefit()
    tokens(benefit, TRIAL + 1, hidden=1.6, spent=0.7)
    assert not any(tokens(benefit, 3 * WINDOW, stall=3.3))
    assert tokens(benefit, 10 * WINDOW, stall=3.5, hidden=3.5, spent=0.7)[-1]


def test_the_trial_weighs_its_tokens_alike_and_not_the_prompt():
    benefit = Benefit()
    tokens(benefit, 1, hidden=0.0, stall=900.0)  # the prompt
    hidden = [1.1 * TRIAL] + [0.0] * (TRIAL - 1)
    assert all(decision for each in hidden for decision in tokens(benefit, 1, hidden=each))
    benefit = Benefit()
    tokens(benefit, 1, hidden=900.0)
    decisions = [decision for _ in range(TRIAL) for decision in tokens(benefit, 1, hidden=0.9)]
    assert decisions == [True] * (TRIAL - 1) + [False]
    assert not any(tokens(benefit, 3 * WINDOW, stall=1.9))


def test_no_later_prompt_counts_as_a_token():
    benefit = Benefit()
    tokens(benefit, 3 * WINDOW, hidden=0.9)
    for _ in range(3 * WINDOW):
        benefit.prompt()
        assert not any(tokens(benefit, 1, stall=900.0) + tokens(benefit, 1, stall=1.0))
    benefit = Benefit()
    tokens(benefit, 3 * WINDOW, hidden=1.1)
    for _ in range(3 * WINDOW):
        benefit.prompt()
        assert all(tokens(benefit, 1, hidden=0.0) + tokens(benefit, 1, hidden=1.1))


def test_waiting_brings_them_back_if_there_is_clearly_more_to_hide_than_they_cost():
    benefit = Benefit()
    tokens(benefit, TRIAL)
    assert not any(tokens(benefit, 3 * WINDOW, stall=1.9))
    decisions = tokens(benefit, 20 * WINDOW, stall=2.5, hidden=2.5)
    assert decisions[-1] and decisions == sorted(decisions)  # once, and for good


def test_one_slow_token_changes_nothing():
    benefit = Benefit()
    tokens(benefit, 2 * WINDOW)
    assert not any(tokens(benefit, 1, stall=20.0) + tokens(benefit, WINDOW))


def test_several_layers_of_a_token_add_up():
    benefit = Benefit()
    for _ in range(3 * WINDOW):
        benefit.hid(0.6)
        benefit.hid(0.5)
        assert benefit.pays(1.0)
