"""`hetermoe tokenize`: text into a file of token ids that `train --data` reads."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hetermoe_cli.cli.progress_bar import progress_bar
from hetermoe_cli.cli.run_options import Json


def tokenize(
    sources: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json of Hugging Face's.")],
    end_token: Annotated[str, typer.Option(help="Its token that ends a document, such as '<|endoftext|>'.")],
    output: Annotated[Path, typer.Option(help="File of ids to write (.npy).")],
    separator: Annotated[
        str | None, typer.Option(help="What stands between documents of one file; default: a file is one.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Turn text into token ids. Corpora beyond memory: Megatron-LM's preprocess_data.py, whose files `train` reads."""
    from hetermoe_cli.model.data.tokenizing import encode
    from hetermoe_cli.spec.files import check_writable

    if output.suffix != ".npy":
        raise typer.BadParameter(f"{output}: must end in .npy", param_hint="--output")
    check_writable(output)
    with progress_bar("documents") as progress:
        found = encode(sources, tokenizer, end_token, separator, progress)
    found.write(output)
    figures = {
        "output": str(output),
        "tokens": len(found.ids),
        "documents": found.documents,
        "vocab_size": found.vocab_size,
        "document_end": found.document_end,
    }
    if json_output:
        typer.echo(json.dumps(figures))
        return
    typer.echo(
        f"{output}: {len(found.ids):,} tokens of {found.documents:,} documents; the model needs a vocab_size of "
        f"{found.vocab_size} or more; document_end: {found.document_end} in the training spec tells documents apart"
    )
