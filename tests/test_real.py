"""The numeric paths on a real chat model, with its outliers: a toy cannot prove an engine."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
import torch
from command_line import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpugrpo_edu.data import Problem
from cpugrpo_edu.engine import c_kernel
from cpugrpo_edu.engine.decode import sample as fast_sample
from cpugrpo_edu.engine.fisher import estimate_fisher
from cpugrpo_edu.engine.int8 import Drift, measure_drift, quantize_for_rollout
from cpugrpo_edu.engine.shared_prefix import packed_log_probs
from cpugrpo_edu.errors import UserError
from cpugrpo_edu.fisher import examples_from_groups
from cpugrpo_edu.lab import estimate
from cpugrpo_edu.models import load_policy
from cpugrpo_edu.models.fetch import fetch
from cpugrpo_edu.models.load import default_answer_format
from cpugrpo_edu.policy import token_log_probs
from cpugrpo_edu.record.run_record import RunRecord
from cpugrpo_edu.run.config import CHAT_MODEL, config_for
from cpugrpo_edu.run.warmstart import warmstart
from cpugrpo_edu.run.warmstart_config import WarmstartConfig
from cpugrpo_edu.sample import Sampling, rollout, sample
from cpugrpo_edu.tasks import held_out_problems
from cpugrpo_edu.tasks.answers import exact_match
from cpugrpo_edu.train import make_batch

pytestmark = [pytest.mark.real, pytest.mark.slow]

QUESTIONS = (
    "What is 12 + 7?",
    "Tom has 3 boxes with 4 pens each and finds 5 more. How many pens does he have?",
)
PROBLEMS = [Problem(str(i), "", "", text, "") for i, text in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def folder():
    try:
        return fetch("smollm2")
    except UserError as error:
        pytest.skip(f"the real model cannot be fetched here: {error}")


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy("smollm2", lora_rank=4)


@pytest.fixture(scope="module")
def groups(policy):
    return rollout(policy, PROBLEMS, 2, Sampling(16, 0.8, seed=1))


def test_it_keeps_the_system_prompt_of_its_template_and_states_answers_its_own_way(policy):
    prompt = policy.tokenizer.decode(policy.encode_problem(PROBLEMS[0]))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert default_answer_format(policy.model.config) == "auto"


def test_it_gets_sums_right_in_its_own_words(policy):
    """Of three sums it gets at least one right, and none of them after ####."""
    sums = [("21 plus 10", "31"), ("25 plus 13", "38"), ("12 plus 7", "19")]
    asked = [Problem(q, "custom", "basic", f"What is {q}?", a) for q, a in sums]
    groups = rollout(policy, asked, 1, Sampling(24, 0.0))
    said = [group.episodes[0].text for group in groups]
    right = [exact_match(p, text, "auto") for p, text in zip(asked, said, strict=True)]
    assert any(right) and not any(map(exact_match, asked, said)), said


def test_prompts_of_its_usual_stories_are_as_long_as_the_estimate_assumes(folder):
    config = config_for("smollm2")
    tokens = estimate.encoder_of(config)
    lengths = [tokens(problem) for problem in held_out_problems(20, config.domains)]
    assert fmean(lengths) == pytest.approx(estimate.PROMPTS["smollm2"], abs=2)


def test_the_folder_is_a_plain_transformers_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama" and model.num_parameters() == 134_515_008
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
    assert {"LICENSE", "README.md"} <= {path.name for path in folder.iterdir()}


def test_both_samplers_write_the_same(policy):
    prompts = [policy.encode_problem(problem) for problem in PROBLEMS]
    greedy = Sampling(12, temperature=0.0)
    ids = {"eos_ids": policy.eos_ids, "pad_id": policy.pad_id}
    ours, plain = (f(policy.model, prompts, 1, greedy, **ids) for f in (fast_sample, sample))
    for a, b in zip(ours, plain, strict=True):
        assert a.episodes[0].completion_ids == b.episodes[0].completion_ids
        torch.testing.assert_close(
            torch.tensor(a.episodes[0].logprobs),
            torch.tensor(b.episodes[0].logprobs),
            atol=1e-3,
            rtol=0,
        )


def test_log_probs_of_sampler_policy_and_packed_pass_agree(policy, groups):
    for group in groups:
        for episode in group.episodes:
            episode.reward = float(len(episode.completion_ids))
    batch = make_batch(groups, "group", policy.pad_id)
    with torch.no_grad():
        plain = token_log_probs(
            policy.model, batch.prompt_ids, batch.completion_ids, batch.attention_mask, 0.8
        )
        packed, _ = packed_log_probs(
            policy.model,
            batch.prompt_ids,
            batch.attention_mask[:, : batch.prompt_ids.shape[1]],
            batch.completion_ids,
            batch.mask,
            0.8,
        )
    on = batch.mask.bool()
    assert (plain - batch.old_log_probs)[on].abs().max() < 1e-3
    assert (packed - plain)[on].abs().max() < 1e-3


def test_the_gradient_through_a_shared_prefix_is_that_of_separate_sequences(policy, groups):
    batch = make_batch(groups[:1], "none", policy.pad_id)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    prompt_mask = batch.attention_mask[:, : batch.prompt_ids.shape[1]]
    plain = token_log_probs(
        policy.model, batch.prompt_ids, batch.completion_ids, batch.attention_mask, 0.8
    )
    packed, _ = packed_log_probs(
        policy.model, batch.prompt_ids, prompt_mask, batch.completion_ids, batch.mask, 0.8
    )
    a, b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x.sum(), trained, allow_unused=True)])
        for x in (plain, packed)
    )
    assert (a - b).norm() < 1e-3 * a.norm()


@pytest.fixture(scope="module")
def frozen(folder):
    """The same policy on a frozen INT8 base; its adapter changes nothing yet."""
    return load_policy("smollm2", dtype="int8", lora_rank=4, system="")


@pytest.mark.skipif(not c_kernel.available(), reason=c_kernel.library()[1])
def test_int8_weights_in_blocks_are_the_policy(policy, frozen, groups):
    """As a copy for rollouts and as a frozen base."""
    copy = quantize_for_rollout(policy.model, kernel="compiled")
    for model in (copy, frozen.model):
        drift = measure_drift(policy.model, model, groups, 0.8)
        assert drift.kl <= 0.01 and drift.agreement >= 0.96 and drift.outside <= 0.01, drift


def test_rollouts_on_a_frozen_base_are_of_the_policy_that_is_trained(frozen):
    """At the first step every ratio should be 1, and a change of 1e-7 should stay small."""
    batch = make_batch(rollout(frozen, PROBLEMS, 4, Sampling(24, 0.8, seed=2)), "none", 0)
    prompt_mask = batch.attention_mask[:, : batch.prompt_ids.shape[1]]
    inputs = (batch.prompt_ids, prompt_mask, batch.completion_ids, batch.mask, 0.8)
    embedding = frozen.model.get_input_embeddings()
    torch.manual_seed(0)
    with torch.no_grad():
        now, _ = packed_log_probs(frozen.model, *inputs)
        nudge = embedding.register_forward_hook(
            lambda module, given, out: out * (1 + 1e-7 * torch.randn_like(out))
        )
        nudged, _ = packed_log_probs(frozen.model, *inputs)
        nudge.remove()
    on = batch.mask.bool()
    ratio = (now - batch.old_log_probs)[on].exp()
    assert ((ratio < 0.8) | (ratio > 1.2)).float().mean() <= 0.01
    assert (nudged - now)[on].abs().mean() <= 0.02


def test_torchs_dynamic_int8_is_another_policy_and_recognised_as_such(policy, groups):
    copy = quantize_for_rollout(policy.model, kernel="packed")
    drift = measure_drift(policy.model, copy, groups, 0.8)
    assert not drift.acceptable and drift.outside > 0.15
    exact = measure_drift(policy.model, policy.model, groups, 0.8)
    assert exact.acceptable and exact.kl < 1e-6 and exact.agreement == 1 and exact.outside == 0


def test_both_limits_of_drift_count():
    assert Drift(0.049, 0.9, 0.14).acceptable
    assert not Drift(0.051, 0.9, 0.0).acceptable and not Drift(0.0, 1.0, 0.16).acceptable


def test_a_bfloat16_copy_is_the_policy(policy, groups):
    drift = measure_drift(
        policy.model, quantize_for_rollout(policy.model, kernel="bf16"), groups, 0.8
    )
    assert drift.kl < 2e-3 and drift.agreement > 0.96 and drift.outside <= 0.02


def test_fisher_of_lora_is_the_mean_square_of_the_scores(policy, groups):
    examples = examples_from_groups(groups)[:2]
    found = estimate_fisher(policy.model, examples, "rollout_score", batch_size=2)
    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in trained.items()}
    for example in examples:
        ids = torch.tensor([example.prompt_ids])
        done = torch.tensor([example.completion_ids])
        mask = torch.ones(1, ids.shape[1] + done.shape[1], dtype=torch.long)
        score = torch.autograd.grad(
            token_log_probs(policy.model, ids, done, mask).sum(), list(trained.values())
        )
        for name, gradient in zip(trained, score, strict=True):
            total[name] += gradient.square() / len(examples)
    a, b = (torch.cat([t.flatten() for t in x.values()]) for x in (found, total))
    assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("method", ["sft", "rft"])
def test_a_warm_start_of_two_steps_is_a_model_that_evaluates(folder, tmp_path, method):
    """It learns from stories, or from its own sums, some of which are right."""
    sums = [{"prompt": f"What is {n} plus 10?", "answer": str(n + 10)} for n in range(20, 50)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    data = {"domains": ("stories",)} if method == "sft" else {"data": str(tmp_path / "sums.jsonl")}
    config = WarmstartConfig(
        "smollm2", method, problems=6, steps=2, batch_size=2, lora_rank=4, samples=4,
        max_completion=32, threads=1, **data,
    )  # fmt: skip
    record = warmstart(config, tmp_path / "warm")
    found = record.results
    assert found["steps"] == 2 and found["weights_changed"]["changed"]
    assert 0 < found["loss"]["first"] < 4
    warm = load_policy(tmp_path / "warm")
    assert warm.system is None and default_answer_format(warm.model.config) == "auto"
    [group] = rollout(warm, PROBLEMS[:1], 1, Sampling(8, 0.0))
    assert group.episodes[0].text


def test_the_command_trains_it_with_defaults_of_its_own(folder, tmp_path):
    """Two steps on sums, some of which it gets right."""
    sums = [{"prompt": f"What is {n} plus 10?", "answer": str(n + 10)} for n in range(20, 60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    code, _, err = invoke(
        "run", "--model", "smollm2", "--data", tmp_path / "sums.jsonl", "--output",
        tmp_path / "run", "--steps", "2,0,0", "--per-cell", 2, "--prompts-per-step", 4,
        "--num-generations", 4, "--max-completion", 24, "--threads", 1,
    )  # fmt: skip
    assert code == 0, err
    assert "groups sampled before training have a signal" in err
    assert "basic, before training: " in err and "basic, after training: " in err
    record = RunRecord.load(tmp_path / "run" / "record.json")
    config, results = record.config, record.results
    assert all(config[name] == CHAT_MODEL[name] for name in ("dtype", "lora_rank", "temperature"))
    assert results["weights_changed"]["changed"]
    assert results["stages"][0]["signal"]["with_signal"] > 0
    assert results["evaluations"][0]["label"] == "before"
    shown = [(sample["before"], sample["after"]) for sample in results["samples"]]
    assert shown and all(map(all, shown))
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.index("The same problems before and after training") < report.index("## Accuracy")
    assert (tmp_path / "run" / "report.html").exists()
