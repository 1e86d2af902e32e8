"""The command line. One file per command; each is imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import threading

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # workers are our own; must be set before numpy is imported

import click

from surgery import __version__

COMMANDS = {
    "plan": "Check and price a recipe; nothing but headers is read.",
    "run": "Carry out a recipe.",
    "inspect": "Show what a checkpoint holds.",
    "diff": "Show how two checkpoints differ, per tensor and per layer.",
    "interference": "Show how much fine-tunes of one base would get in each other's way.",
    "convert": "Print a mergekit recipe as a native one.",
    "edit": "Run a script's edit(checkpoint) and write the result.",
    "delta": "Ship a fine-tune as what changed from its base.",
    "depth": "Show which blocks of a model can be dropped.",
    "gates": "Make router weights for a mixture of experts from prompts.",
    "mixing": "Learn how a mixture's experts are mixed into a dense model.",
    "lora": "Extract, apply, merge and inspect LoRA adapters.",
    "eval": "Evaluate checkpoints and recipes on tasks; nothing is written.",
    "probe": "Look inside: path between models, layers, contribution of a fine-tune, overlap of skills.",
    "ops": "List operators, or explain one.",
    "push": "Publish an output on the hub.",
    "report": "Show results as a page that opens offline, as pictures and as tables.",
    "schema": "Print the JSON Schema of recipes.",
    "verify": "Hash an output again and compare it with its manifest.",
    "statistics": "Collect what merging by data needs: Gram matrices, Fisher information, sensitivity.",
    "sweep": "Search the numbers of a recipe that make the best model.",
    "tune": "Fine-tune a checkpoint: whole, masked, adapted or averaged; a checkpoint or a delta comes out.",
}


class _Lazy(click.Group):
    """Commands by name, from `surgery.cli.NAME_`, without importing them for `--help`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"surgery.cli.{name}_").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from surgery.errors import did_you_mean

            hint = did_you_mean(args[0], COMMANDS)
            raise click.UsageError(f"there is no command `{args[0]}`" + (f"; {hint}" if hint else ""))
        return super().resolve_command(context, args)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="surgery")
def cli() -> None:
    """Merge and edit model checkpoints: planned first, then streamed in bounded memory.

    Exit codes: 0 done, 2 refused (nothing written), 1 failed midway, 130 interrupted (resumable).
    """


def main() -> None:
    """Entry point: errors made on purpose are printed without a traceback."""
    try:
        cli.main(prog_name="surgery", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as problem:
        problem.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; an unfinished run goes on with --resume", file=sys.stderr, flush=True)
        if threading.active_count() > 1:  # interrupted twice: a worker is inside LAPACK, and ending beneath it would abort
            os._exit(130)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as problem:
        from surgery.errors import SurgeryError

        if not isinstance(problem, SurgeryError) or os.environ.get("SURGERY_DEBUG"):
            raise
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
