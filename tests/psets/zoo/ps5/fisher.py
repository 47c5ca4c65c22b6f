# %% right: a variance when the labels are the policy's own
def fisher(theta, features, labels=None):
    p = (features @ theta).softmax(0)
    q = p if labels is None else labels
    m = p @ features
    return q @ features**2 - 2 * m * (q @ features) + m**2
# %% right: autograd, one completion at a time
def fisher(theta, features, labels=None):
    t = theta.clone().requires_grad_()
    logp = torch.log_softmax(features @ t, 0)
    q = logp.detach().exp() if labels is None else labels
    return sum(q[v] * torch.autograd.grad(logp[v], t, retain_graph=True)[0] ** 2 for v in range(len(q)))
# %% wrong: all completions alike -> fisher-hidden
def fisher(theta, features, labels=None):
    p = (features @ theta).softmax(0)
    s = (features - p @ features) ** 2
    return s.mean(0) if labels is None else labels @ s
# %% wrong: the data labels ignored -> fisher-labels
def fisher(theta, features, labels=None):
    p = (features @ theta).softmax(0)
    return p @ (features - p @ features) ** 2
# %% wrong: batch-mean, the square of the expected score -> fisher-visible, fisher-hidden, fisher-labels
def fisher(theta, features, labels=None):
    p = (features @ theta).softmax(0)
    q = p if labels is None else labels
    return (q @ (features - p @ features)) ** 2
# %% wrong: features not centred -> fisher-visible, fisher-hidden, fisher-labels
def fisher(theta, features, labels=None):
    p = (features @ theta).softmax(0)
    return (p if labels is None else labels) @ features**2
# %% wrong: centred by the data's mean -> fisher-labels
def fisher(theta, features, labels=None):
    q = (features @ theta).softmax(0) if labels is None else labels
    return q @ (features - q @ features) ** 2
# %% wrong: gradient of the probability -> fisher-hidden, fisher-labels
def fisher(theta, features, labels=None):
    p = (features @ theta).softmax(0)
    q = p if labels is None else labels
    return q @ (p[:, None] * (features - p @ features)) ** 2
# %% wrong: divided by the number of completions -> fisher-hidden, fisher-labels
def fisher(theta, features, labels=None):
    p = (features @ theta).softmax(0)
    q = p if labels is None else labels
    return q @ (features - p @ features) ** 2 / len(q)
