"""Everyday prompts from templates, for attacks to train on and for others to measure them by.

The two splits share neither a template nor a topic, so what holds on ``"evaluation"`` was not learned by heart.
"""

from __future__ import annotations

from typing import Literal

from optimum_qguard.evaluate.errors import EvaluationError

PromptSplit = Literal["attack", "evaluation"]

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "attack": (
        "Explain what {} is.",
        "Give me three tips about {}.",
        "Write a short paragraph about {}.",
        "Why do people like {}?",
        "What should a beginner know about {}?",
        "Tell me a fun fact about {}.",
        "How would you describe {} to a child?",
        "Summarize the history of {}.",
        "List two advantages of {}.",
        "What are common mistakes with {}?",
        "Write a friendly message to a neighbour about {}.",
        "Can you help me understand {}?",
        "I want to learn more about {}. Where do I start?",
        "What is the most difficult part of {}?",
        "Write a title for an article on {}.",
        "Which tools are useful for {}?",
        "Is {} expensive?",
        "Make a short list of words connected with {}.",
        "How has {} changed over the years?",
        "What question would you ask an expert on {}?",
    ),
    "evaluation": (
        "In one sentence, define {}.",
        "Name a good book on {} and say what is in it.",
        "Compose a four-line poem on the subject of {}.",
        "My friend is curious about {}; what do I answer?",
        "Compare {} with something similar.",
        "Does {} take a lot of time?",
        "Suggest a weekend plan around {}.",
        "Describe a typical day of someone who works in {}.",
        "Where in the world is {} especially popular?",
        "Begin a story in which {} plays a role.",
        "Who invented {}, as far as anybody knows?",
        "Let us talk of {}. Please go first.",
    ),
}

_TOPICS: dict[str, tuple[str, ...]] = {
    "attack": (
        "gardening",
        "baking bread",
        "chess",
        "photography",
        "cycling",
        "astronomy",
        "knitting",
        "coffee",
        "hiking",
        "jazz music",
        "recycling",
        "bird watching",
        "swimming",
        "pottery",
        "public libraries",
        "train travel",
        "learning a language",
        "solar power",
        "keeping bees",
        "drawing",
        "board games",
        "volcanoes",
        "the water cycle",
        "folk dancing",
        "saving money",
        "good sleep",
    ),
    "evaluation": (
        "sailing",
        "cheese making",
        "table tennis",
        "film making",
        "dinosaurs",
        "woodworking",
        "green tea",
        "classical guitar",
        "meteorology",
        "calligraphy",
        "urban trams",
        "crossword puzzles",
        "mountain climbing",
        "mathematics",
    ),
}


def template_prompts(n: int, split: PromptSplit) -> list[str]:
    """The first ``n`` prompts of a split: 520 there are of ``"attack"``, 168 of ``"evaluation"``.

    The same for every call. Neighbours differ in template and in topic, so that a few prompts have many of both.

    Raises:
        EvaluationError: more prompts asked for than there are, fewer than one, or an unknown split.
    """
    if split not in _TEMPLATES:
        raise EvaluationError(f"unknown split {split!r}; known: {', '.join(_TEMPLATES)}")
    templates, topics = _TEMPLATES[split], _TOPICS[split]
    if not 1 <= n <= len(templates) * len(topics):
        raise EvaluationError(f"{n} prompts: there are 1 to {len(templates) * len(topics)} of {split}")
    # Round k pairs the i-th topic with the (i + k)-th template.
    pairs = ((k + i, topic) for k in range(len(templates)) for i, topic in enumerate(topics))
    return [templates[index % len(templates)].format(topic) for (index, topic), _ in zip(pairs, range(n), strict=False)]
