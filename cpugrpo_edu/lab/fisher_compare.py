"""How alike are two estimates of the Fisher information?"""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor


def parameter_kind(name: str) -> str:
    """ "embedding", "head", "norm", "attention", "mlp" or "other", from a parameter's name."""
    kinds = {
        "embedding": ("embed", "wte", "wpe"),
        "head": ("lm_head",),
        "norm": ("norm", "ln_"),
        "attention": ("attn", "attention"),
        "mlp": ("mlp",),
    }
    return next((kind for kind, keys in kinds.items() if any(k in name for k in keys)), "other")


def compare_fishers(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Compare two Fishers of the same parameters, in all and by kind of parameter.

    Each entry ("all", "attention", ...) holds: ``pearson_log`` and ``spearman``, the
    correlations of log values over entries that are positive in both (NaN if one is
    constant); ``cosine`` of the raw vectors; ``scale_ratio`` = mean(a) / mean(b);
    ``share_positive`` of the entries; ``entries``, their number. EWC depends on all of
    them: ranks decide *which* parameters are held, the scale decides *how hard*.
    """
    if a.keys() != b.keys() or any(a[n].shape != b[n].shape for n in a) or not a:
        raise ValueError(
            f"the two Fishers cover {len(a)} and {len(b)} parameters with different names or "
            "shapes, or none; they must be the same: compute both on the same model"
        )
    names: dict[str, list[str]] = {"all": list(a)}
    for name in a:
        names.setdefault(parameter_kind(name), []).append(name)
    return {
        kind: _compare(*(torch.cat([f[n].flatten().double() for n in ns]) for f in (a, b)))
        for kind, ns in names.items()
    }


def _compare(x: Tensor, y: Tensor) -> dict[str, float]:
    positive = (x > 0) & (y > 0)
    log_x, log_y = x[positive].log(), y[positive].log()
    ranks = [torch.from_numpy(rankdata(v.numpy())) for v in (log_x, log_y)]
    return {
        "pearson_log": _pearson(log_x, log_y),
        "spearman": _pearson(*ranks),
        "cosine": (x @ y / (x.norm() * y.norm())).item(),
        "scale_ratio": (x.mean() / y.mean()).item(),
        "share_positive": positive.double().mean().item(),
        "entries": float(len(x)),
    }


def _pearson(x: Tensor, y: Tensor) -> float:
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()
