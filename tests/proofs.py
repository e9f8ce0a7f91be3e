"""Whether scaling the weights that were found scales a layer's scores, and nothing else, inside a whole model.

`hnf_attention.interventions.trial` asks the same of one module alone. Here the inputs are those of the model.
"""

import torch
from torch.overrides import TorchFunctionMode

from hnf_attention import instrument
from hnf_attention.interventions import trial


class _Softmaxes(TorchFunctionMode):
    """Keeps what is softmaxed while one module runs."""

    def __init__(self, module):
        super().__init__()
        self.found, self.running = [], False
        self.hooks = [
            module.register_forward_pre_hook(lambda *_: setattr(self, "running", True)),
            module.register_forward_hook(lambda *_: setattr(self, "running", False)),
        ]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.running and getattr(function, "__name__", "") == "softmax":
            self.found.append((args[0] if args else kwargs["input"]).double())
        return function(*args, **kwargs or {})

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)


def by_head(scores, heads):
    """(B, H, M, N) of scores whose heads are a dimension before the last two, or None."""
    places = [dim for dim, size in enumerate(scores.shape[:-2]) if size == heads and dim > 0]
    if not places and scores.dim() == 3 and scores.shape[0] % heads == 0:
        return scores.unflatten(0, (-1, heads))
    if not places:
        return None
    # Blocks of a sequence (LongT5) count as more rows.
    return scores.movedim(places[-1], 1).flatten(2, -2)


def first_tensor(output):
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output.double()


def contradiction(model, arguments, layer, projections):
    """What contradicts the projections of the layer, None for nothing; and how its scores were seen."""
    heads, how = projections.num_heads, set()
    measured = []

    def run():
        measured.clear()
        torch.manual_seed(0)  # ViLT draws patches
        softmaxes = _Softmaxes(model.get_submodule(layer))
        with torch.no_grad(), softmaxes:
            output = first_tensor(model(**arguments))
        first = measured[0]
        if first.query is not None:
            how.add("queries and keys")
            key = first.key.double().repeat_interleave(heads // first.key.shape[1], 1)
            return first.query.double() @ key.transpose(-1, -2), output
        scores = [x for x in (by_head(x, heads) for x in softmaxes.found) if x is not None]
        if scores:
            how.add("softmax")
            return scores[0], output
        how.add("statistics")
        rows = first.rows
        return torch.stack([rows.max_logit, rows.min_logit], -1).double(), output

    with instrument(model, mode="probe") as handle:
        handle.on_measure = lambda x: measured.append(x) if x.layer == layer else None
        return trial.contradiction(run, projections), how
