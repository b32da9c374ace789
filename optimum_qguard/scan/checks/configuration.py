"""Whether ``config.json`` says of the weights what they are, and which of them cannot be looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from optimum_qguard.checkpoint.reader import CONFIG_FILE
from optimum_qguard.scan.finding import Finding, Severity, listed
from optimum_qguard.scan.subject import StoredTensor, Subject

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_OTHER_WIDTHS = ("word_embed_proj_dim", "embedding_size")
_BUFFERS = ("position_ids", "attn.bias", "masked_bias", "attention.bias")
_ON_LOAD = frozenset({"bitsandbytes", "torchao", "quanto", "hqq", "fp8", "fbgemm_fp8", "eetq", "auto-round"})
"""Methods for which transformers quantizes weights that are not."""


def check_configuration(subject: Subject) -> Iterator[Finding]:
    """Data type, shape of the embedding, and quantization."""
    if not subject.tensors:
        return
    yield from _check_left_out(subject)
    if not subject.config:
        return
    yield from _check_dtype(subject)
    yield from _check_embedding(subject)
    yield from _check_quantization(subject)


def _check_left_out(subject: Subject) -> Iterator[Finding]:
    """Weights that no detector sees, beside some that they do."""
    quantized = [tensor.id for tensor in subject.tensors.values() if _is_quantized(tensor)]
    if quantized and any(tensor.is_float for tensor in subject.tensors.values()):
        message = (
            f"{len(quantized):,} tensors hold weights that are quantized already, so they were not looked at: "
            f"{listed(quantized)}."
        )
        yield Finding(detector="integrity", severity="note", message=message, unsettled=True)


def _check_dtype(subject: Subject) -> Iterator[Finding]:
    declared = subject.config.get("dtype") or subject.config.get("torch_dtype")
    stored = Counter[torch.dtype]()
    for tensor in subject.tensors.values():
        if tensor.is_float:
            stored[tensor.info.dtype] += tensor.info.n_elements
    names = [str(dtype).removeprefix("torch.") for dtype, _ in stored.most_common()]
    if isinstance(declared, str) and names and declared.removeprefix("torch.") not in names:
        yield _finding(
            "note", f"{CONFIG_FILE} says that the weights are {declared:.40}; they are {' and '.join(names)}."
        )


def _check_embedding(subject: Subject) -> Iterator[Finding]:
    sections = [subject.config, subject.config.get("text_config")]
    for section in sections:
        if not isinstance(section, Mapping) or any(name in section for name in _OTHER_WIDTHS):
            continue
        declared = (section.get("vocab_size"), section.get("hidden_size", section.get("n_embd")))
        if not all(type(number) is int for number in declared):
            continue
        found = [t for t in subject.tensors.values() if t.is_float and t.info.name.endswith(_EMBEDDINGS)]
        if len(found) == 1 and len(found[0].info.shape) == 2 and found[0].info.shape != declared:
            shape = " by ".join(map(str, found[0].info.shape))
            message = f"{CONFIG_FILE} says that the embedding is {declared[0]} by {declared[1]}; it is {shape}."
            yield _finding("note", message, tensor=found[0].id)


def _check_quantization(subject: Subject) -> Iterator[Finding]:
    quantized = [tensor.id for tensor in subject.tensors.values() if _is_quantized(tensor)]
    declared = subject.config.get("quantization_config")
    if declared and not quantized:
        method = _method(declared)
        what = f"{CONFIG_FILE} says that the weights are quantized ({method}), but none is"
        if method in _ON_LOAD:
            yield _finding("warning", f"{what}: loading it quantizes it, whether that is wanted or not.")
        else:
            yield _finding("note", f"{what}.")
    if quantized and not declared:
        message = f"{len(quantized):,} tensors look quantized, but {CONFIG_FILE} does not say how"
        yield _finding("note", f"{message}: {listed(quantized)}.")


def _method(declared: Any) -> str:
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return method[:40] if isinstance(method, str) else "by an unknown method"


def _is_quantized(tensor: StoredTensor) -> bool:
    info = tensor.info
    plain = tensor.is_float or info.dtype in (torch.bool, torch.int64)
    return not plain and info.n_elements > 0 and len(info.shape) > 1 and not info.name.endswith(_BUFFERS)


def _finding(severity: Severity, message: str, tensor: str | None = None) -> Finding:
    return Finding(detector="integrity", severity=severity, file=CONFIG_FILE, tensor=tensor, message=message)
