# %% right: by the Jacobian of the softmax
def policy_gradient(theta, rewards):
    p = theta.softmax(0)
    return (torch.diag(p) - torch.outer(p, p)) @ rewards
# %% right: with exponentials
def policy_gradient(theta, rewards):
    e = torch.exp(theta - theta.max())
    p = e / e.sum()
    return p * rewards - p * torch.dot(p, rewards)
# %% wrong: no expected reward is taken off -> gradient-visible, gradient-hidden
def policy_gradient(theta, rewards):
    return theta.softmax(0) * rewards
# %% wrong: the baseline is the plain mean -> gradient-hidden
def policy_gradient(theta, rewards):
    return theta.softmax(0) * (rewards - rewards.mean())
# %% wrong: descends -> gradient-visible, gradient-hidden
def policy_gradient(theta, rewards):
    p = theta.softmax(0)
    return p * ((p * rewards).sum() - rewards)
# %% wrong: score not weighted by the probability -> gradient-hidden
def policy_gradient(theta, rewards):
    p = theta.softmax(0)
    return rewards - (p * rewards).sum()
# %% wrong: standardised rewards -> gradient-hidden
def policy_gradient(theta, rewards):
    p = theta.softmax(0)
    return p * (rewards - (p * rewards).sum()) / (rewards.std() + 1e-4)
# %% wrong: gradient of the logarithm of the expected reward -> gradient-hidden
def policy_gradient(theta, rewards):
    p = theta.softmax(0)
    value = (p * rewards).sum()
    return p * (rewards - value) / value
