# %% right: by cases
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = torch.exp(log_probs - old_log_probs)
    a = advantages.unsqueeze(1)
    return torch.where(a > 0, r * (r < 1 + eps_high), r * (r > 1 - eps_low)) * a
# %% right: free where the plain objective is the smaller one
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = log_probs.exp() / old_log_probs.exp()
    a = advantages.view(-1, 1)
    return r * a * (r * a <= torch.clip(r, 1 - eps_low, 1 + eps_high) * a)
# %% wrong: by the ratio, not by its logarithm -> clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    a = advantages[:, None]
    return torch.where(a > 0, r < 1 + eps_high, r > 1 - eps_low) * a
# %% wrong: nothing pushes outside of the limits -> clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    return r * advantages[:, None] * ((r > 1 - eps_low) & (r < 1 + eps_high))
# %% wrong: never clipped -> clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    return (log_probs - old_log_probs).exp() * advantages[:, None]
# %% wrong: the upper limit for both signs -> clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    return r * advantages[:, None] * (r < 1 + eps_high)
# %% wrong: limits swapped -> clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    a = advantages[:, None]
    return r * a * torch.where(a > 0, r < 1 + eps_low, r > 1 - eps_high)
# %% wrong: the clipped ratio goes on pushing -> clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    a = advantages[:, None]
    return torch.minimum(r * a, r.clamp(1 - eps_low, 1 + eps_high) * a)
# %% wrong: ratio inverted -> clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (old_log_probs - log_probs).exp()
    a = advantages[:, None]
    return r * a * torch.where(a > 0, r < 1 + eps_high, r > 1 - eps_low)
# %% wrong: difference of logarithms as the ratio -> clip-visible, clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = log_probs - old_log_probs
    a = advantages[:, None]
    return r * a * torch.where(a > 0, r < 1 + eps_high, r > 1 - eps_low)
# %% wrong: of a loss, not of an objective -> clip-visible, clip-hidden
def clipped_push(log_probs, old_log_probs, advantages, eps_low, eps_high):
    r = (log_probs - old_log_probs).exp()
    a = advantages[:, None]
    return -r * a * torch.where(a > 0, r < 1 + eps_high, r > 1 - eps_low)
