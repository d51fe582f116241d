"""The exact text a model is asked. Frozen: a change of one character needs a new :data:`PROMPT_VERSION`."""

from eval_mcq.schema import LETTERS, MCQItem

PROMPT_VERSION = "letters-1"
"""Recorded in every run; runs with different prompts are never compared."""

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""The instruction of LLaVA-1.5's multiple-choice training data (haotian-liu/LLaVA, docs/Evaluation.md)."""


def render(item: MCQItem) -> str:
    """The user's turn for a question, without image placeholders and without a chat template."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=False))
    return f"{item.question}\n{options}\n{INSTRUCTION}"
