"""A training script's command line and YAML file: settings, and which of them the user wrote.

TRL's parser fills its dataclasses; what is added: every fault is one line that names the key, values of the file are
checked like those of the command line, and what was written is told from what is a default. Only so can a script refuse
an option that it would otherwise replace.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from neureasoner.config import closest, read_mapping
from neureasoner.errors import UserError

# Names that older versions of Transformers (5.16) have for the same options.
OLDER = {f"activation_checkpointing{end}": f"gradient_checkpointing{end}" for end in ("", "_kwargs")}


def parse(
    types: Sequence[type], argv: Sequence[str] | None, presets: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> tuple[list[Any], dict[str, Any]]:
    """``(an instance of each type, {key: value} that the user wrote)``; the command line overrides the file.

    ``presets``: from what was written to our own defaults. Raises UserError with one line.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise UserError(message)

    path, argv = _config_file(list(sys.argv[1:] if argv is None else argv))
    parser: Any = Parser(types, allow_abbrev=False)  # type: ignore[arg-type]
    options = {action.dest for action in parser._actions}
    argv = [_older(word, options) for word in argv]
    file = {_older(str(key), options): value for key, value in (read_mapping(path) if path else {}).items()}
    for key, value in (file.pop("env", None) or {}).items():  # as TRL's own files
        os.environ[str(key)] = str(value)
    values = _checked(parser, types, file, str(path))
    argv = [f"--{key}={value}" for key, value in values.items() if isinstance(value, str)] + argv
    written = {**values, **_command_line(parser, argv)}
    _check_json(types, written)
    others = {key: value for key, value in values.items() if not isinstance(value, str)}
    parser.set_defaults_with_config(**{**presets(written), **others})
    try:
        return list(parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)), written
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}" if e.filename else one_line(e)) from None
    except (ValueError, TypeError, ImportError, argparse.ArgumentTypeError) as e:
        raise e if isinstance(e, UserError) else UserError(one_line(e)) from None


def _older(word: str, options: Collection[str]) -> str:
    """An option (``--name``, ``--name=value`` or a file's ``name``) by the name that this Transformers has for it."""
    name = word.split("=")[0].removeprefix("--").replace("-", "_")
    if name in options or OLDER.get(name) not in options:
        return word
    return word.replace(word.split("=")[0].removeprefix("--"), OLDER[name], 1)


def one_line(error: BaseException) -> str:
    """What an error of a library says, without its line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _config_file(argv: list[str]) -> tuple[str, list[str]]:
    """(the file of ``--config``, or nothing; the other arguments)."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config needs a YAML file")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.removeprefix("--config="), argv[:i] + argv[i + 1 :]
    return "", argv


def _command_line(parser: Any, argv: Sequence[str]) -> dict[str, Any]:
    """What stands on the command line, with the parser's types. Raises UserError for an unknown option."""
    actions = list(parser._actions)
    defaults = [action.default for action in actions]
    for action in actions:
        action.default = argparse.SUPPRESS
    try:
        found, rest = parser.parse_known_args(list(argv))
    finally:
        for action, default in zip(actions, defaults, strict=True):
            action.default = default
    if rest:
        name = rest[0].split("=")[0]
        known = [option for action in actions for option in action.option_strings]
        raise UserError(f"option '{name}' is unknown{closest(name, known) if name.startswith('-') else ''}")
    return vars(found)


def _checked(parser: Any, types: Sequence[type], file: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The file's values: a single one as text, as on the command line; lists, mappings and None as they are."""
    actions = {action.dest: action for action in reversed(parser._actions)}  # the first of a name; then come --no_NAME
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    values: dict[str, Any] = {}
    for key, value in file.items():
        name = str(key).replace("-", "_")
        if name not in actions or name not in hints:
            raise UserError(f"{path}: key '{key}' is unknown{closest(name, hints)}")
        values[name] = _value(value, actions[name], hints[name], f"{path}: key '{key}'")
    return values


def _value(value: Any, action: Any, hint: Any, where: str) -> Any:
    allowed = {getattr(a, "__origin__", a) for a in (get_args(hint) or (hint,))} | {getattr(hint, "__origin__", hint)}
    if value is None:
        if type(None) not in allowed:
            raise UserError(f"{where} has no value")
        return None
    if isinstance(value, Mapping):
        if dict not in allowed:
            raise UserError(f"{where} takes one value, got key: value pairs")
        return dict(value)
    if isinstance(value, list):
        if list not in allowed:
            raise UserError(f"{where} takes one value, got a list")
        return value
    if isinstance(value, bool) and bool not in allowed:
        value = "yes" if value else "no"  # YAML reads `save_strategy: no` as false
    return [str(value)] if action.nargs == "+" else str(value)


def _check_json(types: Sequence[type], written: Mapping[str, Any]) -> None:
    """Text that begins as JSON must be JSON; Transformers' own message does not say which option it is."""
    names = {name for kind in types for name in getattr(kind, "_VALID_DICT_FIELDS", ())}
    for name in names & set(written):
        value = written[name]
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as e:
                raise UserError(f"{name}: not JSON ({e})") from None


# ---- Checks that every training script shares


def refuse_best(written: Mapping[str, Any]) -> None:
    """Refuse load_best_model_at_end, before Transformers asks for what would go with it."""
    if str(written.get("load_best_model_at_end")).lower() in ("true", "yes", "y", "t", "1"):
        raise UserError("load_best_model_at_end True is not supported: the last update is what is saved")


def check_numbers(args: Any) -> None:
    """Refuse settings under which no update is made, or none that moves anything. ``args``: TrainingArguments."""
    if not 0 < args.learning_rate < math.inf:
        raise UserError(f"learning_rate must be a number above 0, got {args.learning_rate:g}: nothing would be trained")
    if args.max_steps == 0:
        raise UserError("max_steps 0 makes no update; leave it out (-1: num_train_epochs decides), or give a number")
    if args.max_steps < 0 and not 0 < args.num_train_epochs < math.inf:
        raise UserError(f"num_train_epochs must be above 0, got {args.num_train_epochs:g}: nothing would be trained")
    if args.per_device_train_batch_size < 1:
        raise UserError(f"per_device_train_batch_size must be at least 1, got {args.per_device_train_batch_size}")
    if args.gradient_accumulation_steps < 1:
        raise UserError(f"gradient_accumulation_steps must be at least 1, got {args.gradient_accumulation_steps}")
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps" and not args.save_steps > 0:
        raise UserError(
            f"save_steps must be above 0, got {args.save_steps:g}; save_strategy: 'no' writes no checkpoint"
        )
    for key in ("seed", "data_seed"):
        if not 0 <= (getattr(args, key) or 0) < 2**32:
            raise UserError(f"{key} must lie between 0 and 2**32 - 1, got {getattr(args, key)}")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise UserError(
            f"save_total_limit must be at least 1, got {args.save_total_limit}; null keeps every checkpoint"
        )


def check_refused(args: Any, written: Mapping[str, Any], refused: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Refuse options that would not do what they say. ``refused``: ``{name: (values that change nothing, instead)}``.

    One without such values is refused where the user wrote it. Raises UserError.
    """
    for name, (same, instead) in refused.items():
        value = getattr(args, name, None)
        value = getattr(value, "value", value)
        if (name in written or same) and value not in same:
            raise UserError(f"{name} {value!r} is not supported: {instead}")


def check_loggers(args: Any) -> None:
    """Refuse loggers that Transformers does not know or that are not installed, before anything is loaded."""
    from transformers.integrations import integration_utils as known

    names = sorted(known.INTEGRATION_TO_CALLBACK)
    for name in args.report_to or []:
        if name not in names:
            raise UserError(f"report_to '{name}' is unknown{closest(name, names)} ({', '.join(names)}, all, none)")
        if name not in known.get_available_reporting_integrations() and name != "flyte":  # flyte is in no list
            raise UserError(f"report_to '{name}': its package is not installed; install it, or leave report_to out")


def check_machine(args: Any) -> None:
    """Refuse precision that this machine does not have: Accelerate would train in float32 without a word."""
    if args.fp16 and args.device.type == "cpu":
        raise UserError("fp16 needs a GPU, and none is used; leave it out (float32), or set bf16: true")


def checkpointing() -> str:
    """The name that this Transformers has for recomputing activations (once gradient, now activation checkpointing)."""
    from dataclasses import fields

    from transformers import TrainingArguments

    names = {f.name for f in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def launched_with(what: str) -> bool:
    """Whether ``accelerate launch`` was told to use ``DEEPSPEED``, ``FSDP`` or a ``PARALLELISM_CONFIG``."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"
