"""encode: texts to the conditioning of both denoisers.

A request needs up to six encodings (two encoders, positive and negative, and the refiner's). Each is a
`TextJob` of its own, so equal ones are computed once, whether within a request, across requests that
are in flight, or for the refiner, whose encoder is the base's second one wherever their files are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from serve_app.models import loading
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.device import Compute
from serve_app.models.files import refusing
from serve_app.request.errors import ConfigurationError
from serve_app.request.facts import TextFacts
from serve_app.runtime.tasks import Conditioning, EncodeTask, StageConditioning

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Floats

EncoderName = Literal["text_encoder", "text_encoder_2", "refiner_text_encoder_2"]


@dataclass(frozen=True)
class TextJob:
    """One text for one encoder. `clip_skip` counts layers before the penultimate one."""

    encoder: EncoderName
    text: str
    clip_skip: int = 0


@dataclass(frozen=True)
class TextEmbedding:
    """What an encoder makes of a text, how many tokens it read, and the words that did not fit its 77."""

    hidden: Floats  # (77, D)
    pooled: Floats | None  # (P,), None for CLIP-L, whose pooled output SDXL does not use
    cut: str = ""
    tokens: int = 0  # with the begin and the end, without padding


@dataclass(frozen=True)
class _Encoder:
    folder: Path
    tokenizer: Any
    model: Any

    @property
    def clip_skip_max(self) -> int:
        # hidden_states holds the embeddings and every layer: num_hidden_layers + 1 entries, and the
        # one at -(clip_skip + 2) is read.
        return int(self.model.config.num_hidden_layers) - 1


class TextEncoders:
    """All text encoders of the base and, where one is configured, of the refiner."""

    def __init__(self, base: Checkpoint, refiner: Checkpoint | None, compute: Compute) -> None:
        self._compute = compute
        self._encoders: dict[EncoderName, _Encoder] = {
            "text_encoder": self._load(base, "text_encoder", "tokenizer"),
            "text_encoder_2": self._load(base, "text_encoder_2", "tokenizer_2"),
        }
        self._base_zeroes_missing_negative = _zeroes_missing_negative(base)
        self._refiner_encoder: EncoderName | None = None
        self._refiner_zeroes_missing_negative = False
        if refiner is not None:
            files = ("text_encoder_2", "tokenizer_2")
            self._refiner_encoder = "text_encoder_2"
            if refiner.digest(files) != base.digest(files):
                self._refiner_encoder = "refiner_text_encoder_2"
                self._encoders["refiner_text_encoder_2"] = self._load(refiner, "text_encoder_2", "tokenizer_2")
            self._refiner_zeroes_missing_negative = _zeroes_missing_negative(refiner)

    def dry_run(self) -> None:
        """Encodes a short text and one that is too long with each encoder, so that what would fail a request fails the
        replica as it starts.

        Raises `ConfigurationError`, one line that names the encoder's folder.
        """
        for name, encoder in self._encoders.items():
            with refusing(f"{encoder.folder}: a dry run"):
                too_long = "a " * encoder.tokenizer.model_max_length
                jobs = [TextJob(name, "a"), TextJob(name, too_long, clip_skip=encoder.clip_skip_max)]
                for embedding in self.embed(jobs):
                    if not np.isfinite(embedding.hidden).all():
                        raise ConfigurationError(f"{encoder.folder}: its embeddings are not finite")

    def _load(self, source: Checkpoint, model: str, tokenizer: str) -> _Encoder:
        return _Encoder(
            source.path(model),
            loading.load_tokenizer(source, tokenizer),
            loading.load_text_encoder(source, model, self._compute.dtype).to(self._compute.device),
        )

    @property
    def facts(self) -> TextFacts:
        """What the ingress must know of the encoders."""
        encoders, refiners = self._encoders, self._refiner_encoder
        return TextFacts(
            clip_skip_max=min(encoders[name].clip_skip_max for name in ("text_encoder", "text_encoder_2")),
            base_zeroes_missing_negative=self._base_zeroes_missing_negative,
            refiner_clip_skip_max=encoders[refiners].clip_skip_max if refiners else 0,
        )

    @property
    def refiner_shares_encoder(self) -> bool:
        """Whether one forward pass serves both models."""
        return self._refiner_encoder == "text_encoder_2"

    def jobs(self, task: EncodeTask) -> dict[str, TextJob]:
        """The encodings that a task needs, by role. Which text goes where is diffusers' encode_prompt.

        A missing negative prompt that its checkpoint replaces by zeros needs none.
        """
        skip = task.clip_skip or 0
        jobs = {
            "prompt": TextJob("text_encoder", task.prompt, skip),
            "prompt_2": TextJob("text_encoder_2", task.prompt_2 or task.prompt, skip),
        }
        negative = task.negative_prompt or ""
        zeroed = task.negative_prompt is None
        if task.base_guided and not (zeroed and self._base_zeroes_missing_negative):
            jobs["negative_prompt"] = TextJob("text_encoder", negative)
            jobs["negative_prompt_2"] = TextJob("text_encoder_2", task.negative_prompt_2 or negative)
        if task.refined:
            assert self._refiner_encoder is not None
            jobs["refiner prompt"] = TextJob(self._refiner_encoder, task.prompt, skip)
            if task.refiner_guided and not (zeroed and self._refiner_zeroes_missing_negative):
                jobs["refiner negative_prompt"] = TextJob(self._refiner_encoder, negative)
        return jobs

    def assemble(self, task: EncodeTask, done: dict[str, TextEmbedding]) -> Conditioning:
        """The conditioning of a task, from the embeddings of its `jobs`."""
        base = _stage(
            [done["prompt"], done["prompt_2"]],
            [done[role] for role in ("negative_prompt", "negative_prompt_2") if role in done],
            guided=task.base_guided,
        )
        refiner = None
        if task.refined:
            refiner = _stage(
                [done["refiner prompt"]],
                [done[role] for role in ("refiner negative_prompt",) if role in done],
                guided=task.refiner_guided,
            )
        return Conditioning(base, refiner, tuple(_cut_warnings(task, done)), _text_tokens(task, done))

    @torch.inference_mode()
    def embed(self, jobs: Sequence[TextJob]) -> list[TextEmbedding]:
        """Encodes texts for one encoder in one forward pass; they may differ in clip_skip."""
        (name,) = {job.encoder for job in jobs}
        encoder = self._encoders[name]
        length = encoder.tokenizer.model_max_length
        ids = encoder.tokenizer(
            [job.text for job in jobs],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        output = encoder.model(ids.to(self._compute.device), output_hidden_states=True)
        embeddings = []
        for row, job in enumerate(jobs):
            pooled = None if name == "text_encoder" else _to_numpy(output.text_embeds[row])
            hidden = _to_numpy(output.hidden_states[-(job.clip_skip + 2)][row])
            whole = encoder.tokenizer(job.text, truncation=False, verbose=False).input_ids
            # The last place goes to the end token.
            cut = encoder.tokenizer.decode(whole[length - 1 : -1]) if len(whole) > length else ""
            embeddings.append(TextEmbedding(hidden, pooled, cut, min(len(whole), length)))
        return embeddings


def _stage(positive: list[TextEmbedding], negative: list[TextEmbedding], *, guided: bool) -> StageConditioning:
    embeds, pooled = _join(positive)
    if not guided:
        return StageConditioning(embeds, pooled)
    if not negative:
        return StageConditioning(embeds, pooled, np.zeros_like(embeds), np.zeros_like(pooled))
    return StageConditioning(embeds, pooled, *_join(negative))


def _join(embeddings: list[TextEmbedding]) -> tuple[Floats, Floats]:
    """Side by side along the last axis; the pooled one is the last encoder's."""
    pooled = embeddings[-1].pooled
    assert pooled is not None
    return np.concatenate([embedding.hidden for embedding in embeddings], axis=-1), pooled


def _cut_warnings(task: EncodeTask, done: dict[str, TextEmbedding]) -> list[str]:
    warnings = []
    for role in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "refiner negative_prompt"):
        name = role.removeprefix("refiner ")
        if role in done and done[role].cut and not (name.endswith("_2") and not getattr(task, name)):
            line = f"{name} is cut at 77 tokens; not read: {done[role].cut.strip()}"
            if line not in warnings:
                warnings.append(line)
    return warnings


def _text_tokens(task: EncodeTask, done: dict[str, TextEmbedding]) -> int:
    """The tokens of the texts that the task gave, each counted once."""
    read = {}
    for role in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "refiner negative_prompt"):
        text = getattr(task, role.removeprefix("refiner "))
        if text and role in done:
            read[text] = done[role].tokens
    return sum(read.values())


def _zeroes_missing_negative(source: Checkpoint) -> bool:
    return bool(source.model_index().get("force_zeros_for_empty_prompt", True))


def _to_numpy(tensor: torch.Tensor) -> Floats:
    return tensor.to("cpu", torch.float32).numpy().copy()
