# %% right: one flat vector
def ewc(theta, anchor, fisher, strength):
    held = [n for n in theta if n in fisher]
    flat = lambda d: torch.cat([d[n].reshape(-1) for n in held])
    move = flat(theta) - flat(anchor)
    gradient = {n: strength * fisher[n] * (t - anchor[n]) if n in fisher else 0 * t for n, t in theta.items()}
    return float(strength * torch.dot(flat(fisher) * move, move) / 2), gradient
# %% right: the Fisher filled up with zeros
def ewc(theta, anchor, fisher, strength):
    f = {n: fisher.get(n, torch.zeros_like(t)) for n, t in theta.items()}
    d = {n: t - anchor.get(n, t) for n, t in theta.items()}
    return sum((strength / 2 * f[n] * d[n] ** 2).sum().item() for n in f), {n: strength * f[n] * d[n] for n in f}
# %% wrong: penalty without 1/2 -> penalty-hidden, penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: theta[n] - anchor[n] for n in fisher}
    cost = sum(float((strength * fisher[n] * d[n] ** 2).sum()) for n in fisher)
    return cost, {n: strength * fisher[n] * d[n] if n in fisher else 0 * t for n, t in theta.items()}
# %% wrong: gradient keeps the 1/2 -> penalty-hidden, penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: theta[n] - anchor[n] for n in fisher}
    cost = sum(float((strength / 2 * fisher[n] * d[n] ** 2).sum()) for n in fisher)
    return cost, {n: strength / 2 * fisher[n] * d[n] if n in fisher else 0 * t for n, t in theta.items()}
# %% wrong: gradient is twice as large -> penalty-hidden, penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: theta[n] - anchor[n] for n in fisher}
    cost = sum(float((strength / 2 * fisher[n] * d[n] ** 2).sum()) for n in fisher)
    return cost, {n: 2 * strength * fisher[n] * d[n] if n in fisher else 0 * t for n, t in theta.items()}
# %% wrong: gradient towards the anchor -> penalty-visible, penalty-hidden, penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: anchor[n] - theta[n] for n in fisher}
    cost = sum(float((strength / 2 * fisher[n] * d[n] ** 2).sum()) for n in fisher)
    return cost, {n: strength * fisher[n] * d[n] if n in fisher else 0 * t for n, t in theta.items()}
# %% wrong: mean over parameters -> penalty-hidden, penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: theta[n] - anchor[n] for n in fisher}
    cost = sum(float((strength / 2 * fisher[n] * d[n] ** 2).mean()) for n in fisher)
    return cost, {n: strength * fisher[n] * d[n] if n in fisher else 0 * t for n, t in theta.items()}
# %% wrong: plain L2, the Fisher ignored -> penalty-hidden, penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: theta[n] - anchor[n] for n in fisher}
    cost = sum(float((strength / 2 * d[n] ** 2).sum()) for n in fisher)
    return cost, {n: strength * d[n] if n in fisher else 0 * t for n, t in theta.items()}
# %% wrong: lambda forgotten in the gradient -> penalty-hidden, penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: theta[n] - anchor[n] for n in fisher}
    cost = sum(float((strength / 2 * fisher[n] * d[n] ** 2).sum()) for n in fisher)
    return cost, {n: fisher[n] * d[n] if n in fisher else 0 * t for n, t in theta.items()}
# %% wrong: free parameters raise -> penalty-free
def ewc(theta, anchor, fisher, strength):
    d = {n: t - anchor[n] for n, t in theta.items()}
    return sum(float((strength / 2 * fisher[n] * d[n] ** 2).sum()) for n in d), {n: strength * fisher[n] * d[n] for n in d}
# %% wrong: changes its arguments -> penalty-free
def ewc(theta, anchor, fisher, strength):
    cost, gradient = 0.0, {}
    for n in theta:
        if n in fisher:
            gradient[n] = theta[n].sub_(anchor[n])
            cost += float(strength / 2 * (fisher[n] * gradient[n] ** 2).sum())
            gradient[n] = strength * fisher[n] * gradient[n]
        else:
            gradient[n] = 0 * theta[n]
    return cost, gradient
