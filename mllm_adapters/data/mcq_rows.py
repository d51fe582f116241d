"""Multiple-choice questions as training rows: the prompt that eval-mcq scores, and one of three kinds of answers.

The file format is eval-mcq's (JSON Lines with a header). It is parsed here, because eval-mcq depends on this
package and not the other way round; a test checks that both make the same prompt.
"""

from string import ascii_uppercase
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

BENCH_SCHEMA = "eval-mcq/1"
"""Version of the benchmark file that is read."""

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""As in eval-mcq's prompt ``letters-1``."""

Answer = Literal["letter", "text", "both"]
"""The training target: ``B``, ``Glaucoma``, or ``B. Glaucoma``."""

ANSWERS: tuple[str, ...] = get_args(Answer)

Text = Annotated[str, Field(min_length=1)]


class BenchQuestion(BaseModel):
    """The fields of a question needed for training; eval-mcq checks the others.

    Attributes:
        id: Unique within the benchmark.
        images: Image paths, absolute or relative to the folder of the benchmark file.
        question: The question, without options.
        options: Option texts, in their order in the prompt.
        answer: Index of the true option; files give it as a letter or as an index.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Text
    images: list[Text] = Field(min_length=1)
    question: Text
    options: list[Text] = Field(min_length=2, max_length=len(ascii_uppercase))
    answer: int

    @model_validator(mode="before")
    @classmethod
    def _answer_to_index(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("answer"), str):
            letter = data["answer"].strip().upper()
            if len(letter) != 1 or letter not in ascii_uppercase:
                raise ValueError(f"answer '{data['answer']}' is neither an option's letter nor its index")
            return {**data, "answer": ascii_uppercase.index(letter)}
        return data

    @model_validator(mode="after")
    def _answer_is_an_option(self) -> "BenchQuestion":
        if not 0 <= self.answer < len(self.options):
            raise ValueError(f"answer {self.answer} is not among the {len(self.options)} options")
        return self

    def asked(self) -> str:
        """Return the user's turn, without image tags."""
        options = "\n".join(
            f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.options, strict=False)
        )
        return f"{self.question}\n{options}\n{INSTRUCTION}"

    def answered(self, kind: Answer) -> str:
        """Return the assistant's turn."""
        letter, text = ascii_uppercase[self.answer], self.options[self.answer]
        return {"letter": letter, "text": text, "both": f"{letter}. {text}"}[kind]
