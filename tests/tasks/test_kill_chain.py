"""Tests of a hundred kills at random moments; `kill_chain.py` describes them."""

import pytest
from kill_chain import CHAINS, run_chains


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_kills_at_any_moment_change_nothing(tmp_path):
    chains = run_chains(tmp_path, kills=100)
    assert len(chains) >= 10 and sum(chain.kills for chain in chains) >= 100
    assert sum(chain.in_a_save for chain in chains) >= 10
    assert [chain.faults for chain in chains] == [[]] * len(CHAINS)


def test_some_kills_at_any_moment_change_nothing(tmp_path):
    (chain,) = run_chains(tmp_path, kills=4, chains=[("sft", 0, 1)])
    assert chain.kills == 4 and chain.faults == []
