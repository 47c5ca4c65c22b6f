# %% right: minimum of two tensors, without a graph
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    with torch.no_grad():
        keep = mask > 0
        r = torch.exp(log_probs.masked_fill(~keep, 0) - sampler_log_probs.masked_fill(~keep, 0))
        return torch.minimum(r, torch.full_like(r, cap)) * keep
# %% right: quotient of the probabilities, filled in
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    out, keep = torch.zeros_like(log_probs.detach()), mask.bool()
    out[keep] = (log_probs.detach()[keep].exp() / sampler_log_probs[keep].exp()).clamp(max=cap)
    return out
# %% wrong: ratio inverted -> ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    d = torch.where(mask.bool(), sampler_log_probs - log_probs, 0.0).detach()
    return d.exp().clamp(max=cap) * mask
# %% wrong: clipped on both sides -> ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    d = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0).detach()
    return d.exp().clamp(1 / cap, cap) * mask
# %% wrong: tokens above the cap dropped -> ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    r = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0).detach().exp()
    return torch.where(r > cap, 0.0, r) * mask
# %% wrong: the cap on the logarithm -> ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    d = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0).detach()
    return d.clamp(max=cap).exp() * mask
# %% wrong: not truncated -> ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    d = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0).detach()
    return d.exp() * mask
# %% wrong: one ratio for a whole sequence -> ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    d = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0).detach()
    return d.sum(1, keepdim=True).exp().clamp(max=cap) * mask
# %% wrong: padding multiplied away, NaN times 0 is NaN -> ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    return (log_probs - sampler_log_probs).detach().exp().clamp(max=cap) * mask
# %% wrong: gradient through the weight -> ratio-gradient
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    d = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0)
    return d.exp().clamp(max=cap) * mask
# %% wrong: difference of logarithms as the ratio -> ratio-visible, ratio-hidden
def truncated_weights(log_probs, sampler_log_probs, mask, cap):
    d = torch.where(mask.bool(), log_probs - sampler_log_probs, 0.0).detach()
    return d.clamp(max=cap) * mask
