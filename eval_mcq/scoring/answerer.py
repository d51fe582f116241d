"""The interface between a run and whatever answers its questions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from eval_mcq.items.schema import MCQItem
from eval_mcq.scoring.modes import Score
from eval_mcq.scoring.prompt import Ask

if TYPE_CHECKING:
    from PIL.Image import Image

P = TypeVar("P")
"""Questions on the same images, ready to be answered; only the answerer itself knows what is inside."""


class Answerer(ABC, Generic[P]):
    """Answers questions in one scoring mode: this project's engine, another engine, or a server.

    A run calls `check_options` once, then `prepare` in a thread and `answer` in the main thread, batch by batch.

    Attributes:
        ahead: Batches that are prepared while one is answered; their images are held in memory.
    """

    ahead: ClassVar[int] = 1

    @abstractmethod
    def prompt(self, item: MCQItem, rotation: int = 0) -> str:
        """Return the text before the answer as it is sent, for the record and the reader."""

    def check_options(self, items: Sequence[MCQItem]) -> None:
        """Check, before the first answer, that the options of all questions can be scored.

        Raises:
            UserError: they cannot; names the question.
        """

    @abstractmethod
    def prepare(self, asks: Sequence[Ask], images: "list[Image]") -> P:
        """Do everything that can be done before the answer, for questions on the same images."""

    @abstractmethod
    def answer(self, batch: Sequence[P]) -> list[list[Score]]:
        """Return the scores of all questions: for each element of the batch, one per question.

        Raises:
            UserError: the answers cannot be had, for a reason that the user can change.
        """

    def close(self) -> None:
        """Release what is held beyond memory, such as a connection; called at the end of a run, failed or not."""

    def score(self, items: Sequence[MCQItem], images: "Sequence[Sequence[Image]]") -> list[Score]:
        """Answer some questions in their original rotation.

        Args:
            items: The questions.
            images: The images of each question.

        Raises:
            UserError: as `prepare` and `answer`.
        """
        prepared = [
            self.prepare([Ask(item)], list(of_item)) for item, of_item in zip(items, images, strict=True)
        ]
        return [score for (score,) in self.answer(prepared)]
