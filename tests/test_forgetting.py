"""Five tasks in a row: the stack learns like one policy, draws like a policy, and is held by
springs; the study's arithmetic, by hand."""

from __future__ import annotations

import pytest
import torch

from cpugrpo_edu.ewc import Anchor, add_ewc_gradient
from cpugrpo_edu.lab import five_tasks
from cpugrpo_edu.lab.five_tasks import EQUAL, TASKS, VOCABULARY, Arm, Plan, Springs
from cpugrpo_edu.lab.studies import forgetting
from cpugrpo_edu.policy import gather_log_probs, group_advantages, grpo_loss

SHORT = Plan(steps=3, prompts=4, group=8, fisher_prompts=4)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_tasks_share_no_symbol_and_hold_problems_out():
    (asked, told), (held, _) = five_tasks.problems("train"), five_tasks.problems("test")
    assert asked.shape == held.shape == (len(TASKS), 256, 4)
    used = [set(part.flatten().tolist()) for part in torch.cat([asked, held], dim=1)]
    assert sum(len(x) for x in used) == len(set().union(*used)) == VOCABULARY
    for a, b in zip(asked, held):
        assert not {tuple(x) for x in a.tolist()} & {tuple(x) for x in b.tolist()}
    rules = (max, min, lambda x: x[0], lambda x: x[-1], lambda x: x[1])
    for task, rule in enumerate(rules):
        for prompt, answer in zip(asked[task].tolist(), told[task].tolist()):
            assert answer == rule(prompt[1:])


def test_gumbel_draws_follow_the_policy():
    stream = torch.Generator().manual_seed(0)
    plan = Plan(prompts=1, group=40_000)
    gumbel = five_tasks.draw([stream], plan, 256).gumbel[0, 0]
    logits = torch.randn(VOCABULARY, generator=stream)
    counts = torch.bincount((logits + gumbel).argmax(-1), minlength=VOCABULARY)
    expected = logits.softmax(0)
    errors = (expected * (1 - expected) / plan.group).sqrt()
    assert ((counts / plan.group - expected).abs() < 4.5 * errors).all()


def test_a_stack_learns_like_single_policies_with_the_packages_springs():
    """Two members of different seeds and springs against two ordinary training loops."""
    jobs = [(Arm("a", fisher="uniform", strength=0.5), 1), (Arm("b"), 2)]
    policies = [five_tasks.small_policy(seed) for _, seed in jobs]
    skeleton, members = five_tasks.small_policy(0), five_tasks.stack(policies)
    for p in members.values():
        p.requires_grad_()
    place = {name: p.detach() + 0.1 for name, p in members.items()}
    stiffness = {name: torch.zeros_like(p) for name, p in members.items()}
    for s in stiffness.values():
        s[0] = 0.5
    streams = {seed: torch.Generator().manual_seed(seed) for _, seed in jobs}
    five_tasks.train_stage(skeleton, members, jobs, 2, Springs(stiffness, place), streams, SHORT)

    prompts, answers = (x[2] for x in five_tasks.problems("train"))
    for i, (policy, (_, seed)) in enumerate(zip(policies, jobs)):
        stream = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(policy.parameters(), lr=SHORT.rate)
        here = {n: p[i] for n, p in place.items()}
        anchor = Anchor(here, {n: torch.ones_like(p) for n, p in here.items()})
        for _ in range(SHORT.steps):
            drawn = five_tasks.draw([stream], SHORT, 256)
            chosen = drawn.problem[0]
            logits = five_tasks.answer_logits(policy, prompts[chosen])[:, None]
            sampled = (logits + drawn.gumbel[0]).argmax(-1)
            advantages = group_advantages((sampled == answers[chosen, None]).float()).flatten()
            spread = logits.expand(-1, SHORT.group, -1)
            log_p = gather_log_probs(spread, sampled).flatten()[:, None]
            optimizer.zero_grad()
            grpo_loss(log_p, log_p.detach(), advantages, torch.ones_like(log_p)).backward()
            add_ewc_gradient(policy, anchor, 0.5 if i == 0 else 0.0)
            optimizer.step()
        for name, p in policy.named_parameters():
            moved = (p - five_tasks.small_policy(seed).get_parameter(name)).norm()
            assert (members[name][i] - p).norm() < 0.02 * moved, name


def test_arms_practise_what_they_say():
    luck = torch.linspace(0, 0.999, 16)
    none, replay, joint = forgetting.PLAIN
    assert five_tasks.tasks_asked(none, 3, luck).tolist() == [3] * 16
    assert five_tasks.tasks_asked(replay, 0, luck).tolist() == [0] * 16
    old = five_tasks.tasks_asked(replay, 3, luck.flip(0))
    assert (old[4:] == 3).all() and (old[:4] < 3).all()
    assert sorted(set(five_tasks.tasks_asked(joint, 0, luck).tolist())) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="allowed are None, uniform"):
        Arm("x", fisher="fish")


def test_springs_have_mean_stiffness_one_and_know_their_units():
    policy = five_tasks.small_policy(3)
    for variant in forgetting.VARIANTS:
        found = five_tasks.fisher_of(policy, variant, 0, SHORT, seed=0)
        flat = torch.cat([f.flatten() for f in found.values()])
        assert flat.mean() == pytest.approx(1, rel=1e-4) and (flat >= 0).all()
    for variant, part in EQUAL.items():
        held = five_tasks.fisher_of(policy, variant, 0, SHORT, seed=0)
        least = min(float(f.min()) for f in held.values())
        for name, f in held.items():
            ratio = 100 if part and part in name else 1
            torch.testing.assert_close(f, torch.full_like(f, ratio * least))


def test_strong_springs_freeze_and_none_are_the_first_stage():
    arms = [Arm("none"), Arm("frozen", fisher="uniform", strength=1e6), Arm("replay", "replay")]
    right = five_tasks.learn_in_a_row(arms, [7, 8], SHORT)
    assert right.shape == (1 + len(TASKS), 3, 2, len(TASKS), 256) and right.dtype == torch.bool
    # The first task is learned in the same way by all; then only the frozen ones stay.
    assert (right[1, 0] == right[1, 1]).float().mean() > 0.99
    still = (right[-1] == right[1]).float().flatten(1).mean(1)
    assert still[1] > still[0]
    assert not torch.equal(right[:, 0, 0], right[:, 0, 1])  # each seed has a stream of its own


def test_measures_by_hand():
    """One problem a task: learned, then kept or lost."""
    found = forgetting.measures(["00000", "10000", "00000", "11100", "10010", "01011"])
    # just learned 1, 0, 1, 1, 1; at the end 0, 1, 0, 1, 1
    assert found["learned"] == pytest.approx(4 / 5) and found["end"] == pytest.approx(3 / 5)
    assert found["lost"] == pytest.approx(1 / 5) and found["tasks"] == [0, 1, 0, 1, 1]
    assert forgetting.choose({"exact": {0.1: 0.4, 1.0: 0.6, 3.0: 0.5}}) == {"exact": 1.0}


def test_differences_are_paired_by_seed():
    def runs(*bits):
        return [["00000"] * 5 + [x] for x in bits]

    strings = {
        "none": runs("10000", "11000"),
        "uniform": runs("11000", "11100"),
        "exact": runs("11100", "11110"),
    }
    arms = forgetting.summarize(strings, {})["arms"]
    assert arms["exact"]["minus_none"]["difference"] == pytest.approx(0.4)
    assert arms["exact"]["minus_none"]["low"] == pytest.approx(0.4)  # the same in both seeds
    assert arms["uniform"]["exact_minus_it"]["difference"] == pytest.approx(0.2)
    assert arms["none"]["end"]["mean"] == pytest.approx(0.3)
    # Nothing was right before the last stage, whose own task is never learned.
    assert arms["exact"]["learned_minus_none"]["difference"] == 0
    assert arms["exact"]["lost_minus_none"]["difference"] == pytest.approx(-0.4)


def test_the_reduced_study_leaves_the_seeds_of_the_full_one_alone():
    full, reduced = (forgetting.Setting(reduced=x) for x in (False, True))
    used = [*forgetting.seeds_of(full), *forgetting.grid_of(False)[2]]
    spared = [*forgetting.seeds_of(reduced), *forgetting.grid_of(True)[2]]
    assert len(used) == len(set(used)) and not set(used) & set(spared)
    assert len(forgetting.seeds_of(full)) >= 8


@pytest.mark.slow
def test_reduced_study_agrees_with_its_items_and_resumes(tmp_path, monkeypatch):
    setting = forgetting.Setting(reduced=True, work=tmp_path)
    result = forgetting.run(setting)
    for name, arm in result.record.results["arms"].items():
        last = [stages[-1] for stages in result.items["correct"][name]]
        right = [text.count("1") / len(result.items["answers"]) for text in last]
        assert arm["end"]["values"] == pytest.approx(right)
    assert all(rows for _, _, rows in forgetting.tables(result.record))
    assert forgetting.findings(result.record) and len(forgetting.plot(result.record).alt) > 60
    monkeypatch.setattr(forgetting, "learn_in_a_row", lambda *_: pytest.fail("it ran again"))
    assert forgetting.run(setting).record.results == result.record.results
