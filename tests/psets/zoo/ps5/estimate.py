# %% right: a loop over completions
def estimate_fisher(gradients, mask):
    total = torch.zeros(gradients.shape[2], dtype=gradients.dtype)
    for g, m in zip(gradients, mask):
        total += g[m.bool()].sum(0) ** 2
    return total / len(mask)
# %% right: einsum on the cleaned gradients
def estimate_fisher(gradients, mask):
    g = torch.einsum("bcd,bc->bd", gradients.nan_to_num(), mask.to(gradients.dtype))
    return torch.einsum("bd,bd->d", g, g) / len(g)
# %% wrong: batch-mean Fisher -> estimate-visible, estimate-hidden
def estimate_fisher(gradients, mask):
    g = torch.where(mask.bool()[..., None], gradients, 0.0).sum(1)
    return g.mean(0) ** 2
# %% wrong: each token squared by itself -> estimate-hidden
def estimate_fisher(gradients, mask):
    g = torch.where(mask.bool()[..., None], gradients, 0.0)
    return (g**2).sum(1).mean(0)
# %% wrong: mean over tokens, not the sum -> estimate-hidden
def estimate_fisher(gradients, mask):
    g = torch.where(mask.bool()[..., None], gradients, 0.0).sum(1) / mask.sum(1, keepdim=True)
    return (g**2).mean(0)
# %% wrong: mask forgotten -> estimate-hidden
def estimate_fisher(gradients, mask):
    return (gradients.sum(1) ** 2).mean(0)
# %% wrong: multiplied by the mask, NaN times 0 is NaN -> estimate-hidden
def estimate_fisher(gradients, mask):
    return ((gradients * mask[..., None]).sum(1) ** 2).mean(0)
# %% wrong: summed over completions -> estimate-visible, estimate-hidden
def estimate_fisher(gradients, mask):
    g = torch.where(mask.bool()[..., None], gradients, 0.0).sum(1)
    return (g**2).sum(0)
# %% wrong: divided by all tokens -> estimate-hidden
def estimate_fisher(gradients, mask):
    g = torch.where(mask.bool()[..., None], gradients, 0.0).sum(1)
    return (g**2).sum(0) / mask.sum()
# %% wrong: a variance about the mean score -> estimate-visible, estimate-hidden
def estimate_fisher(gradients, mask):
    return torch.where(mask.bool()[..., None], gradients, 0.0).sum(1).var(0)
