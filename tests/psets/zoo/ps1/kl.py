# %% right: token by token
def sequence_kl(log_probs, ref_log_probs, mask):
    out = []
    for lp, rp, m in zip(log_probs, ref_log_probs, mask):
        d = (rp - lp)[m.bool()]
        out.append((d.exp() - 1 - d).mean() if len(d) else torch.tensor(0.0))
    return torch.stack([x.to(log_probs.dtype) for x in out])
# %% right: expm1 and masked_fill
def sequence_kl(log_probs, ref_log_probs, mask):
    d = (ref_log_probs - log_probs).masked_fill(mask == 0, 0.0)
    return (torch.expm1(d) - d).sum(1) / mask.sum(1).clamp(min=1)
# %% wrong: KL reversed -> kl-hidden
def sequence_kl(log_probs, ref_log_probs, mask):
    d = (log_probs - ref_log_probs).masked_fill(mask == 0, 0.0)
    return (d.exp() - d - 1).sum(1) / mask.sum(1).clamp(min=1)
# %% wrong: k1 with the sign of a bonus -> kl-hidden
def sequence_kl(log_probs, ref_log_probs, mask):
    d = (ref_log_probs - log_probs).masked_fill(mask == 0, 0.0)
    return d.sum(1) / mask.sum(1).clamp(min=1)
# %% wrong: k2 -> kl-hidden
def sequence_kl(log_probs, ref_log_probs, mask):
    d = (ref_log_probs - log_probs).masked_fill(mask == 0, 0.0)
    return (d**2 / 2).sum(1) / mask.sum(1).clamp(min=1)
# %% wrong: mask forgotten -> kl-mask
def sequence_kl(log_probs, ref_log_probs, mask):
    d = ref_log_probs - log_probs
    return (d.exp() - d - 1).mean(1)
# %% wrong: multiplied by the mask, so that infinite padding is not a number -> kl-mask
def sequence_kl(log_probs, ref_log_probs, mask):
    d = ref_log_probs - log_probs
    return ((d.exp() - d - 1) * mask).sum(1) / mask.sum(1).clamp(min=1)
# %% wrong: summed, not averaged -> kl-hidden, kl-mask
def sequence_kl(log_probs, ref_log_probs, mask):
    d = (ref_log_probs - log_probs).masked_fill(mask == 0, 0.0)
    return (d.exp() - d - 1).sum(1)
# %% wrong: divided by the padded length -> kl-mask
def sequence_kl(log_probs, ref_log_probs, mask):
    d = (ref_log_probs - log_probs).masked_fill(mask == 0, 0.0)
    return (d.exp() - d - 1).mean(1)
# %% wrong: an empty sequence divides by zero -> kl-mask
def sequence_kl(log_probs, ref_log_probs, mask):
    d = (ref_log_probs - log_probs).masked_fill(mask == 0, 0.0)
    return (d.exp() - d - 1).sum(1) / mask.sum(1)
