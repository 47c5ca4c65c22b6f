"""The formats of chapter 11 against the reference code of GGUF and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from scipy.stats import norm

from cpugrpo_edu.engine.int8 import quantize_activations
from cpugrpo_edu.models.load import load_policy
from cpugrpo_edu.notebook import number_formats as formats
from cpugrpo_edu.policy import token_log_probs
from cpugrpo_edu.sample import Sampling, rollout
from cpugrpo_edu.tasks import held_out_problems


@pytest.fixture(scope="module")
def weights():
    """Two scales of size, a block of zeros, and a block with one large weight."""
    torch.manual_seed(0)
    w = torch.randn(12, 128)
    w[3] *= 100
    w[5, 32:64] = 0
    w[7, 40] = -30
    return w


@pytest.fixture(scope="module")
def policy():
    return load_policy("bundled")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_formats_are_those_of_the_gguf_package(weights, name):
    kind = GGMLQuantizationType[name]
    stored = quants.quantize(weights.numpy(), kind)
    bits, rounding = formats.FORMATS[name]
    np.testing.assert_array_equal(rounding(weights).numpy(), quants.dequantize(stored, kind))
    assert bits == 8 * stored.nbytes / weights.numel()


def test_the_values_of_nf4_are_normal_quantiles():
    """As in the paper's code: 8 positive and 7 negative ones, and an exact zero."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(formats.NF4_VALUES, values / values.max(), atol=1e-5)


def test_nf4_takes_the_nearest_value(weights):
    blocks = weights.view(12, 2, 64)
    scale = blocks.abs().amax(-1, keepdim=True)
    scale[scale == 0] = 1
    distance = (blocks[..., None] / scale[..., None] - formats.NF4_VALUES).abs()
    nearest = formats.NF4_VALUES[distance.argmin(-1)] * scale
    torch.testing.assert_close(formats.nf4(weights), nearest.view_as(weights))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_rounding_again_changes_next_to_nothing(weights, name):
    """Values of a format are on its grid, up to the float16 of the scale."""
    once = formats.FORMATS[name][1](weights)
    twice = formats.FORMATS[name][1](once)
    assert (twice - once).norm() < 2e-3 * once.norm()


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="40 weights"):
        formats.q4_0(torch.ones(2, 40))
    with pytest.raises(ValueError, match="allowed are batch, row, block"):
        formats.round_activations(torch.ones(2, 32), "column")


def test_one_scale_for_the_batch_is_what_a_dynamic_layer_does(weights):
    q, scale, zero = quantize_activations(weights, 7)
    expected = (q.float() - zero) * scale
    torch.testing.assert_close(formats.round_activations(weights, "batch", 7), expected)


def test_a_scale_for_fewer_numbers_has_a_smaller_error(weights):
    """Row 3 is a hundred times as large: it spoils the others unless they have their own scale."""
    error = {
        shared: (formats.round_activations(weights, shared) - weights)[7].norm()
        for shared in formats.SHARED_BY
    }
    assert error["batch"] > 3 * error["row"] > 3 * error["block"]


def test_a_rounded_model_computes_with_the_rounded_weights_and_comes_back(policy):
    ids = torch.tensor([policy.encode_problem(held_out_problems(1)[0])])
    with torch.inference_mode():
        before = policy.model(input_ids=ids).logits
        layers = formats.linear_layers(policy.model)
        kept = {name: layer.weight.clone() for name, layer in layers.items()}
        with formats.rounded_weights(policy.model, formats.q4_0):
            rounded = policy.model(input_ids=ids).logits
            for name, layer in layers.items():
                torch.testing.assert_close(layer.weight.data, formats.q4_0(kept[name]))
        with formats.rounded_activations(policy.model, "row", bits=3):
            coarse = policy.model(input_ids=ids).logits
        assert torch.equal(policy.model(input_ids=ids).logits, before)
    assert not torch.allclose(rounded, before, atol=1e-2)
    assert not torch.allclose(coarse, before, atol=1e-2)


def test_inputs_of_layers_are_those_of_real_tokens(policy):
    ids = torch.tensor([policy.encode_problem(held_out_problems(1)[0])])
    padded = torch.cat([torch.full((1, 3), policy.pad_id), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones_like(ids)], dim=1).long()
    plain, found = (
        formats.layer_inputs(policy.model, ids),
        formats.layer_inputs(policy.model, padded, mask),
    )
    assert set(found) == set(formats.linear_layers(policy.model))
    for name, x in found.items():
        torch.testing.assert_close(x, plain[name], rtol=1e-3, atol=1e-3)


def test_completion_log_probs_are_those_of_the_drawn_tokens(policy):
    [group] = rollout(policy, held_out_problems(1)[:1], 2, Sampling(12, seed=1))
    found = formats.completion_log_probs(policy.model, [group])
    ids = torch.cat([torch.tensor(e.completion_ids) for e in group.episodes])
    for log_probs, episode in zip(
        found.split([len(e.completion_ids) for e in group.episodes]), group.episodes, strict=True
    ):
        drawn = torch.tensor([episode.completion_ids])
        prompt = torch.tensor([group.prompt_ids])
        seen = torch.ones(1, prompt.shape[1] + drawn.shape[1]).long()
        with torch.inference_mode():
            expected = token_log_probs(policy.model, prompt, drawn, seen)[0]
        torch.testing.assert_close(
            log_probs.gather(1, drawn.t())[:, 0], expected, rtol=1e-4, atol=1e-4
        )
    assert len(found) == len(ids)
