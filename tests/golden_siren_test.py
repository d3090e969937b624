"""Stored outputs of SIREN's released code: nucleus entropies, peaks, the penalty and its gradient; see `golden_cases`.

Where the source is not exact, the tests allow for just that: it adds 1e-12 to the sum of a nucleus and inside its
logarithm, compares float64 entropies with a quantile in float32, its mass is a float32 number, it looks at the k most
probable ids only, and it counts rows without tokens in its mean over rows. Ids that tie where the mass is crossed are
cut in the order of a sort by the paper's definition as stored; here they stay together.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from golden_cases import BOTH, TOLERANCE, close, make_test
from toy import rollouts, signals, update

from jentropy import features, stats
from jentropy.mechanisms.siren import peak_weight, peaks, siren
from jentropy.nucleus import NucleusKind, nucleus_entropies

TAU = 0.8
EPSILON = 1e-12

strict_peaks = jax.jit(functools.partial(peaks, strict=True))
full_entropy = jax.jit(features.entropy)
paper_entropy = jax.jit(features.nucleus_entropy)


def of_dtype(array, precision):
    return jnp.asarray(array, np.float64 if precision == "f64" else np.float32)


@jax.jit
def _kept(logits, mass):
    """How much of each id is in the released code's nucleus, and all probabilities, `[B, T, V]`."""
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return features.find_nucleus(weight, mass, released=True).keep(weight), jax.nn.softmax(logits, axis=-1)


def nucleus_entropy(keep, p, epsilon=0.0):
    """Of the kept ids, `[B, T]`, as the source computes it or exactly."""
    total = (keep * p).sum(-1, keepdims=True) + epsilon
    q = p / np.where(total > epsilon, total, 1.0)
    return -(keep * q * np.log(q + epsilon, where=keep > 0, out=np.zeros_like(q))).sum(-1)


@functools.partial(jax.jit, static_argnames="mass")
def released_and_gradient(logits, cotangent, mass):
    """Entropies `[B, T]` and their gradient for a cotangent, twice: on plain logits and of the fused head."""
    eye, kinds = jnp.eye(logits.shape[-1], dtype=logits.dtype), (NucleusKind(mass, released=True),)
    found = []
    for function in (
        lambda z: features.nucleus_entropy_released(z, mass),
        lambda z: nucleus_entropies(z, eye, kinds, num_chunks=7, num_blocks=3)[0],
    ):
        entropy, vjp = jax.vjp(function, logits)
        found.append((entropy, vjp(cotangent)[0]))
    return found


def check_entropies(golden, precision):
    logits, tolerance = of_dtype(golden["logits"], precision), TOLERANCE[precision]
    for key in [k for k in golden if re.fullmatch(rf"H_k\d+_p[\d.]+_{precision}", k)]:
        size, p = re.fullmatch(r"H_k(\d+)_p([\d.]+)_.*", key).groups()
        mass = float(np.float32(p))
        keep, probability = (np.asarray(x, np.float64) for x in _kept(logits, of_dtype(mass, precision)))
        whole = np.round(keep.sum(-1)) <= int(size)
        reached = np.cumsum(-np.sort(-probability, axis=-1), axis=-1)
        clear = np.abs(reached - mass).min(-1) > tolerance  # else rounding decides whether an id crosses the mass
        assert (whole & clear).any()
        close(nucleus_entropy(keep, probability, EPSILON)[whole & clear], golden[key][whole & clear], tolerance)
        exact = nucleus_entropy(keep, probability)
        for entropy, _ in released_and_gradient(logits, jnp.zeros(whole.shape, logits.dtype), mass):
            entropy = np.asarray(entropy)
            close(entropy, exact, tolerance)
            assert np.all(entropy[~whole & clear] > golden[key][~whole & clear])
            assert np.all(entropy[keep.sum(-1) == 0] == 0.0)
        if f"full{key}" in golden and precision == "f64":  # its float32 is off by 2e-6 where logits reach 30
            close(full_entropy(logits), golden[f"full{key}"], tolerance)


def check_paper(golden):
    logits = jnp.asarray(golden["logits"])
    for key in [k for k in golden if k.startswith("paperdef_renorm_H_p")]:
        mass = float(key.removeprefix("paperdef_renorm_H_p"))
        p = -np.sort(-np.asarray(jax.nn.softmax(logits, axis=-1)), axis=-1)
        crossing = np.argmax(np.cumsum(p, axis=-1) >= mass, axis=-1)[..., None]
        tied = (p == np.take_along_axis(p, crossing, -1)).sum(-1) > 1
        ours = np.asarray(paper_entropy(logits, jnp.float64(mass)))
        close(ours[~tied], golden[key][~tied], 1e-12)
        assert np.all(ours[tied] > golden[key][tied])


def check_penalty(golden, mask, mass, stored, precision):
    """Of one stored `{H, peakmask, Hhat, loss, grad_logits}`."""
    tolerance, anchor = TOLERANCE[precision], float(golden["anchor"])
    entropy, logits = of_dtype(stored["H"], precision), of_dtype(golden["logits"], precision)
    batch = rollouts(mask, logp_old=np.zeros(mask.shape, entropy.dtype))
    scale = mask.any(1).sum() / len(mask)
    options = {"nucleus": "released", "strict": True, "average": "rows"}
    mechanism = siren(top_p=mass, tau=TAU, beta=1.0, target=anchor / scale if scale else anchor, **options)
    peak = stored["peakmask"] & mask
    found = np.asarray(strict_peaks(entropy, batch.loss_mask, stats.fraction_parts(TAU)))
    quantile = np.array([np.quantile(h[m], TAU) if m.any() else 0.0 for h, m in zip(stored["H"], mask)])[:, None]
    assert not np.any((found != peak) & (np.abs(stored["H"] - quantile) > 1e-7 * np.abs(quantile)))

    weight = scale * peak_weight(jnp.asarray(peak), batch.loss_mask, "rows", entropy.dtype)
    estimate = float(jnp.sum(jnp.where(peak, weight * entropy, 0.0)))
    close(estimate, stored["Hhat"], tolerance)
    close((estimate - anchor) ** 2, stored["loss"], tolerance)
    coefficient = 2.0 * (estimate - anchor) * weight
    if stored["grad_logits"].size:
        for _, gradient in released_and_gradient(logits, coefficient, mass):
            close(gradient, stored["grad_logits"], tolerance)
    if scale and np.array_equal(found, peak):
        name = str(mechanism.outputs[0])
        plan = update(mechanism, signals(batch, **{name: entropy}), jnp.zeros_like(entropy))
        close(plan.terms[name] * scale**2, coefficient, tolerance)
        close(plan.metrics["siren/entropy"][0] * scale, stored["Hhat"], tolerance)
        close(plan.metrics["actor/penalty"][0] * scale**2, stored["loss"], tolerance)


def check_siren(golden, precision):
    check_entropies(golden, precision)
    mask = golden["response_mask"] > 0
    for key in [k for k in golden if re.fullmatch(rf"Hhat_k\d+_p[\d.]+_{precision}", k)]:
        case, mass = key.removeprefix("Hhat_"), float(np.float32(re.fullmatch(r".*_p([\d.]+)_.*", key)[1]))
        stored = {name: golden[f"{name}_{case}"] for name in ("H", "Hhat", "loss", "grad_logits")}
        stored["peakmask"] = golden[f"peakmask1_{case}"]
        np.testing.assert_array_equal(golden[f"peakmask2_{case}"], stored["peakmask"])
        check_penalty(golden, mask, mass, stored, precision)
    if precision == "f64":
        check_paper(golden)
        if "nofullmask_Hhat" in golden:
            stored = {name: golden[f"nofullmask_{name}"] for name in ("peakmask", "Hhat", "loss", "grad_logits")}
            key = next(k for k in golden if re.fullmatch(r"H_k\d+_p[\d.]+_f64", k))
            mask, stored["H"] = golden["nofullmask_response_mask"] > 0, golden[key]
            check_penalty(golden, mask, float(np.float32(re.search(r"_p([\d.]+)_", key)[1])), stored, precision)


test_released_code = make_test({"entropy_siren*": (check_siren, BOTH)})
