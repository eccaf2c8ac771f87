"""`--print-completion`: what makes a shell complete the options of `hyperpodrun`.

click knows bash, zsh and fish: their scripts ask the command itself. tcsh, which torchrun offers, gets a list of names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

NAME = "hyperpodrun"
SHELLS = ("bash", "zsh", "tcsh", "fish")


def print_completion(ctx: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    """Prints it and ends the command, if it is asked for."""
    if shell is None or ctx.resilient_parsing:
        return
    click.echo(_script(ctx, shell))
    ctx.exit()


def complete_file(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell itself knows the files."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def _script(ctx: click.Context, shell: str) -> str:
    if shell == "tcsh":
        names = [name[2:] for option in ctx.command.get_params(ctx) for name in option.opts if name.startswith("--")]
        return f"complete {NAME} 'c/--/({' '.join(names)})/' 'p/*/f/'"
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    return kind(ctx.command, {}, NAME, f"_{NAME.upper()}_COMPLETE").source()
