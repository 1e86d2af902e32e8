"""surgery delta export | import: the formats of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

OUT = click.option("-o", "--out", required=True, type=click.Path(), help="What to write.")
BASE = click.option("--base", required=True, metavar="BASE", help="The base: a path, or a hub id with @revision.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress, no summary.")


@click.command("export")
@click.argument("package", type=click.Path(dir_okay=False))
@BASE
@click.option("--to", "kind", required=True, type=click.Choice(["slime", "vllm-patch", "lora", "hf"]), help="The format.")
@OUT
@click.option("--version", type=int, default=1, show_default=True, help="slime: the version that this is.")
@click.option("--encoding", default="xor", show_default=True, help="slime: xor or overwrite.")
@click.option("--checksums", default="xxh3-128", show_default=True, help="slime: xxh3-128, blake3 or adler32.")
@click.option("--rank", type=int, help="lora: rank of every target.")
@click.option("--bits", type=float, help="lora: bits per weight of a matrix, instead of a rank.")
@click.option("--overwrite", is_flag=True, help="Replace what is there, once the new one is whole.")
@QUIET
def export_(package: str, base: str, kind: str, out: str, quiet: bool, overwrite: bool, **given: Any) -> None:
    """Write what PACKAGE makes of BASE in another tool's format. All but `hf` say less than a package: read the warnings.

    \b
    slime       one version folder below OUT: weight_vNNNNNN
    vllm-patch  patch.safetensors and patch.json, for vLLM's checkpoint patch loader
    lora        a PEFT adapter; what has no low-rank form is saved whole (modules_to_save)
    hf          the rebuilt checkpoint: the same as `surgery delta apply`

    \b
    Example:
      surgery delta export tuned.delta.safetensors --base base/ --to lora --rank 16 -o adapter/
    """
    from surgery.delta.apply import apply
    from surgery.delta.container import Package
    from surgery.delta.interop.lora import export_lora
    from surgery.delta.interop.slime import export_slime
    from surgery.delta.interop.vllm_patch import export_vllm_patch
    from surgery.delta.rebuild import PackageNode
    from surgery.inputs import open_node

    below = open_node(base)
    node = PackageNode(Package(package), below)
    if kind == "slime":
        options = {k: given[k] for k in ("version", "encoding", "checksums")} | {"overwrite": overwrite}
        said = f"{export_slime(below, node, out, **options)}: version {given['version']}"
    elif kind == "vllm-patch":
        done = export_vllm_patch(below, node, out, overwrite=overwrite)
        said = f"{out}: {done['patches']} patches, {done['elements']:,} elements; applied in place, nothing checks the base"
    elif kind == "lora":
        size = {k: given[k] for k in ("rank", "bits")}
        report = export_lora(below, node, out, base_name=base, overwrite=overwrite, **size)
        worst = max((t["rel_fro"] or 0.0 for t in report["targets"].values()), default=0.0)
        saved = len(report["modules_to_save"])
        said = f"{out}: {len(report['targets'])} targets, largest relative error {worst:.3g}; {saved} modules saved whole"
    else:
        said = f"{apply(node, out, overwrite=overwrite).out}: rebuilt, every hash right"
    if not quiet:
        click.echo(said, err=True)


@click.command("import")
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True))
@BASE
@click.option("--from", "kind", required=True, type=click.Choice(["slime", "lora", "bitdelta"]), help="The format.")
@OUT
@click.option("--overwrite", is_flag=True, help="Replace what is there, once the new one is whole.")
@QUIET
def import_(sources: tuple[str, ...], base: str, kind: str, out: str, overwrite: bool, quiet: bool) -> None:
    """Make an exact package of what SOURCES make of BASE. The model is built in a folder beside OUT and removed.

    \b
    slime     version folders, in order
    lora      a PEFT adapter
    bitdelta  a diff.pt (loaded as plain tensors: nothing in it is run)

    \b
    Example:
      surgery delta import deltas/weight_v000001 deltas/weight_v000002 --base base/ --from slime -o step2.delta.safetensors
    """
    import tempfile

    from surgery.checkpoint.source import open_source
    from surgery.delta.interop.bitdelta import import_bitdelta
    from surgery.delta.interop.files import rebuild
    from surgery.delta.interop.slime import import_slime
    from surgery.delta.pack import pack
    from surgery.engine.render import amount
    from surgery.errors import Refused
    from surgery.inputs import open_node

    if kind != "slime" and len(sources) != 1:
        raise Refused(f"--from {kind} takes one source, {len(sources)} are given")
    source = open_source(base)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=Path(out).resolve().parent) as room:
        built = Path(room) / "model"
        if kind == "slime":
            import_slime(source, sources, built)
        elif kind == "bitdelta":
            import_bitdelta(source, sources[0], built)
        else:
            rebuild(open_node(f"{base}+{sources[0]}"), source, built)
        made = pack(open_node(base), open_node(str(built)), out, overwrite=overwrite)
    if not quiet:
        click.echo(f"{made.path}: {amount(made.size)} for {amount(made.model)} ({made.ratio:.2f}x)", err=True)
