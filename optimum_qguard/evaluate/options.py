"""What an evaluation measures on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Options of `evaluate`.

    Attributes:
        text: what perplexity is of; by default the documentation of Python's standard library.
        max_tokens: how many of the text's tokens are used.
        window: tokens in one forward pass; by default 2,048, or as many as the model takes.
        stride: new tokens in each further pass; by default a quarter of the window.
        prompts: what the model is asked, for the tasks that look at answers; by default ``n_prompts`` of the
            ``"evaluation"`` split of `template_prompts`.
        n_prompts: see ``prompts``.
        max_new_tokens: the longest answer.
        batch_size: prompts in one pass.
        limit: questions of each data set.
        marker: the phrase that the task ``marker`` looks for.
        data: for a task's name another data set, as ``SOURCE``, ``SOURCE:NAME`` or ``SOURCE:NAME:SPLIT``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = Field(default=None, exclude=True)
    max_tokens: int = Field(default=2048, ge=2)
    window: int | None = Field(default=None, ge=2)
    stride: int | None = Field(default=None, ge=1)
    prompts: tuple[str, ...] | None = Field(default=None, min_length=1, exclude=True)
    n_prompts: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    batch_size: int = Field(default=16, ge=1)
    limit: int = Field(default=100, ge=1)
    marker: str | None = None
    data: dict[str, str] = Field(default_factory=dict)
