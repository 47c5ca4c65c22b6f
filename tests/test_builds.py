"""What the reader builds: right code passes, each known mistake is called by its name."""

from __future__ import annotations

import itertools

import pytest
import torch

from cpugrpo_edu.notebook import build_gradient, build_grpo, build_policy, checks
from cpugrpo_edu.notebook.babbler import END, PROMPT, babbler, enumerated, everything
from cpugrpo_edu.policy import token_log_probs
from cpugrpo_edu.sample import Sampling, sample

BUILDS = {
    "pad": build_policy.PAD,
    "log_probs": build_policy.LOG_PROBS,
    "gradient": build_gradient.GRADIENT,
    "advantages": build_gradient.ADVANTAGES,
    "surrogate": build_grpo.SURROGATE,
    "kl": build_grpo.KL,
    "loss": build_grpo.LOSS,
}
MISTAKES = [(name, *mistake) for name, build in BUILDS.items() for mistake in build.mistakes]


def test_the_babbler_says_something_for_sure():
    prompts, ids, mask = enumerated()
    assert len(ids) == len(everything()) == sum(4**t for t in range(3)) + 4**3
    attention = torch.cat([torch.ones_like(prompts), mask], dim=1)
    log_probs = token_log_probs(babbler(), prompts, ids, attention).sum(dim=1)
    torch.testing.assert_close(log_probs.exp().sum().item(), 1.0)
    again = babbler().state_dict()
    assert all(torch.equal(v, again[k]) for k, v in babbler().state_dict().items())


@pytest.mark.parametrize("name", BUILDS)
def test_the_package_passes_and_an_empty_function_is_no_error(name, capsys):
    build = BUILDS[name]
    assert build.check(build.right)
    assert "right" in capsys.readouterr().out

    def mine(*case):
        """To be written."""

    assert not build.check(mine)
    assert "mine: not filled in yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sentence", "mistaken"),
    MISTAKES,
    # The same in every process: a function as text would be an address.
    ids=lambda x: x[:40] if isinstance(x, str) else "function",
)
def test_a_known_mistake_is_called_by_its_name(name, sentence, mistaken, capsys):
    assert not BUILDS[name].check(mistaken)
    assert capsys.readouterr().out.endswith(f": {sentence}\n")


@pytest.mark.parametrize("name", BUILDS)
def test_no_two_mistakes_look_alike(name):
    build = BUILDS[name]
    for (_, one), (_, other) in itertools.combinations(build.mistakes, 2):
        found = [checks.as_tuple(one(*case)) for case in build.cases()]
        assert not checks.agree(found, other, build.cases())


def test_other_faults_are_described(capsys):
    def said(mine):
        assert not build_grpo.KL.check(mine)
        return capsys.readouterr().out

    def breaks(lp, ref):
        d = ref - lp
        return d.exp() - d - torch.ones(3)

    def unfinished(lp, ref):
        raise NotImplementedError

    assert "RuntimeError" in (text := said(breaks)) and "line 3: return d.exp()" in text
    assert "not filled in yet" in said(unfinished)
    assert "returns float; a tensor" in said(lambda lp, ref: 0.5)
    assert "shape (2,); expected (5,)" in said(lambda lp, ref: lp[:2])
    assert "2 tensors; 1 are needed" in said(lambda lp, ref: (lp, ref))
    off = said(lambda lp, ref: build_grpo.KL.right(lp, ref) + torch.eye(5)[3])
    assert "In case 1, its result at [3] is" in off and "the package gives" in off


def test_a_loss_needs_a_gradient_and_is_one_number(capsys):
    assert not build_grpo.check_loss(lambda new, *rest: new.detach().sum())
    assert "has no gradient" in capsys.readouterr().out
    assert not build_grpo.check_loss(lambda new, *rest: new)
    assert "a loss is one number" in capsys.readouterr().out
    assert not build_grpo.check_loss(lambda *case: None)
    assert "not filled in yet" in capsys.readouterr().out
    assert build_grpo.check_loss(build_grpo.package_loss)


# --- Samplers ------------------------------------------------------------------


def by_package(model, prompt_ids, limit, temperature, generator):
    """The package's sampler as a solution of chapter 1."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    sampling = Sampling(limit, temperature, seed=seed)
    prompts = prompt_ids.tolist()
    groups = sample(model, prompts[:1], len(prompts), sampling, eos_ids={END}, pad_id=END)
    ids = torch.full((len(prompts), limit), END)
    mask = torch.zeros(len(prompts), limit)
    for row, episode in enumerate(groups[0].episodes):
        length = len(episode.completion_ids)
        ids[row, :length] = torch.tensor(episode.completion_ids)
        mask[row, :length] = 1
    return ids, mask


def words(model, prompt_ids, limit, chances, generator, keep_on=False):
    """A sampler with a hole in it: ``chances`` makes probabilities of logits."""
    ids, mask = prompt_ids, []
    running = torch.ones(len(prompt_ids), dtype=torch.bool)
    for _ in range(limit):
        p = chances(model(ids).logits[:, -1])
        token = torch.multinomial(p, 1, generator=generator)
        if not keep_on:
            token[~running] = END
        ids = torch.cat([ids, token], dim=1)
        mask.append(running)
        running = running & (token[:, 0] != END)
    return ids[:, len(PROMPT) :], torch.stack(mask, dim=1).float()


def end_is_padding(ids, mask):
    return ids, mask * (ids != END)


SAMPLERS = {
    "the temperature is ignored": lambda m, q, n, t, g: words(m, q, n, lambda z: z.softmax(-1), g),
    "multiplied instead of divided": lambda m, q, n, t, g: words(
        m, q, n, lambda z: (t * z).softmax(-1), g
    ),
    "do not have the model's": lambda m, q, n, t, g: words(
        m, q, n, lambda z: z.softmax(-1) ** 0, g
    ),
    "the same completion each time": lambda m, q, n, t, g: words(
        m, q, n, lambda z: torch.eye(5)[z.argmax(-1)], g
    ),
    "the same generator gave other": lambda m, q, n, t, g: words(
        m, q, n, lambda z: (z / t).softmax(-1), None
    ),
    "words behind END": lambda m, q, n, t, g: words(
        m, q, n, lambda z: (z / t).softmax(-1), g, keep_on=True
    ),
    "mask is 1 behind END": lambda *case: (by_package(*case)[0], torch.ones(4000, 3)),
    "mask is 0 on a real token": lambda *case: end_is_padding(*by_package(*case)),
    "not filled in yet": lambda *case: None,
}


def test_the_package_is_a_right_sampler(capsys):
    assert build_policy.check_sampler(by_package), capsys.readouterr().out


@pytest.mark.parametrize("sentence", SAMPLERS)
def test_a_wrong_sampler_is_told_what_is_wrong(sentence, capsys):
    assert not build_policy.check_sampler(SAMPLERS[sentence])
    assert sentence in capsys.readouterr().out


# --- Loops ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def right():
    """What the package's loop does, once: a check compares with it."""
    return build_grpo.trained(build_grpo.train)


@pytest.fixture
def check(right, monkeypatch, capsys):
    """Checks a loop that returns what it is given, and returns what was printed."""

    def run(history, weights):
        answers = iter([right, (history, weights)])
        monkeypatch.setattr(build_grpo, "trained", lambda loop: next(answers))
        passed = build_grpo.check_train(build_grpo.train)
        said = capsys.readouterr().out
        assert passed == ("right, the same" in said)
        return said

    return run


def test_a_loop_is_compared_step_by_step(right, check):
    history, (start, first, last) = right
    assert "right, the same" in check(*right)
    assert "have not moved" in check(history, [start] * 3)
    assert "opposite way" in check(history, [start, 2 * start - first, last])
    half = torch.cat([first[: len(first) // 2], start[len(first) // 2 :]])
    assert "goes elsewhere" in check(history, [start, half, last])
    assert "the second does not" in check(history, [start, first, first])
    assert "called on_step 0 times in 2 steps" in check(history, [start])
    assert "not filled in yet" in check(None, [start])
    assert "metrics of each step" in check([], [start, first, last])
    other = [{**history[0], "reward": -1.0}, history[1]]
    assert "drew other completions" in check(other, [start, first, last])


def test_a_loop_that_fails_is_reported(right, monkeypatch, capsys):
    def mine(*arguments):
        if arguments:
            raise KeyError("reward")

    real = build_grpo.trained
    monkeypatch.setattr(
        build_grpo, "trained", lambda f: right if f is build_grpo.train else real(f)
    )
    assert not build_grpo.check_train(mine)
    assert "mine: it raises KeyError" in capsys.readouterr().out

    def unfinished(*arguments):
        raise NotImplementedError

    assert not build_grpo.check_train(unfinished)
    assert "not filled in yet" in capsys.readouterr().out
