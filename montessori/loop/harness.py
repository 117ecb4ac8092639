"""lm-evaluation-harness, called as a library: its tasks by name, or tasks of your own from YAML files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from montessori.errors import ArgumentError
from montessori.wording import one_line


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ArgumentError unless the harness is installed and every task file is there and says what task it is.

    Names are left to the harness, which may have to ask a hub for their data.
    """
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ArgumentError("evaluate.tasks: needs lm-evaluation-harness: pip install lm-eval")
    for task in tasks:
        _read(task)


def harness(model: str | os.PathLike[str], tasks: Sequence[str]) -> dict[str, Any]:
    """Results by task of a checkpoint directory: {"task": {"acc,none": value, …}}, as the harness names them."""
    check_tasks(tasks)
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model)},
        tasks=[_read(task) for task in tasks],
        # Without it the harness takes a GPU for granted.
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return found["results"]


def _read(task: str) -> str | dict[str, Any]:
    """The name of a task, or the config in a YAML file."""
    if not task.endswith((".yaml", ".yml")):
        return task
    try:
        config = yaml.safe_load(Path(task).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"evaluate.tasks: {task}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"evaluate.tasks: {task}: expected YAML ({one_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise ArgumentError(f"evaluate.tasks: {task}: expected a task of lm-evaluation-harness, with a key 'task'")
    return config
