# %% right: part by part
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    parts = {"frozen": frozen * size, "weights": 4 * trained, "gradients": 4 * trained, "moments": 8 * trained}
    if checkpointing:
        parts["inputs"], parts["one layer"] = layers * tokens * inputs, tokens * kept
    else:
        parts["activations"] = layers * tokens * kept
    return sum(parts.values())
# %% right: a layer at a time
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    total = size * frozen + 16 * trained
    for _ in range(layers):
        total += tokens * (inputs if checkpointing else kept)
    return total + (tokens * kept if checkpointing else 0)
# %% wrong: one moment -> bytes-hidden, bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    a = layers * inputs + kept if checkpointing else layers * kept
    return frozen * size + 12 * trained + a * tokens
# %% wrong: gradients forgotten along with the weights -> bytes-hidden, bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    a = layers * inputs + kept if checkpointing else layers * kept
    return frozen * size + 8 * trained + a * tokens
# %% wrong: gradients and moments of the frozen ones too -> bytes-visible, bytes-hidden, bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    a = layers * inputs + kept if checkpointing else layers * kept
    return 4 * frozen * size + 16 * trained + a * tokens
# %% wrong: trained ones in the base's precision -> bytes-hidden, bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    a = layers * inputs + kept if checkpointing else layers * kept
    return frozen * size + 4 * size * trained + a * tokens
# %% wrong: activations of one layer only -> bytes-hidden
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    a = layers * inputs + kept if checkpointing else kept
    return frozen * size + 16 * trained + a * tokens
# %% wrong: activations do not grow with tokens -> bytes-visible, bytes-hidden, bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    a = layers * inputs + kept if checkpointing else layers * kept
    return frozen * size + 16 * trained + a
# %% wrong: the recomputed layer forgotten -> bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    return frozen * size + 16 * trained + layers * (inputs if checkpointing else kept) * tokens
# %% wrong: checkpointing keeps everything and the inputs -> bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    return frozen * size + 16 * trained + layers * (kept + inputs * checkpointing) * tokens
# %% wrong: checkpointing ignored -> bytes-checkpointing
def step_bytes(frozen, trained, size, layers, kept, inputs, tokens, checkpointing=False):
    return frozen * size + 16 * trained + layers * kept * tokens
