"""Programs that run as ranks in chapter 16."""

from __future__ import annotations

import pytest
import torch

from cpugrpo_edu.errors import UserError
from cpugrpo_edu.notebook import workers

TELL = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
found = {name: os.environ[name] for name in names}
open(os.path.join(sys.argv[1], "rank" + os.environ["RANK"]), "w").write(json.dumps(found))
"""


def test_by_hand_gives_each_rank_its_number():
    first, second = workers.launch(TELL, ranks=2)
    assert (first["RANK"], second["RANK"]) == (first["LOCAL_RANK"], second["LOCAL_RANK"])
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["WORLD_SIZE"] == first["LOCAL_WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_a_rank_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such luck"):
        workers.launch("raise SystemExit('no such luck')", ranks=2)


def test_a_worker_is_found_by_name():
    assert "def gradient(" in workers.source("toy_gradient")
    with pytest.raises(UserError, match="'nothing'; allowed are .*toy_gradient"):
        workers.source("nothing")


@pytest.mark.slow
def test_two_ranks_hold_the_gradient_of_one_process():
    found = workers.launch(workers.source("toy_gradient"), ranks=2)
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    tokens = torch.randint(6, (40,))
    advantages = torch.randn(40, dtype=torch.float64)
    weights = torch.randn(3, 6, dtype=torch.float64)
    # the gradient of -A log softmax(x w)[token] by hand: A x (probabilities - one)
    one = torch.nn.functional.one_hot(tokens, 6)
    by_hand = x.T @ (advantages[:, None] * ((x @ weights).softmax(1) - one)) / 40
    for rank in found:
        torch.testing.assert_close(torch.tensor(rank["gradient"], dtype=torch.float64), by_hand)
        assert rank["fair"]


@pytest.mark.slow
def test_a_rank_that_stays_away_leaves_the_other_waiting():
    program = workers.source("skip_a_step")
    waiting, away = workers.launch(program, ranks=2)
    assert "Timed out" in waiting["said"] and away["said"] == "fine"
    both = workers.launch(program.replace("if gradient.any():", "if True:"), ranks=2)
    assert [rank["gradient"] for rank in both] == [[2.0] * 3] * 2
