"""`hetermoe export`: a checkpoint's weights in Hugging Face's form."""

from pathlib import Path
from typing import Annotated

import typer

from hetermoe_cli.errors import UserError


def export(
    source: Annotated[Path, typer.Argument(help="Run folder (its newest checkpoint), or one checkpoint's folder.")],
    output: Annotated[Path, typer.Option(help="New folder of config.json and safetensors.")],
) -> None:
    """Write the weights of a Mixtral, Qwen3-MoE or DeepSeek-V3 as transformers reads them, and `train --weights`."""
    from hetermoe_cli.model.weights.checkpoint import MANIFEST, find_latest, load_tensors, read_manifest
    from hetermoe_cli.model.weights.hugging_face import export as write
    from hetermoe_cli.model.weights.training_state import weight_names
    from hetermoe_cli.runtime.run.recorder import CHECKPOINTS

    folder = source if (source / MANIFEST).is_file() else find_latest(source / CHECKPOINTS)
    if folder is None:
        raise UserError(f"{source}: neither a checkpoint nor a run folder with one")
    manifest = read_manifest(folder)
    tensors = load_tensors(folder, weight_names(manifest.model))
    extra = manifest.extra
    write(output, manifest.model, tensors, int(extra["sequence_length"]), int(extra.get("document_end", 0)))
    typer.echo(f"hetermoe: wrote step {manifest.step} of {folder} to {output}", err=True)
