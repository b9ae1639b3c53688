"""What a check of the configuration found, and how it leaves pydantic's validation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding: `keys[0]` is where to change it, the other keys are what it was compared with."""

    keys: tuple[str, ...]
    message: str


class ConflictingSettings(ValueError):
    """Raised inside pydantic's validation; carries the problems so that the loader can give each its file line."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{problem.keys[0]}: {problem.message}" for problem in problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[ConflictingSettings], tuple[list[Problem]]]:
        return type(self), (self.problems,)  # else it could not pass from one process to another
