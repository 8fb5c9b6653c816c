"""Owns attribution patching: gradients in place of the runs of a patching sweep, for nodes and edges.

A node is a value at a position, an edge what one component adds to what another reads. The effect of
patching either is estimated by gradient × (clean - corrupted), to first order; with several steps, by
the mean gradient on the way from one to the other (integrated gradients).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..envoy.names import write_name
from ..tracing.errors import InputError, ShapeError, UnavailableNameError
from ..tracing.proxy import apply
from .names import get_act_name
from .patching import Metric, can_record, check_name, prompt_of, record_hooks

#: Runs of one block whose gradients are kept at once, where gradients are integrated.
RUNS = 256

_HEADED = ("q", "k", "v", "z", "rot_q", "rot_k")
#: Which axes of a value [batch, ...] are summed, by the end of its name.
_SUMMED: dict[str, str] = {
    **dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), "bpd->p"),
    **dict.fromkeys(_HEADED, "bphd->ph"),
    "pattern": "bhqk->hqk",
    "post": "bpm->pm",
}
DEFAULT_NAMES = ("resid_pre", "attn_out", "mlp_out", "z")


def attribution_patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    names: Sequence[str] = DEFAULT_NAMES,
    steps: int = 1,
) -> dict[str, torch.Tensor]:
    """How far each value moves the metric if it is patched from the clean into the corrupted run.

    It estimates what `generic_activation_patch` measures, less the metric of the corrupted run, from a
    clean forward, a corrupted forward and one backward for all layers together.

    Args:
        model: a HookedTransformer.
        clean, corrupted: text, texts or ids, of one shape.
        metric: from logits [batch, pos, d_vocab] to one number that has a gradient.
        names: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v",
            "pattern", "post".
        steps: with more than one, gradients are taken at the middles of so many steps on the straight
            line from a layer's corrupted to its clean value, each in a run of its own. The sum over
            positions then tends to the exact effect of patching all of them at once.

    Returns:
        By name: [layer, pos] for vectors of the stream; [layer, pos, head] for z, q, k, v;
        [layer, head, query, key] for patterns; [layer, pos, neuron] for post. Summed over the batch.

    Raises:
        InputError: an unknown name, or a metric without a gradient.
        ShapeError: prompts of two shapes.
        UnavailableNameError: the model has no such place.

    Source: Nanda 2023, Attribution Patching; Kramár et al. 2024, AtP*; for steps, Sundararajan et al.
    2017, Axiomatic Attribution for Deep Networks, and Marks et al. 2024, Sparse Feature Circuits.
    """
    for name in names:
        if name not in _SUMMED:
            raise InputError(f"attribution is known for {', '.join(_SUMMED)}, not {name!r}")
    if steps < 1:
        raise InputError(f"steps={steps}: there is 1 or more")
    runs = _Runs(model, clean, corrupted, metric)
    layers = range(len(model._vocabulary))
    places = {(name, i): get_act_name(name, i) for name in dict.fromkeys(names) for i in layers}
    for full in places.values():
        check_name(model, full)
    nodes = [(key, *model._meant[full]) for key, full in places.items()]
    if steps == 1:
        found = _by_gradient(runs, nodes)
    else:
        each = max(1, RUNS // steps)
        found = {}
        for start in range(0, len(nodes), each):
            found.update(_integrated(runs, nodes[start : start + each], steps))
    return {
        name: torch.stack([found[name, i].value.detach() for i in layers])
        for name in dict.fromkeys(names)
    }


#: A node's key (short name, layer), and the layer and unified name of its place.
_Node = tuple[tuple[str, int], int, str]


class _Runs:
    """The clean and the corrupted prompt, and a metric that is recorded where it can be."""

    def __init__(self, model: Any, clean: Any, corrupted: Any, metric: Metric) -> None:
        self.model, self.names = model, model._vocabulary
        self.clean, self.corrupted = prompt_of(model, clean), prompt_of(model, corrupted)
        shapes = [list(one["input_ids"].shape) for one in (self.clean, self.corrupted)]
        if shapes[0] != shapes[1]:
            raise ShapeError(
                f"The clean prompt has the shape {shapes[0]} and the corrupted one {shapes[1]}: "
                "attribution compares them position by position."
            )
        recorded = can_record(
            model, self.corrupted, lambda tracer: metric(tracer.output.logits).sum().save()
        )
        self._metric = metric
        self._recorded = recorded

    def read(self, layer: int, name: str) -> Any:
        return self.names.read(layer, name)

    def write(self, layer: int, name: str, value: Any) -> None:
        write_name(self.model.model, self.names, layer, name, value)

    def apart(self, layer: int, name: str) -> Any:
        """What is at a name, as a value that all that follows is made of, not a view of it."""
        value = self.read(layer, name).clone()
        self.write(layer, name, value)
        return value

    def metric(self, tracer: Any) -> Any:
        """The metric of an invoke, as a number whose gradient can be asked for."""
        logits = tracer.output.logits
        value = self._metric(logits) if self._recorded else apply(self._metric, logits)
        return apply(_number, value)


def gradients_of(total: Any, values: list[Any]) -> list[Any]:
    """Gradients of a number by values; parameters get none, as they would by `backward`."""
    return list(torch.autograd.grad(total, values))


def _number(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        what = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"the metric gives one number as a tensor, not {what}")
    if not value.requires_grad:
        raise InputError("the metric has no gradient: make it of torch's functions")
    return value.reshape(())


def _by_gradient(runs: _Runs, nodes: Sequence[_Node]) -> dict[tuple[str, int], Any]:
    """Gradients at the corrupted run: one batch of two prompts, and one backward."""
    with torch.enable_grad(), runs.model.model.trace() as tracer:
        with tracer.invoke(**runs.clean):
            record_hooks(runs.model)
            clean = {key: runs.read(layer, own).detach() for key, layer, own in nodes}
        with tracer.invoke(**runs.corrupted):
            record_hooks(runs.model)
            corrupted = {key: runs.apart(layer, own) for key, layer, own in nodes}
            gradients = gradients_of(runs.metric(tracer), list(corrupted.values()))
            found = {
                key: apply(_score, clean[key], value, [gradient], _SUMMED[key[0]]).save()
                for (key, value), gradient in zip(corrupted.items(), gradients, strict=True)
            }
    return found


def _integrated(runs: _Runs, nodes: Sequence[_Node], steps: int) -> dict[tuple[str, int], Any]:
    """Mean gradients between the corrupted and the clean value of each node.

    The rows of a batch do not feel each other, so one backward of the sum of all metrics has the
    gradients of each.
    """
    with torch.enable_grad(), runs.model.model.trace() as tracer:
        ends = []
        for prompt in (runs.clean, runs.corrupted):
            with tracer.invoke(**prompt):
                record_hooks(runs.model)
                ends.append({key: runs.read(layer, own).detach() for key, layer, own in nodes})
        clean, corrupted = ends
        points: dict[tuple[str, int], list[Any]] = {key: [] for key, *_ in nodes}
        found: dict[tuple[str, int], Any] = {}
        total: Any = 0
        for number, (key, layer, own) in enumerate(nodes):
            for step in range(steps):
                with tracer.invoke(**runs.corrupted):
                    record_hooks(runs.model)
                    part = (step + 0.5) / steps
                    point = (corrupted[key] * (1 - part) + clean[key] * part).detach()
                    points[key].append(point)
                    runs.write(layer, own, point)
                    total = total + runs.metric(tracer)
                    if number + 1 < len(nodes) or step + 1 < steps:
                        continue
                    each = gradients_of(total, [v for values in points.values() for v in values])
                    for place, one in enumerate(points):
                        mine = each[place * steps : (place + 1) * steps]
                        given = (clean[one], corrupted[one], mine, _SUMMED[one[0]])
                        found[one] = apply(_score, *given).save()
    return found


def _score(
    clean: torch.Tensor, corrupted: torch.Tensor, gradients: list[torch.Tensor], axes: str
) -> torch.Tensor:
    gradient = torch.stack([one.detach() for one in gradients]).mean(0)
    return torch.einsum(axes, (clean - corrupted.detach()) * gradient)


# -------------------------------------------------------------------- edges


@dataclasses.dataclass(frozen=True)
class EdgeAttribution:
    """How far each edge moves the metric if it is patched.

    Attributes:
        scores: [sender, receiver]; 0 where the sender is not before the receiver.
        exists: which edges there are, booleans of that shape.
        senders: "embed", "pos_embed", "L0H0", …, "L0MLP", ….
        receivers: "L0H0.q", …, "L0H0.k" (keys and values counted as the model has them), "L0MLP", …,
            "logits".
    """

    scores: torch.Tensor
    exists: torch.Tensor
    senders: list[str]
    receivers: list[str]

    def __getitem__(self, edge: tuple[str, str]) -> float:
        sender, receiver = edge
        for name, known in ((sender, self.senders), (receiver, self.receivers)):
            if name not in known:
                raise InputError(f"no end of an edge is called {name!r}: {', '.join(known[:4])}, …")
        return float(self.scores[self.senders.index(sender), self.receivers.index(receiver)])

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """The edges of the largest absolute scores: sender, receiver, score."""
        flat = self.scores.masked_fill(~self.exists, 0).flatten()
        order = flat.abs().argsort(descending=True)[: min(count, int(self.exists.sum()))]
        width = len(self.receivers)
        return [
            (self.senders[int(i) // width], self.receivers[int(i) % width], float(flat[i]))
            for i in order
        ]


def edge_attribution_patch(
    model: Any, clean: Any, corrupted: Any, metric: Metric, steps: int = 1
) -> EdgeAttribution:
    """Edge attribution patching: (clean - corrupted) of what a sender adds to the stream, times the
    gradient of the metric by what a receiver reads of the stream.

    Senders are heads, MLPs and embeddings; receivers the queries, keys and values of heads before their
    norm, the MLPs before theirs, and the final stream. Summed over batch, positions and d_model. Where
    a norm stands between attention and the stream (Gemma 2), what a head adds is behind it, by the
    scale of each run.

    Args:
        model: a HookedTransformer.
        clean, corrupted: text, texts or ids, of one shape.
        metric: from logits [batch, pos, d_vocab] to one number that has a gradient.
        steps: 1 takes the gradients at the corrupted run. More average those of runs whose embeddings
            are k/steps of the way to the clean ones, k = 1 … steps (EAP-IG).

    Raises:
        InputError: a metric without a gradient.
        ShapeError: prompts of two shapes.
        UnavailableNameError: an architecture without norms in front of attention (OLMo 2), without
            attention, or whose stream is no sum (BERT).

    Source: Syed et al. 2023, Attribution Patching Outperforms Automated Circuit Discovery (EAP); Hanna
    et al. 2024, Have Faith in Faithfulness (EAP-IG).
    """
    if steps < 1:
        raise InputError(f"steps={steps}: there is 1 or more")
    runs = _Runs(model, clean, corrupted, metric)
    count = len(runs.names)
    _check_edges(model)
    embeddings = ["embed", *(["pos_embed"] if "hook_pos_embed" in model._meant else [])]

    def senders() -> list[Any]:
        """[batch, pos, n, d_model]: embeddings, then heads and MLP of each layer."""
        stream = runs.read(0, "resid_pre")
        positions = [runs.read(-1, "pos_embed") for _ in embeddings[1:]]
        # Whatever a model does to its embeddings (scales, norms) is that of the tokens'.
        parts = [stream - positions[0] if positions else stream, *positions]
        found = [one.detach().unsqueeze(2) for one in parts]
        for i in range(count):
            found.append(_added_by_heads(runs, i).detach())
            found.append(runs.read(i, "mlp_out").detach().unsqueeze(2))
        return found

    scores: list[Any] = []
    with torch.enable_grad(), model.model.trace() as tracer:
        with tracer.invoke(**runs.clean):
            record_hooks(model)
            theirs, start = senders(), runs.read(0, "resid_pre").detach()
        with tracer.invoke(**runs.corrupted):
            record_hooks(model)
            own, from_ = senders(), runs.read(0, "resid_pre").detach()
        changes = [apply(_change, *pair) for pair in zip(theirs, own, strict=True)]
        total: Any = 0
        read: list[list[Any]] = []
        for step in range(steps):
            with tracer.invoke(**runs.corrupted):
                record_hooks(model)
                if steps > 1:
                    part = (step + 1) / steps
                    runs.write(0, "resid_pre", from_ * (1 - part) + start * part)
                read.append(_readers(runs))
                total = total + runs.metric(tracer)
                if step + 1 == steps:
                    each = gradients_of(total, [value for values in read for value in values])
                    for number, (before, _) in enumerate(_order(runs, len(embeddings))):
                        mine = each[number :: len(read[0])]
                        scores.append(apply(_edges, changes[:before], mine).save())
    return _assembled(runs, embeddings, [one.value for one in scores])


def _check_edges(model: Any) -> None:
    """Refuse layers that have no edges."""
    names = model._vocabulary
    for i in range(len(names)):
        if names.architecture.block(i).post_norm:
            raise UnavailableNameError(
                f"the stream of {names.kind} is normalized behind each attention and MLP, so that it "
                "is no sum of what senders add."
            )
        for name in ("result", "q_input", "mlp_out"):
            check_name(model, get_act_name(name, i))


def _added_by_heads(runs: _Runs, layer: int) -> Any:
    """What each head adds to the stream, [batch, pos, head, d_model]."""
    found = runs.read(layer, "head_out")
    norm = runs.names.architecture.block(layer).norms.get("ln1_post")
    if norm is None:
        return found
    found = found - found.mean(-1, keepdim=True) if norm.kind == "LN" else found
    found = found / runs.read(layer, "ln1_post_scale").unsqueeze(-1)
    weights = runs.model.model.layers[layer]
    return found * (weights["ln1_post.w"] + norm.offset) if "ln1_post.w" in weights else found


def _order(runs: _Runs, embeddings: int) -> list[tuple[int, str]]:
    """Receivers as `_readers` gives them: how many groups of senders are before each, its label."""
    found = []
    for i in range(len(runs.names)):
        before = embeddings + 2 * i
        found += [(before, f"L{i}H.{which}") for which in "qkv"]
        parallel = runs.names.architecture.block(i).parallel
        found.append((before if parallel else before + 1, f"L{i}MLP"))
    return [*found, (embeddings + 2 * len(runs.names), "logits")]


def _readers(runs: _Runs) -> list[Any]:
    """What each receiver reads, as a value of its own: nothing else depends on it."""
    found: list[Any] = []
    for i in range(len(runs.names)):
        for which in "qkv":
            found.append(runs.apart(i, f"{which}_input"))
        block = runs.names.architecture.block(i)
        stream = runs.read(i, "resid_pre" if block.parallel else "resid_mid").clone()
        norm = block.norms.get("ln2") or block.norms.get("ln1")
        entered = stream
        if norm is not None:
            path = f"{runs.names.layer_path(i)}.{norm.path}"
            entered = runs.model.model.get(path)(stream)
        runs.write(i, "mlp_in", entered)
        found.append(stream)
    return [*found, runs.apart(len(runs.names) - 1, "resid_post")]


def _change(clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    return (clean - corrupted).detach()


def _edges(changes: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
    """[sender, receiver], of changes [batch, pos, n, d_model] and gradients [batch, pos, d_model] or
    [batch, pos, head, d_model]."""
    gradient = torch.stack([one.detach() for one in gradients]).mean(0)
    gradient = gradient.unsqueeze(2) if gradient.ndim == 3 else gradient
    return torch.cat(
        [
            torch.einsum("bpsd,bprd->sr", one.expand(len(gradient), *one.shape[1:]), gradient)
            for one in changes
        ]
    )


def _assembled(runs: _Runs, embeddings: list[str], parts: list[torch.Tensor]) -> EdgeAttribution:
    heads = runs.model.model.cfg.n_heads
    senders = list(embeddings)
    for i in range(len(runs.names)):
        senders += [*(f"L{i}H{head}" for head in range(heads)), f"L{i}MLP"]
    labels: list[str] = []
    for (_, label), part in zip(_order(runs, len(embeddings)), parts, strict=True):
        layer, dot, which = label.partition("H.")
        several = [f"{layer}H{head}.{which}" for head in range(part.shape[1])]
        labels += several if dot else [label]
    scores = torch.cat(
        [torch.nn.functional.pad(one, (0, 0, 0, len(senders) - len(one))) for one in parts], 1
    )
    exists = torch.cat(
        [
            (torch.arange(len(senders)) < len(one))[:, None].expand(-1, one.shape[1])
            for one in parts
        ],
        1,
    )
    return EdgeAttribution(scores, exists.to(scores.device), senders, labels)
