"""What several commands on delta packages take."""

from __future__ import annotations

import click

PACKAGE = click.argument("package", type=click.Path(dir_okay=False))
BASE = click.option("--base", required=True, metavar="BASE", help="The base: a path, or a hub id with @revision.")
OUT = click.option("-o", "--out", required=True, type=click.Path(), help="The package to write: NAME.delta.safetensors.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is there, once the new one is whole.")
THREADS = click.option("--threads", type=int, help="Workers; default the processors at hand.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.")
SHARD_SIZE = click.option("--shard-size", metavar="SIZE", help="Write shards of at most so many bytes, like 5GB, and an index.")
