"""What is wrong with a configuration: every problem with the place it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass

from helixd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend. `where` is `file:line`, an environment variable or a flag."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class ConfigErrors(ConfigError):
    """Everything that is wrong with the configuration, one problem per line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)
