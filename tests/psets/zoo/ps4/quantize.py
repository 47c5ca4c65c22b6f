# %% right: row by row
def quantize(w):
    q, s = torch.zeros(w.shape, dtype=torch.int8), torch.ones(len(w), dtype=w.dtype)
    for i, row in enumerate(w):
        if row.any():
            s[i] = row.abs().max() / 127
            q[i] = torch.round(row / s[i]).to(torch.int8)
    return q, s
def dequantize(q, scale):
    return torch.stack([s * row for s, row in zip(scale, q)])
# %% right: scaled to 127 first
def quantize(w):
    top = torch.maximum(w.amax(1), -w.amin(1))
    top = torch.where(top > 0, top, torch.ones_like(top))
    return (127 * w / top.unsqueeze(1)).round().clamp(-127, 127).char(), top / 127
def dequantize(q, scale):
    return torch.einsum("i,ij->ij", scale, q.to(scale.dtype))
# %% wrong: one scale for all rows -> quantize-hidden
def quantize(w):
    s = (w.abs().max() / 127).clamp(min=1e-30)
    return (w / s).round().to(torch.int8), s.repeat(len(w))
def dequantize(q, scale):
    return q * scale[:, None]
# %% wrong: cut off, not rounded -> quantize-hidden
def quantize(w):
    s = (w.abs().amax(1) / 127).clamp(min=1e-30)
    return (w / s[:, None] * 0.9999999).to(torch.int8), s
def dequantize(q, scale):
    return q * scale[:, None]
# %% wrong: 128 steps, the largest wraps around -> quantize-hidden
def quantize(w):
    s = (w.abs().amax(1) / 128).clamp(min=1e-30)
    return (w / s[:, None]).round().to(torch.int16).to(torch.int8), s
def dequantize(q, scale):
    return q * scale[:, None]
# %% wrong: max without the absolute value -> quantize-hidden
def quantize(w):
    s = (w.amax(1) / 127).clamp(min=1e-30)
    return (w / s[:, None]).round().clamp(-127, 127).to(torch.int8), s
def dequantize(q, scale):
    return q * scale[:, None]
# %% wrong: a scale for each column -> quantize-visible, quantize-hidden
def quantize(w):
    s = (w.abs().amax(0) / 127).clamp(min=1e-30)
    return (w / s).round().to(torch.int8), s
def dequantize(q, scale):
    return q * scale
# %% wrong: 255 steps for a symmetric range -> quantize-hidden
def quantize(w):
    s = (w.abs().amax(1) * 2 / 255).clamp(min=1e-30)
    return (w / s[:, None]).round().clamp(-128, 127).to(torch.int8), s
def dequantize(q, scale):
    return q * scale[:, None]
# %% wrong: a zero row divides by 0 -> quantize-zero
def quantize(w):
    s = w.abs().amax(1) / 127
    return (w / s[:, None]).round().to(torch.int8), s
def dequantize(q, scale):
    return q * scale[:, None]
# %% wrong: divides on the way back -> quantize-hidden
def quantize(w):
    s = (w.abs().amax(1) / 127).clamp(min=1e-30)
    return (w / s[:, None]).round().to(torch.int8), s
def dequantize(q, scale):
    return q / scale[:, None]
