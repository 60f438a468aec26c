"""``tpatch bank diff``: how two banks differ."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from tpatch_jax.cli.bank.common import show_lines
from tpatch_jax.cli.common import Json, Quiet
from tpatch_jax.display.console import print_json

__all__ = ["Diff"]


@dataclass(frozen=True)
class Diff:
    """Compare what two banks hold."""

    left: Annotated[Positional[str], arg(metavar="A", help="a bank")]
    right: Annotated[Positional[str], arg(metavar="B", help="another")]
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print what only one of them holds, and what differs."""
        from rich.markup import escape

        from tpatch_jax.bank.sharing import diff_banks

        diff = diff_banks(self.left, self.right)
        if self.json:
            print_json(diff._asdict())
            return
        show_lines(
            [
                *([] if diff.same_model else ["[red]they are for different models[/red]"]),
                f"{diff.common} lines of their journals are the same",
                *(f"- {escape(prompt)} [bold]{escape(target)}[/bold]" for prompt, target in diff.only_left),
                *(f"+ {escape(prompt)} [bold]{escape(target)}[/bold]" for prompt, target in diff.only_right),
                *(f"! {escape(prompt)} {escape(one)} | {escape(other)}" for prompt, one, other in diff.targets),
                *(f"~ {escape(p)} {escape(t)}: {one} | {other}" for p, t, one, other in diff.states),
            ]
        )
