# %% right: by cases
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = torch.exp(log_probs - old_log_probs)
    a = advantages.unsqueeze(1)
    return torch.where(a > 0, r.clamp(max=1 + eps_high), r.clamp(min=1 - eps_low)) * a
# %% right: stacked minimum
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = log_probs.exp() / old_log_probs.exp()
    a = advantages.view(-1, 1)
    return torch.stack([r * a, torch.clip(r, 1 - eps_low, 1 + eps_high) * a]).min(0).values
# %% wrong: max for min -> clip-hidden
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    a = advantages[:, None]
    return torch.maximum(r * a, r.clamp(1 - eps_low, 1 + eps_high) * a)
# %% wrong: ratio inverted -> clip-hidden
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (old_log_probs - log_probs).exp()
    a = advantages[:, None]
    return torch.minimum(r * a, r.clamp(1 - eps_low, 1 + eps_high) * a)
# %% wrong: clipped only -> clip-hidden
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    return r.clamp(1 - eps_low, 1 + eps_high) * advantages[:, None]
# %% wrong: limits swapped -> clip-hidden
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    a = advantages[:, None]
    return torch.minimum(r * a, r.clamp(1 - eps_high, 1 + eps_low) * a)
# %% wrong: difference of logarithms as the ratio -> clip-visible, clip-hidden
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = log_probs - old_log_probs
    a = advantages[:, None]
    return torch.minimum(r * a, r.clamp(1 - eps_low, 1 + eps_high) * a)
# %% wrong: minimum of the ratios before the advantage -> clip-hidden
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    return torch.minimum(r, r.clamp(1 - eps_low, 1 + eps_high)) * advantages[:, None]
# %% wrong: a loss, not an objective -> clip-visible, clip-hidden
def clipped_objective(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    a = advantages[:, None]
    return -torch.minimum(r * a, r.clamp(1 - eps_low, 1 + eps_high) * a)
