"""Every Fisher estimator against enumeration of a tiny policy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from cpugrpo_edu.data import Episode, Group
from cpugrpo_edu.engine.fisher import estimate_fisher, lightning_fisher
from cpugrpo_edu.fisher import (
    Example,
    Row,
    examples_from_groups,
    fisher_diagonal,
    per_sequence_scores,
)
from cpugrpo_edu.lab.fisher_compare import compare_fishers, parameter_kind

V, PROMPT = 5, [1, 3, 2]


def tiny_policy(tie: bool = True, **options) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": V,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "tie_word_embeddings": tie,
    }
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **options})).eval()


def flat(fisher: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([f.flatten() for f in fisher.values()]).double()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def loop_scores(model, example: Example) -> list[torch.Tensor]:
    """The reference: one backward pass for each token's log-probability, flat gradients."""
    ids = torch.tensor([example.prompt_ids + example.completion_ids])
    log_p = model(ids).logits[0].log_softmax(-1)
    start, parameters = len(example.prompt_ids) - 1, list(model.parameters())
    return [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(log_p[start + t, o], parameters, retain_graph=True)
            ]
        ).double()
        for t, o in enumerate(example.completion_ids)
    ]


def enumerate_policy(model, length: int) -> list[tuple[Example, float]]:
    """Every completion of ``length`` tokens, with its probability."""
    result = []
    for completion in itertools.product(range(V), repeat=length):
        with torch.no_grad():
            log_p = model(torch.tensor([PROMPT + list(completion)])).logits[0].log_softmax(-1)
        logp = sum(log_p[len(PROMPT) - 1 + t, o].item() for t, o in enumerate(completion))
        result.append((Example(PROMPT, list(completion)), math.exp(logp)))
    return result


def true_fisher(model, length: int) -> torch.Tensor:
    """E_o[(grad log pi(o|q))^2], by enumeration of all completions."""
    return sum(p * sum(loop_scores(model, e)).square() for e, p in enumerate_policy(model, length))


SOME = [
    Example(PROMPT, [4, 0, 2]),
    Example([2], [1]),
    Example([0, 1, 2, 3, 4], [3, 3, 1, 0]),
    Example([4, 4], [2, 2]),
    Example(PROMPT, [0, 0]),
]

# --- truth --------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["rollout_score", "exact"])
def test_averaged_over_the_policy_it_is_the_sequence_fisher(variant):
    model, length = tiny_policy(), 2
    expected = sum(
        p * flat(fisher_diagonal(model, [e], variant)) for e, p in enumerate_policy(model, length)
    )
    assert error(expected, true_fisher(model, length)) < 1e-4


def test_exact_weights_every_label_at_every_position():
    model, example = tiny_policy(), SOME[0]
    expected = torch.zeros(sum(p.numel() for p in model.parameters())).double()
    for t in range(3):
        prompt = example.prompt_ids + example.completion_ids[:t]
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        for v in range(V):
            expected += p[v].item() * loop_scores(model, Example(prompt, [v]))[0].square()
    assert error(flat(fisher_diagonal(model, [example], "exact")), expected) < 1e-4


def test_sample_has_the_expectation_of_exact():
    """Monte Carlo: |mean - exact| within 4 standard errors for the sum of all entries."""
    model, example, repeats = tiny_policy(), SOME[0], 25
    exact = flat(fisher_diagonal(model, [example], "exact")).sum().item()
    copies = [example] * 16
    means = torch.tensor(
        [flat(fisher_diagonal(model, copies, "sample", seed=s)).sum() for s in range(repeats)]
    )
    standard_error = (means.std() / repeats**0.5).item()
    assert standard_error < 0.1 * exact  # the test has power
    assert means.mean().item() == pytest.approx(exact, abs=4 * standard_error)


def test_square_of_summed_sampled_scores_equals_sum_of_squares_in_expectation():
    """The step behind "sample", by enumerating the labels of both positions."""
    model, example = tiny_policy(), Example(PROMPT, [4, 0])
    exact = flat(fisher_diagonal(model, [example], "exact"))
    total = torch.zeros_like(exact)
    prefixes = [PROMPT, [*PROMPT, 4]]
    scores = [[loop_scores(model, Example(x, [v]))[0] for v in range(V)] for x in prefixes]
    ps = [model(torch.tensor([x])).logits[0, -1].softmax(-1).tolist() for x in prefixes]
    for a, b in itertools.product(range(V), repeat=2):
        total += ps[0][a] * ps[1][b] * (scores[0][a] + scores[1][b]).square()
    assert error(total, exact) < 1e-4


def test_batched_is_biased_with_given_labels_and_unbiased_with_sampled_ones():
    model = tiny_policy()
    truth = true_fisher(model, 1)
    policy = enumerate_policy(model, 1)
    sampled = torch.zeros_like(truth)
    for (a, pa), (b, pb) in itertools.product(policy, repeat=2):
        sampled += pa * pb * 2 * flat(estimate_fisher(model, [a, b], "batched", batch_size=2))
    assert error(sampled, truth) < 1e-4  # B (mean g)^2 with B = 2: exact in expectation

    given = [Example(PROMPT, [o]) for o in (4, 4, 2, 0)]
    gradients = torch.stack([sum(loop_scores(model, e)) for e in given])
    batched = flat(estimate_fisher(model, given, "batched", batch_size=4))
    empirical = flat(fisher_diagonal(model, given, "empirical"))
    assert error(batched, gradients.mean(0).square()) < 1e-4
    assert error(empirical, gradients.square().mean(0)) < 1e-4
    assert batched.sum() < 0.9 * empirical.sum()
    assert error(4 * batched, empirical) > 0.1  # rescaling does not repair it


def test_batched_depends_on_the_batch_size_and_the_others_do_not():
    model = tiny_policy()
    for variant in ("exact", "sample", "empirical", "rollout_score"):
        one, three = (flat(fisher_diagonal(model, SOME, variant, batch_size=b)) for b in (1, 3))
        assert error(three, one) < 1e-4, variant
    one, three = (flat(estimate_fisher(model, SOME, "batched", batch_size=b)) for b in (1, 3))
    assert error(three, one) > 0.1
    assert error(one, flat(fisher_diagonal(model, SOME, "empirical"))) < 1e-4


# --- the fast path --------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_fast_path_equals_the_loop(tie):
    """Rows of unequal length; with tied weights both uses of the embedding are in one score."""
    model = tiny_policy(tie)
    fast = flat(fisher_diagonal(model, SOME, "empirical", batch_size=5))
    loop = sum(sum(loop_scores(model, e)).square() for e in SOME) / len(SOME)
    assert error(fast, loop) < 1e-5


def test_scores_are_per_sequence():
    model = tiny_policy()
    rows = [Row(e.prompt_ids + e.completion_ids[:-1], e.completion_ids) for e in SOME]
    scores = per_sequence_scores(model, rows)
    for i, example in enumerate(SOME):
        expected = sum(loop_scores(model, example))
        assert error(torch.cat([s[i].flatten() for s in scores.values()]), expected) < 1e-5


def test_temperature_is_that_of_the_policy():
    """At temperature T the logits are divided by T, so dividing the head by T is the same."""
    model, cooled = tiny_policy(tie=False), tiny_policy(tie=False)
    with torch.no_grad():
        cooled.lm_head.weight /= 2
    hot = fisher_diagonal(model, SOME, "rollout_score", temperature=2.0)
    reference = fisher_diagonal(cooled, SOME, "rollout_score")
    name = "model.layers.0.mlp.up_proj.weight"
    assert error(hot[name], reference[name]) < 1e-4
    assert error(hot[name], fisher_diagonal(model, SOME, "rollout_score")[name]) > 0.1


# --- what the caller relies on --------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["exact", "sample", "empirical", "batched", "rollout_score", "lightning"]
)
def test_shapes_types_and_side_effects(variant):
    model = tiny_policy(attention_dropout=0.5).train()
    model.model.embed_tokens.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fisher = estimate_fisher(model, SOME[:2], variant)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert fisher.keys() == trainable.keys() and "model.embed_tokens.weight" not in fisher
    for name, f in fisher.items():
        assert f.shape == trainable[name].shape and f.dtype == torch.float32
        assert (f >= 0).all() and not f.requires_grad
    assert flat(fisher).sum() > 0
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    again = estimate_fisher(model, SOME[:2], variant)  # eval mode: dropout adds no noise
    assert error(flat(again), flat(fisher)) < 1e-6


def test_lora_parameters_only():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_policy(), config).eval()
    fisher = fisher_diagonal(model, SOME, "rollout_score", batch_size=2)
    assert len(fisher) == 4 and all("lora_" in name for name in fisher)
    expected = {n: torch.zeros_like(f) for n, f in fisher.items()}
    for example in SOME:
        model.zero_grad()
        ids = torch.tensor([example.prompt_ids + example.completion_ids])
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        log_p = log_p.gather(1, ids[0, 1:, None])[len(example.prompt_ids) - 1 :]
        log_p.sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                expected[name] += p.grad.square() / len(SOME)
    assert error(flat(fisher), flat(expected)) < 1e-5


def test_bf16_parameters_give_an_fp32_fisher():
    model = tiny_policy()
    reference = flat(fisher_diagonal(model, SOME, "empirical"))
    fisher = fisher_diagonal(model.bfloat16(), SOME, "empirical")
    assert {f.dtype for f in fisher.values()} == {torch.float32}
    assert error(flat(fisher), reference) < 0.1


def test_n_examples_takes_a_seeded_subset():
    model = tiny_policy()
    single = [flat(fisher_diagonal(model, [e], "empirical")) for e in SOME]
    results = [
        flat(fisher_diagonal(model, SOME, "empirical", n_examples=1, seed=s)) for s in range(6)
    ]
    chosen = [min(range(5), key=lambda i: error(r, single[i])) for r in results]
    assert all(error(r, single[i]) < 1e-4 for r, i in zip(results, chosen))
    assert len(set(chosen)) > 1
    everything = flat(fisher_diagonal(model, SOME, "empirical", n_examples=99))
    assert error(everything, sum(single) / 5) < 1e-4


def test_examples_from_groups():
    group = Group([1, 2], [Episode([3], [-1.0], True), Episode([4, 0], [-1.0, -2.0], False)])
    assert examples_from_groups([group]) == [Example([1, 2], [3]), Example([1, 2], [4, 0])]


@pytest.mark.parametrize(
    ("examples", "variant", "options", "words"),
    [
        (SOME, "true", {}, "variant is 'true'"),
        ([], "sample", {}, "0 examples"),
        ([Example([1], [])], "sample", {}, "at least 1 token"),
        ([Example([], [1])], "sample", {}, "at least 1 token"),
        (SOME, "sample", {"n_examples": 0}, "n_examples is 0"),
        (SOME, "sample", {"batch_size": 0}, "batch_size is 0"),
        ([Example([1], [2] * 5000)], "exact", {}, "25000 backward passes"),
    ],
)
def test_bad_input_is_named(examples, variant, options, words):
    with pytest.raises(ValueError, match=words):
        fisher_diagonal(tiny_policy(), examples, variant, **options)


def test_a_frozen_model_is_named():
    with pytest.raises(ValueError, match="0 trainable parameters"):
        fisher_diagonal(tiny_policy().requires_grad_(False), SOME)


# --- the heuristic and the comparison -------------------------------------------


def test_lightning_formula():
    model = tiny_policy(tie=False)
    fisher = lightning_fisher(model)
    for name, m in {
        "model.embed_tokens.weight": 10,
        "lm_head.weight": 8,
        "model.layers.0.self_attn.q_proj.weight": 5,
        "model.layers.0.mlp.up_proj.weight": 2,
        "model.layers.0.post_attention_layernorm.weight": 5,  # by its name
        "model.norm.weight": 1,
    }.items():
        theta = model.get_parameter(name).detach()
        expected = max(0.1 * m * theta.var().item(), 1e-8) + 0.01 * theta.abs()
        assert torch.allclose(fisher[name], expected), name
    single = torch.nn.ParameterDict({"gate": torch.nn.Parameter(torch.tensor([2.0]))})
    assert lightning_fisher(single)["gate"].item() == pytest.approx(1e-8 + 0.02)


def test_uniform_springs_are_equal():
    """As many entries as trainable weights, all 1, whatever the examples."""
    model = tiny_policy()
    model.model.layers[0].requires_grad_(False)
    fisher = estimate_fisher(model, [], "uniform")
    trainable = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert {n: f.shape for n, f in fisher.items()} == trainable
    assert all((f == 1).all() and not f.requires_grad for f in fisher.values())


def test_lightning_cannot_see_the_task():
    model = tiny_policy()
    one, other = [Example([1], [2])], [Example([4, 4], [0, 3])]
    assert torch.equal(*(flat(estimate_fisher(model, e, "lightning")) for e in (one, other)))
    true = [flat(fisher_diagonal(model, e, "exact")) for e in (one, other)]
    assert error(*true) > 0.1


def test_compare_fishers():
    torch.manual_seed(0)
    a = {"model.layers.0.mlp.w": torch.rand(50, 4) + 0.1, "model.norm.weight": torch.rand(9) + 0.1}
    same = compare_fishers(a, {n: f / 4 for n, f in a.items()})
    assert same.keys() == {"all", "mlp", "norm"}
    assert same["norm"]["entries"] == 9
    for entry in same.values():
        assert entry["pearson_log"] == pytest.approx(1)
        assert entry["spearman"] == pytest.approx(1)
        assert entry["cosine"] == pytest.approx(1)
        assert entry["scale_ratio"] == pytest.approx(4, rel=1e-5)
        assert entry["share_positive"] == 1
    inverse = compare_fishers(a, {n: 1 / f for n, f in a.items()})["all"]
    assert inverse["spearman"] == pytest.approx(-1)
    assert inverse["pearson_log"] == pytest.approx(-1)
    squared = compare_fishers(a, {n: f.exp() for n, f in a.items()})["all"]
    assert squared["spearman"] == pytest.approx(1) and squared["pearson_log"] < 0.999


def test_compare_fishers_with_zeros_and_constants():
    a = {"w": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    result = compare_fishers(a, {"w": torch.tensor([5.0, 1.0, 2.0, 3.0])})["all"]
    assert result["share_positive"] == 0.75 and result["spearman"] == pytest.approx(1)
    assert math.isnan(compare_fishers(a, {"w": torch.ones(4)})["all"]["spearman"])
    with pytest.raises(ValueError, match="1 and 1 parameters"):
        compare_fishers(a, {"v": torch.ones(4)})


def test_parameter_kind():
    names = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
        "model.layers.1.mlp.up_proj.weight",
        "scale",
    ]
    kinds = ["embedding", "head", "norm", "attention", "mlp", "other"]
    assert [parameter_kind(name) for name in names] == kinds
