"""Owns `verify_names`: every unified name of a loaded model checked against what it promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from ..envoy.names import Missing, read_name
from ..tracing.errors import GraftworkError, UnavailableNameError
from .vocabulary import Vocabulary

#: Whole numbers: their change is not asked to change the logits.
_COUNTED = frozenset({"expert_indices"})

#: What a wrong place may raise, while it is recorded or run.
_FAILURES = (GraftworkError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check of one name.

    Attributes:
        layer: -1 for the model's own names.
        reason: what was found; None where the promise holds.
    """

    layer: int
    name: str
    promise: str
    reason: str | None = None

    @property
    def holds(self) -> bool:
        return self.reason is None


class NamesReport:
    """What `verify_names` found.

    Attributes:
        findings: each check.
        wrong: those whose promise does not hold.
        missing: names that the architecture does not have, with the reason.
    """

    def __init__(self, kind: str, findings: list[Finding], missing: dict[str, str]) -> None:
        self.kind = kind
        self.findings = findings
        self.wrong = [one for one in findings if not one.holds]
        self.missing = missing

    @property
    def ok(self) -> bool:
        return not self.wrong

    @property
    def names(self) -> list[str]:
        """The names for which every promise holds."""
        wrong = {one.name for one in self.wrong}
        return list(dict.fromkeys(f.name for f in self.findings if f.name not in wrong))

    def and_also(self, others: Iterable[NamesReport]) -> NamesReport:
        """One report of this and others."""
        findings, missing = list(self.findings), dict(self.missing)
        for other in others:
            findings += other.findings
            missing.update(other.missing)
        return NamesReport(self.kind, findings, missing)

    def __str__(self) -> str:
        lines = [f"{self.kind}: {len(self.names)} names hold in {len(self.findings)} checks"]
        for one in self.wrong:
            where = "model" if one.layer < 0 else f"layer {one.layer}"
            lines.append(f"  wrong: {where}, {one.name}: {one.promise}: {one.reason}")
        lines += [f"  missing: {name}: {reason}" for name, reason in self.missing.items()]
        return "\n".join(lines)

    __repr__ = __str__


Values = dict[tuple[int, str], torch.Tensor]


class Verifier:
    """Reads every name of a model in small forwards, and compares.

    Args:
        vocabulary: the names.
        args, kwargs: a prompt, as for `trace`; one row.
        layers: which layers; None for all.
        edited: the names, with their layers, whose edits are tried; None for all.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: Iterable[int] | None = None,
        edited: Iterable[tuple[int, str]] | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.model = vocabulary.root
        self.args, self.kwargs = args, kwargs
        self.layers = list(range(len(vocabulary)) if layers is None else layers)
        self.edited = None if edited is None else set(edited)
        self.findings: list[Finding] = []
        self.missing: dict[str, str] = {}

    def run(self) -> NamesReport:
        """Check everything."""
        with self.vocabulary.verifying():
            return self._run()

    def _run(self) -> NamesReport:
        wanted = self._wanted()
        self.values = self._read(wanted)
        gone = []
        for (layer, name), value in self.values.items():
            self._check_shape(layer, name, value)
            if type(value) is not torch.Tensor and not hasattr(value, "shape"):
                gone.append((layer, name))
        for key in gone:
            del self.values[key]
        for layer in self.layers:
            self._check_layer(layer)
        self._check_own()
        self._check_edits()
        return NamesReport(self.vocabulary.kind, self.findings, self.missing)

    # ---------------------------------------------------------------- reading

    def _wanted(self) -> list[tuple[int, str]]:
        found = []
        for layer in (*self.layers, -1):
            places = (
                self.vocabulary.model_places() if layer < 0 else self.vocabulary.layer_places(layer)
            )
            for name, place in places.items():
                if isinstance(place, Missing):
                    self.missing[name] = place.reason
                else:
                    found.append((layer, name))
        return found

    def _trace(self, wanted: list[tuple[int, str]]) -> Values:
        saved = {}
        with self.model.trace(*self.args, **self.kwargs):
            for layer, name in wanted:
                saved[layer, name] = read_name(self.model, self.vocabulary, layer, name).save()
        return {key: box.value for key, box in saved.items()}

    def _read(self, wanted: list[tuple[int, str]]) -> Values:
        try:
            return self._trace(wanted)
        except _FAILURES:
            pass  # one of them is wrong: which, is found by reading each alone
        values: Values = {}
        for layer, name in wanted:
            try:
                values.update(self._trace([(layer, name)]))
            except _FAILURES as error:
                self._note(layer, name, "exists", f"{type(error).__name__}: {error}".split("\n")[0])
        return values

    # ---------------------------------------------------------------- checks

    def _note(self, layer: int, name: str, promise: str, reason: str | None = None) -> None:
        self.findings.append(Finding(layer, name, promise, reason))

    def _check_shape(self, layer: int, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            self._note(layer, name, "is a tensor", f"it is {type(value).__name__}")
            return
        expected = self.vocabulary.shape(name)
        reason = None
        if expected is not None:
            resid = self.values.get((max(layer, 0), "resid_pre"))
            known = {"batch": 1}
            if resid is not None and not name.startswith("cross_"):
                known.update(token=resid.shape[1], query=resid.shape[1], key=resid.shape[1])
            sizes = [known.get(axis, self.vocabulary.size(axis)) for axis in expected]
            fits = len(sizes) == value.ndim and all(
                size is None or size == found
                for size, found in zip(sizes, value.shape, strict=True)
            )
            if not fits:
                reason = f"it is {list(value.shape)}, not {sizes}"
        if reason is None and value.isnan().any():
            reason = "it has values that are not numbers"
        self._note(layer, name, "has its shape", reason)

    def _equal(self, layer: int, name: str, promise: str, one: Any, other: Any) -> None:
        if one.shape != other.shape:
            self._note(layer, name, promise, f"shapes {list(one.shape)} and {list(other.shape)}")
            return
        one, other = one.double(), other.double().to(one.device)
        half = self.vocabulary.sizes.dtype in (torch.float16, torch.bfloat16)
        size = max(float(other.abs().max()), 1e-6)
        error = float((one - other).abs().max()) / size
        limit = 5e-2 if half else 1e-3
        reason = None if error <= limit else f"they differ by {error:.1e} of their size"
        self._note(layer, name, promise, reason)

    def _get(self, layer: int, *names: str) -> list[Any] | None:
        found = [self.values.get((layer, name)) for name in names]
        return None if any(value is None for value in found) else found

    def _check_layer(self, layer: int) -> None:
        block = self.vocabulary.architecture.block(layer)
        weights = self.vocabulary.layer_weights(layer)
        self._check_stream(layer, block)
        found = self._get(layer, "pattern")
        if found:
            total = found[0].float().sum(-1)
            if "attn.sinks" in weights:
                reason = None if bool((total <= 1 + 1e-3).all()) else "rows sum to more than 1"
                self._note(
                    layer, "pattern", "rows sum to at most 1, the rest is the sink's", reason
                )
            else:
                self._equal(layer, "pattern", "rows sum to 1", total, torch.ones_like(total))
                scores = self._get(layer, "scores")
                if scores:
                    soft = torch.softmax(scores[0].float(), -1)
                    self._equal(layer, "scores", "softmax(scores) = pattern", soft, found[0])
        found = self._get(layer, "pattern", "v", "z")
        if found:
            pattern, v, z = found
            each = pattern.shape[1] // max(v.shape[2], 1)
            mixed = torch.einsum(
                "bhqk,bkhe->bqhe", pattern.double(), v.double().repeat_interleave(each, 2)
            )
            self._equal(layer, "z", "z = pattern · v", mixed, z)
        found = self._get(layer, "scores", "q", "k")
        if found:
            self._check_scores(layer, *found)
        found = self._get(layer, "head_out", "o_out")
        if found:
            total = found[0].sum(2)
            if "attn.b_O" in weights:
                total = total + weights["attn.b_O"]
            self._equal(layer, "head_out", "head_out sums to attention's output", total, found[1])
        for which in "qkv":
            found = self._get(layer, "attn_in", f"{which}_pre")
            key = f"attn.W_{which.upper()}"
            if found and key in weights:
                made = torch.einsum("btd,hde->bthe", found[0], weights[key].to(found[0].dtype))
                bias = f"attn.b_{which.upper()}"
                if bias in weights:
                    made = made + weights[bias]
                self._equal(layer, f"{which}_pre", f"{key} makes it of attn_in", made, found[1])
        self._check_projected(layer)
        first = "mlp.W_gate" if "mlp.W_gate" in weights else "mlp.W_in"
        self._check_linear(layer, "mlp_in", first, "mlp_pre")
        if first == "mlp.W_gate":
            self._check_linear(layer, "mlp_in", "mlp.W_in", "mlp_up")
        if not {"ln2_post"} & set(block.norms):
            self._check_linear(layer, "mlp_post", "mlp.W_out", "mlp_out", scaled=True)
        for norm in ("ln1", "ln2", "ln1_post", "ln2_post"):
            self._check_norm(layer, norm)
        found = self._get(layer, "expert_out", "experts_out")
        if found:
            self._equal(
                layer, "expert_out", "expert_out sums to experts_out", found[0].sum(2), found[1]
            )

    def _check_stream(self, layer: int, block: Any) -> None:
        ends = self._get(layer, "resid_pre", "resid_post")
        middle = self._get(layer, "resid_mid")
        first, second = (
            [(name, self.values[layer, name]) for name in names if (layer, name) in self.values]
            for names in (("attn_out", "mixer_out"), ("cross_attn_out", "mlp_out"))
        )
        sums: list[tuple[str, Any, Any]] = []
        if ends and middle and first:
            sums.append(("resid_mid", ends[0] + sum(v for _, v in first), middle[0]))
        if ends and middle and any(name == "mlp_out" for name, _ in second):
            sums.append(("resid_post", middle[0] + sum(v for _, v in second), ends[1]))
        if block.post_norm and middle:
            norms = [self._get(layer, f"{n}_in") for n in ("ln1_post", "ln2_post")]
            if all(norms):
                sums = [
                    (name, made, norms[0 if name == "resid_mid" else 1][0])  # type: ignore[index]
                    for name, made, _ in sums
                ]
        every = [*first, *second]
        whole = block.parallel and {"attn_out", "mlp_out"} <= {name for name, _ in every}
        alone = not middle and not block.parallel and [name for name, _ in every] == ["mixer_out"]
        if ends and (whole or alone):
            sums.append(("resid_post", ends[0] + sum(v for _, v in every), ends[1]))
        for name, made, there in sums:
            self._equal(layer, name, f"{name} is the sum of its parts", made, there)
        after = self._get(layer + 1, "resid_pre")
        here = self._get(layer, "resid_post")
        if after and here:
            self._equal(layer, "resid_post", "is the next resid_pre", here[0], after[0])

    def _check_projected(self, layer: int) -> None:
        """What is projected is what attention takes, where nothing is done to it on the way."""
        place = self.vocabulary.layer_places(layer).get("v")
        path = getattr(place, "path", "")
        prefix = self.vocabulary.layer_path(layer)
        attention = self.model.submodule(f"{prefix}.{path}" if path else prefix)
        normed = {n for n, c in attention.named_modules() if "norm" in type(c).__name__.lower()}
        own = {name.split(".")[-1] for name in normed}
        for which in "qkv":
            found = self._get(layer, f"{which}_pre", which)
            if not found or found[0].shape != found[1].shape:
                continue
            one, other = (value.double() for value in found)
            rotary = self.vocabulary.sizes.positional_embedding_type == "rotary"
            if which == "v":
                if any(name.startswith(("v_", "value")) for name in own):
                    continue
                limit = getattr(getattr(self.model, "config", None), "clip_qkv", None)
                if limit is not None:
                    one = one.clamp(-limit, limit)
                self._equal(layer, "v_pre", "v_pre = v", one, other)
            elif not own and not rotary:
                factor = float((one * other).sum() / (one * one).sum().clamp_min(1e-12))
                promise = f"{which}_pre = {which}, but for one factor"
                self._equal(layer, f"{which}_pre", promise, one * factor, other)
            elif not own:
                # Turned by its position, a head's vector keeps its length.
                one, other = (value.norm(dim=-1) for value in (one, other))
                one, other = (value / value.sum(-1, keepdim=True) for value in (one, other))
                promise = f"heads of {which} are as long as those of {which}_pre"
                self._equal(layer, f"{which}_pre", promise, one, other)

    def _check_scores(self, layer: int, scores: Any, q: Any, k: Any) -> None:
        """Scores are q · k times one factor, where nothing else is added."""
        sizes = self.vocabulary.sizes
        if sizes.positional_embedding_type in ("alibi", "relative") or sizes.attn_scores_soft_cap:
            return
        each = q.shape[2] // max(k.shape[2], 1)
        product = torch.einsum("bqhe,bkhe->bhqk", q.double(), k.double().repeat_interleave(each, 2))
        seen = scores > -1e4
        a, b = product[seen], scores.double()[seen]
        factor = float((a * b).sum() / (a * a).sum().clamp_min(1e-12))
        self._equal(layer, "q", "scores = q · k times a factor", a * factor, b)

    def _check_linear(
        self, layer: int, entered: str, weight: str, left: str, scaled: bool = False
    ) -> None:
        """What a weight makes of one name is another; with `scaled`, but for a factor by channel."""
        found = self._get(layer, entered, left)
        weights = self.vocabulary.layer_weights(layer)
        if not found or weight not in weights:
            return
        made = found[0] @ weights[weight].to(found[0].dtype)
        bias = weight.replace("W_", "b_")
        if bias in weights:
            made = made + weights[bias]
        if scaled and self.vocabulary.architecture.probed:
            factor = (made * found[1]).sum((0, 1)) / (made * made).sum((0, 1)).clamp_min(1e-12)
            made = made * factor
        self._equal(layer, left, f"{weight} makes it of {entered}", made, found[1])

    def _check_norm(self, layer: int, norm: str) -> None:
        found = self._get(layer, f"{norm}_normalized", f"{norm}_out", f"{norm}_in", f"{norm}_scale")
        if not found:
            return
        normalized, out, entered, scale = found
        if layer < 0:
            declared, weights = self.vocabulary.architecture.norm, self.vocabulary.model_weights()
        else:
            block = self.vocabulary.architecture.block(layer)
            declared, weights = block.norms.get(norm), self.vocabulary.layer_weights(layer)
        if declared is None:
            return
        made = normalized
        if f"{norm}.w" in weights:
            made = made * (weights[f"{norm}.w"] + declared.offset)
        if f"{norm}.b" in weights:
            made = made + weights[f"{norm}.b"]
        self._equal(layer, f"{norm}_normalized", "gain and bias give the norm's output", made, out)
        entered = entered.double()
        if declared.kind == "LN":
            entered = entered - entered.mean(-1, keepdim=True)
        self._equal(
            layer, f"{norm}_scale", "it divides the input", entered / scale.double(), normalized
        )

    def _check_own(self) -> None:
        weights = self.vocabulary.model_weights()
        found = self._get(-1, "unembed_in", "unembed_out")
        if found and "unembed.W_U" in weights:
            made = found[0] @ weights["unembed.W_U"].to(found[0].dtype)
            if "unembed.b_U" in weights:
                made = made + weights["unembed.b_U"]
            self._equal(-1, "unembed_out", "W_U makes it of unembed_in", made, found[1])
        self._check_norm(-1, "ln_final")
        last = max(self.layers, default=0)
        found = self._get(last, "resid_post")
        final = self._get(-1, "ln_final_in")
        if found and final and last == len(self.vocabulary) - 1:
            self._equal(-1, "ln_final_in", "is the last resid_post", found[0], final[0])

    # ---------------------------------------------------------------- edits

    def _logits(self, tracer: Any) -> Any:
        return tracer.output.logits

    def _check_edits(self) -> None:
        """A change of each name changes the logits."""
        names = [key for key in self.values if key[1] not in _COUNTED and key[1] != "embed"]
        if self.edited is not None:
            names = [key for key in names if key in self.edited]
        changed: dict[tuple[int, str], Any] = {}
        generator = torch.Generator().manual_seed(0)

        def edit(key: tuple[int, str]) -> None:
            layer, name = key
            value = self.values[key]
            noise = torch.rand(value.shape, generator=generator).to(value.device, value.dtype)
            place = read_name(self.model, self.vocabulary, layer, name)
            place[...] = place * (1 + noise) + 0.1 * noise

        try:
            with self.model.trace(*self.args, **self.kwargs) as tracer:
                plain = self._logits(tracer).save()
            with self.model.trace() as tracer:
                for key in names:
                    with tracer.invoke(*self.args, **self.kwargs):
                        edit(key)
                        changed[key] = self._logits(tracer).save()
            results = {key: box.value for key, box in changed.items()}
        except _FAILURES:
            results = {}
            for key in names:
                try:
                    with self.model.trace(*self.args, **self.kwargs) as tracer:
                        edit(key)
                        box = self._logits(tracer).save()
                    results[key] = box.value
                except _FAILURES as error:
                    reason = f"{type(error).__name__}: {error}".split("\n")[0]
                    self._note(*key, "can be edited", reason)
        for key, logits in results.items():
            same = torch.allclose(logits.float(), plain.value.float(), rtol=1e-6, atol=1e-7)
            self._note(*key, "an edit changes the logits", "it changes nothing" if same else None)


def verify(
    vocabulary: Vocabulary,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layers: Iterable[int] | None = None,
    strict: bool = True,
    edited: Iterable[tuple[int, str]] | None = None,
) -> NamesReport:
    """Check every name of a vocabulary.

    Args:
        layers, edited: as for `Verifier`.

    Raises:
        UnavailableNameError: with `strict`, where a promise does not hold.
    """
    report = Verifier(vocabulary, args, kwargs, layers, edited).run()
    if strict and not report.ok:
        raise UnavailableNameError(str(report))
    return report
