"""What an inference engine computes for an evaluation."""

from abc import ABC, abstractmethod

from torch import Tensor


class EngineModel(ABC):
    """A model loaded into an engine."""

    vocabulary: int

    @abstractmethod
    def log_probabilities(self, ids: Tensor) -> Tensor:
        """ids (tokens,) int64 -> (tokens, vocabulary) float32, row t of the token after t."""

    def tokenize(self, text: str) -> list[int] | None:
        """The ids of a text as the engine's own tokenizer has them, without special tokens; None where it has none."""
        return None

    def close(self) -> None:  # noqa: B027 - most free it by themselves
        """Frees what the engine holds."""
