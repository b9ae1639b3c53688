"""From a YAML file and `section.key=value` overrides to a `Config`, with every problem reported at once.

Each value keeps where it came from, both for the messages (`file:line: section.key: ...`) and for --print-config.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launch.config import SECTIONS, Config
from launch.config_checks import without_effect
from launch.config_describe import describe_field, describe_value, hint, yaml_spelling
from launch.config_names import SHORT_FORMS, keys_of, override_hint, similar_file, similar_key, unknown_section
from launch.config_problem import ConflictingSettings, Problem
from launch.errors import ConfigError
from launch.yaml_lines import Located, YamlError, parse_yaml, plain

# Stand-ins for required values that are missing or wrong, so that the rest can still be checked in the same pass. They
# are never returned, and no finding that involves one is reported.
_STAND_INS: dict[str, Any] = {"run.dir": "unknown", "data.seq_len": 1 << 40, "optim.steps": 1 << 40}
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A valid configuration and how it came about.

    Attributes:
        config: The settings.
        sources: For every `section.key`: `file:line`, `override N` (counted from 1) or `default`.
        path: The file, as given.
        overrides: The overrides, as given.
        warnings: Settings that are valid but change nothing, one line each.
    """

    config: Config
    sources: dict[str, str]
    path: str
    overrides: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class _Draft:
    """What has been read so far: values by `section.key`, their origins, and the problems found."""

    path: str
    readable: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    section_lines: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def report(self, origin: str, text: str) -> None:
        self.problems.append(f"{origin}: {text}")

    def sorted_problems(self) -> list[str]:
        """The problems in reading order: the file from top to bottom, then the overrides."""
        override = re.compile(r"override (\d+): ")
        in_file = re.compile(re.escape(self.path) + r":(\d+): ")

        def place(problem: str) -> tuple[bool, int]:
            found = override.match(problem) or in_file.match(problem)
            return problem.startswith("override "), int(found[1]) if found else 0

        return sorted(self.problems, key=place)

    def origin(self, key: str) -> str:
        """Where to look for `key`; for one that was never written: its section's line, else the file."""
        line = self.section_lines.get(key.split(".")[0])
        return self.origins.get(key) or (f"{self.path}:{line}" if line else self.path)


def load_config(path: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read and check a configuration.

    Args:
        path: A YAML file with the sections of `Config`.
        overrides: `section.key=value` texts; each wins over the file. Values follow the same YAML rules.

    Raises:
        ConfigError: lists all the problems, one per line, as `file:line: section.key: what is wrong; what to do`.
    """
    draft = _Draft(path=path)
    _read_file(draft)
    for number, override in enumerate(overrides, start=1):
        _read_override(draft, number, override)
    overridden = _settle_memory(draft)
    config = _validate(draft)
    if config is None or draft.problems:
        raise ConfigError("\n".join(draft.sorted_problems()))
    sources = {
        f"{name}.{key}": draft.origins.get(f"{name}.{key}", "default")
        for name, section in SECTIONS.items()
        for key in section.model_fields
    }
    idle = (
        f"{draft.origin(problem.keys[0])}: {problem.keys[0]}: {problem.message}" for problem in without_effect(config)
    )
    return LoadedConfig(
        config=config, sources=sources, path=path, overrides=tuple(overrides), warnings=(*overridden, *idle)
    )


def split_worker_args(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Take a worker's arguments apart: `CONFIG [section.key=value ...]`, in `sys.argv[1:]`.

    The deepspeed launcher adds `--local_rank=N`, which says nothing that the environment does not: it is dropped.

    Returns:
        (config path, overrides).

    Raises:
        ConfigError: no configuration file, or an option that a worker does not have.
    """
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--local_rank", "--local-rank"):
            next(arguments, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            rest.append(argument)
    usage = "usage: launch.train CONFIG [section.key=value ...]"
    options = [argument for argument in rest if argument.startswith("-")]
    if options:
        raise ConfigError(f"unknown option {options[0]}: a worker takes settings as section.key=value; {usage}")
    if not rest or "=" in rest[0]:
        raise ConfigError(f"expected a configuration file first, got {rest[0] if rest else 'no argument'}; {usage}")
    return rest[0], rest[1:]


def _read_file(draft: _Draft) -> None:
    document = _parse_file(draft)
    if document is None:
        return
    if document.value is None:
        document = Located(value={}, line=1)
    if not isinstance(document.value, dict):
        draft.report(
            f"{draft.path}:{document.line}",
            f"expected sections ({', '.join(SECTIONS)}), got {describe_value(plain(document))}",
        )
        return
    draft.readable = True
    _report_duplicates(draft, document, prefix="")
    for name, section in document.value.items():
        origin = f"{draft.path}:{section.line}"
        if name not in SECTIONS:
            draft.report(origin, unknown_section(name))
            continue
        draft.section_lines[name] = section.line
        if section.value is None:  # `evaluate:` with every line under it commented out
            continue
        if name in SHORT_FORMS and section.value == SHORT_FORMS[name]:
            _store(draft, name, SHORT_FORMS[name], True, origin)
            continue
        if not isinstance(section.value, dict):
            draft.report(
                origin, f"{name}: expected a section with keys {keys_of(name)}, got {describe_value(plain(section))}"
            )
            continue
        _report_duplicates(draft, section, prefix=f"{name}.")
        for key, located in section.value.items():
            _store(draft, name, key, plain(located), f"{draft.path}:{located.line}")
            _report_duplicates(draft, located, prefix=f"{name}.{key}.")


def _parse_file(draft: _Draft) -> Located | None:
    path = Path(draft.path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            draft.report(
                draft.path, f"expected a configuration of at most {_MAX_FILE_BYTES} bytes; is this a data file?"
            )
            return None
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        draft.report(draft.path, f"cannot read the configuration: {error.strerror}{similar_file(path)}")
    except UnicodeDecodeError as error:
        draft.report(draft.path, f"not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}")
    except YamlError as error:
        draft.report(f"{draft.path}:{error.line}", error.message)
    return None


def _read_override(draft: _Draft, number: int, override: str) -> None:
    origin = f"override {number}"
    dotted, equals, text = override.partition("=")
    if equals and dotted in SHORT_FORMS and text == SHORT_FORMS[dotted]:
        dotted, text = f"{dotted}.{text}", "true"
    name, dot, key = dotted.partition(".")
    if not equals or not dot or not key:
        draft.report(origin, f"expected section.key=value, got {override!r}{override_hint(dotted, equals, text)}")
        return
    if name not in SECTIONS:
        draft.report(origin, f"{dotted}: {unknown_section(name)}")
        return
    earlier = draft.origins.get(f"{name}.{key}", "")
    if earlier.startswith("override"):
        draft.report(origin, f"{dotted}: given twice, first by {earlier}; keep one of them")
        return
    try:
        located = parse_yaml(text)
    except YamlError as error:
        draft.report(origin, f"{dotted}: {error.message}; put the value in quotes if it is text")
        return
    _store(draft, name, key, plain(located), origin)


def _settle_memory(draft: _Draft) -> list[str]:
    """Let the overrides win where either they or the file leave the `memory` section to `auto`; returns warnings."""
    auto = "memory.auto"
    others = [key for key in draft.values if key.startswith("memory.") and key != auto]
    by_override = [key for key in others if draft.origins[key].startswith("override")]
    in_file = [key for key in others if key not in by_override]
    if draft.values.get(auto) is not True:
        return []
    if draft.origins[auto].startswith("override"):
        if not in_file:
            return []
        dropped = ", ".join(
            f"{key}={yaml_spelling(draft.values.pop(key))} ({draft.origins.pop(key)})" for key in in_file
        )
        return [f"{draft.origins[auto]}: {auto}: chooses the memory settings; not used: {dropped}"]
    if not by_override or in_file:  # a file that contradicts itself stays an error
        return []
    del draft.values[auto]
    first, names = draft.origins[by_override[0]], ", ".join(by_override)
    return [f"{first}: {names}: turns off memory: auto ({draft.origins.pop(auto)}); what is not given has its default"]


def _store(draft: _Draft, section: str, key: str, value: Any, origin: str) -> None:
    if key not in SECTIONS[section].model_fields:
        draft.report(origin, f"{section}.{key}: no such setting{similar_key(section, key)}")
        return
    draft.values[f"{section}.{key}"] = value
    draft.origins[f"{section}.{key}"] = origin


def _report_duplicates(draft: _Draft, located: Located, *, prefix: str) -> None:
    for key, first, second in located.duplicates:
        draft.report(f"{draft.path}:{second}", f"{prefix}{key}: given twice, first in line {first}; keep one of them")


def _validate(draft: _Draft) -> Config | None:
    """Build the config; on errors report them and check the combinations of what is left."""
    if not draft.readable:
        return None  # else every required setting would be reported as missing
    try:
        return Config.model_validate(_nested(draft.values))
    except ValidationError as error:
        wrong = _report_fields(draft, error)
        if not wrong:
            _report_conflicts(draft, error, wrong)
            return None
    remaining = {key: value for key, value in draft.values.items() if key not in wrong}
    remaining.update({key: value for key, value in _STAND_INS.items() if key in wrong})
    try:
        Config.model_validate(_nested(remaining))
    except ValidationError as error:
        _report_conflicts(draft, error, wrong)
    return None


def _nested(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, name = key.split(".", 1)
        tree[section][name] = value
    return tree


def _report_fields(draft: _Draft, error: ValidationError) -> set[str]:
    """One line per field, however many branches of its type pydantic complains about."""
    wrong: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        if len(detail["loc"]) < 2:
            continue
        section, name = str(detail["loc"][0]), str(detail["loc"][1])
        key, info = f"{section}.{name}", SECTIONS[section].model_fields[name]
        if detail["type"] == "missing" and key not in draft.values:
            wrong[key] = f"{key}: missing; expected {describe_field(info)}: {info.description}"
        else:
            value = draft.values[key]
            advice = hint(info, value)
            got = f"expected {describe_field(info)}, got {describe_value(value)}"
            wrong[key] = f"{key}: {got}{f'; {advice}' if advice else ''}"
    for key, text in wrong.items():
        draft.report(draft.origin(key), text)
    return set(wrong)


def _report_conflicts(draft: _Draft, error: ValidationError, wrong: set[str]) -> None:
    for detail in error.errors(include_url=False):
        conflict = detail.get("ctx", {}).get("error")
        if isinstance(conflict, ConflictingSettings):
            for problem in conflict.problems:
                if not wrong.intersection(problem.keys):
                    _report_problem(draft, problem)


def _report_problem(draft: _Draft, problem: Problem) -> None:
    # Point at a line that exists: the first key that somebody wrote, when the key to change is a default.
    written = next((key for key in problem.keys if key in draft.origins), problem.keys[0])
    draft.report(draft.origin(written), f"{problem.keys[0]}: {problem.message}")
