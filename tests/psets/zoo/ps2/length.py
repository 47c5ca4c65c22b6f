# %% right: by cases
def length_penalty(tokens, soft, hard, finished):
    if not finished or tokens >= hard:
        return -1.0
    if tokens <= soft:
        return 0.0
    return (soft - tokens) / (hard - soft)
# %% right: numpy
def length_penalty(tokens, soft, hard, finished):
    import numpy as np
    return float(np.interp(tokens, [soft, hard], [0.0, -1.0])) if finished else -1.0
# %% wrong: a cliff at soft -> length-hidden
def length_penalty(tokens, soft, hard, finished):
    return -1.0 if not finished or tokens > soft else 0.0
# %% wrong: not limited below -> length-visible, length-hidden
def length_penalty(tokens, soft, hard, finished):
    return min(0.0, (soft - tokens) / (hard - soft)) if finished else -1.0
# %% wrong: pays a bonus for short ones -> length-visible
def length_penalty(tokens, soft, hard, finished):
    return max(-1.0, (soft - tokens) / (hard - soft)) if finished else -1.0
# %% wrong: cut-off completions go free -> length-cut
def length_penalty(tokens, soft, hard, finished):
    return -min(1.0, max(0.0, (tokens - soft) / (hard - soft)))
# %% wrong: positive sign -> length-visible, length-hidden
def length_penalty(tokens, soft, hard, finished):
    return min(1.0, max(0.0, (tokens - soft) / (hard - soft))) if finished else 1.0
# %% wrong: line from zero instead of from soft -> length-hidden
def length_penalty(tokens, soft, hard, finished):
    if not finished or tokens >= hard:
        return -1.0
    return 0.0 if tokens <= soft else -tokens / hard
