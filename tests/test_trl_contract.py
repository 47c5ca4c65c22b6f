"""What we rely on inside TRL 1.16: version, signatures, and equal losses.

TRL's underscored methods may change with any release; then this file fails first and says what
moved.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
import trl
import trl.kernels.chunked_logprob
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer

from cpugrpo_edu.policy import group_advantages, grpo_loss, kl_estimates, token_log_probs

MAX_LENGTH = 7
VOCABULARY = ["<pad>", "<eos>", "<unk>"] + [chr(c) for c in range(ord("a"), ord("z") + 1)]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("_prepare_inputs", ["generation_batch"]),
        ("_get_train_sampler", ["dataset"]),
        ("_compute_loss", ["model", "inputs"]),
        ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("_generate_and_score_completions", ["inputs"]),
        ("training_step", ["model", "inputs", "num_items_in_batch"]),
        ("_calculate_rewards", ["inputs", "prompts", "completions", "completion_ids_list"]),
        ("log", ["logs", "start_time"]),
        ("train", ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
    ],
)
def test_signatures(method, expected):
    assert parameters(getattr(GRPOTrainer, method)) == ["self", *expected]


def test_log_prob_method_and_helpers():
    method = GRPOTrainer._get_per_token_logps_and_entropies
    assert parameters(method)[:7] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ]
    assert parameters(trl.trainer.utils.split_tensor_dict) == ["tensor_dict", "num_chunks"]


def test_head_tiles_can_be_made_smaller(tmp_path, monkeypatch):
    """Three module names shrink the fused head's tiles and skip prompt and padding."""
    utils, kernel = trl.trainer.utils, trl.kernels.chunked_logprob
    assert parameters(utils._use_triton) == ["device"]
    assert isinstance(utils._CHUNKED_LOGPROB_CHUNK_SIZE, int)
    assert isinstance(kernel.TOKEN_CHUNK_SIZE, int)
    trainer = tiny_trainer(tmp_path)
    batch = fixed_batch(trainer)
    before = trainer._compute_loss(trainer.model, batch)

    tiles, forward_tile = [], kernel._forward_tile

    def record(tile, *args, **kwargs):
        tiles.append(tuple(tile.shape))
        return forward_tile(tile, *args, **kwargs)

    monkeypatch.setattr(kernel, "_forward_tile", record)
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 16)
    monkeypatch.setattr(kernel, "TOKEN_CHUNK_SIZE", 5)
    after = trainer._compute_loss(trainer.model, batch)
    assert after.item() == pytest.approx(before.item(), abs=1e-5)
    # 12 completion tokens in tiles of 5, a vocabulary of 29 in tiles of 16.
    assert tiles == [(5, 16), (5, 13), (5, 16), (5, 13), (2, 16), (2, 13)]


def tiny_trainer(folder, **options) -> GRPOTrainer:
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    tokens = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=MAX_LENGTH,
        gradient_checkpointing=False,
        temperature=0.8,
        epsilon=0.1,
        epsilon_high=0.25,
        **options,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["ab", "cd"]}),
        args=config,
    )
    trainer.current_gradient_accumulation_steps = 1  # what the training loop sets
    trainer.model.train()
    return trainer


def fixed_batch(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([[5], [2], [4], [1]])
    prompt_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    completion_mask = (torch.arange(5) < lengths).long()
    batch = {
        "prompt_ids": torch.randint(3, len(VOCABULARY), (4, 4)) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, len(VOCABULARY), (4, 5)) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.1, -0.6, 0.4, -0.9]),
        "num_items_in_batch": torch.tensor(20),  # of the generation batch, not of this one
    }
    with torch.no_grad():
        now = our_log_probs(trainer.model, batch)
    batch["old_per_token_logps"] = now + 0.3 * torch.randn(4, 5)
    batch["ref_per_token_logps"] = now + 0.3 * torch.randn(4, 5)
    return batch


def our_log_probs(model, batch):
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return token_log_probs(model, batch["prompt_ids"], batch["completion_ids"], mask, 0.8)


@pytest.mark.parametrize(("beta", "correct_kl"), [(0.0, True), (0.2, True), (0.2, False)])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_our_loss_and_gradient_equal_trl(tmp_path, importance, beta, correct_kl):
    trainer = tiny_trainer(
        tmp_path, importance_sampling_level=importance, use_bias_correction_kl=correct_kl
    )
    assert trainer.args.steps_per_generation == 1
    trainer.beta = beta  # after construction: a reference model would be loaded from a hub name
    model, batch = trainer.model, fixed_batch(trainer)
    losses = set()
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        trainer.loss_type = loss_type
        theirs = trainer._compute_loss(model, batch)
        ours = grpo_loss(
            our_log_probs(model, batch),
            batch["old_per_token_logps"],
            batch["advantages"],
            batch["completion_mask"],
            ref_log_probs=batch["ref_per_token_logps"],
            beta=beta,
            correct_kl=correct_kl,
            eps_low=0.1,
            eps_high=0.25,
            importance=importance,
            reduction=loss_type,
            max_length=MAX_LENGTH,
            total_tokens=batch["num_items_in_batch"],
        )
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-5), loss_type
        losses.add(round(ours.item(), 5))
        pairs = zip(
            torch.autograd.grad(ours, list(model.parameters())),
            torch.autograd.grad(theirs, list(model.parameters())),
        )
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs), loss_type
    assert len(losses) == 4  # the batch tells the loss types apart


def test_log_probs_entropy_and_kl_equal_trl(tmp_path):
    trainer = tiny_trainer(tmp_path)
    batch = fixed_batch(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    result = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, 5, compute_entropy=True
    )
    assert len(result) == 3
    assert torch.allclose(result[0], our_log_probs(trainer.model, batch), atol=1e-5)
    d = batch["ref_per_token_logps"] - batch["old_per_token_logps"]
    k3 = kl_estimates(batch["old_per_token_logps"], batch["ref_per_token_logps"]).k3
    assert torch.allclose(k3, d.exp() - d - 1, atol=1e-6)


def test_rollouts_can_be_ours(tmp_path):
    """TRL hands over every prompt as often as it wants completions, and keeps the log-probs."""
    asked = []

    def rollout(prompts, trainer):
        asked.append((prompts, trainer))
        return {"prompt_ids": [[3]] * 8, "completion_ids": [[4, 5]] * 8, "logprobs": [[-1, -2]] * 8}

    trainer = tiny_trainer(tmp_path)
    trainer.rollout_func = rollout
    prompts = ["ab"] * 4 + ["cd"] * 4
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts])
    assert asked == [(prompts, trainer)]
    assert batch["prompt_ids"].tolist() == [[3]] * 8
    assert batch["completion_ids"].tolist() == [[4, 5]] * 8
    assert batch["sampling_per_token_logps"].tolist() == [[-1, -2]] * 8
    assert "old_per_token_logps" not in batch  # so the ratio would be 1


def test_trainer_attributes(tmp_path):
    trainer = tiny_trainer(tmp_path)
    assert trainer._step == 0
    assert trainer._buffered_inputs is None
    trainer._metrics["train"]["contract"].append(1.0)  # {mode: {name: [values]}}
    assert trainer._metrics["train"]["contract"] == [1.0]
    assert trainer.entropy_coef == 0.0 and not trainer.use_adaptive_entropy
    assert {"prompt", "completion", "rewards"} <= set(trainer._logs)
    indices = list(trainer._get_train_sampler())
    assert indices[:4] == [indices[0]] * 4  # each prompt in one block of G


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_our_advantages_equal_trl(tmp_path, scale):
    """Rewards enter TRL through a reward function; its advantages come back from scoring."""
    scores = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.5, 0.5, 2.0, 0.0])
    trainer = tiny_trainer(tmp_path, scale_rewards=scale)
    trainer.reward_funcs = [lambda completions, **_: scores.tolist()]
    inputs = [{"prompt": p} for p in ["ab"] * 4 + ["cd"] * 4]
    batch = trainer._generate_and_score_completions(inputs)
    expected = group_advantages(scores.view(2, 4), scale).flatten()
    assert torch.allclose(batch["advantages"], expected, atol=1e-5)
    assert set(batch) >= {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
    }
