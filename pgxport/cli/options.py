# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, each written once."""

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
engine_option = click.option("--engine", default="cpu", show_default=True, help="The engine to run in; no other is tried.")
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of the engine  [default: one a core]")
cluster_option = click.option(
    "--cluster", metavar="ADDRESS", help="Spread the work over a Ray cluster: auto, local or HOST:PORT (docs/cluster.md)."
)
precision_option = click.option(
    "--precision", default="fp32", show_default=True, help="How weights are stored; a wrong one lists what there is."
)
target_option = click.option(
    "--target", default="cpu", show_default=True, help="The engine to write for; a wrong one lists what there is."
)
context_option = click.option(
    "--context", type=click.IntRange(1), help="Longest prefix and answer together, in tokens  [default: image + 512]"
)
local_window_option = click.option(
    "--local-window", type=click.Choice(["hf", "none"]), default="hf", show_default=True, help="Gemma 2's window: hf or none."
)

# The options that name a model: arguments of click.option, and the help.
MODEL: dict[str, tuple[dict[str, Any], str | None]] = {
    "size": ({}, "A published size, 3b, 10b or 28b, or tiny for the embedded checkpoint."),
    "res": ({"type": int}, "Pixels a side: 224, 448 or 896; tiny: 112 or 224."),
    "family": ({"type": click.Choice(["paligemma", "paligemma2"]), "default": "paligemma2", "show_default": True}, None),
    "variant": ({"default": "pt", "show_default": True}, "pt, mix or ft-TASK, as the hub names them."),
    "checkpoint": ({}, "A folder in hub layout, or a hub id, in place of the published one."),
    "adapter": (
        {"type": click.Path(), "multiple": True},
        "A PEFT adapter's folder, merged as its base is read; may be repeated.",
    ),
    "masks": ({"type": click.Path(dir_okay=False)}, "vae-oid.npz, for the masks of `segment` (tiny brings its own)."),
}
OF_SOURCE = {  # where an argument SOURCE stands for --checkpoint
    "size": "A published size, 3b, 10b or 28b, or tiny for the embedded checkpoint, in place of SOURCE.",
    "adapter": "A PEFT adapter's folder, as it will be given to the export; may be repeated.",
}


def model_options(*names: str, **helps: str) -> Decorator:
    """Give a command the options of MODEL with these names.

    Args:
        helps: The help of an option by its name, in place of MODEL's.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):  # decorators apply from the last to the first
            arguments, text = MODEL[name]
            command = click.option(f"--{name}", **arguments, help=helps.get(name, text))(command)
        return command

    return decorate
